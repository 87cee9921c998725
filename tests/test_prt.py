"""The method (prt.py): identities of the paper, the training loop, generation."""
import copy
import doctest
import math
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import error, load, random_ids

import prt
from models import runs

G = torch.Generator().manual_seed(0)
BASE, LOGITS = (2 * torch.randn(6, 5, generator=G) for _ in range(2))
TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_the_examples_in_the_docstrings_are_right(monkeypatch):
    monkeypatch.setattr(prt, "print", lambda *args, **options: None, raising=False)  # the line of fit's log
    failed, attempted = doctest.testmod(prt)
    assert failed == 0
    assert attempted >= 9


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_tilt_is_the_base_times_exp_of_reward_over_beta(beta):
    want = BASE.softmax(-1) * (LOGITS / beta).exp()
    assert torch.allclose(prt.tilt(BASE, LOGITS, beta).exp(), want / want.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(prt.reward(LOGITS, beta=beta), beta * LOGITS)  # without a reference


def test_half_precision_is_computed_in_float32():
    """Catches: In bfloat16, sums of logits near 30 lose whole nats."""
    base, r = (30 + BASE).bfloat16(), (30 + LOGITS).bfloat16()
    assert prt.tilt(base, r).dtype == prt.reward(r).dtype == torch.float32
    assert torch.allclose(prt.tilt(base, r), prt.tilt(base.float(), r.float()))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_reward_of_a_fine_tuned_model_is_normalized_and_restores_the_model(beta):
    """Prop. 3.1: r = beta * log(pi_ft / pi_pt) has E_pt[exp(r / beta)] = 1, and EFT gives pi_ft back."""
    r = prt.reward(LOGITS, BASE, beta)
    assert torch.allclose((BASE.softmax(-1) * (r / beta).exp()).sum(-1), torch.ones(6), atol=1e-5)
    assert torch.allclose(prt.tilt(BASE, r, beta), F.log_softmax(LOGITS, -1), atol=1e-5)


def test_numbers_of_labels_that_differ_are_named():
    for call in (prt.reward, prt.tilt, lambda base, r: prt.prt_loss(base, r, TARGETS)):
        with pytest.raises(ValueError, match=r"4.*5|5.*4"):
            call(BASE, LOGITS[:, :4])


def test_the_loss_is_value_minus_reward():
    """Eq. 8 and 9: the mean of V(x) - r(x, y*) - log pi_pt(y*|x), where V = log E_pt[exp r].

    Catches: Tensors of shape [B, T, L], of texts, have other means than the same targets in one row.
    """
    value = (BASE.softmax(-1) * LOGITS.exp()).sum(-1).log()
    rows = torch.arange(6)
    want = (value - LOGITS[rows, TARGETS] - F.log_softmax(BASE, -1)[rows, TARGETS]).mean()
    for shape in ((6,), (2, 3)):
        base, r = BASE.view(*shape, 5), LOGITS.view(*shape, 5)
        assert torch.allclose(prt.prt_loss(base, r, TARGETS.view(shape)), want, atol=1e-5)


def test_alpha_rewards_entropy():
    """Eq. 12: a uniform reward has the entropy log L, and alpha times it is subtracted from the loss."""
    r = torch.zeros(6, 5)
    plain = prt.prt_loss(BASE, r, TARGETS)
    assert torch.allclose(prt.prt_loss(BASE, r, TARGETS, alpha=0.1), plain - 0.1 * math.log(5), atol=1e-6)


# The loop, on a linear policy: 40 examples, 3 labels, a base that is half right.

X = torch.randn(40, 6, generator=G)
Y = (X @ torch.randn(6, 3, generator=G)).argmax(-1)
CACHED = F.one_hot(torch.where(torch.rand(40, generator=G) < 0.5, Y, 0), 3).float()


def new_policy():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 3)


def reader(base_logits):
    """Returns a `fetch` with the base's cached logits, or None for no cache."""
    return lambda i, generator: ((X[i],), Y[i], None if base_logits is None else base_logits[i])


def noisy(i, generator):
    return (X[i] + torch.randn(len(i), 6, generator=generator),), Y[i], CACHED[i]


def indices(step):
    return runs.shuffled(step, 40, 16, 0)


def adamw(policy, lr=0.05):
    return torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)


def train(policy=None, fetch=None, lr=0.05, **options):
    """Returns a policy after 12 steps of AdamW, and the history."""
    policy = policy or new_policy()
    options = dict(steps=12, log_every=4, optimizer=adamw(policy, lr)) | options
    return policy, prt.fit(policy, indices, fetch or reader(CACHED), **options)


def difference(a, b):
    return max(map(error, a.parameters(), b.parameters()))


def in_step(n):
    """Returns a `stop` that is true in its n-th call, and the list of the calls."""
    calls = []
    return lambda: calls.append(1) or len(calls) == n, calls


def preference_loss(base_logits, r, targets, beta, alpha):
    """The logistic loss of preferences, without the base: targets [N, 2] are (chosen, rejected) labels."""
    chosen, rejected = r.gather(-1, targets).unbind(-1)
    return -F.logsigmoid(chosen - rejected).sum(), (chosen > rejected).sum()


PAIRS = torch.stack([Y, (Y + 1 + torch.arange(40) % 2) % 3], 1)  # with one of the two wrong labels
PREFERENCES = dict(fetch=lambda i, generator: ((X[i],), PAIRS[i], CACHED[i]), loss=preference_loss)


@pytest.mark.parametrize("options", [dict(), PREFERENCES], ids=["labels", "preferences"])
def test_fit_learns(options):
    (before,), (*_, after) = train(lr=0.0, steps=5, log_every=5, **options)[1], train(steps=60, **options)[1]
    assert after["loss"] < 0.5 * before["loss"]
    assert before["accuracy"] < 0.7 < 0.85 < after["accuracy"]


def test_a_row_has_the_means_over_the_steps_since_the_last_row(capsys):
    """With weights that do not move. Catches: Norm or KL is that of one step; both labels of a pair count."""
    stop, _ = in_step(5)
    _, history = train(lr=0.0, accum=4, clip=0.01, name="reward", stop=stop, **PREFERENCES)
    policy, steps = new_policy(), []
    for i in map(indices, range(5)):
        loss, correct = preference_loss(None, policy(X[i]), PAIRS[i], 1.0, 0.0)
        gradients = torch.autograd.grad(loss / 16, list(policy.parameters()))
        divergence = prt.kl(prt.tilt(CACHED[i], policy(X[i])), CACHED[i]).mean()
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        steps.append([loss.item() / 16, correct.item() / 16, norm.item(), divergence.item()])
    printed = capsys.readouterr().out.splitlines()  # where there is no terminal
    for row, line, first, last in zip(history, printed, (1, 5), (4, 5), strict=True):
        assert row.pop("per_second") > 0
        means = torch.tensor(steps[first - 1:last]).mean(0).tolist()
        want = dict(zip(("loss", "accuracy", "norm", "kl"), means), step=last)
        assert row == pytest.approx(want, abs=1e-5)
        values = "loss {loss:.4f}, accuracy {accuracy:.3f}, norm {norm:.3f}, KL {kl:.3f}, ".format(**row)
        assert line.startswith(f"reward {last}/12: {values}")
        assert f"/s (steps {first}-{last}), " in line and line.endswith(" s left")


def test_random_views_differ_between_steps_micro_batches_and_seeds_and_the_policy_keeps_its_mode():
    def draw(i, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return reader(CACHED)(i, generator)

    drawn = []
    for seed in (0, 1):
        policy, _ = train(new_policy().train(seed == 0), draw, accum=2, seed=seed)
        assert policy.training == (seed == 0)
    assert len(set(drawn)) == len(drawn) == 2 * 12 * 2


FROZEN = torch.nn.Linear(6, 3)


@pytest.mark.parametrize("one, other", [
    (dict(fetch=reader(None), base=FROZEN), dict(fetch=reader(FROZEN(X).detach()))),
    (dict(fetch=reader(None)), dict(fetch=reader(torch.zeros(40, 3)))),
    (dict(fetch=reader(None)), dict(method="ft")),
    (dict(fetch=reader(None)), dict(method="ft", fetch=reader(None), base=FROZEN))])
def test_two_ways_to_train_the_same_policy(one, other):
    assert difference(train(**one)[0], train(**other)[0]) < 1e-6


@pytest.mark.parametrize("options, passes, known", [
    (dict(), 12, True), (dict(method="ft"), 0, False), (dict(method="ft", alpha=0.1), 12, True),
    (dict(method="ft", fetch=reader(CACHED)), 0, True), (dict(base=None), 0, False)])
def test_the_frozen_base_runs_where_the_loss_needs_it_and_the_kl_is_shown_where_it_is_known(
        capsys, options, passes, known):
    """Catches: Fine-tuning pays for a base that cancels out of its loss; a KL from nothing; a base moves."""
    base, calls = copy.deepcopy(FROZEN), []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    _, history = train(**dict(fetch=reader(None), base=base) | options)
    assert len(calls) == passes
    assert [row["kl"] is not None for row in history] == [known] * 3
    assert capsys.readouterr().out.count("KL") == 3 * known
    assert difference(base, FROZEN) == 0 and all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("options, message", [
    (dict(accum=3), "batch of 16 does not split into 3"),
    *((dict(warmup=n), f"warmup of {n} steps does not fit into 12 steps") for n in (12, 13, -1))], ids=str)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


POLICY, BATCH_NORM = new_policy(), torch.nn.BatchNorm1d(6)
REFUSED = [
    (dict(model=new_policy().requires_grad_(False)), "no weight of model requires grad.*requires_grad_"),
    (dict(model=torch.nn.Flatten()), "no weight of model requires grad.*requires_grad_"),
    (dict(optimizer=adamw(FROZEN)), "no weight of model .*in optimizer"),
    *((dict(model=POLICY, base=base), "base has weights that are trained.*deepcopy")
      for base in (POLICY, torch.nn.Sequential(POLICY))),
    (dict(base=BATCH_NORM), r"base has BatchNorm in train mode.*base.eval\(\)"),
    (dict(base=torch.nn.Linear(6, 4)), "base has 4 labels and the reward 3"),
    (dict(fetch=lambda i, generator: ((X[i],), Y[i].repeat(2), None)), "longer"),
    (dict(fetch=lambda i, generator: (X[i], Y[i])), "fetch must return inputs"),
    (dict(fetch=[]), "indices and fetch must be functions"),
    (dict(indices=torch.utils.data.DataLoader([1])), "indices and fetch must be functions"),
    (dict(indices=lambda step: [0, 1]), "indices returned a list"),
    (dict(model=torch.nn.LSTM(6, 3)), "the model returned tuple, not a tensor of logits"),
    (dict(base=lambda x: POLICY(x)), "base is a function, but must be a module"),
    (dict(method="rpt"), "unknown method='rpt'"),
    (dict(decay="cosin"), "decay='cosin'")]


@pytest.mark.parametrize("options, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_fit_cannot_use_is_refused_in_a_sentence(options, message):
    """Catches: Training of nothing, with a base that moves, or with targets of other logits."""
    with pytest.raises(ValueError, match=message):
        prt.fit(**dict(model=new_policy(), indices=indices, fetch=reader(None), steps=2) | options)


def test_a_base_may_require_gradients_or_share_weights_that_are_not_trained():
    """Catches: One of them is refused, or trains another policy."""
    trunk = torch.nn.Linear(6, 6).requires_grad_(False)
    shared = torch.nn.Sequential(trunk, copy.deepcopy(BATCH_NORM).eval(), FROZEN)
    for base in FROZEN, shared:
        policies = [train(torch.nn.Sequential(trunk, new_policy()), reader(None), base=b)[0]
                    for b in (base, copy.deepcopy(base))]
        assert FROZEN.weight.requires_grad and difference(*policies) == 0


def test_more_than_one_process_needs_a_sharded_policy(monkeypatch):
    """Catches: Each process trains a copy of its own, with the gradient of its own micro-batches."""
    for name, value in dict(is_initialized=True, get_rank=0, get_world_size=2).items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(ValueError, match="not sharded"):
        train()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fit_on_cuda_synchronizes_only_where_it_logs(capsys):
    """Catches: A hidden .item() or blocking copy in every step leaves the GPU idle."""
    x, y, cached = (t.cuda() for t in (X, Y, CACHED))

    def fetch(i, generator):
        i = i.cuda(non_blocking=True)
        return (x[i],), y[i], cached[i]

    policy = new_policy().cuda()
    train(policy, fetch, steps=2, log_every=2)
    assert "MiB" in capsys.readouterr().out
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            train(policy, fetch, steps=20, log_every=10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) < 20


@pytest.mark.parametrize("rates, decay", [(None, "cosine"), ([0.05, 0.002], "linear")])
def test_a_step_is_one_of_adam_with_clipped_gradients_and_the_schedule_of_each_group(rates, decay):
    """In float64, where a weight decay of 0.01 would be seen next to the default learning rate of 1e-5."""
    policy, want = new_policy().double(), new_policy().double()
    groups, want_groups = ([dict(params=[p], lr=lr) for p, lr in zip(m.parameters(), rates or [1e-5] * 2)]
                           for m in (policy, want))
    prt.fit(policy, indices, lambda i, generator: ((X[i].double(),), Y[i], CACHED[i]), steps=6, clip=0.1,
            warmup=2, decay=decay, optimizer=rates and torch.optim.Adam(groups))
    optimizer = torch.optim.Adam(want_groups)
    for step in range(6):
        i = indices(step)
        for group, lr in zip(optimizer.param_groups, rates or [1e-5] * 2):
            group["lr"] = lr * prt.schedule(step, 6, 2, decay)
        optimizer.zero_grad()
        F.cross_entropy(CACHED[i] + want(X[i].double()).float(), Y[i]).backward()
        torch.nn.utils.clip_grad_norm_(want.parameters(), 0.1)
        optimizer.step()
    assert error(want.weight, new_policy().weight) > 1e-5
    assert error(policy.weight, want.weight) < 1e-9
    assert error(policy.bias, want.bias) < 1e-9


def test_the_learning_rates_at_the_call_are_the_peaks_and_are_there_again_after_it():
    """Catches: A second run begins where the schedule of the first one ended, or with its peak."""
    policy, rates = new_policy(), []
    optimizer = adamw(policy)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    for peak, last in ((0.05, 8), (0.02, None)):  # the first run is stopped
        optimizer.param_groups[0]["lr"] = peak
        train(policy, optimizer=optimizer, warmup=4, stop=in_step(last)[0])
        assert rates == [peak * prt.schedule(step, 12, 4, "cosine") for step in range(last or 12)]
        assert optimizer.param_groups[0]["lr"] == peak
        rates.clear()


@pytest.mark.parametrize("decay, middle", [("cosine", 0.5 + 0.5 * math.cos(math.pi / 4)), ("linear", 0.75)])
def test_the_schedule_warms_up_to_the_peak_and_decays_from_there_to_near_0(decay, middle):
    factors = [prt.schedule(step, 100, 20, decay) for step in range(100)]
    assert factors[0] == 1 / 20
    assert factors[19] == factors[20] == 1 == max(factors)
    assert abs(factors[40] - middle) < 1e-9
    assert factors[99] < 0.02


# Checkpoints and failures

@pytest.mark.parametrize("options, last, saves, rows", [
    (dict(steps=7, log_every=5), None, None, [5, 7]),
    (dict(steps=10, log_every=100), None, [2, 4, 6, 8, 10], [2, 4, 6, 8, 10]),
    (dict(steps=12, log_every=6, save_every=5), None, [5, 10, 12], [5, 6, 10, 12]),
    *((dict(log_every=100, save_every=4), last, saves, saves or [last])
      for last, saves in [(1, [1]), (4, [4]), (5, [4, 5]), (12, [4, 8, 12]), (1, None)])], ids=str)
def test_the_last_step_and_those_that_save_are_logged(options, last, saves, rows):
    """Catches: A run goes on after a stop, saves a step twice, or leaves out the row of a save or stop."""
    saved, (stop, calls) = [], in_step(last)
    _, history = train(save=None if saves is None else saved.append, stop=stop, **options)
    assert saved == (saves or [])
    assert [row["step"] for row in history] == rows
    assert len(calls) == rows[-1]
    assert all(math.isfinite(row[key]) for row in history for key in ("loss", "accuracy", "norm"))


@pytest.mark.parametrize("last", [3, 8], ids=["in the warmup", "in the decay"])
def test_a_stopped_run_resumes_bit_for_bit(last):
    """Catches: A moment estimate, the step, or a random state is lost."""
    whole, _ = train(fetch=noisy, warmup=4)
    half, states = new_policy(), {}
    optimizer = adamw(half)

    def save(step):
        states[step] = copy.deepcopy((half.state_dict(), optimizer.state_dict()))

    train(half, noisy, optimizer=optimizer, warmup=4, save=save, save_every=100, stop=in_step(last)[0])
    resumed = torch.nn.Linear(6, 3)
    optimizer = adamw(resumed)
    for part, state in zip((resumed, optimizer), states[last]):
        part.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.05  # the peak again, and not the rate of the last step
    assert difference(resumed, whole) > 0
    train(resumed, noisy, optimizer=optimizer, warmup=4, start=last)
    assert difference(resumed, whole) == 0


@pytest.mark.parametrize("log_every, last, named", [(4, None, 8), (100, 6, 6)], ids=["logged", "stopped"])
def test_a_loss_that_is_not_finite_is_not_saved(log_every, last, named):
    """Catches: A save, or Ctrl-C, writes nan over the last good checkpoint."""
    saved, calls = [], []

    def poisoned(i, generator):
        calls.append(i)
        return (X[i] * (math.nan if len(calls) > 5 else 1),), Y[i], CACHED[i]

    with pytest.raises(FloatingPointError, match=f"steps 5 to {named}:"):
        train(fetch=poisoned, log_every=log_every, save_every=4, save=saved.append, stop=in_step(last)[0])
    assert saved == [4]


# The loss in chunks, on two GPTs

TEXTS = random_ids(4, 11, seed=5)


def texts(i):
    """Returns the inputs and targets of texts, another number of each: so micro-batches differ, too."""
    index = torch.cat([10 * row + torch.arange(2 + text, 10) for row, text in enumerate(i.tolist())])
    return (TEXTS[i, :-1], index), TEXTS[i, 1:].flatten()[index]


def one_step(policy, **options):
    """Returns what one step of prt.fit reports, and the gradient of each weight in it."""
    parameters, gradients = list(policy.parameters()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in parameters))
    row, = prt.fit(policy, lambda step: torch.arange(4), lambda i, _: (*texts(i), None), steps=1,
                   base=load("falcon3"), optimizer=optimizer, clip=math.inf, **options)
    return {key: row[key] for key in ("loss", "accuracy", "kl", "norm")}, gradients


def by_definition(method="prt", beta=1.0, alpha=0.0, accum=1):
    """Returns the same of one batch, without micro-batches or chunks."""
    policy, ((ids, index), targets) = load("llama3"), texts(torch.arange(4))
    base_logits, logits = load("falcon3")(ids).detach().flatten(0, 1)[index], policy(ids).flatten(0, 1)[index]
    r = prt.reward(logits, base_logits if method == "ft" else None, beta)
    loss, log_probs = prt.prt_loss(base_logits, r, targets, beta, alpha), prt.tilt(base_logits, r, beta)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    correct, norms = log_probs.argmax(-1) == targets, [gradient.norm() for gradient in gradients]
    row = dict(loss=loss, accuracy=correct.float().mean(), kl=prt.kl(log_probs, base_logits).mean(),
               norm=torch.stack(norms).norm())
    return {key: value.item() for key, value in row.items()}, gradients


@pytest.mark.parametrize("method", ["prt", "ft"])
@pytest.mark.parametrize("options", [
    dict(), dict(alpha=0.1, beta=0.7), dict(accum=2), dict(accum=4, alpha=0.1)], ids=str)
def test_chunks_and_micro_batches_change_neither_loss_nor_gradient(method, options):
    """Catches: They are weighted by their number instead of by their targets, or one is left out."""
    def head(policy, features):
        sizes.append(len(features))
        return policy.head(features)

    want, gradients = by_definition(method, **options)
    if method == "ft" and "alpha" not in options:
        want["kl"] = None  # the base cancels out of the loss, and does not run
    policy, options, steps = load("llama3"), dict(method=method, **options), []
    for chunk in (1000, 7, 5):
        sizes = []
        steps.append(one_step(policy, head=head, chunk=chunk, **options))
        assert max(sizes) <= chunk
    for row, other in steps:
        assert row == pytest.approx(want, abs=1e-4)
        assert len(gradients) == len(other)
        assert max(map(error, gradients, other)) < 1e-5


# Generation

@torch.no_grad()
def test_generation_is_algorithm_2_in_each_row_of_a_padded_batch():
    """Catches: A cache holds another policy's keys, a weight or sign is lost, or padding is attended to."""
    models = dict(base=load("llama3"), tuned=load("falcon3"), old=load("qwen2"))
    mixtures = [[], [(1.0, "tuned")], [(2.0, "tuned")], [(1.0, "tuned"), (-1.0, "old")],
                [(1.0, "old"), (1.0, "base")]]  # no reward, one, twice one, EFT, the base as its own reward
    texts, ids, pad = set(), random_ids(3, 9, seed=3), torch.tensor([0, 2, 7])
    for mixture in mixtures:
        rewards = [(weight, models[policy]) for weight, policy in mixture]
        out = prt.generate(models["base"], rewards, ids, length=16, pad=pad)
        for row, n in enumerate(pad):
            want = ids[row:row + 1, n:]
            for _ in range(16):  # Algorithm 2 without a cache
                scores = sum((w * policy(want) for w, policy in rewards), models["base"](want))
                want = torch.cat([want, scores[:, -1:].argmax(-1)], 1)
            assert torch.equal(out[row, n:], want[0])
        texts.add(tuple(out.flatten().tolist()))
    assert len(texts) == len(mixtures)


@pytest.mark.parametrize("prompts, length, end, most", [
    ([[2, 3], [9, 7], [9, 9], [0, 15]], 60, 9, 39), ([[2, 3], [9, 7]], 60, 9, 9),
    ([[2, 3], [0, 15]], 5, 9, 5), ([[2, 3], [9, 7]], 60, None, 60)])
def test_the_end_token_fills_its_row_and_stops_the_last_row(prompts, length, end, most):
    """Catches: What follows it is noise, one in a prompt ends a row, or steps are computed for nothing."""
    policy = Mock(head=lambda ids: F.one_hot((ids + 1) % 20, 20).float())  # of 20 tokens, counts: 3 4 5 ...
    policy.features.side_effect = lambda ids, cache: ids
    out = prt.generate(policy, [], torch.tensor(prompts), length=length, end=end)
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        new = [(prompt[-1] + 1 + i) % 20 for i in range(length)]
        n = new.index(end) if end in new else length
        assert row == prompt + new[:n] + [end] * (length - n)
    assert policy.features.call_count <= most
