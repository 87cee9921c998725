"""prt.generate faster: drafts that the base checks, and compiled steps, against plain decoding."""
import copy
import inspect
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch

import prt
import train_lm
from data import text
from models.gpt import GPT
from models.tokenizer import Tokenizer

@pytest.fixture(scope="module")
def trained():
    """A base and a smaller model, pretrained on the arithmetic text, and what tuning makes of the latter."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(train_lm.TOKENIZER.read_text(), str(train_lm.TOKENIZER))
    end = tokenizer.size - 1

    def train(policy, data, base=None, method="prt"):
        _, examples = text.load(data, "train")
        data = (text.blocks(examples[:2000], tokenizer, end, 65) if base is None else
                text.encode(examples, tokenizer, end, 200, False))
        prt.fit(policy, lambda step: prt.shuffled(step, len(data.ids), 16, 0),
                lambda i, _: (*text.collate(data, i, "cpu"), None), base=base, method=method, steps=60,
                lr=4e-3, head=GPT.head)
        return policy.requires_grad_(False)

    sizes = [train_lm.OLD | dict(vocab=tokenizer.size, end=end) | change for change in (
        dict(width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp=96),
        dict(width=32, head_width=8, mlp=64))]
    base, old = (train(GPT(size).eval(), f"arithmetic-{name}") for size, name in zip(sizes, ("new", "old")))
    reward, tuned = (train(copy.deepcopy(old).requires_grad_(True), "arithmetic", old, method) for method in ("prt", "ft"))
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0]
               for _, parts in text.load("arithmetic", "test")[1][:6]]
    return SimpleNamespace(base=base, old=old, reward=reward, tuned=tuned, prompts=prompts, end=end)


def padded(m):
    """The prompts as one batch [6, T], and the padding at the left of each [6]."""
    T = max(map(len, m.prompts))
    pad = torch.tensor([T - len(prompt) for prompt in m.prompts])
    return torch.tensor([[m.end] * n + prompt for n, prompt in zip(pad, m.prompts)]), pad


def mixtures(m):
    return {"prt": [(1.0, m.reward)], "half": [(0.5, m.reward)], "eft": [(1.0, m.tuned), (-1.0, m.old)],
            "two": [(0.7, m.tuned), (0.4, m.reward)]}


class Count(torch.nn.Module):
    """A policy that counts its passes."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.passes = policy, []
        self.cache, self.head, self.arch = policy.cache, policy.head, policy.arch

    def features(self, ids, *rest):
        self.passes.append(ids.shape[1])
        return self.policy.features(ids, *rest)


@pytest.mark.parametrize("mixture", ["prt", "half", "eft", "two"])
def test_speculative_greedy(trained, mixture):
    """A draft kept that is not the likeliest token, or keys of a dropped draft left in a cache."""
    rewards, base, tokens = mixtures(trained)[mixture], Count(trained.base), 0
    for prompt in trained.prompts:
        ids = torch.tensor([prompt])
        plain = prt.generate(trained.base, rewards, ids, length=50, end=trained.end)
        fast = prt.generate(base, rewards, ids, length=50, end=trained.end, speculative=True)
        assert torch.equal(fast, plain)
        new = plain[0, len(prompt):].tolist()
        tokens += new.index(trained.end) + 1 if trained.end in new else len(new)
    assert len(base.passes) < 0.8 * tokens  # it is worth something, its six prefills included


def test_speculative_batch(trained):
    """Rows of which one keeps more drafts than another, prompts of different lengths, rows that ended."""
    ids, pad = padded(trained)
    assert pad.any()
    for rewards in mixtures(trained).values():
        plain, fast = (prt.generate(trained.base, rewards, ids, length=60, end=trained.end, pad=pad,
                                    speculative=speculative) for speculative in (False, True))
        assert torch.equal(plain, fast)


def test_base_alone_has_no_draft(trained):
    ids = torch.tensor([trained.prompts[0]])
    assert torch.equal(*(prt.generate(trained.base, [], ids, length=8, speculative=s) for s in (False, True)))


# The distribution of samples

class Table(torch.nn.Module):
    """A policy of four tokens whose next one depends on the last two: fast enough for many samples."""

    def __init__(self, seed):
        super().__init__()
        self.logits = 1.5 * torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))

    def cache(self, batch, length, pad=None):
        return SimpleNamespace(at=0, length=length, ids=torch.zeros(batch, length + 1, dtype=torch.long))

    def features(self, ids, cache, at=None):
        end = cache.at + ids.shape[1]
        cache.ids[:, cache.at + 1:end + 1] = ids
        before, cache.at = cache.ids[:, cache.at:end], end
        return 4 * before + ids

    def head(self, features):
        return self.logits[features]


@pytest.fixture(scope="module")
def four():
    base, reward, old = map(Table, range(3))
    return SimpleNamespace(base=base, reward=reward, tuned=reward, old=old)


LENGTH, ROWS = 4, 4
PROMPT = torch.tensor([[0, 3, 1]])


@torch.no_grad()
def truth(base, rewards, temperature=1.0, top_p=1.0):
    """The probability of each continuation of the prompt, by the definition: [4 ** LENGTH]."""
    rows = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))
    ids = torch.cat([PROMPT.expand(len(rows), -1), rows], 1)
    logits = {m: m.head(m.features(ids, m.cache(*ids.shape, None)))[:, PROMPT.shape[1] - 1:-1]
              for _, m in [(1, base), *rewards]}
    p = (prt.mixture(base, rewards, logits.get) / temperature).softmax(-1)
    for place in p.flatten(0, 1):
        order = sorted(range(4), key=lambda i: -place[i])
        nucleus = next(n for n in range(1, 5) if place[order[:n]].sum() >= top_p - 1e-6)
        place[order[nucleus:]] = 0.0
        place /= place.sum()
    return p.gather(-1, rows[..., None])[..., 0].prod(1).double()


def surprise(base, rewards, samples=24_000, seed=0, **options):
    """The chi-square test's p-value of so many samples, cells with few of them put together."""
    want = truth(base, rewards, **options) * samples
    generator, power = torch.Generator().manual_seed(seed), 4 ** torch.arange(LENGTH - 1, -1, -1)
    found = torch.zeros(4**LENGTH, dtype=torch.double)
    for _ in range(samples // ROWS):
        ids = prt.generate(base, rewards, PROMPT.expand(ROWS, -1), length=LENGTH, speculative=True,
                           **{"temperature": 1.0} | options, generator=generator)
        found += torch.bincount((ids[:, -LENGTH:] * power).sum(1), minlength=4**LENGTH)
    assert not found[want == 0].any()
    rare = want < 8
    want, found = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (want, found))
    want, found = want[want > 0], found[want > 0]
    return torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(),
                                   ((found - want) ** 2 / want).sum() / 2).item()


@pytest.mark.parametrize("rewards, options", [
    ("prt", {}), ("eft", {}), ("half", dict(temperature=0.7, top_p=0.8))])
def test_speculative_samples(four, rewards, options):
    """Samples of another distribution than Algorithm 2's."""
    assert surprise(four.base, mixtures(four)[rewards], **options) > 1e-3


@pytest.mark.parametrize("line, broken", [
    ("kept = (u * q_y < p_y)", "kept = (u < p_y)"),
    ("kept = (u * q_y < p_y)", "kept = (u * q_y < 1.1 * p_y)"),
    ("rest = (p[:, n] - q[:, n]).clamp(min=0)", "rest = p[:, n]"),
    ("token = torch.where(kept > n, drafts[:, n], token)", "pass"),
    (".long().cumprod(1)", ".long()"),
])
def test_a_broken_acceptance_is_seen(four, monkeypatch, line, broken):
    """The test above passing whatever the rule is."""
    source = inspect.getsource(prt.accept)
    assert line in source
    scope = dict(vars(prt))
    exec(source.replace(line, broken), scope)
    monkeypatch.setattr(prt, "accept", scope["accept"])
    assert surprise(four.base, [(1.0, four.reward)], 12_000) < 1e-6


# Compiled steps

@pytest.fixture
def traced(monkeypatch):
    """Steps that are traced as for compilation, and then run as they are: no compiler, no minutes."""
    monkeypatch.setattr(prt, "compiled", lambda _: torch.compile(prt.scores, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()


@pytest.mark.parametrize("mixture", ["prt", "eft"])
@pytest.mark.parametrize("speculative", [False, True])
def test_compiled_steps(trained, traced, mixture, speculative):
    """A place that became a constant of the compiled step, places behind the last one that are seen."""
    rewards = mixtures(trained)[mixture]
    for prompt in trained.prompts:
        ids = torch.tensor([prompt])
        plain, fast = (prt.generate(trained.base, rewards, ids, length=30, end=trained.end, **options)
                       for options in ({}, dict(compile=True, speculative=speculative)))
        assert torch.equal(plain, fast)
    # One step of each set of models, drafts in one number, and in any number: not one a place.
    assert 0 < traced["ok"] == traced["total"] <= (4 if speculative else 1)


def test_compiled_batch(trained, traced):
    """A mask without the padding, and places counted with it."""
    ids, pad = padded(trained)
    plain, fast = (prt.generate(trained.base, [(1.0, trained.reward)], ids, length=20, end=trained.end,
                                pad=pad, compile=compile) for compile in (False, True))
    assert torch.equal(plain, fast) and traced["ok"] == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiler(trained):
    """What the compiler makes of a step: the caches written in place, with what masks leave out."""
    ids = torch.tensor([trained.prompts[0]])
    prt.compiled("cpu")
    with torch._inductor.config.patch(max_autotune=False):  # which takes seconds for each shape
        plain, fast = (prt.generate(trained.old, [(1.0, trained.reward)], ids, length=12, compile=compile)
                       for compile in (False, True))
    assert torch.equal(plain, fast)
