"""Faster decoding (models/decode.py): drafts, compiled steps, and samples, all held to prt.generate."""
import copy
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import error, load, random_ids

import prt
import train_lm
from data import text
from models import decode, runs
from models.gpt import GPT
from models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def trained():
    """A base and a smaller model, pretrained on the arithmetic text, and what tuning makes of the latter."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(train_lm.TOKENIZER.read_text(), str(train_lm.TOKENIZER))
    end = tokenizer.size - 1

    def examples(source, split):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "COUNTS", dict.fromkeys(text.COUNTS, 2000))
            return text.load(source, split)[1]

    def train(policy, data, base=None, method="prt"):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, weight_decay=0.0)
        prt.fit(policy, lambda step: runs.shuffled(step, len(data.ids), 10, 0),
                lambda i, _: (*text.collate(data, i), None), base=base, method=method, steps=60,
                optimizer=optimizer, head=GPT.head)
        return policy.requires_grad_(False)

    def pretrain(source, **sizes):
        policy = GPT(train_lm.OLD | dict(vocab=tokenizer.size, end=end) | sizes).eval()
        return train(policy, text.blocks(examples(source, "train"), tokenizer, end, 65))

    base = pretrain("arithmetic-new", width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp=96)
    old = pretrain("arithmetic-old", width=32, head_width=8, mlp=64)
    problems, tests = (examples("arithmetic", split) for split in ("train", "test"))
    problems = text.encode(problems, tokenizer, end, 200)
    reward, tuned = (train(copy.deepcopy(old).requires_grad_(True), problems, old, method)
                     for method in ("prt", "ft"))
    prompts = [text.token_ids(parts[:-1], tokenizer, end)[0] for _, parts in tests[:6]]
    return SimpleNamespace(base=base, old=old, reward=reward, tuned=tuned, prompts=prompts, end=end)


def padded(m):
    """Returns the prompts as one batch [6, T], and how many positions on the left are padding, [6]."""
    T = max(map(len, m.prompts))
    pad = torch.tensor([T - len(prompt) for prompt in m.prompts])
    return torch.tensor([[m.end] * n + prompt for n, prompt in zip(pad, m.prompts)]), pad


MIXTURES = dict(none=[], prt=[(1.0, "reward")], half=[(0.5, "reward")], eft=[(1.0, "tuned"), (-1.0, "old")],
                two=[(0.7, "tuned"), (0.4, "reward")])


# The mixture on the base, and who drafts: None (the first reward), or another base and a mixture on it.
DRAFTS = {"prt": ("prt", None), "half": ("half", None), "eft": ("eft", None), "two": ("two", None),
          "prt and source": ("prt", ("old", "prt")), "half and source": ("half", ("old", "half")),
          "eft and source": ("eft", ("old", "eft")), "a model of its own": ("prt", ("old", "none")),
          "the mixture itself": ("prt", ("base", "prt")), "for a base alone": ("none", ("old", "prt"))}


def mixture(models, name):
    return [(weight, getattr(models, policy)) for weight, policy in MIXTURES[name]]


def drafted(models, name):
    """Returns the rewards and the drafter of an entry of DRAFTS, as arguments of decode.speculative."""
    rewards, drafter = DRAFTS[name]
    if drafter:
        drafter = getattr(models, drafter[0]), mixture(models, drafter[1])
    return mixture(models, rewards), drafter


# Drafts

class Count(torch.nn.Module):
    """A policy that counts its passes."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.passes = policy, 0
        self.cache, self.head, self.arch = policy.cache, policy.head, policy.arch

    def features(self, ids, *rest):
        self.passes += 1
        return self.policy.features(ids, *rest)


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_speculation_writes_the_same_text_in_fewer_passes(trained, name):
    """Catches: A draft is kept that is not the most likely token, or keys of a dropped draft stay cached."""
    (rewards, drafter), base, tokens = drafted(trained, name), Count(trained.base), 0
    for prompt in trained.prompts:
        ids = torch.tensor([prompt])
        plain = prt.generate(trained.base, rewards, ids, length=50, end=trained.end)
        assert torch.equal(decode.speculative(base, rewards, ids, length=50, end=trained.end,
                                              drafter=drafter), plain)
        new = plain[0, len(prompt):].tolist()
        tokens += new.index(trained.end) + 1 if trained.end in new else len(new)
    most = {"the mixture itself": 0.2, "a model of its own": 1, "for a base alone": 1}.get(name, 0.8)
    assert base.passes < most * tokens  # the passes over the six prompts are counted, too


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_speculation_of_a_batch_writes_the_same_texts(trained, name):
    """Catches: Rows keep different numbers of drafts, differ in padding, or end, and disturb each other."""
    ids, pad = padded(trained)
    assert pad.any()
    rewards, drafter = drafted(trained, name)
    arguments, options = (trained.base, rewards, ids), dict(length=60, end=trained.end, pad=pad)
    plain = prt.generate(*arguments, **options)
    assert torch.equal(decode.speculative(*arguments, **options, drafter=drafter), plain)


@pytest.mark.parametrize("drafting", ["old", "base"])
def test_policies_that_draft_do_not_run_again_to_check(trained, drafting):
    """Catches: A policy in both mixtures, with one cache or two, takes twice the passes."""
    models = SimpleNamespace(**{name: Count(getattr(trained, name)) for name in ("base", "old", "reward")})
    rewards, ids = [(1.0, models.reward)], torch.tensor([trained.prompts[0]])
    drafter = getattr(models, drafting)
    decode.speculative(models.base, rewards, ids, length=30, drafter=(drafter, rewards))
    assert models.reward.passes == drafter.passes >= 30
    assert drafter.passes == 30 if drafting == "base" else models.base.passes < 30


def test_greedy_speculation_without_an_end_token_writes_the_same_text(trained):
    arguments = trained.base, mixture(trained, "prt"), torch.tensor([trained.prompts[0]])
    assert torch.equal(decode.speculative(*arguments, length=40), prt.generate(*arguments, length=40))


def test_speculation_on_a_base_alone_is_plain_decoding(trained):
    ids = torch.tensor([trained.prompts[0]])
    plain = prt.generate(trained.base, [], ids, length=8)
    assert torch.equal(decode.speculative(trained.base, [], ids, length=8), plain)


def test_samples_of_speculation_depend_on_their_generator_alone(trained):
    def sampled(seed):
        torch.seed()  # the global generator must not matter
        return decode.speculative(trained.base, mixture(trained, "prt"), torch.tensor([trained.prompts[0]]),
                                  length=20, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


# The number of drafts

@pytest.mark.parametrize("kept, drafts", [
    ([16] * 7, [8, 10, 12, 14, 16, 16, 16]),
    ([5, 5, 2, 0, 1, 3, 0], [8, 5, 7, 2, 1, 3, 5]),
], ids=["all are kept", "some are refused"])
def test_as_many_tokens_are_drafted_as_were_kept_and_two_more_if_all_were(monkeypatch, kept, drafts):
    """Catches: Many drafts are made that are refused, or few although all are kept."""
    made, rest = [], iter(kept)

    def keep(p_y, q_y, u):
        made.append(u.shape[1])
        return torch.full((len(u),), min(next(rest, 0), u.shape[1]))

    monkeypatch.setattr(decode, "accepted_drafts", keep)
    decode.speculative(TABLES.base, mixture(TABLES, "prt"), PROMPT, length=sum(map(min, kept, drafts)) + 20)
    assert made[:len(drafts)] == drafts


def test_no_more_tokens_are_drafted_than_are_asked_for(trained):
    """Catches: The last drafts need positions that the models do not have."""
    ids = torch.tensor([trained.prompts[0]])
    length = trained.base.arch["positions"] - ids.shape[1]
    arguments = trained.base, mixture(trained, "prt"), ids
    fast = decode.speculative(*arguments, length=length, drafter=(trained.base, mixture(trained, "prt")))
    assert torch.equal(fast, prt.generate(*arguments, length=length))


# The rule of acceptance

def test_a_draft_is_kept_with_probability_p_over_q_at_most_1():
    p_y, q_y = torch.tensor([[0.2], [0.2], [0.6]]), torch.tensor([[0.4], [0.4], [0.3]])
    u = torch.tensor([[0.49], [0.51], [0.99]])
    assert decode.accepted_drafts(p_y, q_y, u).tolist() == [1, 0, 1]


def test_drafts_after_a_refused_one_are_not_kept():
    p_y, q_y = torch.tensor([[0.5, 0.0, 0.5, 0.5]]), torch.full((1, 4), 0.5)
    assert decode.accepted_drafts(p_y, q_y, torch.full((1, 4), 0.5)).tolist() == [1]


def test_the_residual_is_what_p_has_more_than_q():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert decode.residual(p, q).tolist() == [[0.25, 0, 0]]


def test_the_residual_of_equal_distributions_is_p():
    """Catches: Rounding refuses a draft although p equals q, and the sample of nothing is token 0."""
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    assert decode.residual(p, q).tolist() == [[0.25, 0.75], [0.5, 0]]


def one_hot(tokens):
    return torch.nn.functional.one_hot(torch.tensor(tokens), 8).float()


def test_all_rows_take_as_many_tokens_as_the_row_that_keeps_fewest():
    drafts = torch.tensor([[1, 2, 3], [1, 2, 3]])
    p = one_hot([[1, 2, 3, 4], [1, 5, 6, 7]])
    accepted = decode.accept(p, one_hot(drafts.tolist()), drafts, torch.zeros(2, dtype=torch.bool))
    assert accepted.tolist() == [[1, 2], [1, 5]]


def test_a_row_that_has_ended_does_not_hold_up_the_others():
    drafts = torch.tensor([[1, 2, 3], [1, 2, 3]])
    p = one_hot([[1, 2, 3, 4], [0, 0, 0, 0]])
    accepted = decode.accept(p, one_hot(drafts.tolist()), drafts, torch.tensor([False, True]))
    assert accepted[0].tolist() == [1, 2, 3, 4]


def test_what_follows_an_end_token_becomes_end_tokens():
    tokens = torch.tensor([[1, 9, 2, 9], [1, 2, 3, 4], [5, 6, 7, 8]])
    new, done = decode.fill_after_end(tokens, torch.tensor([False, False, True]), 9)
    assert new.tolist() == [[1, 9, 9, 9], [1, 2, 3, 4], [9, 9, 9, 9]]
    assert done.tolist() == [True, False, True]


# The distribution of samples

class Table(torch.nn.Module):
    """A policy of four tokens whose next one depends on the last two: fast enough for many samples."""

    def __init__(self, seed, scale):
        super().__init__()
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
    p = (prt.mixture(TABLES.base, rewards, logits.get) / temperature).softmax(-1)
    for q in p.flatten(0, 1):
        order = sorted(range(4), key=lambda token, q=q: -q[token])
        nucleus = next(n for n in range(1, 5) if q[order[:n]].sum() >= top_p - 1e-6)
        q[order[nucleus:]] = 0.0
        q /= q.sum()
    return p.gather(-1, rows[..., None])[..., 0].prod(1).double()


def p_value(name, samples, **options):
    """Returns the p-value of a chi-square test of samples of decode.speculative; rare cells are joined."""
    rewards, drafter = drafted(TABLES, name)
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
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("name", DRAFTS)
def test_samples_of_speculation_are_samples_of_algorithm_2(name):
    options = dict(temperature=0.7, top_p=0.8) if "half" in name else {}
    assert p_value(name, samples=3000 if drafted(TABLES, name)[1] else 6000, **options) > 1e-3


BROKEN = {
    "p instead of p / q": dict(accepted_drafts=lambda p_y, q_y, u: (u < p_y).long().cumprod(1).sum(1)),
    "a tenth too often": dict(
        accepted_drafts=lambda p_y, q_y, u: (u * q_y < 1.1 * p_y).long().cumprod(1).sum(1)),
    "drafts after a refused one": dict(accepted_drafts=lambda p_y, q_y, u: (u * q_y < p_y).long().sum(1)),
    "p instead of the residual": dict(residual=lambda p, q: p),
}


@pytest.mark.parametrize("rule", [*BROKEN, "a kept draft replaced"])
def test_a_broken_rule_of_acceptance_is_seen(monkeypatch, rule):
    """Catches: The test above passes whatever the rule is. Half of its samples show that it does not."""
    def replace_kept_draft(p, q, drafts, done, generator=None):
        """Like `accept`, but a row that keeps more drafts than another gets a sample of the residual, too."""
        accepted = accept(p, q, drafts, done, generator)
        n = accepted.shape[1] - 1
        if n < drafts.shape[1]:
            accepted[:, n] = decode.sample(decode.residual(p[:, n], q[:, n]), generator)
        return accepted

    accept = decode.accept
    for name, function in BROKEN.get(rule, dict(accept=replace_kept_draft)).items():
        monkeypatch.setattr(decode, name, function)
    assert p_value("prt", samples=3000) < 1e-6


# Compiled steps

@pytest.fixture
def traced(monkeypatch):
    """Steps that are traced as for compilation, and then run as they are: no compiler, no minutes."""
    step = torch.compile(decode.last_logits, backend="eager")
    monkeypatch.setattr(decode, "compiled_logits", lambda device_type: step)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()


def assert_same_text(trained, name, generate, **how):
    """Asserts that `generate` continues every prompt as prt.generate does."""
    for prompt in trained.prompts:
        arguments = trained.base, mixture(trained, name), torch.tensor([prompt])
        options = dict(length=30, end=trained.end)
        assert torch.equal(generate(*arguments, **options, **how), prt.generate(*arguments, **options))


@pytest.mark.parametrize("name", ["prt", "eft"])
def test_compiled_steps_write_the_same_text(trained, traced, name):
    """Catches: A position is a constant of the compiled step, or positions after the last one are seen."""
    assert_same_text(trained, name, decode.compiled)
    assert traced["ok"] == traced["total"] == 1


@pytest.mark.parametrize("name", ["prt", "eft", "prt and source", "a model of its own", "the mixture itself"])
def test_compiled_speculation_writes_the_same_text(trained, traced, name):
    """There is one step per set of models, with one draft and with any number, and none per position."""
    rewards, drafter = drafted(trained, name)
    assert_same_text(trained, DRAFTS[name][0], decode.speculative, compile=True, drafter=drafter)
    assert 0 < traced["ok"] == traced["total"] <= 4


def test_compiled_steps_of_a_padded_batch_write_the_same_texts(trained, traced):
    """Catches: The mask leaves out the padding, or positions are counted with it."""
    ids, pad = padded(trained)
    arguments = trained.base, mixture(trained, "prt"), ids
    options = dict(length=20, end=trained.end, pad=pad)
    assert torch.equal(decode.compiled(*arguments, **options), prt.generate(*arguments, **options))
    assert traced["ok"] == 1


@pytest.mark.parametrize("name", ["prt", "prt and source"])
def test_compiled_speculation_of_a_padded_batch_writes_the_same_texts(trained, traced, name):
    ids, pad = padded(trained)
    rewards, drafter = drafted(trained, name)
    arguments, options = (trained.base, rewards, ids), dict(length=20, end=trained.end, pad=pad)
    fast = decode.speculative(*arguments, **options, drafter=drafter, compile=True)
    assert torch.equal(fast, prt.generate(*arguments, **options))


@pytest.mark.parametrize("name", ["prt", "prt and source", "the mixture itself"])
def test_logits_of_a_compiled_step_outlive_it(trained, monkeypatch, name):
    """Catches: Drafts are chosen by the outputs of a CUDA graph that a later one has overwritten."""
    outputs, steps = [], []

    def step(*arguments):
        outputs[:] = decode.last_logits(*arguments)
        steps.append(1)
        return list(outputs)

    def overwrite():
        for logits in outputs:
            logits.fill_(float("nan"))

    monkeypatch.setattr(decode, "compiled_logits", lambda device_type: step)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", overwrite)
    rewards, drafter = drafted(trained, name)
    assert_same_text(trained, DRAFTS[name][0], decode.speculative, compile=True, drafter=drafter)
    assert steps


@pytest.mark.parametrize("rows", [1, 6])
def test_steps_get_tokens_of_the_same_strides(trained, monkeypatch, rows):
    """Catches: A step is compiled anew for tokens that are a slice of those that were kept."""
    strides, score = set(), decode.next_logits

    def see(caches, tokens, *arguments):
        if tokens.shape[1] == 1:
            strides.add(tokens.stride())
        assert tokens.is_contiguous()
        return score(caches, tokens, *arguments)

    monkeypatch.setattr(decode, "next_logits", see)
    ids, pad = padded(trained)
    decode.speculative(trained.base, mixture(trained, "prt"), ids[:rows], length=20, pad=pad[:rows])
    assert strides == {(1, 1)}


def test_compiled_speculation_on_a_base_alone_is_plain_decoding(trained, traced):
    ids = torch.tensor([trained.prompts[0]])
    plain = prt.generate(trained.old, [], ids, length=8)
    assert torch.equal(decode.speculative(trained.old, [], ids, length=8, compile=True), plain)
    assert traced["ok"] == 1


def test_compiled_steps_draw_the_same_samples(trained, traced):
    def sampled(generate):
        draw = decode.sampler(1.0, 0.9, torch.Generator().manual_seed(1))
        return generate(trained.old, [], torch.tensor([trained.prompts[0]]), length=20, draw=draw)

    assert torch.equal(sampled(decode.compiled), sampled(prt.generate))


def test_compiled_steps_reach_the_last_position(traced):
    """Catches: A cache whose length is rounded up exceeds the model's positions. These are learned ones."""
    model, ids = load("gpt2"), random_ids(1, 58)
    assert model.arch["positions"] == 64
    assert torch.equal(decode.compiled(model, [], ids, length=6), prt.generate(model, [], ids, length=6))


def test_compiled_steps_of_similar_lengths_share_a_cache(trained):
    """Catches: A CUDA graph is recorded for memory that the next call has given away."""
    cache = decode.static_cache(trained.old, 1, 60, None)
    assert decode.static_cache(trained.old, 1, 70, None) is cache
    assert decode.static_cache(trained.tuned, 1, 60, None) is not cache
    assert decode.static_cache(trained.old, 2, 60, None) is not cache


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_the_compiler_writes_the_same_text(trained):
    """Catches: What the compiler makes of a step writes the caches, or reads what masks exclude, wrongly."""
    arguments = trained.old, mixture(trained, "prt"), torch.tensor([trained.prompts[0]])
    decode.compiled_logits("cpu")
    # Autotuning takes seconds for each shape, and so do programs that check the CPU's vector instructions.
    with torch._inductor.config.patch({"max_autotune": False, "cpp.vec_isa_ok": True}):
        fast = decode.compiled(*arguments, length=12)
    assert torch.equal(fast, prt.generate(*arguments, length=12))


# All ways of decoding

WAYS = dict(generate=prt.generate, speculative=decode.speculative, compiled=decode.compiled)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_without_room_are_refused_before_the_first_step(trained, traced, way):
    ids = torch.tensor([trained.prompts[0]])
    assert trained.reward.arch["positions"] == 256
    base = Count(trained.base)
    length = 257 - ids.shape[1]
    with pytest.raises(ValueError, match="257 tokens.* room for 256"):
        WAYS[way](base, [(1.0, trained.reward)], ids, length=length)
    assert base.passes == 0


@pytest.mark.parametrize("way", ["speculative", "compiled"])
def test_decoding_builds_no_graph_for_backward(trained, traced, monkeypatch, way):
    """Catches: Every token that is generated keeps the activations of all models in memory."""
    score, scores = decode.next_logits, []

    def keep(*arguments, **options):
        logits = score(*arguments, **options)
        scores.extend(logits.values())
        return logits

    monkeypatch.setattr(decode, "next_logits", keep)
    policies = [copy.deepcopy(policy).requires_grad_(True) for policy in (trained.old, trained.reward)]
    WAYS[way](policies[0], [(1.0, policies[1])], torch.tensor([trained.prompts[0]]), length=4)
    assert scores
    assert not any(x.requires_grad for x in scores)


# Samples

P = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def assert_near(shares, want):
    """Shares of 20,000 samples, or a distribution, must be `want` up to chance, and 0 where it is 0."""
    want = torch.tensor(want)
    assert torch.equal(shares > 0, want > 0)
    assert error(shares, want / want.sum()) < 0.02


@pytest.mark.parametrize("temperature, top_p, want", [
    (1.0, 1.0, [0.1, 0.4, 0.05, 0.25, 0.2]),
    (1.0, 0.6, [0, 0.4, 0, 0.25, 0]),
    (1.0, 0.7, [0, 0.4, 0, 0.25, 0.2]),  # 0.65 is not enough
    (1.0, 0.3, [0, 1.0, 0, 0, 0]),
    (0.5, 1.0, [0.1**2, 0.4**2, 0.05**2, 0.25**2, 0.2**2]),
    (2.0, 0.6, [0, 0.4**0.5, 0, 0.25**0.5, 0.2**0.5]),  # the smallest set of what is sampled
])
def test_samples_follow_temperature_and_top_p(temperature, top_p, want):
    """Catches: The set is too large, lacks the token that crosses top_p, or the temperature is inverted."""
    log_probs = (P.log() + 3).expand(20_000, 5)  # up to a constant
    p = decode.probabilities(log_probs, temperature, top_p)
    assert_near(p[0], want)
    tokens = decode.sample(p, torch.Generator().manual_seed(0))
    assert tokens.shape == (20_000,)
    assert_near(torch.bincount(tokens, minlength=5) / 20_000, want)
    tokens = decode.sampler(temperature, top_p, torch.Generator().manual_seed(0))(log_probs)
    assert_near(torch.bincount(tokens, minlength=5) / 20_000, want)


def test_samples_need_no_normalized_distribution():
    tokens = decode.sample(3 * P.expand(20_000, 5), torch.Generator().manual_seed(0))
    assert_near(torch.bincount(tokens, minlength=5) / 20_000, P.tolist())


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1e-9)])
def test_without_temperature_or_top_p_the_distribution_is_one_hot(temperature, top_p):
    log_probs = torch.tensor([[0.0, 9, 0], [0, 0, 9]])
    p = decode.probabilities(log_probs, temperature, top_p)
    assert p.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert decode.sample(p).tolist() == [1, 2]
    assert decode.sampler(temperature, top_p)(log_probs).tolist() == [1, 2]


# Stop strings

@pytest.mark.parametrize("way", ["generate", "compiled"])
def test_a_row_ends_after_its_first_stop_string(trained, traced, way):
    """Catches: A stop string in two tokens is missed, the others end with the row, or its text is another."""
    (ids, pad), end, tokenizer = padded(trained), trained.end, Tokenizer(train_lm.TOKENIZER.read_text(), "")
    generate, rewards, T = dict(generate=prt.generate, compiled=decode.compiled)[way], [], ids.shape[1]
    whole = prt.generate(trained.base, rewards, ids, length=24, end=end, pad=pad)
    texts = [tokenizer.decode(row) for row in whole[:, T:].tolist()]
    until = [texts[0][8:13], texts[3][15:20]]
    draw = decode.stopping(decode.sampler(0.0), until, tokenizer.decode, end)
    rows = generate(trained.base, rewards, ids, length=24, end=end, pad=pad, draw=draw)[:, T:].tolist()
    for row, text_, full in zip(rows, texts, whole[:, T:].tolist()):
        n = next((n for n in range(25) if any(x in tokenizer.decode(full[:n]) for x in until)), 24)
        assert row == full[:n] + [end] * (24 - n), text_
    assert len({row.index(end) if end in row else 24 for row in rows}) > 1
