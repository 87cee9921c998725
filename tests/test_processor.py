"""A reward in another library's decoding: RewardProcessor, to the tilt without a cache, and transformers."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES
from helpers import error, load, random_ids

import prt
from models.processor import RewardProcessor


@pytest.fixture(scope="module")
def models():
    return SimpleNamespace(base=load("llama3"), reward=load("falcon3"))


@torch.no_grad()
def check(processor, model, ids, beta=1.0, pad=None):
    """Asserts that the result is the tilt of random scores, computed without a cache, a row at a time."""
    scores = 3 * torch.randn(len(ids), 512, generator=torch.Generator().manual_seed(ids.numel()))
    given = ids.clone()
    out = processor(given, scores)
    given += 1  # a decoder may write into the ids that it has passed
    logits = torch.cat([model(row[None, n:])[:, -1] for row, n in zip(ids, pad or [0] * len(ids))])
    assert out.dtype == torch.float32
    assert error(out, prt.tilt(scores, logits, beta)) < 1e-4


IDS, OTHER = random_ids(3, 30), random_ids(3, 30, seed=1)
CHANGED = torch.cat([IDS[:, :7], OTHER[:, 7:12]], 1)
ONE_ROW = IDS[:, :9].clone()
ONE_ROW[1, 4] = OTHER[1, 4]
PADDED, PADDED_MORE = random_ids(3, 16), random_ids(3, 16)
PADDED[1, :3], PADDED[2, :1], PADDED_MORE[1, :5], PADDED_MORE[2, :1] = 0, 0, 0, 0
PADDED[0, 8] = 0  # not padding, since there is text to the left of it
# The ids of one call after another, how many positions of each row are padding, and how many tokens are new.
CALLS = [(IDS[:, :5], None, 5), (IDS[:, :6], None, 1), (IDS[:, :10], None, 4), (IDS[:, :10], None, 1),
         (CHANGED, None, 5), (IDS[:, :4], None, 1), (IDS[:, :9], None, 5), (ONE_ROW, None, 5),
         (IDS[[2, 0, 0], :10], None, 10), (IDS[:2, :8], None, 8), (OTHER[:, :8], None, 8),
         (OTHER[:1, :1], None, 1), (OTHER[:1, :2], None, 1)]
PADDED_CALLS = [(PADDED[:, :6], [0, 3, 1], 6), (PADDED[:, :10], [0, 3, 1], 4), (PADDED[:, :8], [0, 3, 1], 1),
                (PADDED_MORE[:, :9], [0, 5, 1], 9), (PADDED[:, :11], [0, 3, 1], 11)]


@pytest.mark.parametrize("calls, options", [(CALLS, dict(beta=0.4)), (PADDED_CALLS, dict(beta=1.0, pad=0))])
def test_the_processor_computes_what_follows_the_longest_prefix_that_it_has_seen(models, calls, options):
    """Catches: It reads keys of a prefix that has changed, of another beam or batch, or of padding."""
    reward, counts = load("falcon3"), []
    features = reward.features
    reward.features = lambda ids, cache: counts.append(ids.shape[1]) or features(ids, cache)
    processor = RewardProcessor(reward, **options)
    for ids, pad, _ in calls:
        check(processor, models.reward, ids, options["beta"], pad)
    assert counts == [new for *_, new in calls]


@pytest.mark.parametrize("trained, beta, weight", [(0.5, None, 1), (0.5, 0.25, 2), (None, None, 1)])
def test_the_reward_is_the_beta_of_its_training_times_the_logits(trained, beta, weight):
    """So at this beta the logits have a weight of 1. It is 1 for a model that does not name it."""
    model = load("falcon3")
    del model.info
    if trained:
        model.info = dict(beta=trained)
    check(RewardProcessor(model, beta), model, random_ids(2, 5), 1 / weight)


def test_the_cache_grows_to_the_models_last_position(models):
    """Catches: Keys are lost when a larger cache replaces the first one, or it exceeds the positions."""
    room = models.reward.arch["positions"]
    processor, ids = RewardProcessor(models.reward), random_ids(1, room + 1)
    for n in (1, 60, 66, 67, 68, 150, room - 1, room):
        check(processor, models.reward, ids[:, :n])
    with pytest.raises(ValueError, match=f"{room + 1} tokens.* {room}"):
        processor(ids, torch.zeros(1, 512))


def test_padded_rows_of_output_matrices_are_excluded(models):
    """Catches: A base whose output matrix has more rows than the tokenizer has tokens samples one of them."""
    ids, scores = random_ids(2, 5), torch.randn(2, 520)
    out = RewardProcessor(models.reward, size=500)(ids, scores)
    with torch.no_grad():
        want = prt.tilt(scores[:, :500], models.reward(ids)[:, -1, :500])
    assert error(out[:, :500], want) < 1e-4
    assert out.shape == (2, 520) and (out[:, 500:] == -math.inf).all()
    with pytest.raises(ValueError, match="520.*512"):
        RewardProcessor(models.reward)(ids, scores)


@pytest.mark.parametrize("tokens", [300, 12], ids=["too long", "interrupted"])
def test_the_processor_is_right_after_an_error(models, monkeypatch, tokens):
    """Catches: A call that fails halfway, in a new cache or the old one, leaves keys of other tokens."""
    processor, ids = RewardProcessor(models.reward), random_ids(2, 9)
    others = torch.cat([ids[:, :3], random_ids(2, tokens - 3, seed=1)], 1)
    check(processor, models.reward, ids)
    with monkeypatch.context() as patch, pytest.raises((ValueError, ZeroDivisionError)):
        patch.setattr(models.reward.norm, "forward", lambda x: 1 / 0)
        processor(others, torch.zeros(2, 512))
    check(processor, models.reward, ids)


@pytest.fixture(scope="module")
def their_generate():
    """The base in transformers: a function that generates greedily with a processor."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "llama3").eval()
    return lambda ids, *processors, **options: model.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
        attention_mask=(ids != 0).long(), logits_processor=[*processors], **options)


@pytest.mark.parametrize("beta, pad", [(None, [0, 0]), (1.0, [0, 0]), (0.5, [0, 0]), (1.0, [0, 3])])
def test_in_transformers_a_reward_writes_the_same_text(their_generate, models, beta, pad):
    ids, rewards = random_ids(2, 8), [(1 / beta, models.reward)] if beta else []
    ids[1, :pad[1]] = 0
    want = prt.generate(models.base, rewards, ids, length=20, pad=torch.tensor(pad))
    processors = [RewardProcessor(models.reward, beta, pad=0)] if beta else []
    assert torch.equal(their_generate(ids, *processors), want)


def test_in_transformers_beams_keep_their_own_keys(their_generate, models):
    """Catches: Beam search permutes the rows in every step, and one beam reads another's keys."""
    @torch.no_grad()
    def without_cache(ids, scores):
        return prt.tilt(scores, models.reward(ids)[:, -1])

    ids = random_ids(2, 8)
    want = their_generate(ids, without_cache, num_beams=4)
    assert torch.equal(their_generate(ids, RewardProcessor(models.reward), num_beams=4), want)
    assert not torch.equal(want, their_generate(ids, num_beams=4))
