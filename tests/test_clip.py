"""CLIP (models/clip.py and models/convnets.py): parity with OpenCLIP, the contrastive logits, classifiers."""
import pytest
import torch
import torch.nn.functional as F
from helpers import error, expected, load

from models.clip import CLIP, classifier, cosine, normalize
from models.convnets import ModifiedResNet

NAMES = ["openclip_vit", "openclip_vit_quickgelu", "openclip_rn", "openclip_bare"]


# Parity with OpenCLIP

@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_image_features_are_those_of_openclip(name):
    """Catches: A wrong head count, activation, normalization, or pooling moves the features."""
    io, model = expected(name), load(name)
    assert isinstance(model.visual, ModifiedResNet) == (name == "openclip_rn")
    assert error(model.encode_image(io["image"]), io["image_features"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_text_features_are_those_of_openclip(name):
    """Catches: A wrong head count, activation, mask, or position of the end token moves the features."""
    io = expected(name)
    assert error(load(name).encode_text(io["tokens"]), io["text_features"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_cosines_times_the_scale_are_the_logits_of_openclip(name):
    """Catches: The scale is read as itself and not as its logarithm."""
    io, model = expected(name), load(name)
    image, text = model.encode_image(io["image"]), model.encode_text(io["tokens"])
    logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    assert error(logits, io["logits_per_image"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_contrastive_logits_are_those_of_images_then_of_texts(name):
    """Catches: The second half of the rows does not have the texts of its images as targets."""
    io = expected(name)
    logits = load(name)(io["image"][:3], io["tokens"][:3])  # one caption per image
    assert logits.shape == (6, 3)
    assert error(logits[:3], io["logits_per_image"][:, :3]) < 1e-4
    assert error(logits[3:], io["logits_per_image"][:, :3].T) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_text_padding_is_never_read(name):
    """Catches: The text feature is read at the last position, or padding is attended to."""
    io, model = expected(name), load(name)
    for tokens, feature in zip(io["tokens"], io["text_features"]):
        short = tokens[: tokens.argmax() + 1]
        assert error(model.encode_text(short[None])[0], feature) < 1e-4


@torch.no_grad()
def test_quick_gelu_matters():
    """Catches: Weights trained with one GELU run with the other one, without any error."""
    model, io = load("openclip_vit_quickgelu"), expected("openclip_vit_quickgelu")
    assert model.arch["quick_gelu"] is True
    other = CLIP(model.arch | dict(quick_gelu=False)).eval()
    other.load_state_dict(model.state_dict())
    assert error(other.encode_image(io["image"]), io["image_features"]) > 1e-3
    assert error(other.encode_text(io["tokens"]), io["text_features"]) > 1e-3


# Pixels

@torch.no_grad()
def test_pixel_mean_and_std_belong_to_the_weights():
    """Catches: CLIP's own mean and std are applied to weights that were trained with others."""
    model, images = load("openclip_vit"), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = expected("openclip_vit")["tokens"][:2]
    assert error(model(images, tokens), model((images / 255 - 0.5) / 0.25, tokens)) < 1e-5


def test_normalize_takes_each_channel_by_its_mean_and_std():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    pixels = normalize(images, dict(mean=[0.5, 0.2, 0.0], std=[0.5, 0.1, 0.25]))
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 4, 4)
    assert error(pixels, torch.tensor([-1.0, 0.0, 4.0]).view(3, 1, 1)) < 1e-6


def test_normalize_leaves_floats_as_they_are():
    """Catches: Images that are normalized already are normalized again."""
    images = torch.randn(2, 3, 4, 4)
    assert normalize(images, dict(mean=[0.5] * 3, std=[0.5] * 3)) is images


# Logits and classifiers

def test_logits_of_autocast_features_are_float32():
    """Catches: bfloat16 rounds logits near 100 to multiples of 0.5."""
    features, head = torch.randn(5, 16), 100 * F.normalize(torch.randn(3, 16), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cosine(features.bfloat16(), head)
    assert logits.dtype == torch.float32
    assert error(logits, F.normalize(features.bfloat16().float(), dim=-1) @ head.T) < 1e-4


@torch.no_grad()
def test_scale_of_the_contrastive_logits_is_at_most_100():
    """Catches: A scale that grows without bound makes the training unstable."""
    model, io = load("openclip_vit"), expected("openclip_vit")
    model.logit_scale.fill_(10.0)
    cosines = io["logits_per_image"][:, :3] / load("openclip_vit").logit_scale.exp()
    assert error(model(io["image"][:3], io["tokens"][:3])[:3], 100 * cosines) < 1e-3


@torch.no_grad()
def test_classifier_of_one_template_has_the_logits_of_the_clip():
    io, model = expected("openclip_rn"), load("openclip_rn")
    logits = classifier(model, io["tokens"][:, None])(io["image"])
    assert error(logits, io["logits_per_image"]) < 1e-4


@torch.no_grad()
def test_classifier_averages_the_normalized_features_of_its_templates():
    """Catches: A template with long features outweighs the others, or the average is not normalized."""
    io, model = expected("openclip_vit"), load("openclip_vit")
    head = classifier(model, io["tokens"][:4].view(2, 2, -1)).head
    a, b, c, d = F.normalize(io["text_features"][:4], dim=-1)
    directions = torch.stack([(a + b) / (a + b).norm(), (c + d) / (c + d).norm()])
    assert error(head, model.logit_scale.exp() * directions) < 1e-3


def test_classifier_shares_the_image_tower_of_its_clip():
    """Catches: A copy of the image tower takes its memory twice."""
    model = load("openclip_vit")
    shared = classifier(model, expected("openclip_vit")["tokens"][:, None])
    assert shared.visual is model.visual and shared.arch == model.arch
    assert not shared.training and not shared.head.requires_grad


@pytest.mark.parametrize("prompts", [torch.full((2, 1, 77), 512), torch.ones(2, 1, 78, dtype=torch.long),
                                     torch.full((2, 1, 78), 512)], ids=["vocabulary", "positions", "both"])
def test_classifier_refuses_prompts_that_its_clip_cannot_hold(prompts):
    """Catches: An index error deep inside, or positions cut off in silence."""
    with pytest.raises(ValueError, match=r"\(512, 77\)"):
        classifier(load("openclip_vit"), prompts)
