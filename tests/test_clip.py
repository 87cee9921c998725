"""CLIP (models/clip.py and models/convnets.py): parity with OpenCLIP, pixels, classifiers."""
import pytest
import torch
import torch.nn.functional as F
from helpers import error, expected, load
from PIL import Image

from data.images import resize_crop
from models.clip import Preprocess, VisionTransformer, classifier, cosine, resize
from models.convnets import ConvNeXt, ModifiedResNet

TOWERS = dict(openclip_vit=VisionTransformer, openclip_vit_quickgelu=VisionTransformer,
              openclip_bare=VisionTransformer, openclip_rn=ModifiedResNet, openclip_convnext=ConvNeXt,
              openclip_convnext_mlp=ConvNeXt)
IO = expected("openclip_vit")


@pytest.fixture
def vit():
    return load("openclip_vit")


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_features_and_logits_are_those_of_openclip(name):
    """Catches: A wrong head count, activation, mask, pooling, or scale, or text padding is read."""
    io, model = expected(name), load(name)
    assert type(model.visual) is TOWERS[name]
    assert error(model.visual(io["image"]), io["image_features"]) < 1e-4
    assert error(model.encode_text(io["tokens"]), io["text_features"]) < 1e-4
    for tokens, feature in zip(io["tokens"], io["text_features"]):
        without_padding = tokens[: tokens.argmax() + 1]
        assert error(model.encode_text(without_padding[None])[0], feature) < 1e-4
    for_images = io["logits_per_image"][:, :3]
    logits = model(io["image"][:3], io["tokens"][:3])  # one caption per image
    assert error(logits, torch.cat([for_images, for_images.T])) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip_convnext", "openclip_convnext_mlp"])
def test_a_convnext_has_the_eps_of_timm_and_takes_images_of_any_size(name):
    """Catches: PyTorch's 1e-5, which moves features by less than the tolerance above."""
    visual = load(name).visual
    assert {m.eps for m in visual.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    for size in (33, 100):
        assert visual(torch.randn(2, 3, size, size)).shape == (2, 32)


def noise(n, size=32):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("size", [20, 32, 64])
def test_a_clip_and_its_classifier_resize_and_normalize_for_their_weights(vit, size):
    """Catches: One of the two does not, or takes CLIP's own mean and std, which these weights do not have."""
    pixels, tokens = noise(2, size), IO["tokens"][:2]
    for model, *rest in ((vit, tokens), (classifier(vit, tokens[:, None]),)):
        normalized = (resize(pixels, 32) / 255 - 0.5) / 0.25
        assert error(model(pixels, *rest), model(normalized, *rest)) < 1e-5


def test_each_channel_is_normalized_by_its_mean_and_std():
    """Catches: Images that are floats, and so normalized already, are normalized again."""
    preprocess = Preprocess(dict(image_size=4, mean=[0.5, 0.2, 0.0], std=[0.5, 0.1, 0.25]))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    pixels = preprocess(images)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 4, 4)
    assert error(pixels, torch.tensor([-1.0, 0.0, 4.0]).view(3, 1, 1)) < 1e-6
    assert preprocess(pixels) is pixels


@pytest.mark.parametrize("size", [16, 48, 224])
def test_images_are_resized_like_pil(size):
    """Catches: Another filter, or no antialias: of noise, the mean difference is then above 3.8 of 255."""
    pixels = noise(32)
    arrays = (image.permute(1, 2, 0).numpy() for image in pixels)
    want = torch.stack([resize_crop(Image.fromarray(array), size) for array in arrays])
    out = resize(pixels, size)
    assert resize(pixels, 32) is pixels  # no pass through the filter, or copy, for nothing
    assert out.dtype == torch.uint8 and out.shape == want.shape == (32, 3, size, size)
    difference = (out.float() - want.float()).abs()
    assert difference.mean() < 0.35  # PIL rounds and clips twice, between columns and rows, too
    assert (difference > 1).float().mean() < 0.02


@pytest.mark.parametrize("name", TOWERS)
def test_mean_and_std_are_those_of_the_weights_and_move_with_the_model(name):
    """Catches: They are lost on "meta", where models are built; checkpoints without them are refused."""
    model = load(name)
    assert not [key for key in model.state_dict() if "preprocess" in key]
    for buffer, want in zip(model.preprocess.buffers(), (model.arch["mean"], model.arch["std"]), strict=True):
        assert buffer.device.type == "cpu" and buffer.dtype == torch.float32
        assert error(buffer.flatten(), torch.tensor(want)) < 1e-7
    assert all(buffer.is_meta for buffer in model.to("meta").preprocess.buffers())


def test_logits_of_autocast_features_are_float32():
    """Catches: bfloat16 rounds logits near 100 to multiples of 0.5."""
    features, head = torch.randn(5, 16), 100 * F.normalize(torch.randn(3, 16), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cosine(features.bfloat16(), head)
    assert logits.dtype == torch.float32
    assert error(logits, F.normalize(features.bfloat16().float(), dim=-1) @ head.T) < 1e-4


@torch.no_grad()
def test_scale_of_the_contrastive_logits_is_at_most_100(vit):
    """Catches: A scale that grows without bound makes the training unstable."""
    cosines = IO["logits_per_image"][:, :3] / vit.logit_scale.exp()
    vit.logit_scale.fill_(10.0)
    assert error(vit(IO["image"][:3], IO["tokens"][:3])[:3], 100 * cosines) < 1e-3


@torch.no_grad()
def test_classifier_is_the_image_tower_of_its_clip_and_the_average_features_of_its_templates(vit):
    """Catches: A template with long features outweighs the others, or a copy of the tower takes memory."""
    head = classifier(vit, IO["tokens"][:4].view(2, 2, -1)).head
    a, b, c, d = F.normalize(IO["text_features"][:4], dim=-1)
    directions = torch.stack([(a + b) / (a + b).norm(), (c + d) / (c + d).norm()])
    assert error(head, vit.logit_scale.exp() * directions) < 1e-3
    shared = classifier(vit, IO["tokens"][:, None])  # of one template
    assert error(shared(IO["image"]), IO["logits_per_image"]) < 1e-4
    assert shared.visual is vit.visual and shared.arch == vit.arch
    assert set(shared.state_dict()) == {"head", *(f"visual.{name}" for name in vit.visual.state_dict())}
    assert not shared.training and not shared.head.requires_grad


@pytest.mark.parametrize("prompts", [torch.full((2, 1, 77), 512), torch.ones(2, 1, 78, dtype=torch.long)],
                         ids=["vocabulary", "positions"])
def test_classifier_refuses_prompts_that_its_clip_cannot_hold(vit, prompts):
    """Catches: An index error deep inside, or positions cut off in silence."""
    with pytest.raises(ValueError, match=r"\(512, 77\)"):
        classifier(vit, prompts)
