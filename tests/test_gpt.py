"""GPTs (models/gpt.py): parity with transformers, the KV cache, precision, gradients, initialization."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from helpers import error, expected, load, random_ids

import prt
from models import decode
from models.gpt import GPT, Attention, attention_mask, rotate

NAMES = ["gpt2", "gpt2_hub", "llama2", "llama3", "falcon3", "qwen2"]


@torch.no_grad()
def logits_without_padding(model, ids, pad):
    """Returns the logits [B, T, V] of left-padded rows, one row at a time, and no cache; nan at padding."""
    logits = torch.full((*ids.shape, model.size), math.nan)
    for row, n in enumerate(pad.tolist()):
        logits[row, n:] = model(ids[row:row + 1, n:])[0]
    return logits


def assert_near(logits, want):
    """Padding included, all logits must be finite; those that are not nan in `want` must be the same."""
    text = ~want.isnan()
    assert logits.isfinite().all()
    assert error(logits[text], want[text]) < 1e-4


# Parity

@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """Catches: A wrong norm, rotation, head grouping, bias, or matrix moves the logits."""
    io = expected(name)
    with torch.no_grad():
        assert error(load(name)(io["ids"]), io["logits"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_transformers(name):
    """Catches: The model continues its prompt with other tokens than transformers does.

    transformers took the id 0 in the second prompt for padding (pad_token_id=0): no token attended to it, and
    positions were counted without it. That is the prompt without its 0, and one position of padding on the
    left.
    """
    io = expected(name)
    prompt = io["prompt"].clone()
    assert prompt[1, 3] == 0
    prompt[1] = torch.cat([prompt[1, 3:4], prompt[1, :3], prompt[1, 4:]])
    out = prt.generate(load(name), [], prompt, length=24, pad=torch.tensor([0, 1]))
    assert torch.equal(out[:, :8], prompt)
    assert torch.equal(out[:, 8:], io["greedy"][:, 8:])


def test_trained_model_tells_its_story_for_200_tokens():
    """Catches: A rotation or a cache drifts with the position, so that another story is told."""
    io = json.loads((FIXTURES / "stories260k" / "expected.json").read_text())
    assert len(io["greedy"]) >= 200
    prompt = torch.tensor([io["prompt"]])
    out = prt.generate(load("stories260k"), [], prompt, length=len(io["greedy"]) - len(io["prompt"]))
    assert out[0].tolist() == io["greedy"]


def test_forward_with_an_index_returns_features_for_the_head():
    """Catches: Training computes its loss from the features of other positions."""
    model, ids, index = load("qwen2"), random_ids(2, 7), torch.tensor([0, 5, 6, 13])
    with torch.no_grad():
        features = model(ids, index)
        logits = model(ids).flatten(0, 1)[index]
    assert features.shape == (4, model.arch["width"])
    assert error(model.head(features), logits) < 1e-4


# The cache

@pytest.fixture(params=[None, [0, 3, 5]], ids=["no padding", "padding"])
def pad(request):
    return None if request.param is None else torch.tensor(request.param)


@pytest.fixture(params=["gpt2", "llama3", "qwen2"])
def case(request, pad):
    """A model, ids [3, 20], their padding [3] or None, and their logits without a cache or padding."""
    model, ids = load(request.param), random_ids(3, 20)
    lengths = torch.zeros(3, dtype=torch.long) if pad is None else pad
    return SimpleNamespace(model=model, ids=ids, pad=pad, logits=logits_without_padding(model, ids, lengths))


@torch.no_grad()
def test_cache_takes_text_in_one_piece(case):
    """Catches: Padding is attended to, or counted as a position."""
    assert_near(case.model(case.ids, cache=case.model.cache(3, 20, case.pad)), case.logits)


@torch.no_grad()
def test_cache_takes_text_in_parts(case):
    """Catches: Tokens attend to wrong positions, or positions start anew with each part."""
    cache = case.model.cache(3, 20, case.pad)
    logits = [case.model(part, cache=cache) for part in case.ids.split([7, 1, 1, 4, 1, 6], 1)]
    assert cache.at == 20
    assert_near(torch.cat(logits, 1), case.logits)


@torch.no_grad()
@pytest.mark.parametrize("at, tokens", [(9, 3), (9, 1), (1, 8)])
def test_cache_forgets_what_comes_after_a_smaller_at(case, at, tokens):
    """Catches: Dropped tokens are still attended to after others took their positions."""
    cache = case.model.cache(3, 20, case.pad)
    case.model(case.ids, cache=cache)
    cache.at = at
    case.model(random_ids(3, tokens, seed=1), cache=cache)
    cache.at = at
    assert_near(case.model(case.ids[:, at:], cache=cache), case.logits[:, at:])


@torch.no_grad()
def test_position_as_a_tensor_has_the_same_result(case):
    """Catches: The graph of a compiled step, which attends to the whole cache, sees other tokens."""
    cache, T = case.model.cache(3, 24, case.pad), 0
    for x in itertools.chain.from_iterable(cache.kv):
        x.zero_()
    logits = []
    for part in case.ids.split([7, 1, 1, 4, 1, 6], 1):
        logits.append(case.model.head(case.model.features(part, cache, torch.tensor([T]))))
        T += part.shape[1]
    assert cache.at == 0  # is left to the caller
    assert_near(torch.cat(logits, 1), case.logits)


@torch.no_grad()
def test_padding_may_be_longer_than_the_first_part():
    """Catches: A row of padding has no key to attend to, and its nan spreads through the cache."""
    model, ids, pad = load("llama2"), random_ids(2, 9), torch.tensor([0, 6])
    cache = model.cache(2, 9, pad)
    logits = [model(part, cache=cache) for part in ids.split([2, 1, 2, 4], 1)]
    assert_near(torch.cat(logits, 1), logits_without_padding(model, ids, pad))


def test_attention_mask_is_causal():
    mask = attention_mask(torch.tensor([1, 2]), 4, None)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_attention_mask_hides_padding_except_from_itself():
    mask = attention_mask(torch.tensor([1, 2]), 4, torch.tensor([0, 1, 2]))
    assert mask.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 1, 0]]],
                                   [[[0, 1, 0, 0], [0, 1, 1, 0]]],
                                   [[[0, 1, 0, 0], [0, 0, 1, 0]]]]


# Heads that share keys and values

ARCH = dict(vocab=512, width=48, layers=2, heads=6, head_width=8, mlp=96, positions=64, eps=1e-5, end=0,
            tied=True, rope=dict(theta=1e4), layer_norm=False, gated_mlp=True, qkv_bias=True, bias=False)


@pytest.fixture(params=[2, 1, 6], ids=["groups of 3", "one group of 6", "no groups"])
def grouped(request):
    torch.manual_seed(0)
    return GPT(ARCH | dict(kv_heads=request.param)).eval()


def each_head_alone(pad):
    """Returns an Attention.forward with a copy of the keys and values for each head, and a call for each."""
    def forward(self, x, context, kv):
        T, copies = x.shape[1], self.heads // self.kv_heads
        q, k, v = (proj(x).unflatten(-1, (n, -1)).transpose(1, 2) for proj, n in (
            (self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads)))
        kv[0][:, :, context.slots], kv[1][:, :, context.slots] = rotate(k, *context.rope), v
        q, keys = rotate(q, *context.rope), context.keys
        k, v = (cached[:, :, :keys].repeat_interleave(copies, 1) for cached in kv)
        mask = attention_mask(torch.arange(keys - T, keys), keys, pad)
        y = [F.scaled_dot_product_attention(q[:, [h]], k[:, [h]], v[:, [h]], attn_mask=mask)
             for h in range(self.heads)]
        return self.o_proj(torch.cat(y, 1).transpose(1, 2).flatten(2))
    return forward


@torch.no_grad()
def test_heads_that_share_keys_attend_as_with_copies_of_them(grouped, pad, monkeypatch):
    """Catches: The queries of two groups are mixed up, or meet the mask of another token."""
    def in_parts():
        cache = grouped.cache(3, 20, pad)
        return torch.cat([grouped(part, cache=cache) for part in random_ids(3, 20).split([7, 5, 1, 7], 1)], 1)

    logits = in_parts()
    monkeypatch.setattr(Attention, "forward", each_head_alone(pad))
    assert error(logits, in_parts()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("start, T", [(0, 4), (0, 1), (7, 4), (7, 1)])
def test_heads_that_share_keys_become_queries_of_one_head(grouped, pad, monkeypatch, start, T, compiled):
    """Catches: Under a mask torch copies the keys and values, since no fused kernel has enable_gqa, too."""
    attend, calls, kv = F.scaled_dot_product_attention, [], grouped.arch["kv_heads"]

    def see(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((q.shape, k.shape, attn_mask, is_causal, enable_gqa))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    cache = grouped.cache(3, 20, pad)
    for x in itertools.chain.from_iterable(cache.kv):
        x.zero_()
    if start:
        grouped(random_ids(3, start), cache=cache)
    monkeypatch.setattr(F, "scaled_dot_product_attention", see)
    grouped.features(random_ids(3, T), cache, torch.tensor([start]) if compiled else None)
    assert len(calls) == grouped.arch["layers"]
    masked = pad is not None or compiled or (start > 0 and T > 1)
    for q, k, mask, causal, gqa in calls:
        assert (mask is not None) == masked
        if masked or T == 1:
            assert q == (3, kv, 6 // kv * T, 8) and k[1] == kv and not causal and not gqa
            assert mask is None or mask.shape[-2:] == (q[2], k[2])
        else:
            assert q == (3, 6, T, 8) and causal is True and gqa is (k[1] < 6)


# Room

@torch.no_grad()
def test_more_tokens_than_positions_are_refused():
    """Catches: GPT-2 reads a 65th position beyond its table of 64."""
    model = load("gpt2")
    model(random_ids(1, 64))
    with pytest.raises(ValueError, match="65 tokens.* 64"):
        model(random_ids(1, 65))


@torch.no_grad()
def test_more_tokens_than_the_cache_holds_are_refused():
    """Catches: Keys are written beyond the cache."""
    model = load("gpt2")
    cache = model.cache(1, 6)
    model(random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="7 tokens.* 6"):
        model(random_ids(1, 3), cache=cache)
    model(random_ids(1, 2), cache=cache)
    assert cache.at == 6


@pytest.mark.parametrize("length", [65, 80])
def test_cache_longer_than_the_positions_is_refused(length):
    """Catches: A cache has room for positions that the model does not have."""
    with pytest.raises(ValueError, match=f"{length} tokens.* 64"):
        load("gpt2").cache(1, length)


@pytest.mark.parametrize("generate", [prt.generate, decode.compiled, decode.speculative])
def test_text_that_does_not_fit_is_refused_before_the_first_step(generate, monkeypatch):
    """Catches: Minutes of decoding end in an error about the last token."""
    model = load("gpt2")
    monkeypatch.setattr(model, "features", lambda *args: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match="68 tokens.* room for 64"):
        generate(model, [(1.0, model)], random_ids(1, 60), length=8)


def test_text_may_fill_all_positions():
    assert prt.generate(load("gpt2"), [], random_ids(1, 60), length=4).shape == (1, 64)


# Precision

@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_bfloat16_weights_are_near_the_float32_logits(name):
    """Catches: Mixed types fail, or the cache of frozen weights takes twice the memory."""
    model, io = load(name, dtype=torch.bfloat16), expected(name)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    cache = model.cache(2, 24)
    assert {x.dtype for x in itertools.chain.from_iterable(cache.kv)} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(io["ids"])
        in_parts = torch.cat([model(part, cache=cache) for part in io["ids"].split([20, 4], 1)], 1)
    assert logits.dtype == torch.bfloat16
    for x in (logits, in_parts):
        assert error(x.float(), io["logits"]) < 0.05 * io["logits"].abs().max()


def test_frequencies_are_float32_beside_bfloat16_weights():
    """Catches: Angles per position are rounded to bfloat16, which turns far positions arbitrarily."""
    model = load("llama3", dtype=torch.bfloat16)
    assert model.rope.dtype == torch.float32
    assert torch.equal(model.rope, load("llama3").rope)


@torch.no_grad()
def test_far_positions_in_bfloat16_are_near_the_float32_logits():
    """Catches: Angles are computed in bfloat16, which has no odd positions above 256."""
    ids = random_ids(2, 250)
    logits = load("llama2")(ids)
    assert error(load("llama2", dtype=torch.bfloat16)(ids).float(), logits) < 0.05 * logits.abs().max()


# Training

def gradients(name, recompute):
    """Returns the gradients of a next-token loss, and how often the forward pass of a block ran for them."""
    model, ids, passes = load(name), random_ids(2, 12), []
    model.recompute = recompute
    model.layers[1].mlp.register_forward_pre_hook(lambda *args: passes.append(1))
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [p.grad for p in model.parameters()], len(passes)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_recompute_gives_the_same_gradients(name):
    """Catches: Activation checkpointing recomputes something else, or does not recompute at all."""
    kept, once = gradients(name, recompute=False)
    recomputed, twice = gradients(name, recompute=True)
    assert (once, twice) == (1, 2)
    assert all(error(a, b) < 1e-6 for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("name, recompute", [("gpt2", False), ("qwen2", False), ("qwen2", True)])
def test_training_is_compiled_in_one_piece_for_all_lengths(name, recompute):
    """Catches: The graph breaks at every attention, or each length of the texts is compiled anew."""
    model, counters = load(name), torch._dynamo.utils.counters
    model.recompute = recompute
    torch._dynamo.reset()
    counters.clear()
    network = torch.compile(model, backend="eager")
    for T in (9, 14, 5, 30, 17, 22):
        ids = random_ids(2, T + 1)
        index = torch.arange(2 * T)
        logits = model.head(network(ids[:, :-1], index))
        assert error(logits, model(ids[:, :-1]).flatten(0, 1)) < 1e-5
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    breaks, frames = dict(counters["graph_break"]), dict(counters["frames"])
    torch._dynamo.reset()
    assert not breaks
    assert frames["ok"] == frames["total"] <= 3


@pytest.mark.parametrize("gpt2", [True, False])
def test_initialization_scales_with_the_fan_in_and_the_depth(gpt2):
    """Catches: The residual stream of a new model grows with its depth."""
    arch = dict(vocab=300, width=128, layers=3, heads=4, kv_heads=4, head_width=32, mlp=256, positions=64,
                eps=1e-5, tied=gpt2, rope=None if gpt2 else dict(theta=1e4), end=0, layer_norm=gpt2,
                gated_mlp=not gpt2, qkv_bias=gpt2, bias=gpt2)
    torch.manual_seed(0)
    for name, p in GPT(arch).named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif "embed" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        elif "o_proj.weight" in name or "down_proj.weight" in name:  # two for each of the three layers
            assert p.std().item() == pytest.approx((6 * p.shape[1]) ** -0.5, rel=0.05)
        elif name.endswith("weight"):
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05)
