"""The method (prt.py): identities of the paper, the training loop, generation, rewards in other libraries."""
import copy
import doctest
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FIXTURES
from helpers import error, load, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

import prt
from models import decode, runs
from models.gpt import GPT

G = torch.Generator().manual_seed(0)
BASE, LOGITS, REF = (2 * torch.randn(6, 5, generator=G) for _ in range(3))
TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_the_examples_in_the_docstrings_are_right():
    failed, attempted = doctest.testmod(prt)
    assert failed == 0
    assert attempted >= 9


# Rewards and the tilt

def test_without_a_reference_the_reward_is_beta_times_the_logits():
    assert torch.equal(prt.reward(LOGITS, beta=0.7), 0.7 * LOGITS)


def test_the_uniform_reference_changes_the_reward_by_a_constant_per_input():
    difference = prt.reward(LOGITS, torch.zeros(6, 5), beta=0.7) - prt.reward(LOGITS, beta=0.7)
    assert torch.allclose(difference, difference[:, :1].expand(-1, 5), atol=1e-5)


def test_the_uniform_reference_does_not_change_the_tilt():
    uniform = prt.reward(LOGITS, torch.zeros(6, 5), beta=0.7)
    assert torch.allclose(prt.tilt(BASE, uniform), prt.tilt(BASE, 0.7 * LOGITS), atol=1e-5)


def test_a_constant_added_to_the_reward_changes_nothing():
    constants = torch.arange(6.0)[:, None]
    assert torch.allclose(prt.tilt(BASE, LOGITS + constants), prt.tilt(BASE, LOGITS), atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_tilt_is_the_base_times_exp_of_reward_over_beta(beta):
    want = BASE.softmax(-1) * (LOGITS / beta).exp()
    assert torch.allclose(prt.tilt(BASE, LOGITS, beta).exp(), want / want.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_base_need_not_be_normalized(beta):
    normalized = prt.tilt(F.log_softmax(BASE, -1), LOGITS, beta)
    assert torch.allclose(prt.tilt(BASE, LOGITS, beta), normalized, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    """Catches: In bfloat16, sums of logits near 30 lose whole nats."""
    base, r = (30 + BASE).bfloat16(), (30 + LOGITS).bfloat16()
    assert prt.tilt(base, r).dtype == prt.reward(r).dtype == torch.float32
    assert torch.allclose(prt.tilt(base, r), prt.tilt(base.float(), r.float()))


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_eft_on_the_source_base_is_the_tuned_model(beta):
    tilted = prt.tilt(REF, prt.reward(LOGITS, REF, beta), beta)
    assert torch.allclose(tilted, F.log_softmax(LOGITS, -1), atol=1e-5)


def test_a_normalized_reward_stands_for_one_fine_tuned_model():
    """Prop. 3.1: r = log pi_ft / pi_pt has E_pt[exp r] = 1, and gives pi_ft back."""
    r = prt.reward(LOGITS, BASE)
    assert torch.allclose((BASE.softmax(-1) * r.exp()).sum(-1), torch.ones(6), atol=1e-5)
    assert torch.allclose(prt.tilt(BASE, r).exp(), LOGITS.softmax(-1), atol=1e-6)


def test_before_training_the_tilt_is_the_squared_base():
    tilted = prt.tilt(BASE, prt.reward(BASE))
    want = BASE.softmax(-1) ** 2
    assert torch.allclose(tilted.exp(), want / want.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(tilted.argmax(-1), BASE.argmax(-1))


def test_before_training_the_loss_is_not_that_of_fine_tuning():
    assert abs(prt.prt_loss(BASE, BASE, TARGETS) - F.cross_entropy(BASE, TARGETS)) > 0.05


@pytest.mark.parametrize("call", [
    lambda: prt.prt_loss(BASE, LOGITS[:, :4], TARGETS),
    lambda: prt.reward(LOGITS[:, :4], REF),
    lambda: prt.tilt(BASE, LOGITS[:, :4])], ids=["loss", "reward", "tilt"])
def test_numbers_of_labels_that_differ_are_named(call):
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        call()


# The loss

def test_the_gradient_is_the_tilted_distribution_minus_the_truth():
    r = LOGITS.clone().requires_grad_()
    prt.prt_loss(BASE, r, TARGETS).backward()
    want = (prt.tilt(BASE, LOGITS).exp() - F.one_hot(TARGETS, 5)) / 6
    assert torch.allclose(r.grad, want, atol=1e-6)


def test_the_loss_is_value_minus_reward():
    """Eq. 8 and 9: the mean of V(x) - r(x, y*) - log pi_pt(y*|x), where V = log E_pt[exp r]."""
    value = (BASE.softmax(-1) * LOGITS.exp()).sum(-1).log()
    rows = torch.arange(6)
    want = (value - LOGITS[rows, TARGETS] - F.log_softmax(BASE, -1)[rows, TARGETS]).mean()
    assert torch.allclose(prt.prt_loss(BASE, LOGITS, TARGETS), want, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_ignored_targets_do_not_count(alpha):
    targets = TARGETS.clone()
    targets[[1, 4]] = -100
    keep = targets >= 0
    want = prt.prt_loss(BASE[keep], LOGITS[keep], TARGETS[keep], alpha=alpha)
    assert torch.allclose(prt.prt_loss(BASE, LOGITS, targets, alpha=alpha), want, atol=1e-6)


def test_another_index_may_be_ignored():
    keep = torch.tensor([True, False, True, True, False, True])
    loss = prt.prt_loss(BASE, LOGITS, torch.where(keep, TARGETS, 7), ignore_index=7)
    assert torch.allclose(loss, prt.prt_loss(BASE[keep], LOGITS[keep], TARGETS[keep]), atol=1e-6)


def test_without_a_target_that_counts_the_loss_is_0():
    assert prt.prt_loss(BASE, LOGITS, torch.full((6,), -100)) == 0


def test_the_loss_takes_text_of_several_positions():
    """Catches: Tensors of shape [B, T, L] have other means than the same targets in one row."""
    text = prt.prt_loss(BASE.view(2, 3, 5), LOGITS.view(2, 3, 5), TARGETS.view(2, 3))
    assert torch.allclose(text, prt.prt_loss(BASE, LOGITS, TARGETS))


def test_alpha_rewards_entropy():
    """Eq. 12: a uniform reward has the entropy log L, and alpha times it is subtracted from the loss."""
    r = torch.zeros(6, 5)
    plain = prt.prt_loss(BASE, r, TARGETS)
    assert torch.allclose(prt.prt_loss(BASE, r, TARGETS, alpha=0.1), plain - 0.1 * math.log(5), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_summed_loss_is_the_mean_times_the_number_of_counted_targets(alpha):
    targets = TARGETS.clone()
    targets[[1, 4]] = -100
    mean = prt.prt_loss(BASE, LOGITS, targets, alpha=alpha)
    summed = prt.prt_loss(BASE, LOGITS, targets, alpha=alpha, reduction="sum")
    assert torch.allclose(summed, 4 * mean, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_on_the_uniform_base_the_loss_is_cross_entropy(reduction):
    targets = TARGETS.clone()
    targets[[1, 4]] = -100
    loss = prt.prt_loss(torch.zeros(6, 5), LOGITS, targets, reduction=reduction)
    assert torch.allclose(loss, F.cross_entropy(LOGITS, targets, reduction=reduction), atol=1e-5)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="median"):
        prt.prt_loss(BASE, LOGITS, TARGETS, reduction="median")


# The loop, on a linear policy: 40 examples, 3 labels, a base that is half right.
X = torch.randn(40, 6, generator=G)
Y = (X @ torch.randn(6, 3, generator=G)).argmax(-1)
CACHED = F.one_hot(torch.where(torch.rand(40, generator=G) < 0.5, Y, 0), 3).float()


def new_policy():
    torch.manual_seed(1)
    return torch.nn.Linear(6, 3)


def fetch(i, generator):
    return (X[i],), Y[i], CACHED[i]


def fetch_without_base(i, generator):
    return (X[i],), Y[i], None


def indices(step):
    return runs.shuffled(step, 40, 16, 0)


def train(policy=None, fetch=fetch, lr=0.05, **options):
    """Returns a policy after 12 steps of AdamW, and the history."""
    policy = policy or new_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    options = dict(steps=12, log_every=4, optimizer=optimizer) | options
    return policy, prt.fit(policy, indices, fetch, **options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_fit_learns():
    _, history = train(steps=60, log_every=20)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.85


def test_fit_reports_every_log_step():
    _, history = train(steps=60, log_every=20)
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["kl"] > 0
    assert history[-1]["norm"] > 0
    assert history[-1]["per_second"] > 0


def test_the_last_step_is_reported():
    assert [row["step"] for row in train(steps=7, log_every=5)[1]] == [5, 7]


def test_fit_prints_a_line_per_log_step_where_there_is_no_terminal(capsys):
    train(steps=12, log_every=4, name="reward")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["reward 4/12", "reward 8/12", "reward 12/12"]
    assert all(word in lines[0] for word in ("loss ", "accuracy ", "norm ", "KL ", "/s", " s left"))


def test_reported_loss_accuracy_and_kl_are_those_of_the_tilt():
    """Each example is seen twice with weights that do not move; the KL is that of the last step's batch."""
    (row,) = train(lr=0.0, steps=5, log_every=5, accum=4)[1]
    log_probs = prt.tilt(CACHED, new_policy()(X))
    assert abs(row["loss"] - F.nll_loss(log_probs, Y).item()) < 1e-5
    assert abs(row["accuracy"] - (log_probs.argmax(-1) == Y).float().mean().item()) < 1e-5
    assert abs(row["kl"] - prt.kl(log_probs, CACHED)[indices(4)].mean().item()) < 1e-5


def test_reported_norm_is_that_of_the_gradient_of_the_log_step():
    (row,) = train(lr=0.0, steps=5, log_every=5, accum=4, clip=0.01)[1]
    policy, batch = new_policy(), indices(4)
    prt.prt_loss(CACHED[batch], policy(X[batch]), Y[batch]).backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert norm > 0.01
    assert abs(row["norm"] - norm) < 1e-5


def test_random_views_differ_between_steps_micro_batches_and_seeds():
    drawn = []

    def noisy(i, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return fetch(i, generator)

    for seed in (0, 1):
        train(fetch=noisy, accum=2, seed=seed)
    assert len(set(drawn)) == len(drawn) == 2 * 12 * 2


def test_the_base_cancels_out_of_fine_tuning():
    """With any base, and with none, method "ft" is plain cross-entropy training."""
    assert close(train(method="ft")[0], train(fetch=fetch_without_base)[0])


def test_tuning_a_reward_is_not_fine_tuning():
    assert not close(train(method="ft")[0], train()[0])


def test_a_frozen_base_equals_its_cached_logits():
    base = torch.nn.Linear(6, 3)
    with torch.no_grad():
        cached = base(X)
    live, _ = train(fetch=fetch_without_base, base=base)
    assert close(live, train(fetch=lambda i, generator: ((X[i],), Y[i], cached[i]))[0])


@pytest.mark.parametrize("method", ["prt", "ft"])
def test_the_frozen_base_does_not_move(method):
    base = torch.nn.Linear(6, 3)
    before = copy.deepcopy(base)
    train(fetch=fetch_without_base, base=base, method=method)
    assert equal(base, before)
    assert all(p.grad is None for p in base.parameters())


def test_in_fine_tuning_the_base_answers_only_where_something_is_logged():
    """Catches: Fine-tuning pays for a pass of a base that cancels out of its loss."""
    base, calls = torch.nn.Linear(6, 3), []
    base.register_forward_pre_hook(lambda *_: calls.append(1))
    train(fetch=fetch_without_base, base=base, method="ft", steps=12, log_every=4)
    assert len(calls) == 3


def test_the_policy_stays_in_its_mode():
    for mode in (True, False):
        assert train(new_policy().train(mode))[0].training == mode


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_accumulation_normalizes_over_all_micro_batches(alpha):
    """Catches: The mean of the micro-batches' means gives a target among many ignored ones more weight."""
    masked = torch.where(torch.arange(40) % 7 < 3, Y, -100)

    def sparse(i, generator):
        return (X[i],), masked[i], CACHED[i]

    assert close(train(fetch=sparse, alpha=alpha)[0], train(fetch=sparse, alpha=alpha, accum=4)[0])


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="batch of 16 does not split into 3"):
        train(accum=3)


# The optimizer and its schedule

def adam_by_hand(policy, lr, steps):
    """Trains the policy as `fit` should: Adam, gradients clipped to a norm of 1, a cosine schedule."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for step in range(steps):
        i = indices(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * prt.schedule(step, steps, 0, "cosine")
        optimizer.zero_grad()
        F.cross_entropy(CACHED[i] + policy(X[i].to(policy.weight.dtype)).float(), Y[i]).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy


def test_without_weight_decay_adamw_is_adam():
    assert close(train(steps=6)[0], adam_by_hand(new_policy(), 0.05, 6))


def test_the_default_optimizer_is_adam_with_a_learning_rate_of_1e_5():
    """In float64, where a weight decay of 0.01 would be seen next to so small a learning rate."""
    def fetch_double(i, generator):
        return (X[i].double(),), Y[i], CACHED[i]

    policy = new_policy().double()
    prt.fit(policy, indices, fetch_double, steps=6)
    want = adam_by_hand(new_policy().double(), 1e-5, 6)
    assert error(want.weight, new_policy().weight) > 1e-5
    assert error(policy.weight, want.weight) < 1e-9


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_every_parameter_group_follows_the_schedule_from_its_learning_rate(decay):
    """Catches: The schedule sets the learning rate of the first group only, or one rate for all groups."""
    policy, rates = new_policy(), []
    groups = [dict(params=[policy.weight], lr=0.3), dict(params=[policy.bias], lr=0.02)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: rates.append([g["lr"] for g in optimizer.param_groups]))
    _, history = train(policy, steps=40, log_every=10, optimizer=optimizer, warmup=8, decay=decay)
    factors = [prt.schedule(step, 40, 8, decay) for step in range(40)]
    assert rates == [[0.3 * factor, 0.02 * factor] for factor in factors]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_the_warmup_reaches_the_peak():
    factors = [prt.schedule(step, 100, 20, "cosine") for step in range(100)]
    assert factors[0] == 1 / 20
    assert factors[19] == factors[20] == 1 == max(factors)


@pytest.mark.parametrize("decay, middle", [("cosine", 0.5 + 0.5 * math.cos(math.pi / 4)), ("linear", 0.75)])
def test_the_decay_starts_at_the_peak_and_ends_near_0(decay, middle):
    factors = [prt.schedule(step, 100, 20, decay) for step in range(100)]
    assert factors[19] == factors[20] == 1 == max(factors)
    assert abs(factors[40] - middle) < 1e-9
    assert factors[99] < 0.02


@pytest.mark.parametrize("warmup", [12, 13, -1])
def test_a_warmup_that_does_not_fit_is_refused(warmup):
    with pytest.raises(ValueError, match=f"warmup of {warmup} steps does not fit into 12 steps"):
        train(steps=12, warmup=warmup)


# Another loss

def pairwise_loss(base_logits, r, targets, beta, alpha):
    """The logistic loss of preferences, without the base: targets [N, 2] are (chosen, rejected) labels."""
    chosen, rejected = r.gather(-1, targets).unbind(-1)
    return -F.logsigmoid(chosen - rejected).sum(), (chosen > rejected).sum()


def fetch_pairs(i, generator):
    rejected = (Y + 1 + torch.arange(40) % 2) % 3  # one of the two wrong labels
    return (X[i],), torch.stack([Y, rejected], 1)[i], CACHED[i]


def test_fit_learns_preferences_with_a_loss_given_to_it():
    _, history = train(fetch=fetch_pairs, loss=pairwise_loss, steps=60, log_every=20)
    (before,) = train(fetch=fetch_pairs, loss=pairwise_loss, steps=5, log_every=5, lr=0.0)[1]
    assert before["accuracy"] < 0.6
    assert history[-1]["accuracy"] > 0.9
    assert history[-1]["loss"] < 0.5 * before["loss"]


def test_a_pair_of_labels_is_one_target():
    """Catches: Both labels of a pair count, so that the reported loss is half of the mean over pairs."""
    (row,) = train(fetch=fetch_pairs, loss=pairwise_loss, steps=5, log_every=5, lr=0.0)[1]
    targets = fetch_pairs(torch.arange(40), None)[1]
    with torch.no_grad():
        total, wins = pairwise_loss(None, new_policy()(X), targets, 1.0, 0.0)
    assert abs(row["loss"] - total.item() / 40) < 1e-5
    assert abs(row["accuracy"] - wins.item() / 40) < 1e-5


def test_accumulation_normalizes_another_loss():
    one = train(fetch=fetch_pairs, loss=pairwise_loss)[0]
    assert close(one, train(fetch=fetch_pairs, loss=pairwise_loss, accum=4)[0])


# Checkpoints and failures

def test_fit_saves_every_quarter_of_the_run_and_at_its_end():
    steps = []
    train(steps=10, save=steps.append)
    assert steps == [2, 4, 6, 8, 10]


def test_fit_saves_as_often_as_it_is_told_to():
    steps = []
    train(steps=12, save=steps.append, save_every=5)
    assert steps == [5, 10, 12]


def test_a_save_step_is_a_log_step():
    _, history = train(steps=12, log_every=100, save=lambda step: None, save_every=5)
    assert [row["step"] for row in history] == [5, 10, 12]


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_equals_one_without_interruption_bit_for_bit(stop):
    """Catches: A moment estimate, the step, the peak of the schedule, or a random state is lost.

    The run stops once in the warmup and once in the decay.
    """
    def noisy(i, generator):
        return (X[i] + torch.randn(len(i), 6, generator=generator),), Y[i], CACHED[i]

    def adamw(policy, lr):
        return torch.optim.AdamW(policy.parameters(), lr=lr)

    whole, checkpoints = new_policy(), {}
    optimizer = adamw(whole, 0.05)

    def save(step):
        checkpoints[step] = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))

    train(whole, noisy, optimizer=optimizer, warmup=4, save_every=1, save=save)
    torch.manual_seed(99)
    resumed = torch.nn.Linear(6, 3)
    optimizer_of_resumed = adamw(resumed, 1.0)
    for part, state in zip((resumed, optimizer_of_resumed), checkpoints[stop]):
        part.load_state_dict(state)
    assert optimizer_of_resumed.param_groups[0]["initial_lr"] == 0.05
    train(resumed, noisy, optimizer=optimizer_of_resumed, warmup=4, start=stop)
    assert equal(whole, resumed)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved():
    saved, calls = [], []

    def poisoned(i, generator):
        calls.append(i)
        return (X[i] * (math.nan if len(calls) > 6 else 1),), Y[i], CACHED[i]

    with pytest.raises(FloatingPointError, match="step 8"):
        train(fetch=poisoned, save_every=4, save=saved.append)
    assert saved == [4]


@pytest.mark.parametrize("last, saved", [(1, [1]), (4, [4]), (5, [4, 5]), (12, [4, 8, 12])])
def test_a_stopped_run_saves_once_and_returns(last, saved):
    """Catches: It goes on, saves a step twice, or leaves out the row of the step that it stops after."""
    policy, calls, seen = new_policy(), [], {}

    def stop():
        calls.append(1)
        return len(calls) == last

    def save(step):
        assert step not in seen
        seen[step] = copy.deepcopy(policy)

    _, history = train(policy, log_every=100, save=save, save_every=4, stop=stop)
    assert [*seen] == [row["step"] for row in history] == saved and len(calls) == last
    assert all(math.isfinite(row[key]) for row in history for key in ("loss", "accuracy", "norm"))
    whole = {}
    reference = new_policy()
    train(reference, save=lambda step: whole.update({step: copy.deepcopy(reference)}), save_every=1)
    assert equal(seen[last], whole[last]) and equal(policy, whole[last])


def test_a_stopped_run_reports_the_steps_since_the_last_row():
    """With weights that do not move, the loss of steps 3 to 5 is that of their batches; the KL is unknown."""
    calls = []
    _, (_, row) = train(lr=0.0, log_every=2, stop=lambda: calls.append(1) or len(calls) == 3)
    assert row["step"] == 3
    log_probs = prt.tilt(CACHED, new_policy()(X))[indices(2)]
    assert abs(row["loss"] - F.nll_loss(log_probs, Y[indices(2)]).item()) < 1e-5
    assert math.isnan(row["kl"])


def test_a_run_without_checkpoints_stops_too():
    _, history = train(stop=lambda: True)
    assert [row["step"] for row in history] == [1]


@pytest.mark.parametrize("stop", [2, 7])
def test_a_stopped_run_resumes_bit_for_bit(stop):
    whole, _ = train(warmup=4)
    half, calls, saved = new_policy(), [], []
    optimizer = torch.optim.AdamW(half.parameters(), lr=0.05, weight_decay=0.0)
    train(half, optimizer=optimizer, warmup=4, save=saved.append, save_every=100,
          stop=lambda: calls.append(1) or len(calls) == stop)
    assert saved == [stop] and not equal(half, whole)
    train(half, optimizer=optimizer, warmup=4, start=stop)
    assert equal(half, whole)


def test_a_loss_that_is_not_finite_is_not_saved_by_a_stop():
    """Catches: Ctrl-C right after the loss has become nan writes nan over the last good checkpoint."""
    saved, calls = [], []

    def poisoned(i, generator):
        calls.append(i)
        return (X[i] * (math.nan if len(calls) > 5 else 1),), Y[i], CACHED[i]

    with pytest.raises(FloatingPointError, match="step 6"):
        train(fetch=poisoned, log_every=100, save_every=4, save=saved.append, stop=lambda: len(calls) == 6)
    assert saved == [4] and len(calls) == 6


def test_more_than_one_process_needs_a_sharded_policy(monkeypatch):
    """Catches: Each process trains a copy of its own, with the gradient of its own micro-batches."""
    for name, value in dict(is_initialized=True, get_rank=0, get_world_size=2).items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(ValueError, match="not sharded"):
        train()


def test_fit_has_at_most_90_lines():
    assert len(inspect.getsource(prt.fit).splitlines()) <= 90


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


@pytest.mark.parametrize("method", ["prt", "ft"])
def test_a_uniform_base_takes_no_memory(method):
    """Catches: Zeros [N, L] are allocated for every chunk: for text, as much as the logits themselves."""
    sizes = []

    def loss(base_logits, r, targets, beta, alpha):
        assert base_logits.shape == r.shape == (16, 3) and not base_logits.any()
        sizes.append(base_logits.untyped_storage().nbytes() // base_logits.element_size())
        return prt.label_loss(base_logits, r, targets, beta, alpha)

    policy, _ = train(fetch=fetch_without_base, method=method, loss=loss)
    assert sizes == [1] * 12
    explicit, _ = train(fetch=lambda i, generator: ((X[i],), Y[i], torch.zeros(len(i), 3)), method=method)
    assert close(policy, explicit)


# What it is for

class Mlp(torch.nn.Module):
    """A policy that sees the first of four inputs and chooses one of 16 labels."""

    def __init__(self, inputs, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = torch.nn.Linear(inputs, width), torch.nn.ReLU(), torch.nn.Linear(width, 16)
        self.inputs, self.layers = inputs, torch.nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x[:, :self.inputs])


def things(light, seed, n=2000):
    """Returns things [n, 4] of one of 4 colors and one of 4 forms, each an angle with noise, and labels [n].

    light: by how much of the distance between two colors all colors are shifted.
    """
    generator = torch.Generator().manual_seed(seed)
    color, form = torch.randint(4, (2, n), generator=generator)
    x = torch.cat([torch.stack([(math.pi / 2 * angle).cos(), (math.pi / 2 * angle).sin()], 1)
                   for angle in (color + light, form)], 1)
    return x + 0.25 * torch.randn(n, 4, generator=generator), 4 * color + form


def test_a_reward_tuned_on_one_base_raises_the_accuracy_of_another():
    """Together they know more than each: the reward the light, the other base the forms, which it cannot see.

    Both bases have learned in white light. The old one, and so its reward, sees colors only.
    """
    white, tuning, test = things(0.0, seed=0), things(0.5, seed=1), things(0.5, seed=2)

    def learn(policy, x, y, base=None):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        prt.fit(policy, lambda step: runs.shuffled(step, len(y), 64, 0), lambda i, _: ((x[i],), y[i], None),
                base=base, optimizer=optimizer, steps=150)
        return policy

    @torch.no_grad()
    def accuracy(base, rewards):
        return runs.accuracy(prt.mixture(base, rewards, lambda policy: policy(test[0])), test[1])

    old, new = learn(Mlp(2, 16, seed=0), *white), learn(Mlp(4, 32, seed=1), *white)
    reward = learn(copy.deepcopy(old), *tuning, base=old)
    assert accuracy(old, []) < accuracy(old, [(1.0, reward)]) < 0.3
    assert accuracy(new, [(1.0, reward)]) > accuracy(new, []) + 0.2
    assert accuracy(new, [(1.0, reward)]) > 0.9


# The loss in chunks, on two GPTs

class Whole(torch.nn.Module):
    """A policy that returns the logits of all targets at once, as an image model does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, index):
        return self.model(ids).flatten(0, 1)[index]


TEXTS = random_ids(8, 11, seed=5)


def targets_of(i, ignore=False):
    """Returns the inputs and targets of texts: a few targets of each, of which some may be ignored."""
    ids = TEXTS[i]
    index = torch.cat([10 * row + torch.arange(2 + row, 10) for row in range(len(i))])
    targets = ids[:, 1:].flatten()[index]
    return (ids[:, :-1], index), torch.where(targets % 5 == 0, -100, targets) if ignore else targets


def one_step(whole=False, ignore=False, policy=None, **options):
    """Returns what one step of prt.fit reports, and the gradient of each weight in it."""
    policy, base = policy or load("llama3"), load("falcon3").requires_grad_(False)
    parameters, gradients = list(policy.parameters()), []
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in parameters))
    if whole:
        policy, base = Whole(policy), Whole(base)

    def fetch(i, generator):
        return *targets_of(i, ignore), None

    (row,) = prt.fit(policy, lambda step: torch.arange(4), fetch, steps=1, base=base, optimizer=optimizer,
                     clip=math.inf, **options)
    return {k: row[k] for k in ("loss", "accuracy", "kl", "norm")}, gradients


@pytest.mark.parametrize("method", ["prt", "ft"])
@pytest.mark.parametrize("options", [dict(), dict(alpha=0.1, beta=0.7), dict(ignore=True), dict(accum=2)],
                         ids=["plain", "alpha and beta", "ignored targets", "micro-batches"])
def test_chunks_of_targets_change_neither_loss_nor_gradient(method, options):
    """Catches: Chunks are weighted by their number instead of by their targets, or one is left out."""
    sizes = []

    def head(policy, features):
        sizes.append(len(features))
        return policy.head(features)

    want, gradients = one_step(head=GPT.head, chunk=1000, method=method, **options)
    steps = [one_step(whole=True, method=method, **options)]
    for chunk in (5, 7):
        sizes.clear()
        steps.append(one_step(head=head, chunk=chunk, method=method, **options))
        assert max(sizes) <= chunk < len(targets_of(torch.arange(4))[1])
    for row, other in steps:
        assert row == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert max(map(error, gradients, other)) < 1e-5
        assert len(gradients) == len(other)
    assert max(g.abs().max() for g in gradients) > 1e-2


class Casts(TorchDispatchMode):
    """Counts how often a matrix is cast to bfloat16."""

    def __init__(self, matrix):
        super().__init__()
        self.pointer, self.count = matrix.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() == self.pointer
        return function(*args, **kwargs or {})


@pytest.fixture
def autocast_on_the_cpu(monkeypatch):
    """Makes autocast for "cuda" that of a CPU, to bfloat16, where a dtype is given."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype=None, enabled=True: autocast(
        "cpu", torch.bfloat16, enabled=enabled or dtype is not None))


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", ["llama2", "qwen2"], ids=["own matrix", "tied"])
def test_the_vocabulary_matrix_is_cast_once_per_micro_batch(autocast_on_the_cpu, name, recompute, accum):
    """Catches: Every chunk casts the largest matrix anew, or a chunk's gradient is lost with the cast."""
    def step(chunk):
        policy = load(name)
        policy.recompute = recompute
        matrix = (policy.embed_tokens if policy.lm_head is None else policy.lm_head).weight
        with Casts(matrix) as casts:
            row, gradients = one_step(policy=policy, head=GPT.head, chunk=chunk, accum=accum)
        return casts.count, row, gradients

    assert (load(name).lm_head is None) == (name == "qwen2")
    count, row, gradients = step(chunk=5)
    once, want, whole = step(chunk=1000)
    assert count == once == accum
    assert row["loss"] == pytest.approx(want["loss"], rel=1e-3)
    for a, b in zip(gradients, whole, strict=True):
        assert error(a, b) <= 0.02 * b.abs().max()


def test_a_cast_is_not_kept_for_the_next_step(autocast_on_the_cpu):
    """Catches: Later steps use the matrix of the first one."""
    policy, base = load("llama2"), load("falcon3").requires_grad_(False)
    optimizer, logits = torch.optim.SGD(policy.parameters(), lr=10.0), []

    def head(model, features):
        out = GPT.head(model, features)
        if model is policy:
            matrix = policy.lm_head.weight.detach()
            logits.append((out.detach().float(), features.detach().float() @ matrix.float().T))
        return out

    before = policy.lm_head.weight.detach().clone()
    prt.fit(policy, lambda step: torch.arange(4), lambda i, _: (*targets_of(i), None), steps=3, base=base,
            optimizer=optimizer, head=head, chunk=9)
    assert error(policy.lm_head.weight, before) > 0.1
    assert len(logits) > 6 and all(error(a, b) < 0.05 * b.abs().max() for a, b in logits)


# Generation

@torch.no_grad()
def generate_by_hand(base, rewards, ids, length):
    """Algorithm 2 without a cache."""
    for _ in range(length):
        scores = base(ids)[:, -1].log_softmax(-1)
        for weight, policy in rewards:
            scores = scores + weight * policy(ids)[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.fixture(scope="module")
def models():
    """A base, a tuned model, and the base that it comes from, all with one vocabulary."""
    return SimpleNamespace(base=load("llama3"), tuned=load("falcon3"), old=load("qwen2"))


MIXTURES = {"base alone": [], "reward": [(1.0, "tuned")], "twice the reward": [(2.0, "tuned")],
            "EFT": [(1.0, "tuned"), (-1.0, "old")], "base as its own reward": [(1.0, "old"), (1.0, "base")]}


def mixture(models, name):
    return [(weight, getattr(models, policy)) for weight, policy in MIXTURES[name]]


@pytest.mark.parametrize("name", MIXTURES)
def test_generation_is_algorithm_2(models, name):
    """Catches: A policy's cache holds another's keys, a weight is left out, or a sign is lost."""
    ids, rewards = random_ids(2, 6), mixture(models, name)
    out = prt.generate(models.base, rewards, ids, length=16)
    assert torch.equal(out, generate_by_hand(models.base, rewards, ids, 16))


def test_every_mixture_writes_another_text(models):
    ids = random_ids(2, 6)
    texts = [prt.generate(models.base, mixture(models, name), ids, length=16) for name in MIXTURES]
    assert len({tuple(text.flatten().tolist()) for text in texts}) == len(MIXTURES)


def test_generation_builds_no_graph_for_backward(models):
    scores = []
    prt.generate(models.base, [(1.0, models.tuned)], random_ids(1, 4), length=2,
                 draw=lambda log_probs: scores.append(log_probs) or log_probs.argmax(-1))
    assert any(p.requires_grad for p in models.base.parameters())
    assert not any(x.requires_grad for x in scores)


class Counter:
    """A policy of 20 tokens that counts: 3 4 5 ..."""

    passes = 0

    def cache(self, batch, length, pad):
        return SimpleNamespace(length=length)

    def features(self, ids, cache, at=None):
        self.passes += 1
        return ids

    def head(self, features):
        return F.one_hot((features + 1) % 20, 20).float()


COUNTS = torch.tensor([[2, 3], [9, 7], [9, 9], [0, 15]])


def test_the_end_token_fills_the_rest_of_its_row():
    """Catches: What follows the end token is noise. An end token in a prompt ends nothing."""
    out = prt.generate(Counter(), [], COUNTS, length=60, end=9)
    assert out.shape == (4, 62)
    assert out[0, 2:].tolist() == [4, 5, 6, 7, 8] + [9] * 55
    assert out[1, 2:].tolist() == [8] + [9] * 59
    assert out[2, 2:].tolist() == [*range(10, 20), *range(10)] + [9] * 40
    assert out[3, 2:].tolist() == [*range(16, 20), *range(10)] + [9] * 46


def test_generation_stops_when_all_rows_have_ended():
    """Catches: All steps are computed although every row has ended, or the result is then too short."""
    policy = Counter()
    assert prt.generate(policy, [], COUNTS, length=60, end=9).shape == (4, 62)
    assert 20 < policy.passes < 40
    policy = Counter()
    assert prt.generate(policy, [], COUNTS[:2], length=60, end=9).shape == (2, 62)
    assert policy.passes < 10


def test_generation_may_stop_before_any_row_has_ended():
    assert prt.generate(Counter(), [], COUNTS, length=5, end=9).shape == (4, 7)


def test_without_an_end_token_no_row_ends():
    out = prt.generate(Counter(), [], COUNTS, length=60)
    assert out[1].tolist() == [9, *(i % 20 for i in range(7, 68))]


@pytest.mark.parametrize("value", [0, 7])
def test_a_row_does_not_depend_on_its_padding(models, value):
    """Catches: Padding is attended to or counted, so that a row depends on how long its neighbors are."""
    rewards = [(1.0, models.tuned), (-1.0, models.old)]
    ids, pad = random_ids(3, 9, seed=3), torch.tensor([0, 2, 7])
    for row, n in enumerate(pad):
        ids[row, :n] = value
    out = prt.generate(models.base, rewards, ids, length=12, pad=pad)
    assert torch.equal(out[:, :9], ids)
    for row, n in enumerate(pad):
        want = prt.generate(models.base, rewards, ids[row:row + 1, n:], length=12)
        assert torch.equal(out[row, n:], want[0])


def sampled(models, seed, temperature=1.0, top_p=1.0):
    torch.seed()  # the global generator must not matter
    draw = decode.sampler(temperature, top_p, torch.Generator().manual_seed(seed))
    return prt.generate(models.base, [(1.0, models.tuned)], random_ids(2, 6), length=10, draw=draw)


def test_samples_depend_on_their_generator_alone(models):
    """Catches: Samples are drawn with the global generator, so that no run can be repeated."""
    assert torch.equal(sampled(models, 1), sampled(models, 1))
    assert not torch.equal(sampled(models, 1), sampled(models, 2))


def test_samples_of_little_temperature_or_top_p_are_the_most_likely_tokens(models):
    greedy = prt.generate(models.base, [(1.0, models.tuned)], random_ids(2, 6), length=10)
    assert not torch.equal(sampled(models, 1), greedy)
    assert torch.equal(sampled(models, 1, top_p=1e-9), greedy)
    assert torch.equal(sampled(models, 2, temperature=1e-4), greedy)


# A reward in another library's decoding

@torch.no_grad()
def tilted(model, ids, scores, beta=1.0, pad=None):
    """Returns what RewardProcessor must return, computed without a cache, and row by row without padding."""
    pad = [0] * len(ids) if pad is None else pad.tolist()
    logits = torch.cat([model(row[None, n:])[:, -1] for row, n in zip(ids, pad)])
    return prt.tilt(scores, logits, beta)


def scores_for(ids, width=512):
    return 3 * torch.randn(len(ids), width, generator=torch.Generator().manual_seed(ids.numel()))


@pytest.fixture
def passes(models, monkeypatch):
    """How many tokens per row each pass of the reward computes."""
    counts, features = [], models.tuned.features
    monkeypatch.setattr(models.tuned, "features",
                        lambda ids, cache=None: counts.append(ids.shape[1]) or features(ids, cache))
    return counts


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_processor_finds_the_longest_prefix_that_it_has_seen(models, passes, beta):
    """Catches: It reads keys of a prefix that has changed, of another beam, or of another batch."""
    processor = prt.RewardProcessor(models.tuned, beta)
    ids, other = random_ids(3, 30), random_ids(3, 30, seed=1)
    changed = torch.cat([ids[:, :7], other[:, 7:12]], 1)
    one_row = ids[:, :9].clone()
    one_row[1, 4] = other[1, 4]
    calls = [(ids[:, :5], 5), (ids[:, :6], 1), (ids[:, :7], 1), (ids[:, :10], 3), (ids[:, :10], 1),
             (changed, 5), (ids[:, :4], 1), (ids[:, :9], 5), (one_row, 5), (ids[:, :9], 5),
             (ids[[2, 0, 0], :10], 10), (ids[[2, 0, 0], :11], 1), (ids[:2, :8], 8), (ids[:, :8], 8),
             (other[:, :8], 8), (other[:1, :1], 1), (other[:1, :2], 1)]
    for call, _ in calls:
        scores = scores_for(call)
        out = processor(call, scores)
        assert out.dtype == torch.float32
        assert out.shape == scores.shape
        assert error(out, tilted(load("falcon3"), call, scores, beta)) < 1e-4
    assert passes == [tokens for _, tokens in calls]


@pytest.mark.parametrize("beta, weight", [(None, 1.0), (0.5, 1.0), (1.0, 0.5), (0.25, 2.0)])
def test_the_processors_beta_is_that_of_the_tilt(beta, weight):
    """The reward is the trained beta times the logits: at the beta of its training, their weight is 1."""
    model, ids = load("falcon3"), random_ids(2, 5)
    model.info["beta"] = 0.5
    scores = scores_for(ids)
    out = prt.RewardProcessor(model, beta)(ids, scores)
    assert error(out, tilted(model, ids, scores, 1 / weight)) < 1e-4


def test_the_processors_beta_is_1_for_a_model_that_names_none():
    model, ids = load("falcon3"), random_ids(2, 5)
    assert "beta" not in model.info
    scores = scores_for(ids)
    want = tilted(model, ids, scores)
    assert error(prt.RewardProcessor(model)(ids, scores), want) < 1e-4
    del model.info
    assert error(prt.RewardProcessor(model)(ids, scores), want) < 1e-4


def test_the_processors_cache_grows(models):
    """Catches: Keys are written beyond the first call's cache, or lost when a larger one replaces it."""
    processor, ids = prt.RewardProcessor(models.tuned), random_ids(2, 200)
    for n in (1, 60, 66, 67, 68, 150, 200):
        scores = scores_for(ids[:, :n])
        assert error(processor(ids[:, :n], scores), tilted(models.tuned, ids[:, :n], scores)) < 1e-4


def test_the_processor_works_to_the_models_last_position(models):
    """Catches: A cache for twice the tokens exceeds the model's positions and is refused too early."""
    room = models.tuned.arch["positions"]
    processor, ids = prt.RewardProcessor(models.tuned), random_ids(1, room + 1)
    for n in (room - 1, room):
        scores = scores_for(ids[:, :n])
        assert error(processor(ids[:, :n], scores), tilted(models.tuned, ids[:, :n], scores)) < 1e-4
    with pytest.raises(ValueError, match=f"{room + 1} tokens.* {room}"):
        processor(ids, scores)


def test_the_processor_keeps_a_copy_of_the_tokens(models):
    """Catches: A decoder that writes into ids it has passed also changes what the reward has seen."""
    processor, ids = prt.RewardProcessor(models.tuned), random_ids(2, 8)
    scores = scores_for(ids)
    processor(ids[:, :6], scores)
    ids[:, 3] += 1
    assert error(processor(ids, scores), tilted(models.tuned, ids, scores)) < 1e-4


def test_the_processor_does_not_attend_to_padding(models, passes):
    """Catches: The reward attends to padding, or keeps keys for a batch with other padding."""
    pad, ids = torch.tensor([0, 3, 1]), random_ids(3, 16)
    other = ids.clone()
    for row, n in enumerate(pad):
        ids[row, :n] = 0
    other[:, :2], other[1, :5] = ids[:, :2], 0
    ids[0, 8] = 0  # not padding, since there is text to the left of it
    processor = prt.RewardProcessor(models.tuned, pad=0)
    calls = [(ids[:, :6], pad, 6), (ids[:, :7], pad, 1), (ids[:, :10], pad, 3), (ids[:, :8], pad, 1),
             (other[:, :9], torch.tensor([0, 5, 1]), 9), (ids[:, :11], pad, 11)]
    for call, n, _ in calls:
        scores = scores_for(call)
        assert error(processor(call, scores), tilted(load("falcon3"), call, scores, pad=n)) < 1e-4
    assert passes == [tokens for *_, tokens in calls]


def test_the_processor_excludes_padded_rows_of_output_matrices(models):
    """Catches: A base whose output matrix has more rows than the tokenizer has tokens samples one of them."""
    ids, scores = random_ids(2, 5), scores_for(random_ids(2, 5), 520)
    out = prt.RewardProcessor(models.tuned, size=500)(ids, scores)
    with torch.no_grad():
        want = prt.tilt(scores[:, :500], models.tuned(ids)[:, -1, :500])
    assert out.shape == (2, 520)
    assert (out[:, 500:] == -math.inf).all()
    assert error(out[:, :500], want) < 1e-4


def test_the_processor_names_output_matrices_that_differ(models):
    ids, scores = random_ids(2, 5), scores_for(random_ids(2, 5), 520)
    with pytest.raises(ValueError, match="520.*512"):
        prt.RewardProcessor(models.tuned)(ids, scores)


@pytest.mark.parametrize("fault", ["too long", "interrupted"])
def test_the_processor_is_right_after_an_error(models, monkeypatch, fault):
    """Catches: A call that fails halfway, in a new cache or the old one, leaves keys of other tokens."""
    processor, ids, others = prt.RewardProcessor(models.tuned), random_ids(2, 9), random_ids(2, 300)
    others[:, :3] = ids[:, :3]
    scores = scores_for(ids)
    processor(ids, scores)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((ValueError, KeyboardInterrupt)):
        if fault == "interrupted":
            patch.setattr(models.tuned.norm, "forward", stop)
        processor(others if fault == "too long" else others[:, :12], scores)
    assert error(processor(ids, scores), tilted(models.tuned, ids, scores)) < 1e-4


@pytest.fixture(scope="module")
def their_generate():
    """The base in transformers: a function that generates greedily with a processor."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "llama3").eval()

    def generate(ids, processor=None, **options):
        given = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
                     attention_mask=(ids != 0).long(), logits_processor=[processor] if processor else [])
        return model.generate(ids, **given | options)

    return generate


def test_without_a_reward_transformers_writes_the_same_text(their_generate, models):
    ids = random_ids(2, 8)
    assert torch.equal(their_generate(ids), prt.generate(models.base, [], ids, length=20))


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_in_transformers_a_reward_writes_the_same_text(their_generate, models, beta):
    ids = random_ids(2, 8)
    want = prt.generate(models.base, [(1 / beta, models.tuned)], ids, length=20)
    assert torch.equal(their_generate(ids, prt.RewardProcessor(models.tuned, beta)), want)


def test_in_transformers_padded_prompts_have_the_same_continuations(their_generate, models):
    ids = random_ids(2, 8)
    ids[1, :3] = 0
    want = prt.generate(models.base, [(1.0, models.tuned)], ids, length=20, pad=torch.tensor([0, 3]))
    assert torch.equal(their_generate(ids, prt.RewardProcessor(models.tuned, pad=0)), want)


def test_in_transformers_beams_keep_their_own_keys(their_generate, models):
    """Catches: Beam search permutes the rows in every step, and one beam reads another's keys."""
    @torch.no_grad()
    def slow(ids, scores):
        return prt.tilt(scores, models.tuned(ids)[:, -1])

    ids, in_order = random_ids(2, 8), []
    processor = prt.RewardProcessor(models.tuned)

    def watch(beams, scores):
        in_order.append(processor.seen is None or torch.equal(beams[:, :-1], processor.seen))
        return processor(beams, scores)

    want = their_generate(ids, slow, num_beams=4)
    assert torch.equal(their_generate(ids, watch, num_beams=4), want)
    assert not all(in_order)
    assert not torch.equal(want, their_generate(ids, num_beams=4))
