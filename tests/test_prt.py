"""The method: identities that the paper states or implies, and the training loop."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import prt

G = torch.Generator().manual_seed(0)
BASE, LOGITS, REF = (2 * torch.randn(6, 5, generator=G) for _ in range(3))
TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_reward_with_uniform_reference_is_beta_times_the_logits_up_to_a_constant():
    uniform = prt.reward(LOGITS, torch.zeros(6, 5), beta=0.7)
    assert torch.equal(prt.reward(LOGITS, beta=0.7), 0.7 * LOGITS)
    difference = uniform - 0.7 * LOGITS
    assert torch.allclose(difference, difference[:, :1].expand(-1, 5), atol=1e-5)
    assert torch.allclose(prt.tilt(BASE, uniform), prt.tilt(BASE, 0.7 * LOGITS), atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_tilt_is_base_times_exp_reward_over_beta(beta):
    want = BASE.softmax(-1) * (LOGITS / beta).exp()
    assert torch.allclose(prt.tilt(BASE, LOGITS, beta).exp(), want / want.sum(-1, keepdim=True), atol=1e-6)
    normalised = prt.tilt(F.log_softmax(BASE, -1), LOGITS, beta)
    assert torch.allclose(prt.tilt(BASE, LOGITS, beta), normalised, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    """In bfloat16 sums of logits near 30 lose whole nats."""
    base, r = (30 + BASE).bfloat16(), (30 + LOGITS).bfloat16()
    assert prt.tilt(base, r).dtype == prt.reward(r).dtype == torch.float32
    assert torch.allclose(prt.tilt(base, r), prt.tilt(base.float(), r.float()))


def test_eft_on_the_source_is_the_tuned_model():
    for beta in (1.0, 0.3):
        tilted = prt.tilt(REF, prt.reward(LOGITS, REF, beta), beta)
        assert torch.allclose(tilted, F.log_softmax(LOGITS, -1), atol=1e-5)


def test_normalised_reward_stands_for_one_fine_tuned_model():
    """Prop. 3.1: r = log pi_ft / pi_pt has E_pt[exp r] = 1, and leads back to pi_ft."""
    r = prt.reward(LOGITS, BASE)
    assert torch.allclose((BASE.softmax(-1) * r.exp()).sum(-1), torch.ones(6), atol=1e-5)
    assert torch.allclose(prt.tilt(BASE, r).exp(), LOGITS.softmax(-1), atol=1e-6)


def test_at_initialisation_the_tilt_is_the_squared_base():
    tilted = prt.tilt(BASE, prt.reward(BASE))
    want = BASE.softmax(-1) ** 2
    assert torch.allclose(tilted.exp(), want / want.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(tilted.argmax(-1), BASE.argmax(-1))
    assert abs(prt.prt_loss(BASE, BASE, TARGETS) - F.cross_entropy(BASE, TARGETS)) > 0.05


def test_gradient_is_the_tilted_distribution_minus_the_truth():
    r = LOGITS.clone().requires_grad_()
    prt.prt_loss(BASE, r, TARGETS).backward()
    want = (prt.tilt(BASE, LOGITS).exp() - F.one_hot(TARGETS, 5)) / 6
    assert torch.allclose(r.grad, want, atol=1e-6)


def test_loss_is_value_minus_reward():
    """Eq. 8, 9: -mean of r(x, y*) - V(x) + log pi_pt(y*|x), V = log E_pt[exp r]."""
    value = (BASE.softmax(-1) * LOGITS.exp()).sum(-1).log()
    at = lambda table: table[torch.arange(6), TARGETS]  # noqa: E731
    want = (value - at(LOGITS) - at(F.log_softmax(BASE, -1))).mean()
    assert torch.allclose(prt.prt_loss(BASE, LOGITS, TARGETS), want, atol=1e-5)


def test_loss_counts_only_targets_that_count():
    targets = TARGETS.clone()
    targets[[1, 4]] = -100
    keep = targets >= 0
    for alpha in (0.0, 0.1):
        want = prt.prt_loss(BASE[keep], LOGITS[keep], TARGETS[keep], alpha=alpha)
        assert torch.allclose(prt.prt_loss(BASE, LOGITS, targets, alpha=alpha), want, atol=1e-6)
    other = torch.where(keep, TARGETS, 7)
    assert torch.allclose(prt.prt_loss(BASE, LOGITS, other, ignore_index=7),
                          prt.prt_loss(BASE[keep], LOGITS[keep], TARGETS[keep]), atol=1e-6)
    assert prt.prt_loss(BASE, LOGITS, torch.full((6,), -100)) == 0
    assert torch.allclose(prt.prt_loss(BASE.view(2, 3, 5), LOGITS.view(2, 3, 5), TARGETS.view(2, 3)),
                          prt.prt_loss(BASE, LOGITS, TARGETS))  # [B, T, L], as text has it


def test_alpha_rewards_entropy():
    """Eq. 12; a uniform reward has the entropy log L, which alpha takes off the loss."""
    r = torch.zeros(6, 5)
    plain = prt.prt_loss(BASE, r, TARGETS)
    assert torch.allclose(prt.prt_loss(BASE, r, TARGETS, alpha=0.1), plain - 0.1 * math.log(5), atol=1e-6)


def test_label_counts_that_differ_are_named():
    for call in (lambda: prt.prt_loss(BASE, LOGITS[:, :4], TARGETS), lambda: prt.reward(LOGITS[:, :4], REF),
                 lambda: prt.tilt(BASE, LOGITS[:, :4])):
        with pytest.raises(ValueError, match=r"4.*5|5.*4"):
            call()


# The loop, on a linear policy: 40 examples, 3 labels, a base that is half right.
X = torch.randn(40, 6, generator=G)
Y = (X @ torch.randn(6, 3, generator=G)).argmax(-1)
CACHED = F.one_hot(torch.where(torch.rand(40, generator=G) < 0.5, Y, 0), 3).float()


def policy():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 3)


def fetch(i, generator, cached=CACHED):
    return (X[i],), Y[i], None if cached is None else cached[i]


def train(network=None, fetch=fetch, **options):
    network = network or policy()
    options = dict(steps=12, lr=0.05, log_every=4) | options
    history = prt.fit(network, lambda step: prt.shuffled(step, 40, 16, 0), fetch, **options)
    return network, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_every_epoch_sees_every_example_once():
    seen = torch.cat([prt.shuffled(step, 40, 16, seed=3) for step in range(5)])  # 80 = two epochs
    first, second = seen[:40], seen[40:]
    assert torch.equal(first.sort().values, torch.arange(40))
    assert torch.equal(second.sort().values, torch.arange(40))
    assert not torch.equal(first, second)
    assert len(prt.shuffled(0, 5, 16, 0)) == 16  # a batch larger than the data


@pytest.mark.parametrize("decay, middle", [("cosine", 0.5 + 0.5 * math.cos(math.pi / 4)), ("linear", 0.75)])
def test_schedule(decay, middle):
    """Warm-up reaches the peak, the decay starts there and ends near zero."""
    factors = [prt.schedule(step, 100, 20, decay) for step in range(100)]
    assert factors[0] == 1 / 20 and factors[19] == factors[20] == 1 == max(factors)
    assert abs(factors[40] - middle) < 1e-9 and factors[99] < 0.02


def test_fit_learns_and_reports():
    network, history = train(steps=60, log_every=20)
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and history[-1]["accuracy"] > 0.85
    assert history[-1]["kl"] > 0 and history[-1]["per_second"] > 0 and history[-1]["peak_mib"] > 0


def test_reported_figures_are_those_of_the_loss():
    network, history = train(lr=0.0, steps=5, log_every=5, accum=4)  # each example twice, unmoved weights
    log_probs = prt.tilt(CACHED, policy()(X))
    assert abs(history[0]["loss"] - F.nll_loss(log_probs, Y).item()) < 1e-5
    assert abs(history[0]["accuracy"] - (log_probs.argmax(-1) == Y).float().mean().item()) < 1e-5
    last = prt.shuffled(4, 40, 16, 0)  # the KL is that of the log step's whole batch
    assert abs(history[0]["kl"] - prt.kl(log_probs, CACHED)[last].mean().item()) < 1e-5


def test_random_views_differ_between_steps_and_seeds():
    drawn = []

    def noisy(i, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return fetch(i, generator)

    for seed in (0, 1):
        train(fetch=noisy, accum=2, seed=seed)
    assert len(set(drawn)) == len(drawn) == 2 * 12 * 2


def test_fine_tuning_is_the_reward_with_the_base_as_reference():
    """The base must cancel: ft with any base, with none, and plain cross-entropy end in the same weights."""
    with_base, _ = train(method="ft")
    without, _ = train(fetch=lambda i, g: fetch(i, g, None))
    assert close(with_base, without)
    assert not close(with_base, train()[0])


def test_frozen_base_equals_its_cached_logits():
    base = torch.nn.Linear(6, 3)
    with torch.no_grad():
        cached = base(X)
    before = copy.deepcopy(base)
    live, _ = train(fetch=lambda i, g: fetch(i, g, None), base=base)
    assert close(live, train(fetch=lambda i, g: fetch(i, g, cached))[0])
    assert same(base, before) and all(p.grad is None for p in base.parameters())


def test_accumulation_normalises_over_all_micro_batches():
    """Averaging the micro-batches' own means weighs a target in a sparse micro-batch more than others."""
    masked = torch.where(torch.arange(40) % 7 < 3, Y, -100)
    sparse = lambda i, g: ((X[i],), masked[i], CACHED[i])  # noqa: E731
    assert close(train(fetch=sparse)[0], train(fetch=sparse, accum=4)[0])
    assert close(train(fetch=sparse, alpha=0.1)[0], train(fetch=sparse, alpha=0.1, accum=4)[0])
    with pytest.raises(ValueError, match="batch of 16 does not split into 3"):
        train(accum=3)


def test_weight_decay_zero_is_adam():
    adam = policy()
    optimizer = torch.optim.Adam(adam.parameters(), lr=0.05)
    for step in range(6):
        i = prt.shuffled(step, 40, 16, 0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * prt.schedule(step, 6, 0, "cosine")
        optimizer.zero_grad()
        F.cross_entropy(CACHED[i] + adam(X[i]), Y[i]).backward()
        torch.nn.utils.clip_grad_norm_(adam.parameters(), 1.0)
        optimizer.step()
    assert close(train(steps=6)[0], adam)


@pytest.mark.parametrize("stop", [3, 8])
def test_resumed_run_equals_one_never_interrupted(stop):
    """Bit for bit, random views included: a lost moment estimate, step or random state would show."""
    def noisy(i, generator):
        return (X[i] + torch.randn(len(i), 6, generator=generator),), Y[i], CACHED[i]

    saved = {}
    keep = lambda s: saved.update({s["step"]: copy.deepcopy(s)})  # noqa: E731
    whole, _ = train(fetch=noisy, warmup=4, save_every=1, save=keep)
    assert "optimizer" in saved[stop] and "optimizer" not in saved[12]
    torch.manual_seed(99)
    resumed = torch.nn.Linear(6, 3)
    assert same(whole, train(resumed, noisy, warmup=4, state=saved[stop])[0])


def test_loss_that_is_not_finite_stops_before_it_is_saved():
    saved = []

    def poisoned(i, generator, calls=[]):
        calls.append(i)
        return (X[i] * (math.nan if len(calls) > 6 else 1),), Y[i], CACHED[i]

    with pytest.raises(FloatingPointError, match="step 8"):
        train(fetch=poisoned, save_every=4, save=saved.append)
    assert [s["step"] for s in saved] == [4]


def test_predict_in_pieces_equals_one_pass():
    network = policy()
    assert torch.allclose(prt.predict(network, X, 7), network(X), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fit_on_cuda_waits_for_the_device_only_where_it_logs():
    """A hidden .item() or blocking copy in every step leaves the GPU idle."""
    data = [t.cuda() for t in (X, Y, CACHED)]

    def fetch(i, generator):
        i = i.cuda(non_blocking=True)
        return (data[0][i],), data[1][i], data[2][i]

    network = policy().cuda()
    train(network, fetch, steps=2, log_every=2)
    waits = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            train(network, fetch, steps=20, log_every=10)
        waits = [w for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) < 20
