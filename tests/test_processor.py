"""A reward in another library's decoding: RewardProcessor, to the tilt without a cache, and transformers."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES
from helpers import error, load, random_ids
from test_project import block, run

import prt
from models import weights
from models.processor import RewardProcessor


@pytest.fixture(scope="module")
def models():
    models = SimpleNamespace(base=load("llama3"), reward=load("falcon3"))
    models.reward.info["method"] = "prt"
    return models


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
PADDED, PAD, MASK = random_ids(3, 16), [0, 3, 1], torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [0] + [1] * 5])
PADDED[1, :4], PADDED[2, :1], PADDED[0, 4] = 0, 0, 0  # two of these are text, not padding: where MASK has a 1
PROMPTS = PADDED[:, :6]
# The ids of one call after another, how many positions of each row are padding, and how many tokens are new.
CALLS = [(IDS[:, :5], None, 5), (IDS[:, :6], None, 1), (IDS[:, :10], None, 4), (IDS[:, :10], None, 1),
         (CHANGED, None, 5), (IDS[:, :4], None, 1), (IDS[:, :9], None, 5), (ONE_ROW, None, 5),
         (IDS[[2, 0, 0], :10], None, 10), (IDS[:2, :8], None, 8), (OTHER[:, :8], None, 8),
         (OTHER[:1, :1], None, 1), (OTHER[:1, :2], None, 1)]
PADDED_CALLS = [(PADDED[[0, 0, 1, 1, 2, 2], :8], [0, 0, 3, 3, 1, 1], 8), (PROMPTS, PAD, 6),
                (PADDED[:, :10], PAD, 4), (PROMPTS, PAD, 1), (PADDED[:, :9], PAD, 3)]


@pytest.mark.parametrize("calls, mask", [(CALLS, None), (CALLS, torch.ones(3, 5)), (PADDED_CALLS, MASK)])
def test_the_processor_computes_what_follows_the_longest_prefix_that_it_has_seen(models, calls, mask):
    """Catches: It reads keys of a prefix that has changed, of another beam or batch, or of padding."""
    reward, counts = load("falcon3"), []
    reward.info = models.reward.info
    features = reward.features
    reward.features = lambda ids, cache: counts.append(ids.shape[1]) or features(ids, cache)
    processor = RewardProcessor(reward, 0.4, mask)
    for ids, pad, _ in calls:
        check(processor, models.reward, ids, 0.4, pad)
    assert counts == [new for *_, new in calls]


@pytest.mark.parametrize("trained, beta, weight", [(0.5, None, 1), (0.5, 0.25, 2), (None, None, 1)])
def test_the_reward_is_the_beta_of_its_training_times_the_logits(trained, beta, weight):
    """So at this beta the logits have a weight of 1. It is 1 for a model that does not name it."""
    model = load("falcon3")
    del model.info
    if trained:
        model.info = dict(method="prt", beta=trained)
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


@pytest.mark.parametrize("refused", [PROMPTS[:2], PROMPTS[[0, 0, 1, 1]], IDS[:, :5], PROMPTS.repeat(2, 1)])
def test_other_prompts_than_those_of_the_mask_are_refused(models, refused):
    """Catches: They get the padding of the first prompts, or a row that of another; or the error remains."""
    processor = RewardProcessor(models.reward, attention_mask=MASK)
    for ids in (refused, OTHER[:, :8]):
        with pytest.raises(ValueError, match=rf"\[{len(ids)}, {ids.shape[1]}\] .*\[3, 6\].* new RewardP"):
            processor(ids, torch.zeros(len(ids), 512))
        check(processor, models.reward, PROMPTS, pad=PAD)


@pytest.mark.parametrize("method, row, message", [
    ("base", [0, 1, 1], "method base, .* --method prt"), ("ft", [0, 1, 1], "method ft, .* --method prt"),
    *[("prt", row, "zeros, then ones: .*left") for row in ([1, 1, 0], [1, 0, 1], [0, 0, 0])],
    ("prt", [0, 1, 1], "no input_ids, as with inputs_embeds")])
def test_what_no_reward_can_read_and_what_is_no_reward_are_refused(method, row, message):
    """Catches: A base is added as a reward, zeros anywhere are padding, or no ids fail deep in the reward."""
    model = SimpleNamespace(info={} if method == "base" else dict(method=method))
    with pytest.raises(ValueError, match=message):
        RewardProcessor(model, attention_mask=torch.tensor([[0, 1, 1], row]))(PROMPTS[:2, :0], None)


@pytest.fixture(scope="module")
def their_generate():
    """The method `generate` of the base in transformers, where the padding is also the end token."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "llama3").eval()
    model.generation_config.update(max_new_tokens=20, eos_token_id=0, pad_token_id=0)
    return model.generate


@pytest.mark.parametrize("beta", [None, 1.0, 0.5])
def test_in_transformers_a_reward_writes_the_same_text(their_generate, models, beta):
    rewards = [(1 / beta, models.reward)] if beta else []
    want = prt.generate(models.base, rewards, PROMPTS, length=20, pad=torch.tensor(PAD))
    processors = [RewardProcessor(models.reward, beta, MASK)] if beta else []
    assert their_generate(PROMPTS, attention_mask=MASK, logits_processor=processors).equal(want)


@pytest.mark.parametrize("options", [{}, dict(num_beams=4), dict(num_beams=4, num_return_sequences=2),
                                     dict(do_sample=True, top_k=1, num_return_sequences=2)])
def test_in_transformers_each_row_is_the_same_as_alone(their_generate, models, options):
    """Catches: A beam, whose row changes in every step, reads another's keys, or has another's padding."""
    @torch.no_grad()
    def without_cache(ids, scores):
        return prt.tilt(scores, models.reward(ids)[:, -1])

    processor = RewardProcessor(models.reward, attention_mask=MASK)
    for _ in range(2):
        found = their_generate(PROMPTS, attention_mask=MASK, logits_processor=[processor], **options)
        for n, row, rows in zip(PAD, PROMPTS, found.unflatten(0, (3, -1))):
            alone = dict(input_ids=row[None, n:], attention_mask=MASK[:1, n:])
            assert rows[:, n:].equal(their_generate(**alone, logits_processor=[without_cache], **options))
            assert not rows[:, n:].equal(their_generate(**alone, **options))


@block("RewardProcessor")
def test_in_transformers_the_readme_is_right_for_padded_prompts(their_generate, models, code, monkeypatch):
    """Catches: The snippet does not run, or leaves the reward without the padding."""
    monkeypatch.setattr(weights, "load", lambda name, dtype: models.reward)
    inputs, found = dict(input_ids=PROMPTS, attention_mask=MASK), []
    model = SimpleNamespace(generate=lambda **options: found.append(their_generate(**options)))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURES / "stories260k")
    text = tokenizer.backend_tokenizer.to_str()
    monkeypatch.setitem(models.reward.info, "tokenizer", text)
    run(code.replace('"cuda"', '"cpu"'), model=model, inputs=inputs, tokenizer=tokenizer)
    want = prt.generate(models.base, [(1.0, models.reward)], PROMPTS, length=20, pad=torch.tensor(PAD))
    assert found[0].equal(want)
