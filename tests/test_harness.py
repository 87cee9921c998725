"""eval.py --tasks with the real lm_eval, on tasks in local files (pip install lm_eval[hf]; or skipped)."""
import argparse
import functools
import json
import math
import os
import random
import re
import shutil

import pytest
import torch
from conftest import EVAL_LM, FIXTURES, NEW, OLD, REWARD, TUNE_LM, TUNED, call, jsonl, one_line

os.environ["HF_HUB_OFFLINE"] = "1"  # read when lm_eval imports huggingface_hub
pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance

import eval as eval_script
import prt
from data import text
from models import decode, harness, runs, weights
from models.tokenizer import byte_alphabet

RANDOM = random.Random(0)
WORDS = ["Once", "upon", "a", "time", "there", "was", "a", "little", "girl", "named", "Lily.", "She", "liked",
         "to", "play", "with", "her", "mom", "and", "a", "dog."]
PAIRS = [(" ".join(RANDOM.choice(WORDS) for _ in range(n)), continuation)
         for n in (1, 3, 8, 20, 60, 300) for continuation in (" Lily", " and then", "s dog.")]
PAIRS += [("", "Once upon"), ("", " Once"), ("One day  ", " Lily"), ("One day ", "Lily"), ("One day\n", "x")]
TEXTS = [PAIRS[3][0], PAIRS[12][0], 5 * PAIRS[15][0], "One day, ", "x"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Without lm_eval's own 14,000 tasks, its report on the machine, and a cache in the home directory."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def words_tokenizer():
    """Returns a tokenizer.json of 512 tokens: the bytes, pairs of letters, and an end token."""
    vocab, letters = {c: i for i, c in enumerate(byte_alphabet())}, "etaoinshrdlucmfwygpbvk"
    merges = [(a, b) for a in "Ġ" + letters for b in letters][:255]
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)} | {"<|endoftext|>": 511}
    added = dict(id=511, content="<|endoftext|>", single_word=False, lstrip=False, rstrip=False,
                 normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return dict(version="1.0", added_tokens=[added], pre_tokenizer=byte_level, decoder=byte_level,
                model=dict(type="BPE", vocab=vocab, merges=merges))


def model_folder(name, path):
    """Returns a copy of a fixture with a tokenizer of as many tokens as its output matrix has rows."""
    folder, special = shutil.copytree(FIXTURES / name, path / name), dict(bos_token="<s>", eos_token="</s>")
    if name != "stories260k":
        (folder / "tokenizer.json").write_text(json.dumps(words_tokenizer()))
        config = json.loads((folder / "config.json").read_text()) | dict(eos_token_id=511, bos_token_id=511)
        (folder / "config.json").write_text(json.dumps(config))
        special = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **special)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def mixture(base, rewards=(), batch=3, **flags):
    """Returns the Mixture that eval.py --tasks makes of a row with these models."""
    args = argparse.Namespace(**dict(batch=batch, seed=0, speculative=False, compile=False) | flags)
    row = eval_script.Row("", None, base, base, rewards)
    models = base, *(reward for _, reward in rewards)
    tokenizer = weights.same_vocabulary({str(i): model for i, model in enumerate(models)})
    return harness.Mixture(tokenizer, None, base.arch["end"], base.arch["positions"],
                           functools.partial(runs.score_examples, base, rewards, batch=batch),
                           functools.partial(eval_script.generate_answers, args, torch.device("cpu"), row))


def ask(model, kind, *arguments):
    """Returns a model's results for requests of one kind, from their arguments."""
    arguments = [x if isinstance(x, tuple) else (x,) for x in arguments]
    return getattr(model, kind)([Instance(kind, {}, x, 0) for x in arguments])


# Against lm_eval's own class for transformers

@pytest.fixture(scope="module", params=["stories260k", "gpt2", "qwen2", "llama3", "falcon3"])
def pair(request, tmp_path_factory):
    """A model as a Mixture, and as lm_eval runs it with transformers."""
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    folder = model_folder(request.param, tmp_path_factory.mktemp("hub"))
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return mixture(weights.load(folder)), reference


def test_log_likelihoods_are_those_of_lm_eval(pair):
    """Catches: A context is split, begun, or truncated in another way, or an empty one has no first token."""
    (scores, greedy), (expected, truth) = (zip(*ask(model, "loglikelihood", *PAIRS)) for model in pair)
    print(f"\nlargest difference {(torch.tensor(scores) - torch.tensor(expected)).abs().max():.1e}")
    assert scores == pytest.approx(expected, abs=1e-4)
    assert greedy == truth


def test_log_likelihoods_of_whole_texts_are_those_of_lm_eval(pair):
    """Catches: A window counts a token twice, or has less context, or the first token is not predicted."""
    ours, expected = (ask(model, "loglikelihood_rolling", *TEXTS) for model in pair)
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("settings", [
    dict(until=["."], max_gen_toks=30), dict(until=["\n", " a"], max_gen_toks=20, do_sample=False),
    dict(until="Lily", max_gen_toks=16, temperature=0.0), dict(max_gen_toks=24)], ids=str)
def test_continuations_are_those_of_lm_eval(pair, settings):
    """Catches: A stop string is kept, a prompt is truncated on the right, or the text begins with a space."""
    requests = [(context, settings) for context, _ in PAIRS[:18:3]]
    ours, expected = (ask(model, "generate_until", *requests) for model in pair)
    assert ours == expected


def test_special_tokens_begin_a_text_unless_lm_eval_asks_for_none(pair):
    model, reference = pair
    for options in (dict(), dict(add_special_tokens=True), dict(add_special_tokens=False)):
        assert model.tok_encode("Once upon", **options) == reference.tok_encode("Once upon", **options)


# Mixtures

@pytest.fixture
def models(in_texts):
    """The new base and the reward of the run of `texts`, and their tokenizer."""
    return weights.load(NEW), weights.load(REWARD)


@torch.no_grad()
def log_probs(base, rewards, ids):
    """Returns the mixture's log-probabilities after each of some ids, [T, V]."""
    return prt.mixture(base, rewards, lambda policy: policy(torch.tensor([ids]))[0])


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_log_likelihoods_are_sums_of_those_of_the_mixture(models, weight):
    """Catches: The reward is left out or has another weight, or scores return in the order of lengths."""
    base, reward = models
    requests = [(" Tom has 7 apples.", " How many?"), ("", " 3 + 4 = 7"), (" 3 + 4 =", " 7"),
                (" Eva has 4 bags of 12 eggs each.", " 48 #### 48")]
    rewards = [(weight, reward)] if weight else []
    model = mixture(base, rewards)
    expected = []
    for context, continuation in requests:
        ids = model.tok_encode(context) if context else [model.eot_token_id]
        whole = ids + model.tok_encode(continuation)
        scores = log_probs(base, rewards, whole[:-1])[len(ids) - 1:]
        y = torch.tensor(whole[len(ids):])
        expected.append((scores.gather(-1, y[:, None]).sum().item(), bool((scores.argmax(-1) == y).all())))
    ours = ask(model, "loglikelihood", *requests)
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert [x for _, x in ours] == [x for _, x in expected]
    data = text.Tokens([torch.tensor(whole)], [torch.arange(len(whole)) >= len(ids)])
    mean = runs.score_texts(base, rewards, [text.collate(data, torch.tensor([0]))])["nll"]
    assert ours[-1][0] == pytest.approx(-mean * len(y), abs=1e-4)


def test_the_greedy_continuation_is_marked(models):
    model, context = mixture(models[0]), " Tom has 7 apples."
    prompt = model.tok_encode(context)
    ids, = model.generate([prompt], model.eot_token_id, model.room, new_tokens=3, temperature=0.0, top_p=1.0)
    others = [[*ids[:k], ids[k] - 1, *ids[k + 1:]] for k in range(3)]
    (best, is_greedy), *rest = model._loglikelihood_tokens([(None, prompt, x) for x in (ids, *others)])
    assert is_greedy and not any(greedy for _, greedy in rest)


def test_batches_give_the_same_as_requests_one_by_one(models):
    """Catches: Padding is attended to, or results return in the order of lengths, or of settings."""
    base, reward = models
    one, many = (mixture(base, [(1.0, reward)], batch=batch) for batch in (1, 5))
    for kind, requests in dict(loglikelihood=PAIRS, loglikelihood_rolling=TEXTS).items():
        a, b = (torch.tensor(ask(model, kind, *requests)) for model in (one, many))
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-6)
    settings = [dict(until=[" a"], max_gen_toks=5), dict(max_gen_toks=9)]  # in turn
    requests = [(context, settings[i % 2]) for i, (context, _) in enumerate(PAIRS)]
    answers = [ask(one, "generate_until", request)[0] for request in requests]
    assert len({*answers}) > 3 and ask(many, "generate_until", *requests) == answers


def test_a_long_context_is_truncated_on_the_left(models):
    """Catches: The end of the context is dropped, or room for one token less or more is left."""
    base, _ = models
    model, room = mixture(base), base.arch["positions"]
    context, answer = [5 + i % 300 for i in range(2 * room)], [7, 8, 9]
    (score, _), = model._loglikelihood_tokens([(None, context, answer)])
    expected = log_probs(base, [], (context + answer)[-room - 1:-1])[-3:].gather(
        -1, torch.tensor(answer)[:, None]).sum().item()
    assert score == pytest.approx(expected, abs=1e-4)
    continuation, = ask(model, "generate_until", (model.tokenizer.decode(context), dict(max_gen_toks=10)))
    prompt = model.tok_encode(model.tokenizer.decode(context))[-(room - 10):]
    ids = prt.generate(base, [], torch.tensor([prompt]), length=10)[0, len(prompt):].tolist()
    ids = ids[:ids.index(model.eot_token_id)] if model.eot_token_id in ids else ids
    assert continuation == model.tokenizer.decode(ids)


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_ends_after_a_stop_string(models, monkeypatch, speculative):
    """Catches: Each answer is generated up to its greatest length, and most of it is thrown away."""
    base, reward = models
    model, steps = mixture(base, [(1.0, reward)] if speculative else [], speculative=speculative), []
    whole, = ask(model, "generate_until", (" Tom has", dict(max_gen_toks=100)))
    features = type(base).features
    monkeypatch.setattr(type(base), "features", lambda *args: steps.append(1) or features(*args))
    until = whole[3:5]
    answer, = ask(model, "generate_until", (" Tom has", dict(max_gen_toks=100, until=["", until])))
    assert answer == whole.split(until)[0]
    assert speculative or len(steps) < 20


def test_a_task_may_sample(models):
    """Catches: The temperature of a task or --seed is ignored, or do_sample: false is."""
    hot, requests = dict(do_sample=True, temperature=2.0, max_gen_toks=9), [" Tom has", " Eva has 4 bags"]

    def answers(settings, **flags):
        return ask(mixture(*models[:1], **flags), "generate_until", *((x, settings) for x in requests))

    assert answers(hot) == answers(hot) != answers(hot, seed=1)
    greedy = answers(dict(max_gen_toks=9))
    assert greedy == answers(hot | dict(do_sample=False)) == answers(hot | dict(top_p=1e-9)) != answers(hot)


def test_speculative_decoding_gives_the_same_continuations(models, monkeypatch):
    """Catches: --speculative has no effect on tasks, or changes their answers."""
    base, reward = models
    requests, calls = [(context, dict(until=[" a"], max_gen_toks=12)) for context, _ in PAIRS], []
    plain = ask(mixture(base, [(1.0, reward)]), "generate_until", *requests)
    assert len({*plain}) > 3
    speculative = decode.speculative
    monkeypatch.setattr(decode, "speculative", lambda *args, **options: calls.append(1) or speculative(
        *args, **options))
    assert ask(mixture(base, [(1.0, reward)], speculative=True), "generate_until", *requests) == plain
    assert calls


# Tasks from files to tables

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANSWER = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["apples", " are"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: strip, filter: [{function: take_first}]}]
"""
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def write_task(folder, name, yaml, rows):
    """Writes a task and its data; returns the path of its .yaml file."""
    (folder / f"{name}.jsonl").write_text(jsonl(rows))
    (folder / f"{name}.yaml").write_text(f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}
test_split: test
metadata: {{version: 1}}
{yaml}""")
    return folder / f"{name}.yaml"


@pytest.fixture
def tasks(models, tmp_path):
    """Paths of a task of each kind. The base answers every second question with the expected text."""
    base, _ = models
    questions = [" Tom has 7 apples.", " Eva has 4 bags.", " Ben picks 3 stones and then 5 more.", " 3 + 4 ="]
    settings = dict(until=["apples", " are"], max_gen_toks=6)
    answers = ask(mixture(base), "generate_until", *((question, settings) for question in questions))
    choices = [[" How many?", " 7", " Now it is 9 in all."], [" 48", " How"], [" 8", " How many? 3 + 5 = 8"]]
    data = dict(choice=[dict(question=question, choices=options, label=i % 2)
                        for i, (question, options) in enumerate(zip(questions, choices))],
                answer=[dict(question=question, answer=answer if i % 2 else "no")
                        for i, (question, answer) in enumerate(zip(questions, answers))],
                perplexity=[dict(text=" 3 + 4 = 7"), dict(text=" Eva has 4 bags.")])
    yaml = dict(choice=CHOICE, answer=ANSWER, perplexity=PERPLEXITY)
    return [write_task(tmp_path, name, yaml[name], rows) for name, rows in data.items()]


def bits_per_byte(model, *texts):
    """Returns minus the sum of the texts' log-likelihoods, in bits, per byte."""
    total = sum(ask(model, "loglikelihood_rolling", *texts))
    return pytest.approx(-total / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_the_tables_have_a_row_for_each_way_to_use_the_models(models, tasks, report, capsys):
    """Catches: A row is scored with another row's models, or a score stands in another's column."""
    about = report(*EVAL_LM, "--tasks", *tasks, "--tuned", TUNED, "--beta", 1, 0.5)
    printed, (base, reward) = capsys.readouterr().out, models
    old, tuned = weights.load(OLD), weights.load(TUNED)
    rows = {(row["method"], row["beta"]): row["tasks"] for row in about["rows"]}
    expected = {("base alone", None): (base, []), ("base + reward (PRT)", 1): (base, [(1.0, reward)]),
                ("base + reward (PRT)", 0.5): (base, [(2.0, reward)]), ("source alone", None): (old, []),
                ("source + reward", 1): (old, [(1.0, reward)]), ("source fine-tuned", None): (tuned, []),
                ("base + EFT", 1): (base, [(1.0, tuned), (-1.0, old)]),
                ("base + EFT", 0.5): (base, [(2.0, tuned), (-2.0, old)])}
    assert rows.keys() == expected.keys()
    for key, (row_base, rewards) in expected.items():
        expected_bits = bits_per_byte(mixture(row_base, rewards), " 3 + 4 = 7", " Eva has 4 bags.")
        assert rows[key]["perplexity"]["bits_per_byte,none"] == expected_bits
    assert len({row["perplexity"]["bits_per_byte,none"] for row in rows.values()}) == len(rows)
    assert rows["base alone", None]["answer"]["exact_match,strip"] == 0.5
    docs = [json.loads(line) for line in tasks[0].with_suffix(".jsonl").read_text().splitlines()]
    right = 0
    for doc in docs:
        pairs = [(doc["question"], choice) for choice in doc["choices"]]
        scores = torch.tensor([score for score, _ in ask(mixture(base), "loglikelihood", *pairs)])
        right += scores.argmax().item() == doc["label"]
    assert rows["base alone", None]["choice"]["acc,none"] == pytest.approx(right / 3)
    assert about["lm_eval"] == lm_eval.__version__ and about["examples"] == "all"
    *lines, last = printed.splitlines()
    headers = [re.split("  +", line) for line in lines if " beta " in line]
    assert headers == [["choice", "beta", "acc", "std. err.", "acc_norm", "std. err."],
                       ["answer", "beta", "exact_match,strip", "std. err."],
                       ["perplexity", "beta", "word_perplexity", "bits_per_byte"]]
    scores = rows["base + EFT", 0.5]["perplexity"]
    assert re.split("  +", last) == ["base + EFT", "0.5", *(f"{x:.4f}" for x in scores.values())]


def test_limit_is_the_number_of_examples_of_each_task(models, tasks, report):
    row = report(*EVAL_LM, "--tasks", *tasks, "--limit", 1)["rows"][0]["tasks"]
    assert row["answer"]["exact_match,strip"] == 0  # the first question's answer is another one
    assert row["perplexity"]["bits_per_byte,none"] == bits_per_byte(mixture(models[0]), " 3 + 4 = 7")


@pytest.mark.parametrize("chat", [False, True])
def test_the_template_is_that_of_the_reward_if_it_is_asked_for(in_texts, tmp_path, report, monkeypatch, chat):
    """Catches: A template is applied without the flag, another one than in training, or only in some rows."""
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "talk.pt") == 0
    yaml = ANSWER + """num_fewshot: 1
fewshot_config: {sampler: first_n, split: test}
description: "Be brief.\\n\\n"
gen_prefix: "Well,"
"""
    docs = [dict(question="A?", answer="a"), dict(question="B {}?", answer="b")]
    seen, tok_encode = [], harness.Mixture.tok_encode
    monkeypatch.setattr(harness.Mixture, "tok_encode", lambda self, text, *args, **options: seen.append(
        text) or tok_encode(self, text, *args, **options))
    report(*EVAL_LM, "--reward", tmp_path / "talk.pt", "--tasks", write_task(tmp_path, "answer", yaml, docs),
           *["--apply-chat-template"] * chat)
    prompt = "Be brief.\n\nA? Well, a\n\nB {}?"
    expected = f"<|user|>\n{prompt}\n<|assistant|>\nWell," if chat else f"{prompt} Well,"
    assert len(seen) == 8 and seen[1::2] == [expected] * 4


BAD = {"gsm9k": ("--tasks", "gsm9k", "lm_eval ls tasks"),
       "{}/none.yaml": ("--tasks", "none.yaml"),
       "{}/broken.yaml": ("--tasks: cannot be loaded",),
       "{}/beams.yaml": ("--tasks", "num_beams"),
       "{}/long.yaml": ("300 tokens", "256 positions"),
       "{}/long_choice.yaml": ("--tasks", "256 positions")}


@pytest.mark.parametrize("task", BAD)
def test_a_bad_task_is_refused_in_one_line(in_texts, tmp_path, capfd, task):
    """Catches: A traceback, or settings of a task that are ignored."""
    questions = [dict(question=" Tom has", answer="7", choices=[" 7", " 8" * 300], label=0)]
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: [")
    write_task(tmp_path, "beams", ANSWER.replace("do_sample: false", "num_beams: 4"), questions)
    write_task(tmp_path, "long", ANSWER.replace("max_gen_toks: 6", "max_gen_toks: 300"), questions)
    write_task(tmp_path, "long_choice", CHOICE, questions)
    code = call(*EVAL_LM, "--tasks", task.format(tmp_path))
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    one_line(code, "\n".join(err), *BAD[task])
