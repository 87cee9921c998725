"""eval.py --tasks with the real lm_eval, on tasks in local files (pip install lm_eval[hf]; or skipped)."""
import functools
import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import EVAL_LM, FIXTURES, NEW, OLD, REWARD, TUNE_LM, TUNED_SOURCE, call, jsonl, one_line

os.environ["HF_HUB_OFFLINE"] = "1"  # read when lm_eval imports huggingface_hub
pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance

import prt
from data.bpe import byte_alphabet
from eval import Row
from models import answers, decode, gpt, harness, weights

WORDS = ["Once", "upon", "a", "time", "there", "was", "a", "little", "girl", "named", "Lily.", "She", "liked",
         "to", "play", "with", "her", "mom", "and", "a", "dog."]
PAIRS = [(" ".join((WORDS * 20)[n:3 * n]), continuation)
         for n in (1, 3, 8, 20, 60, 150) for continuation in (" Lily", " and then", "s dog.")]
PAIRS += [("", "Once upon"), ("", " Once"), ("One day  ", " Lily"), ("One day ", "Lily"), ("One day\n", "x")]
SETTINGS = [dict(until=["."], max_gen_toks=30), dict(until=["\n", " a"], max_gen_toks=20, do_sample=False),
            dict(until="Lily", max_gen_toks=16, temperature=0.0), dict(max_gen_toks=24)]
REQUESTS = dict(loglikelihood=PAIRS, generate_until=[(x, y) for x, _ in PAIRS[:18:3] for y in SETTINGS],
                loglikelihood_rolling=[PAIRS[3][0], PAIRS[12][0], 5 * PAIRS[15][0], "One day, ", "x"])

ASK = EVAL_LM[:-2]  # without --new-tokens, which tasks say
QUESTIONS = [" Tom has 7 apples.", " Eva has 4 bags.", " Ben picks 3.", " 3 + 4 ="]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Without lm_eval's own 14,000 tasks, its report on the machine, and a cache in the home directory."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def tilted(base, rewards=(), **how):
    """Returns the model that eval.py --tasks makes of a row with these models."""
    tokenizer = gpt.same_vocabulary({str(i): x for i, x in enumerate((base, *(x for _, x in rewards)))})
    row, how = Row("", None, base, rewards, base), answers.Decoding(**dict(batch=3) | how)
    return harness.TiltedModel(row, tokenizer, None, [base.arch["end"]], base.arch["positions"], how)


def ask(model, kind, *arguments):
    """Returns a model's results for requests of one kind, from their arguments."""
    arguments = [x if isinstance(x, tuple) else (x,) for x in arguments]
    return getattr(model, kind)([Instance(kind, {}, x, 0) for x in arguments])


# Against lm_eval's own class for transformers

@pytest.fixture(scope="module", params=["stories260k", "gpt2"])
def pair(request, tmp_path_factory):
    """A TiltedModel, and as lm_eval runs it with transformers: texts have a first token, or none."""
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    folder = shutil.copytree(FIXTURES / request.param, tmp_path_factory.mktemp("hub") / request.param)
    special = dict(bos_token="<s>", eos_token="</s>")
    if request.param == "gpt2":  # has no tokenizer: 512 tokens, which are bytes, pairs of letters, and an end
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        special, letters = dict.fromkeys(special, "<|endoftext|>"), "etaoinshrdlucmfwygpbvk"
        merges = [(a, b) for a in "Ġ" + letters for b in letters][:255]
        vocab = {token: i for i, token in enumerate([*byte_alphabet(), *map("".join, merges)])}
        peer = Tokenizer(models.BPE(vocab, merges))
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        peer.decoder = decoders.ByteLevel()
        peer.add_special_tokens(["<|endoftext|>"])
        peer.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text()) | dict(eos_token_id=511, bos_token_id=511)
        (folder / "config.json").write_text(json.dumps(config))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **special)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return tilted(weights.load(folder)), reference


@pytest.mark.parametrize("kind", REQUESTS)
def test_results_are_those_of_lm_eval(pair, kind):
    """Catches: A context is split, begun, or truncated in another way, or a window counts a token twice.

    Or padding is attended to, a stop string stays, or results have the order of lengths or of settings.
    """
    ours, expected = (ask(model, kind, *REQUESTS[kind]) for model in pair)
    if kind == "generate_until":
        assert ours == expected and len({*ours}) > 3
    else:
        assert torch.allclose(torch.tensor(ours), torch.tensor(expected), atol=1e-4, rtol=1e-6)
    for options in (dict(), dict(add_special_tokens=True), dict(add_special_tokens=False)):
        assert pair[0].tok_encode("Once upon", **options) == pair[1].tok_encode("Once upon", **options)


# Tilted models

@pytest.fixture
def models(in_texts):
    """The new base and the reward of the run of `texts`."""
    return weights.load(NEW), weights.load(REWARD)


@torch.no_grad()
def test_log_likelihoods_are_sums_of_those_of_the_tilted_base(models):
    """Catches: The reward is left out or has another weight, or a greedy continuation is not marked."""
    base, reward = models
    model, prompt, length = tilted(base, [(2.5, reward)], new_tokens=3), [5, 7, 9, 11], 3
    best, = answers.generate(model.row, [prompt], model.how, [10**6], model.room)
    requests = [best, *([*best[:k], best[k] - 1, *best[k + 1:]] for k in range(length))]
    results = model._loglikelihood_tokens([(None, prompt, answer) for answer in requests])
    assert [greedy for _, greedy in results] == [True, False, False, False]
    for answer, (score, _) in zip(requests, results):
        ids = torch.tensor([prompt + answer])
        log_probs = prt.tilt(base(ids)[0], 2.5 * reward(ids)[0])[len(prompt) - 1:-1]
        assert score == pytest.approx(log_probs[range(length), answer].sum().item(), abs=1e-4)


def test_a_task_may_sample_and_ends_after_a_stop_string(models, monkeypatch):
    """Catches: The temperature of a task, do_sample: false, --seed, or --speculative is ignored.

    Or each answer is generated up to its greatest length, and most of it is thrown away.
    """
    def answers(settings, *contexts, **how):
        model = tilted(models[0], [(0.25, models[1])], **how)
        return ask(model, "generate_until", *((context, settings) for context in contexts or QUESTIONS))

    hot, cold = dict(do_sample=True, temperature=2.0, max_gen_toks=9), dict(max_gen_toks=9)
    assert answers(hot) == answers(hot) != answers(hot, seed=1)
    greedy = answers(cold)
    assert greedy == answers(hot | dict(do_sample=False)) == answers(hot | dict(top_p=1e-9)) != answers(hot)
    i, steps, features = max(range(4), key=lambda i: len(greedy[i])), [], type(models[0]).features
    stop = greedy[i][3:5]
    stopped = answers(cold | dict(until=["", stop]))
    assert stopped == [x.split(stop)[0] for x in greedy] and len({*greedy}) > 1
    assert stopped == answers(cold | dict(until=["", stop]), speculative=True)
    monkeypatch.setattr(type(models[0]), "features", lambda *args: steps.append(1) or features(*args))
    assert answers(dict(max_gen_toks=100, until=[stop]), QUESTIONS[i]) == [stopped[i]] and len(steps) < 40
    monkeypatch.setattr(decode, "speculative", None)
    with pytest.raises(TypeError):
        answers(cold, speculative=True)


# Tasks from files to tables

CHOICE = dict(output_type="multiple_choice", doc_to_target="{{label}}", doc_to_choice="{{choices}}",
              metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)])
GREEDY = dict(until=["apples", " are"], do_sample=False, max_gen_toks=6)
ANSWER = dict(output_type="generate_until", doc_to_target="{{answer}}", generation_kwargs=GREEDY,
              metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
              filter_list=[dict(name="strip", filter=[dict(function="take_first")])])
PERPLEXITY = dict(
    output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
    metric_list=[dict(metric="word_perplexity", aggregation="weighted_perplexity", higher_is_better=False),
                 dict(metric="bits_per_byte", aggregation="bits_per_byte", higher_is_better=False)])


def write_task(folder, name, settings, rows):
    """Writes a task and its data; returns the path of its .yaml file, of which JSON is a part."""
    (folder / f"{name}.jsonl").write_text(jsonl(rows))
    task = dict(task=name, test_split="test", metadata=dict(version=1), dataset_path="json",
                dataset_kwargs=dict(data_files=dict(test=str(folder / f"{name}.jsonl"))),
                doc_to_text="{{question}}") | settings
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder / f"{name}.yaml"


@pytest.fixture
def tasks(models, tmp_path):
    """Paths of a task of each kind. The base is right in every second question."""
    model = tilted(models[0])
    choices = [" How many?", " 7"]
    written = ask(model, "generate_until", *((x, GREEDY) for x in QUESTIONS))
    scores = ask(model, "loglikelihood", *((x, choice) for x in QUESTIONS for choice in choices))
    docs = [dict(question=x, choices=choices, label=int((b > a) == i % 2), answer=answer if i % 2 else "no")
            for i, (x, answer, a, b) in enumerate(zip(QUESTIONS, written, scores[::2], scores[1::2]))]
    texts = [dict(text=" 3 + 4 = 7"), dict(text=" Eva has 4 bags.")]
    return [write_task(tmp_path, *task) for task in (
        ("choice", CHOICE, docs), ("answer", ANSWER, docs), ("perplexity", PERPLEXITY, texts))]


def bits_per_byte(model, *texts):
    """Returns minus the sum of the texts' log-likelihoods, in bits, per byte."""
    total = sum(ask(model, "loglikelihood_rolling", *texts))
    return pytest.approx(-total / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_the_tables_have_a_row_for_each_way_to_use_the_models(models, tasks, report, capsys):
    """Catches: A row is scored with another row's models, or a score stands in another's column."""
    about = report(*ASK, "--tasks", *tasks, "--tuned-source", TUNED_SOURCE, "--beta", 1, 0.5)
    (base, reward), old, tuned = models, weights.load(OLD), weights.load(TUNED_SOURCE)
    rows = {(row["method"], row["beta"]): row["tasks"] for row in about["rows"]}
    expected = {("base alone", None): (base, []), ("base + reward (PRT)", 1): (base, [(1.0, reward)]),
                ("base + reward (PRT)", 0.5): (base, [(2.0, reward)]), ("source alone", None): (old, []),
                ("source + reward", 1): (old, [(1.0, reward)]), ("source fine-tuned", None): (tuned, []),
                ("base + EFT", 1): (base, [(1.0, tuned), (-1.0, old)]),
                ("base + EFT", 0.5): (base, [(2.0, tuned), (-2.0, old)])}
    bits = {key: row["perplexity"]["bits_per_byte,none"] for key, row in rows.items()}
    assert bits == {key: bits_per_byte(tilted(*x), " 3 + 4 = 7", " Eva has 4 bags.")
                    for key, x in expected.items()}
    assert len({*bits.values()}) == len(rows)
    assert rows["base alone", None]["answer"]["exact_match,strip"] == 0.5
    assert rows["base alone", None]["choice"]["acc,none"] == 0.5
    assert about["lm_eval"] == lm_eval.__version__ and about["examples"] == "all"
    *lines, last = capsys.readouterr().out.splitlines()
    assert [re.split("  +", line) for line in lines if " beta " in line] == [
        ["choice", "beta", "acc,none", "acc_stderr,none"],
        ["answer", "beta", "exact_match,strip", "exact_match_stderr,strip"],
        ["perplexity", "beta", "word_perplexity,none", "bits_per_byte,none"]]
    scores = rows["base + EFT", 0.5]["perplexity"].values()
    assert re.split("  +", last) == ["base + EFT", "0.5", *(f"{x:.4f}" for x in scores)]


def test_limit_is_the_number_of_examples_of_each_task(models, tasks, report):
    row = report(*ASK, "--tasks", *tasks, "--limit", 1)["rows"][0]["tasks"]
    assert row["answer"]["exact_match,strip"] == 0  # the first question's answer is another one
    assert row["perplexity"]["bits_per_byte,none"] == bits_per_byte(tilted(models[0]), " 3 + 4 = 7")


@pytest.mark.parametrize("chat", [False, True])
def test_the_template_is_that_of_the_reward_if_it_is_asked_for(in_texts, tmp_path, report, monkeypatch, chat):
    """Catches: A template is applied without the flag, another one than in training, or only in some rows."""
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "talk.pt") == 0
    task = ANSWER | dict(num_fewshot=1, fewshot_config=dict(sampler="first_n", split="test"),
                         description="Be brief.\n\n", gen_prefix="Well,")
    docs = [dict(question="A?", answer="a"), dict(question="B {}?", answer="b")]
    seen, tok_encode = [], harness.TiltedModel.tok_encode
    monkeypatch.setattr(harness.TiltedModel, "tok_encode", lambda self, text, *args, **options: seen.append(
        text) or tok_encode(self, text, *args, **options))
    report(*ASK, "--reward", tmp_path / "talk.pt", "--tasks", write_task(tmp_path, "answer", task, docs),
           *["--chat-template"] * chat)
    prompt = "Be brief.\n\nA? Well, a\n\nB {}?"
    expected = f"<|user|>\n{prompt}\n<|assistant|>\nWell," if chat else f"{prompt} Well,"
    assert len(seen) == 8 and seen[1::2] == [expected] * 4


def test_a_chat_template_gets_the_messages_of_lm_eval(models):
    """Catches: The system message is joined with the question, or a begun answer is a turn of its own."""
    model = tilted(models[0])
    model.chat = dict(tokens={}, date="2026-01-01", end="x", template=(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"))
    history = [dict(role="system", content="S"), dict(role="user", content="U")]
    assert model.apply_chat_template(history) == "[system]S[user]U[assistant]"
    begun = [*history, dict(role="assistant", content="Well,")]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "[system]S[user]U[assistant]Well,"


@pytest.mark.parametrize("task, settings, words", [
    ("gsm9k", None, ["gsm9k", "lm_eval ls tasks"]),
    ("broken", dict(output_type="no such type"), ["cannot be loaded"]),
    ("beams", ANSWER | dict(generation_kwargs=dict(until=["."], num_beams=4)), ["num_beams"]),
    ("long", ANSWER | dict(generation_kwargs=dict(max_gen_toks=300)), ["300 tokens", "256 positions"]),
    ("long choice", CHOICE, ["--tasks", "256 positions"])])
def test_a_bad_task_is_refused_in_one_line(in_texts, tmp_path, capfd, task, settings, words):
    """Catches: A traceback, or settings of a task that are ignored."""
    if settings:
        docs = [dict(question=" Tom has", answer="7", choices=[" 7", " 8" * 300], label=0)]
        task = write_task(tmp_path, "x", settings, docs)
    code = call(*ASK, "--tasks", task)
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    one_line(code, "\n".join(err), *words)
