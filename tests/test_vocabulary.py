"""Rewards on bases with other special and added tokens: models/vocabulary.py, and what uses it."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import EVAL_LM, FIXTURES, NEW, OLD, REWARD, TUNED_SOURCE, call, read
from helpers import error, random_ids

import prt
from data.tokenizer import Tokenizer
from models import decode, gpt, vocabulary, weights
from models.gpt import GPT
from models.pretrain import OLD as SIZES
from models.processor import RewardProcessor

QWEN2, LLAMA3 = ((FIXTURES / f"{name}_tokenizer/tokenizer.json").read_text() for name in ("qwen2", "llama3"))


def added(text, *tokens, rename=()):
    """Returns the text of a tokenizer.json with more added tokens, or other names for some."""
    d, rename = json.loads(text), dict(rename)
    for token in d["added_tokens"]:
        token["content"] = rename.get(token["content"], token["content"])
    first = max(token["id"] for token in d["added_tokens"]) + 1
    d["added_tokens"] += [dict(id=first + i, content=t, special=False) for i, t in enumerate(tokens)]
    return json.dumps(d)


# As Qwen3 has four tokens more than Qwen2.5, and SmolLM3 other names for some of Llama 3's.
QWEN3 = added(QWEN2, "<tool_response>", "</tool_response>", "<think>", "</think>")
SMOLLM3 = added(LLAMA3, rename={"<|eot_id|>": "<|im_end|>"})


def model(text, rows=None, seed=0, end=0):
    torch.manual_seed(seed)
    made = GPT(SIZES | dict(vocab=rows or Tokenizer(text, "x").size, end=end, layers=1)).eval()
    made.info = dict(tokenizer=text, method="prt", kind="gpt", beta=1.0)
    return made


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_ids_without_a_reward_keep_the_probability_of_the_base(beta):
    """Catches: They get r = 0, or a reward that depends on a constant that is added to r."""
    torch.manual_seed(0)
    base, r, ids = torch.randn(4, 9), 3 * torch.randn(4, 9), torch.tensor([2, 7])
    shared = [i for i in range(9) if i not in (2, 7)]
    p = base.softmax(-1)
    kept = vocabulary.keep(base, base + r / beta, ids).softmax(-1)
    assert error(kept[:, ids], p[:, ids]) < 1e-6
    odds = p[:, shared] * (r[:, shared] / beta).exp()  # of the shared ids, which keep their sum
    share = odds / odds.sum(-1, keepdim=True)
    assert error(kept[:, shared], share * p[:, shared].sum(-1, keepdim=True)) < 1e-6
    # Definition: r / beta is log E[exp(r / beta)] over the shared ids under the base.
    r[:, ids] = beta * (odds.sum(-1) / p[:, shared].sum(-1)).log()[:, None]
    assert error(prt.tilt(base, r, beta).exp(), kept) < 1e-6
    r[:, ids] = torch.nan  # what the reward says of them is not used
    assert error(vocabulary.keep(base, base + (r + 5) / beta, ids).softmax(-1), kept) < 1e-6


def test_where_all_shared_tokens_are_masked_the_base_decides():
    base = torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0]])
    assert torch.equal(vocabulary.keep(base, base + 3, torch.tensor([2, 3])), base)


@torch.no_grad()
@pytest.mark.parametrize("own, other, names", [
    (QWEN2, QWEN3, ["<tool_response>", "</tool_response>", "<think>", "</think>"]),
    (QWEN3, QWEN2, []), (LLAMA3, SMOLLM3, ["<|im_end|>"])])
def test_a_reward_speaks_of_the_tokens_that_are_the_same(capsys, own, other, names):
    """Catches: An id of another token carries a reward, or is too large for the reward's embedding."""
    base, reward = model(other, seed=1), model(own)
    tokenizer, before = Tokenizer(other, "x"), model(own)
    assert gpt.same_vocabulary(dict(base=base, reward=reward), "base").hash == tokenizer.hash
    printed, V = capsys.readouterr().out, tokenizer.size
    assert (f"reward: no reward for {len(names)} of the base's {V} tokens" in printed) == bool(names)
    assert all(name in printed for name in names)
    unshared = [i for i in range(V) if tokenizer.bytes[i].decode("utf-8", "replace") in names]
    assert base.keep.keywords["ids"].tolist() == unshared and len(unshared) == len(names)
    ids = torch.arange(V - 6, V)[None]
    known = ids.clone()
    known[torch.isin(ids, torch.tensor(unshared, dtype=torch.long))] = 0  # the reward's end token
    shared = [i for i in range(V) if i not in unshared]
    assert torch.equal(reward(ids)[..., shared], before(known)[..., shared])
    logits = {m: m(ids) for m in (base, reward)}
    log_probs = prt.combine(base, [(1.0, reward)], logits.get)
    kept, alone = log_probs[..., unshared], base(ids).log_softmax(-1)
    assert torch.allclose(kept, alone[..., unshared], atol=1e-5)
    assert torch.equal(prt.combine(base, [], logits.get), alone)
    source = reward(ids).softmax(-1)  # as a base, it gives them no probability
    assert not source[..., unshared].any() and prt.kl(reward(ids).log_softmax(-1), base(ids)).isfinite().all()


@pytest.mark.parametrize("own, other, base", [(QWEN2, LLAMA3, "base"), (QWEN2, QWEN3, None)])
def test_other_ordinary_tokens_are_refused_and_in_training_all_others(own, other, base):
    with pytest.raises(ValueError, match="reward.* must have the same"):
        gpt.same_vocabulary(dict(base=model(other), reward=model(own)), base)


def test_a_reward_with_only_the_hash_of_its_tokenizer_is_known_by_its_source():
    """Catches: A ticket or low-rank reward is refused on the next generation although its source is there."""
    base, source, reward = model(QWEN3), model(QWEN2), model(QWEN2)
    reward.info = dict(tokenizer=Tokenizer(QWEN2, "x").hash, lora={})
    gpt.same_vocabulary(dict(base=base, reward=reward, source=source), "base")
    assert torch.equal(reward.reads, source.reads) and len(base.keep.keywords["ids"]) == 4
    reward.reads = None
    with pytest.raises(ValueError, match="reward"):
        gpt.same_vocabulary(dict(base=base, reward=reward), "base")


@torch.no_grad()
def test_all_ways_to_decode_write_the_same_text(monkeypatch):
    """Catches: Speculation, compiled steps, or padding treat unshared ids in another way."""
    base, reward, source = model(QWEN3, seed=1), model(QWEN2), model(QWEN2, seed=2)
    gpt.same_vocabulary(dict(base=base, reward=reward, source=source), "base")
    base.lm_head.weight[-4:] *= 4  # so that unshared tokens are written
    ids, rewards, pad = random_ids(3, 6), [(1.5, reward)], torch.tensor([0, 2, 1])
    want = prt.generate(base, rewards, ids, length=24, pad=pad, end=[1, 2])
    assert (want >= base.size - 4).any()
    for drafter in None, (source, rewards):
        assert torch.equal(want, decode.speculative(base, rewards, ids, length=24, pad=pad, end=[1, 2],
                                                    drafter=drafter))
    step = torch.compile(decode.last_logits, backend="eager", fullgraph=True)  # traced, without a compiler
    monkeypatch.setattr(decode, "compiled_logits", lambda device_type: step)
    torch._dynamo.reset()
    assert torch.equal(want, decode.compiled(base, rewards, ids, length=24, pad=pad, end=[1, 2]))
    torch._dynamo.reset()
    processor = RewardProcessor(model(QWEN2), beta=1 / 1.5, tokenizer=SimpleNamespace(
        backend_tokenizer=SimpleNamespace(to_str=lambda: QWEN3)))
    same = RewardProcessor(again := model(QWEN2), tokenizer=SimpleNamespace(
        backend_tokenizer=SimpleNamespace(to_str=lambda: QWEN3)))
    assert again.reads is not None and same.unshared is not None
    same = RewardProcessor(again, tokenizer=SimpleNamespace(  # an earlier one leaves nothing behind
        backend_tokenizer=SimpleNamespace(to_str=lambda: QWEN2)))
    assert again.reads is None and same.unshared is None and again.size == again.arch["vocab"]
    text = ids[:1]
    for _ in range(24):
        text = torch.cat([text, processor(text, base(text)[:, -1]).argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, prt.generate(base, rewards, ids[:1], length=24))


@torch.no_grad()
def test_the_harness_scores_unshared_tokens_as_the_base_does():
    """Catches: A likelihood of lm_eval's is that of a model without its base's own tokens."""
    pytest.importorskip("lm_eval")
    from eval import Row
    from models import answers, harness
    base, reward = model(QWEN3, seed=1), model(QWEN2)
    tokenizer = gpt.same_vocabulary(dict(base=base, reward=reward), "base")
    context, said = tokenizer.encode("What is it?"), tokenizer.encode("<think>")
    assert said == [base.size - 2]

    def score(rewards):
        row = Row("", None, base, rewards, base)
        tilted = harness.TiltedModel(row, tokenizer, None, [0], 256, answers.Decoding())
        return [x for x, _ in tilted._loglikelihood_tokens([(None, context, said), (None, context, [5])])]

    alone, tilted = score([]), score([(1.0, reward)])
    assert tilted[0] == pytest.approx(alone[0], abs=1e-5) and abs(tilted[1] - alone[1]) > 0.01


@pytest.fixture
def newer(in_texts, tmp_path):
    """The path of the example's new base with two more tokens."""
    content = read(NEW)
    rows, d = content["arch"]["vocab"], json.loads(content["tokenizer"])
    d["added_tokens"] += [dict(id=rows + i, content=f"<|{i}|>", special=True) for i in range(2)]
    content["tokenizer"] = json.dumps(d)
    content["arch"]["vocab"] += 2
    for name in "embed_tokens.weight", "lm_head.weight":
        content["model"][name] = torch.cat([content["model"][name], content["model"][name][:2]])
    torch.save(content, tmp_path / "newer.pt")
    return tmp_path / "newer.pt"


def test_the_tables_on_a_base_with_more_tokens_are_almost_those_without_them(newer, table, capsys):
    """Catches: A row of the table, with EFT and the source, is computed with other ids."""
    flags = *EVAL_LM, "--limit", 6, "--tuned-source", TUNED_SOURCE
    before, after = table(*flags), table(*flags, "--base", newer)
    printed = capsys.readouterr().out
    assert re.search(f"{REWARD}: no reward for 2 of the base's .* tokens.*<.0.>, <.1.>", printed)
    for a, b in zip(before, after, strict=True):
        assert (a["method"], a["exact"]) == (b["method"], b["exact"])
        assert b["nll"] == pytest.approx(a["nll"], rel=0.02)  # the copies have some of the probability
    assert call(*EVAL_LM, "--base", newer, "--prompt", " 3 + 4 =", "--speculative") == 0


def test_where_the_end_of_the_reward_is_not_a_token_of_the_base_its_own_counts(in_texts, tmp_path, capsys):
    content = read(OLD)
    d = json.loads(content["tokenizer"])
    end = content["arch"]["end"]
    next(t for t in d["added_tokens"] if t["id"] == end)["content"] = "<|other|>"
    content["tokenizer"] = json.dumps(d)
    torch.save(content, tmp_path / "other.pt")
    assert call(*EVAL_LM, "--base", tmp_path / "other.pt", "--limit", 2) == 0
    assert weights.load(REWARD).arch["end"] == end
    assert "1 of the base's" in capsys.readouterr().out
