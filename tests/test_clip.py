"""CLIP (models/clip.py and models/convnets.py): parity with OpenCLIP, the contrastive logits, classifiers."""
import pytest
import torch
import torch.nn.functional as F
from helpers import error, expected, load
from PIL import Image

from data.images import resize_crop
from models.clip import CLIP, Preprocess, VisionTransformer, classifier, cosine, resize
from models.convnets import ConvNeXt, ModifiedResNet

TOWERS = dict(openclip_vit=VisionTransformer, openclip_vit_quickgelu=VisionTransformer,
              openclip_bare=VisionTransformer, openclip_rn=ModifiedResNet, openclip_convnext=ConvNeXt,
              openclip_convnext_mlp=ConvNeXt)
NAMES = list(TOWERS)


# Parity with OpenCLIP

@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_image_features_are_those_of_openclip(name):
    """Catches: A wrong head count, activation, normalization, or pooling moves the features."""
    io, model = expected(name), load(name)
    assert type(model.visual) is TOWERS[name]
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip_convnext", "openclip_convnext_mlp"])
def test_every_weight_of_a_convnext_matters(name):
    """Catches: The parity above would hold without a part of the tower, which its layer scale hides."""
    io, model = expected(name), load(name)
    for weight in model.visual.parameters():
        before = weight.clone()
        weight.mul_(0.9)
        assert error(model.encode_image(io["image"]), io["image_features"]) > 1e-4
        weight.copy_(before)


def test_every_layer_norm_of_a_convnext_has_an_epsilon_of_a_millionth():
    """Catches: PyTorch's 1e-5, which moves features by less than the tolerance."""
    norms = [m for m in load("openclip_convnext").visual.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 3 + 5 + 1  # of the stem, between stages, in the blocks, and of the head
    assert {norm.eps for norm in norms} == {1e-6}


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 33, 100])
def test_a_convnext_takes_images_of_any_size(size):
    """Catches: A size that is no multiple of 32 fails deep inside."""
    assert load("openclip_convnext").encode_image(torch.randn(2, 3, size, size)).shape == (2, 32)


# Pixels

@torch.no_grad()
def test_pixel_mean_and_std_belong_to_the_weights():
    """Catches: CLIP's own mean and std are applied to weights that were trained with others."""
    model, images = load("openclip_vit"), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = expected("openclip_vit")["tokens"][:2]
    assert error(model(images, tokens), model((images / 255 - 0.5) / 0.25, tokens)) < 1e-5


def preprocess(**arch):
    return Preprocess(dict(image_size=4, mean=[0.5, 0.2, 0.0], std=[0.5, 0.1, 0.25]) | arch)


def test_each_channel_is_normalized_by_its_mean_and_std():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    pixels = preprocess()(images)
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 4, 4)
    assert error(pixels, torch.tensor([-1.0, 0.0, 4.0]).view(3, 1, 1)) < 1e-6


def test_floats_are_left_as_they_are():
    """Catches: Images that are normalized already are normalized again."""
    images = torch.randn(2, 3, 4, 4)
    assert preprocess()(images) is images


def test_small_images_are_resized_before_they_are_normalized():
    """Catches: Overshoots of the filter beyond black and white stay, or values between the 256 of uint8."""
    pixels = preprocess(image_size=28, mean=[0.0] * 3, std=[1.0] * 3)(noise(2))
    assert pixels.dtype == torch.float32 and pixels.shape == (2, 3, 28, 28)
    assert pixels.min() == 0 and pixels.max() == 1
    assert error(pixels, resize(noise(2), 28) / 255) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("size", [20, 32, 64])
def test_a_clip_and_its_classifier_take_images_of_any_size(size):
    """Catches: One of the two does not resize, and a position embedding of another length meets its input."""
    model, tokens, pixels = load("openclip_vit"), expected("openclip_vit")["tokens"][:2], noise(2, size)
    resized = resize(pixels, 32)
    assert resized.shape == (2, 3, 32, 32)
    assert torch.equal(model(pixels, tokens), model(resized, tokens))
    reward = classifier(model, tokens[:, None])
    assert torch.equal(reward(pixels), reward(resized))


def test_images_of_the_right_size_are_not_resized():
    """Catches: Every batch takes a pass through the filter, or a copy, for nothing."""
    pixels = noise(2)
    assert resize(pixels, 32) is pixels


def noise(n, size=32):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def photographs(n, size=32):
    """Returns smooth random images with a little noise, some of them with areas at 0 and at 255."""
    generator = torch.Generator().manual_seed(size)
    smooth = F.interpolate(torch.rand(n, 3, 6, 6, generator=generator), (size, size), mode="bicubic")
    pixels = 300 * smooth - 20 + 5 * torch.randn(smooth.shape, generator=generator)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def by_pil(pixels, size):
    """Returns uint8 images [B, 3, h, w] as the readers of data sets resize them."""
    arrays = (image.permute(1, 2, 0).numpy() for image in pixels)
    return torch.stack([resize_crop(Image.fromarray(array), size) for array in arrays])


@pytest.mark.parametrize("size", [16, 48, 224])
@pytest.mark.parametrize("make, mean, share", [(photographs, 0.3, 0.003), (noise, 0.35, 0.02)],
                         ids=["photographs", "noise"])
def test_images_are_resized_like_pil(make, mean, share, size):
    """Catches: Another filter, or one without antialias, silently costs accuracy.

    Without antialias, torch's bicubic filter has a = -0.75 and not PIL's -0.5: the mean difference is then
    above 0.7, and of noise above 3.8, of 255. PIL rounds and clips twice, between columns and rows, too.
    """
    pixels = make(32)
    out, want = resize(pixels, size), by_pil(pixels, size)
    assert out.dtype == torch.uint8 and out.shape == want.shape == (32, 3, size, size)
    difference = (out.float() - want.float()).abs()
    assert difference.mean() < mean
    assert (difference > 1).float().mean() < share


def test_photographs_of_32_pixels_are_enlarged_like_pil():
    """Catches: The images that a model sees drift from those that its figures were measured with."""
    pixels = photographs(64)
    difference = (resize(pixels, 224).float() - by_pil(pixels, 224).float()).abs()
    assert difference.mean() < 0.2
    assert (difference > 1).float().mean() < 0.001


@torch.no_grad()
def test_a_classifier_has_nearly_the_logits_of_images_that_pil_resized():
    """Catches: Small images that are resized on the device are scored otherwise than those of a reader."""
    torch.manual_seed(0)
    arch = dict(embed_dim=32, quick_gelu=False, mean=[0.5] * 3, std=[0.25] * 3, image_size=224, width=64,
                layers=2, patch=16, heads=2, text_width=32, text_layers=1, text_heads=1, context=9, vocab=64)
    clip, pixels = CLIP(arch).eval(), photographs(16)
    model = classifier(clip, torch.randint(0, 64, (10, 1, 9)))
    logits, want = model(pixels), model(by_pil(pixels, 224))
    assert error(logits, want) < 0.01 < 0.2 < want.std(0).mean()  # without antialias: 0.02 to 0.03


def test_mean_and_std_are_not_in_the_state_dict():
    """Catches: Older checkpoints, which lack these two keys, are refused."""
    model = load("openclip_vit")
    shared = classifier(model, expected("openclip_vit")["tokens"][:, None])
    assert not [name for name in (*model.state_dict(), *shared.state_dict()) if "preprocess" in name]
    assert set(shared.state_dict()) == {"head", *(f"visual.{k}" for k in model.visual.state_dict())}
    assert [name for name, _ in model.named_buffers()] == ["preprocess.mean", "preprocess.std"]


def test_mean_and_std_move_with_the_model():
    """Catches: Images on a GPU meet a mean on the CPU."""
    model = load("openclip_vit").to("meta")
    assert model.preprocess.mean.is_meta and model.preprocess.std.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_std_have_values_after_loading(name):
    """Catches: They are lost on the meta device, where models are built before their weights come."""
    model = load(name)
    for key in ("mean", "std"):
        buffer = getattr(model.preprocess, key)
        assert buffer.device.type == "cpu" and buffer.dtype == torch.float32
        assert error(buffer.flatten(), torch.tensor(model.arch[key])) < 1e-7


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
