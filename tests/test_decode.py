"""Faster decoding (models/decode.py): drafts, compiled steps, and samples, all held to prt.generate."""
import copy
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import error, load

import prt
from data import arithmetic, text
from data.tokenizer import Tokenizer
from models import answers, decode, pretrain, runs, sampling
from models.gpt import GPT


@pytest.fixture(scope="module")
def trained():
    """A base and a smaller model, pretrained on arithmetic, and what tuning makes of the latter.

    cases: six prompts, (ids [1, T], None), and last all of them in one batch with padding, (ids [6, T], pad).
    """
    torch.manual_seed(0)
    tokenizer = Tokenizer(pretrain.TOKENIZER.read_text(), str(pretrain.TOKENIZER))
    end = tokenizer.size - 1

    def examples(split, count=2000):
        return [(split, parts) for parts in itertools.islice(arithmetic.arithmetic(split), count)]

    def train(policy, data, base=None, method="prt"):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, weight_decay=0.0)
        prt.fit(policy, lambda step: runs.shuffled(step, len(data.ids), 10, 0),
                lambda i, _: (*text.collate(data, i), None), base=base, method=method, steps=60,
                optimizer=optimizer, head=GPT.head)
        return policy.requires_grad_(False)

    def pretrained(split, **sizes):
        policy = GPT(pretrain.OLD | dict(vocab=tokenizer.size, end=end) | sizes).eval()
        return train(policy, pretrain.blocks(examples(split), tokenizer, end, 65))

    base = pretrained("new", width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp=96)
    old = pretrained("old", width=32, head_width=8, mlp=64)
    problems = text.encode(examples("train"), tokenizer, end, 200)
    reward, tuned = (train(copy.deepcopy(old).requires_grad_(True), problems, old, method)
                     for method in ("prt", "ft"))
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in examples("test", 6)]
    T = max(map(len, prompts))
    pad = torch.tensor([T - len(prompt) for prompt in prompts])
    batch = torch.tensor([[end] * n + prompt for n, prompt in zip(pad, prompts)])
    cases = [(torch.tensor([prompt]), None) for prompt in prompts] + [(batch, pad)]
    return SimpleNamespace(base=base, old=old, reward=reward, tuned=tuned, cases=cases, end=end)


MIXTURES = dict(none=[], prt=[(1.0, "reward")], half=[(0.5, "reward")], eft=[(1.0, "tuned"), (-1.0, "old")],
                two=[(0.7, "tuned"), (0.4, "reward")])
# The mixture on the base, and who drafts: None (the first reward), or another base and a mixture on it.
DRAFTS = {"prt": ("prt", None), "half": ("half", None), "eft": ("eft", None), "two": ("two", None),
          "prt and source": ("prt", ("old", "prt")), "half and source": ("half", ("old", "half")),
          "eft and source": ("eft", ("old", "eft")), "a model of its own": ("prt", ("old", "none")),
          "the mixture itself": ("prt", ("base", "prt")), "for a base alone": ("none", ("old", "prt")),
          "a base alone": ("none", None)}


def drafted(models, name):
    """Returns the rewards and the drafter of an entry of DRAFTS, as arguments of decode.speculative."""
    def mixture(name):
        return [(weight, getattr(models, policy)) for weight, policy in MIXTURES[name]]

    rewards, drafter = DRAFTS[name]
    return mixture(rewards), drafter and (getattr(models, drafter[0]), mixture(drafter[1]))


class Count(torch.nn.Module):
    """A policy that counts its passes, and notes whether one of them is made for backward."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.passes, self.graph = policy, 0, False
        self.cache, self.head, self.arch = policy.cache, policy.head, policy.arch

    def features(self, ids, *rest):
        self.passes += 1
        out = self.policy.features(ids, *rest)
        self.graph |= out.requires_grad
        return out


@pytest.fixture
def traced(monkeypatch):
    """Steps that are traced as for compilation, and then run as they are: no compiler, no minutes."""
    step = torch.compile(decode.last_logits, backend="eager")
    monkeypatch.setattr(decode, "compiled_logits", lambda device_type: step)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()


def assert_same_text(way, trained, rewards, cases, base=None, length=40, **options):
    """Asserts that a way of decoding continues prompts as prt.generate does; returns how many tokens."""
    tokens = 0
    for ids, pad in cases:
        common = dict(length=length, end=trained.end, pad=pad)
        plain = prt.generate(trained.base, rewards, ids, **common)
        assert torch.equal(way(base or trained.base, rewards, ids, **common, **options), plain)
        for row in plain[:, ids.shape[1]:].tolist():
            tokens += row.index(trained.end) + 1 if trained.end in row else len(row)
    return tokens


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_speculation_writes_the_same_text_in_fewer_passes(trained, name):
    """Catches: A draft is kept that is not the most likely token, or keys of a dropped draft stay cached."""
    (rewards, drafter), base = drafted(trained, name), Count(trained.base)
    *prompts, batch = trained.cases
    tokens = assert_same_text(decode.speculative, trained, rewards, prompts, base, drafter=drafter)
    most = {"the mixture itself": 0.2, "a model of its own": 1, "for a base alone": 1, "a base alone": 1.03}
    assert base.passes <= most.get(name, 0.8) * tokens  # the passes over the six prompts are counted, too
    assert_same_text(decode.speculative, trained, rewards, [batch], length=60, drafter=drafter)


@pytest.mark.parametrize("name, speculate", [
    ("prt", False), ("eft", False), ("prt", True), ("eft and source", True), ("the mixture itself", True),
    ("a base alone", True)])
def test_compiled_steps_write_the_same_text(trained, traced, name, speculate):
    """With drafts, there is one step per set of models for one draft, and one for any number.

    Catches: A position is a constant of the step, one after the last is seen, or padding is read.
    """
    *prompts, batch = trained.cases
    rewards, drafter = drafted(trained, name)
    way, options = decode.compiled, {}
    if speculate:
        way, options = decode.speculative, dict(compile=True, drafter=drafter)
    assert_same_text(way, trained, rewards, prompts, **options)
    frames = 4 if speculate else 1
    assert 0 < traced["ok"] == traced["total"] <= frames or name == "a base alone"  # its check runs no model
    assert_same_text(way, trained, rewards, [batch], **options)


def test_one_cache_and_one_graph_serve_all_batches_of_a_table(trained, traced, monkeypatch):
    """Catches: A cache for each length stays in memory, or the last, smaller batch is compiled anew."""
    made, row = [], SimpleNamespace(base=trained.base, rewards=[(1.0, trained.reward)], drafter=None)
    cache = GPT.cache
    monkeypatch.setattr(GPT, "cache", lambda self, *shape: made.append(shape[:2]) or cache(self, *shape))
    prompts = [[5] * n for n in (3, 100, 130, 20, 7)]
    how = answers.Decoding(batch=2, new_tokens=9, compile=True)
    written = answers.generate(row, prompts, how, [trained.end], 256)
    assert made == [(2, 256)] * 2 and traced["total"] == traced["ok"] == 1
    assert written == answers.generate(row, prompts, how._replace(compile=False), [trained.end], 256)
    made.clear()
    answers.generate(row, prompts[:1], how, [trained.end], 256)  # another batch size takes its place
    assert made == [(1, 128)] * 2
    assert {decode.CACHES[model].length for model in (trained.base, trained.reward)} == {128}


def test_few_numbers_of_drafts_are_checked(trained, monkeypatch):
    """Catches: Each number of drafts, also at the end of a text, needs another graph."""
    seen, accept = set(), decode.accept
    monkeypatch.setattr(decode, "accept", lambda p, q, drafts, *rest: seen.add(drafts.shape[1]) or accept(
        p, q, drafts, *rest))
    names, lengths = ("prt", "the mixture itself"), (2, 7, 31, 60)
    for name, length, (ids, pad) in itertools.product(names, lengths, trained.cases):
        rewards, drafter = drafted(trained, name)
        decode.speculative(trained.base, rewards, ids, length=length, pad=pad, drafter=drafter)
    assert seen == {0, 1, 4, 8, 16}


def test_logits_of_a_compiled_step_outlive_it(trained, monkeypatch):
    """Catches: Drafts are chosen by the outputs of a CUDA graph that a later one has overwritten."""
    outputs = []

    def step(*arguments):
        outputs[:] = decode.last_logits(*arguments)
        return list(outputs)

    monkeypatch.setattr(decode, "compiled_logits", lambda device_type: step)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin",
                        lambda: [logits.fill_(float("nan")) for logits in outputs])
    rewards, drafter = drafted(trained, "prt and source")
    assert_same_text(decode.speculative, trained, rewards, trained.cases, compile=True, drafter=drafter)
    assert outputs


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_the_compiler_writes_the_same_text(trained):
    """Catches: What the compiler makes of a step writes the caches, or reads what masks exclude, wrongly."""
    decode.compiled_logits("cpu")
    # Autotuning takes seconds for each shape, and so do programs that check the CPU's vector instructions.
    with torch._inductor.config.patch({"max_autotune": False, "cpp.vec_isa_ok": True}):
        assert_same_text(decode.compiled, trained, [(1.0, trained.reward)], trained.cases[:1], length=12)


@pytest.mark.parametrize("drafting", ["old", "base"])
def test_policies_that_draft_do_not_run_again_to_check(trained, drafting):
    """Catches: A policy in both mixtures, with one cache or two, takes twice the passes."""
    models = SimpleNamespace(**{name: Count(getattr(trained, name)) for name in ("base", "old", "reward")})
    rewards, drafter = [(1.0, models.reward)], getattr(models, drafting)
    decode.speculative(models.base, rewards, trained.cases[0][0], length=30, drafter=(drafter, rewards))
    assert models.reward.passes == drafter.passes >= 30
    assert drafter.passes == 30 if drafting == "base" else models.base.passes < 30


WAYS = dict(generate=prt.generate, speculative=decode.speculative, compiled=decode.compiled)


@pytest.mark.parametrize("way", WAYS)
def test_text_may_reach_the_last_position_and_is_refused_beyond(traced, way):
    """Catches: A cache whose length is rounded up, or the last drafts, need positions that are not there."""
    model, reward, ids = Count(load("gpt2")), load("gpt2"), torch.arange(3, 61)[None]
    assert model.arch["positions"] == 64 and ids.shape[1] == 58
    plain = prt.generate(model, [(1.0, reward)], ids, length=6)  # there is no end token
    assert torch.equal(WAYS[way](model, [(1.0, reward)], ids, length=6), plain)
    assert not model.graph  # Catches: Every token keeps the activations of all models in memory
    model.passes = 0
    with pytest.raises(ValueError, match="65 tokens.* room for 64"):
        WAYS[way](model, [(1.0, reward)], ids, length=7)
    assert model.passes == 0  # Catches: Minutes of decoding end in an error about the last token


@pytest.mark.parametrize("way", WAYS)
def test_samples_depend_on_their_generator_alone(trained, traced, way):
    """Catches: Samples are drawn with the global generator, so that no run can be repeated."""
    def sampled(seed, way):
        torch.seed()  # the global generator must not matter
        generator = torch.Generator().manual_seed(seed)
        draw = dict(temperature=1.0, generator=generator) if way == "speculative" else dict(
            draw=sampling.sampler(1.0, 0.9, generator))
        return WAYS[way](trained.base, [(1.0, trained.reward)], trained.cases[0][0], length=20, **draw)

    assert torch.equal(sampled(1, way), sampled(1, way))
    assert not torch.equal(sampled(1, way), sampled(2, way))
    assert way == "speculative" or torch.equal(sampled(1, way), sampled(1, "generate"))


def test_a_row_ends_after_its_first_stop_string(trained):
    """Catches: A stop string in two tokens is missed, the others end with the row, or its text is another."""
    (ids, pad), end, tokenizer = trained.cases[-1], trained.end, Tokenizer(pretrain.TOKENIZER.read_text(), "")
    arguments, T = (trained.base, [], ids), ids.shape[1]
    whole = prt.generate(*arguments, length=24, end=end, pad=pad)[:, T:].tolist()
    until = [tokenizer.decode(whole[0])[8:13], tokenizer.decode(whole[3])[15:20]]
    draw = sampling.stopping(sampling.sampler(0.0), until, tokenizer.decode, end)
    rows = prt.generate(*arguments, length=24, end=end, pad=pad, draw=draw)[:, T:].tolist()
    ends = [next((n for n in range(25) if any(x in tokenizer.decode(full[:n]) for x in until)), 24)
            for full in whole]
    assert rows == [full[:n] + [end] * (24 - n) for n, full in zip(ends, whole)]
    assert len({*ends}) > 1


# The distribution of samples

@pytest.mark.parametrize("temperature, top_p, want", [
    (1.0, 1.0, [0.1, 0.4, 0.05, 0.25, 0.2]),
    (1.0, 0.6, [0, 0.4, 0, 0.25, 0]),
    (1.0, 0.7, [0, 0.4, 0, 0.25, 0.2]),  # 0.65 is not enough
    (2.0, 0.6, [0, 0.4**0.5, 0, 0.25**0.5, 0.2**0.5]),  # the smallest set of what is sampled
    (1.0, 1e-9, [0, 1.0, 0, 0, 0]),
    (0.0, 1.0, [0, 1.0, 0, 0, 0]),
])
def test_samples_follow_temperature_and_top_p(temperature, top_p, want):
    """Catches: The set is too large, lacks the token that crosses top_p, or the temperature is inverted."""
    log_probs = (torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log() + 3).expand(20_000, 5)  # up to a constant
    p, generator = sampling.probabilities(log_probs, temperature, top_p), torch.Generator().manual_seed(0)
    samples = (sampling.sample(3 * p, generator),  # need not be normalized
               sampling.sampler(temperature, top_p, generator)(log_probs))
    want = torch.tensor(want) / sum(want)
    for shares in (p[0], *(torch.bincount(tokens, minlength=5) / 20_000 for tokens in samples)):
        assert torch.equal(shares > 0, want > 0)
        assert error(shares, want) < 0.02  # by chance


class Table:
    """A policy of four tokens whose next one depends on the last two: fast enough for many samples."""

    def __init__(self, seed, scale):
        self.logits = scale * torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))

    def cache(self, batch, length, pad=None):
        return SimpleNamespace(at=0, length=length, ids=torch.zeros(batch, length + 1, dtype=torch.long))

    def features(self, ids, cache, at=None):
        end = cache.at + ids.shape[1]
        cache.ids[:, cache.at + 1:end + 1] = ids
        before, cache.at = cache.ids[:, cache.at:end], end
        return 4 * before + ids

    def head(self, features):
        return self.logits[features]


REWARD = Table(1, scale=1.5)  # so much sharper than the base that in half of the passes all rows keep a draft
TABLES = SimpleNamespace(base=Table(0, scale=1.0), reward=REWARD, tuned=REWARD, old=Table(2, scale=1.5))
PROMPT = torch.tensor([[0, 3, 1]])
LENGTH, ROWS = 4, 4


@torch.no_grad()
def continuation_probabilities(rewards, temperature=1.0, top_p=1.0):
    """Returns the probability of each continuation of the prompt, by definition: [4 ** LENGTH]."""
    rows = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))
    ids = torch.cat([PROMPT.expand(len(rows), -1), rows], 1)
    logits = {m: m.head(m.features(ids, m.cache(*ids.shape, None)))[:, PROMPT.shape[1] - 1:-1]
              for _, m in [(1.0, TABLES.base), *rewards]}
    p = sampling.probabilities(prt.combine(TABLES.base, rewards, logits.get), temperature, top_p)
    return p.gather(-1, rows[..., None])[..., 0].prod(1).double()


@pytest.mark.parametrize("name", DRAFTS)
def test_samples_of_speculation_are_samples_of_algorithm_2(name):
    """A chi-square test, in which rare cells are joined."""
    rewards, drafter = drafted(TABLES, name)
    samples, options = 3000 if drafter else 6000, dict(temperature=0.7, top_p=0.8) if "half" in name else {}
    expected = continuation_probabilities(rewards, **options) * samples
    generator, digits = torch.Generator().manual_seed(1), 4 ** torch.arange(LENGTH - 1, -1, -1)
    counts = torch.zeros(4**LENGTH, dtype=torch.double)
    for _ in range(samples // ROWS):
        ids = decode.speculative(TABLES.base, rewards, PROMPT.expand(ROWS, -1), length=LENGTH,
                                 **dict(temperature=1.0) | options, generator=generator, drafter=drafter)
        counts += torch.bincount((ids[:, -LENGTH:] * digits).sum(1), minlength=4**LENGTH)
    assert not counts[expected == 0].any()
    rare = expected < 8
    expected, counts = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2) > 1e-3


def test_the_residual_of_equal_distributions_is_p():
    """Catches: Rounding refuses a draft although p equals q, and the sample of nothing is token 0."""
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    assert decode.residual(p, q).tolist() == [[0.25, 0.75], [0.5, 0]]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_row_ends_at_the_first_of_several_end_tokens(trained, traced, way):
    """Catches: An answer goes on after the second end token of the base, or is filled with it."""
    ids, pad = trained.cases[-1]
    rewards, options = [(1.0, trained.reward)], dict(length=24, pad=pad)
    long = prt.generate(trained.base, rewards, ids, **options)[:, ids.shape[1]:]
    ends = [trained.end, long[0, 3].item(), long[1, 5].item()]
    out = WAYS[way](trained.base, rewards, ids, end=ends, **options)[:, ids.shape[1]:]
    for row, new in zip(long.tolist(), out.tolist()):
        n = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        assert new == row[:n] + [trained.end] * (len(row) - n)
    row = SimpleNamespace(base=trained.base, rewards=rewards, drafter=None)
    how = answers.Decoding(new_tokens=24, speculative=way == "speculative", compile=way == "compiled")
    prompts = [text[n:].tolist() for text, n in zip(ids, pad)]
    want = [[*itertools.takewhile(lambda token: token not in ends, new)] for new in long.tolist()]
    assert answers.generate(row, prompts, how, ends, 256) == want


def test_a_row_that_has_ended_does_not_hold_up_the_others():
    drafts = torch.tensor([[1, 2, 3], [1, 2, 3]])
    p, q = (torch.eye(5)[tokens] for tokens in (torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]]), drafts))
    accepted = decode.accept(p, q, drafts, torch.tensor([False, True]))
    assert accepted[0].tolist() == [1, 2, 3, 4]
