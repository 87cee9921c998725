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
from models.cache import attention_mask
from models.gpt import GPT
from models.pretrain import OLD

FAMILIES = ["qwen3", "olmo2", "smollm3", "mistral"]
NAMES = ["gpt2", "gpt2_hub", "llama2", "llama3", "falcon3", "qwen2", *FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """Catches: A wrong norm, rotation, head grouping, bias, or matrix moves the logits."""
    io = expected(name)
    with torch.no_grad():
        assert error(load(name)(io["ids"]), io["logits"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_transformers(name):
    """Catches: The model continues its prompt with other tokens than transformers does.

    transformers took the id 0 in the second prompt for padding: no token attended to it, and positions were
    counted without it. That is the prompt without its 0, and one position of padding on the left.
    """
    io = expected(name)
    prompt = io["prompt"].clone()
    assert prompt[1, 3] == 0
    prompt[1] = torch.cat([prompt[1, 3:4], prompt[1, :3], prompt[1, 4:]])
    out = prt.generate(load(name), [], prompt, length=24, pad=torch.tensor([0, 1]))
    assert torch.equal(out[:, 8:], io["greedy"][:, 8:])


def test_trained_model_tells_its_story_for_200_tokens():
    """Catches: A rotation or a cache drifts with the position, so that another story is told."""
    io = json.loads((FIXTURES / "stories260k" / "expected.json").read_text())
    assert len(io["greedy"]) >= 200
    prompt = torch.tensor([io["prompt"]])
    out = prt.generate(load("stories260k"), [], prompt, length=len(io["greedy"]) - len(io["prompt"]))
    assert out[0].tolist() == io["greedy"]


PARTS = [7, 1, 1, 4, 1, 6]
PADDING = [0, 3, 9]  # 9: more than the first part


@pytest.fixture(params=itertools.product(["gpt2", "llama3", "falcon3", "qwen2", *FAMILIES], [None, PADDING]),
                ids=str)
def case(request):
    """A model, ids [3, 20], a cache, and the logits of each row without cache and padding, nan at padding."""
    name, pad = request.param
    model = load(name)
    ids = random_ids(3, 20) % model.size
    want = torch.full((3, 20, model.size), math.nan)
    with torch.no_grad():
        for row, n in enumerate(pad or [0] * 3):
            want[row, n:] = model(ids[row:row + 1, n:])[0]
    cache = model.cache(3, 24, pad and torch.tensor(pad))
    for x in itertools.chain.from_iterable(cache.kv):
        x.zero_()
    return SimpleNamespace(model=model, ids=ids, cache=cache, want=want)


def logits(case, ids, at=None):
    return case.model.head(case.model.features(ids, case.cache, at))


def assert_near(logits, want):
    """Padding included, all logits must be finite; those that are not nan in `want` must be the same."""
    text = ~want.isnan()
    assert logits.isfinite().all()
    assert error(logits[text], want[text]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("parts, compiled", [([20], False), (PARTS, False), (PARTS, True)],
                         ids=["whole", "parts", "compiled"])
def test_a_cache_does_not_change_the_logits(case, parts, compiled):
    """Catches: Padding is attended to or counted, heads are mixed up, or a part starts at position 0.

    The graph of a compiled step attends to the whole cache. It takes the position of its tokens as a tensor,
    and leaves that of the cache to the caller.
    """
    starts = itertools.accumulate([0, *parts])
    steps = [logits(case, part, torch.tensor([at]) if compiled else None)
             for part, at in zip(case.ids.split(parts, 1), starts)]
    assert_near(torch.cat(steps, 1), case.want)
    assert case.cache.at == (0 if compiled else 20)


@torch.no_grad()
@pytest.mark.parametrize("at, tokens", [(9, 3), (9, 1), (1, 8)])
def test_a_cache_forgets_what_comes_after_a_smaller_at(case, at, tokens):
    """Catches: Dropped tokens are still attended to after others took their positions."""
    logits(case, case.ids)
    case.cache.at = at
    logits(case, random_ids(3, tokens, seed=1) % case.model.size)
    case.cache.at = at
    assert_near(logits(case, case.ids[:, at:]), case.want[:, at:])


def test_padding_attends_to_itself():
    """Catches: A softmax over no key, which is nan in some kernels."""
    mask = attention_mask(torch.tensor([1, 2]), 4, torch.tensor([0, 2]))
    assert mask.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 1, 0]]], [[[0, 1, 0, 0], [0, 0, 1, 0]]]]


@torch.no_grad()
def test_tokens_without_room_are_refused():
    """Catches: GPT-2 reads a 65th position beyond its table of 64, or keys are written beyond the cache."""
    model = load("gpt2")
    cache = model.cache(1, 6)
    model.features(random_ids(1, 4), cache)
    for call, message in [(lambda: model(random_ids(1, 65)), "65 tokens.* 64"),
                          (lambda: model.cache(1, 65), "65 tokens.* 64"),
                          (lambda: model.features(random_ids(1, 3), cache), "7 tokens.* 6")]:
        with pytest.raises(ValueError, match=message):
            call()
    model(random_ids(1, 64))
    model.features(random_ids(1, 2), cache)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "olmo2"])
def test_bfloat16_weights_are_near_the_float32_logits(name):
    """Catches: Mixed types fail, or the cache of frozen weights takes twice the memory."""
    model, io = load(name, dtype=torch.bfloat16), expected(name)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    cache = model.cache(2, 24)
    assert {x.dtype for x in itertools.chain.from_iterable(cache.kv)} == {torch.bfloat16}
    with torch.no_grad():
        parts = [model.head(model.features(part, cache)) for part in io["ids"].split([20, 4], 1)]
        for x in (model(io["ids"]), torch.cat(parts, 1)):
            assert x.dtype == torch.bfloat16
            assert error(x.float(), io["logits"]) < 0.05 * io["logits"].abs().max()


@torch.no_grad()
def test_far_positions_in_bfloat16_are_near_the_float32_logits():
    """Catches: Frequencies or angles are rounded to bfloat16, which has no odd positions above 256."""
    model, ids = load("llama2", dtype=torch.bfloat16), random_ids(2, 250)
    want = load("llama2")(ids)
    assert torch.equal(model.rope, load("llama2").rope)
    assert error(model(ids).float(), want) < 0.05 * want.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "qwen2", *FAMILIES])
def test_recompute_gives_the_same_gradients(name):
    """Catches: Activation checkpointing recomputes something else, or does not recompute at all."""
    model, ids, passes, gradients = load(name), random_ids(2, 12) % 128, [], []
    model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(model.recompute))
    for model.recompute in (False, True):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert passes == [False, True, True]
    assert all(error(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name, recompute", [("gpt2", False), ("qwen2", True), ("qwen3", True),
                                             ("olmo2", False)])
def test_training_is_compiled_in_one_piece_for_all_lengths(name, recompute):
    """Catches: The graph breaks at every attention, or each length of the texts is compiled anew."""
    model, counters = load(name), torch._dynamo.utils.counters
    model.recompute = recompute
    torch._dynamo.reset()
    counters.clear()
    network = torch.compile(model, backend="eager")
    for T in (9, 14, 5, 30):
        ids = random_ids(2, T + 1) % model.size
        logits = model.head(network(ids[:, :-1], torch.arange(2 * T)))
        assert error(logits, model(ids[:, :-1]).flatten(0, 1)) < 1e-5
        F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    breaks, frames = dict(counters["graph_break"]), dict(counters["frames"])
    torch._dynamo.reset()
    assert not breaks
    assert frames["ok"] == frames["total"] <= 3


@pytest.mark.parametrize("gpt2", [True, False])
def test_initialization_scales_with_the_fan_in_and_the_depth(gpt2):
    """Catches: The residual stream of a new model grows with its depth."""
    gpt2s = dict(tied=True, rope=None, layer_norm=True, gated_mlp=False, qkv_bias=True, bias=True)
    arch = OLD | dict(vocab=300, end=0, width=128, layers=3, head_width=32, mlp=256) | (gpt2s if gpt2 else {})
    torch.manual_seed(0)
    for name, p in GPT(arch).named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("weight"):
            depth = 6 if "o_proj" in name or "down_proj" in name else 1  # two for each of the three layers
            std = 0.02 if "embed" in name else (depth * p.shape[1]) ** -0.5
            assert p.std().item() == pytest.approx(std, rel=0.05)
