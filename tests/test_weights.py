"""Tokenizer and weights: parity with OpenCLIP, every file form, downloads, damaged files, atomic writes."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, REFUSED

from models import weights
from models.clip import CLIP
from models.tokenizer import clip_tokens

KINDS = {"openclip_vit": "", "openclip_vit_quickgelu": "", "openclip_rn": "", "openclip_bare": "weights.pt"}
VIT = FIXTURES / "openclip_vit"
BARE = FIXTURES / "openclip_bare" / "weights.pt"


def expected(folder):
    return torch.load(FIXTURES / folder / "io.pt", weights_only=True)


def features(model, io):
    with torch.no_grad():
        return model.encode_image(io["image"]), model.encode_text(io["tokens"])


def error(a, b):
    return (a - b).abs().max().item()


def bare():
    return torch.load(BARE, weights_only=True)


def write_safetensors(path, tensors, **change):
    """Writes the format by hand; change: replacements in the last tensor's header entry."""
    codes = {v: k for k, v in weights.DTYPES.items()}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        data = t.contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""
        offsets, body = [len(body), len(body) + len(data)], body + data
        header[name] = dict(dtype=codes[t.dtype], shape=list(t.shape), data_offsets=offsets)
    header[name] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


# Parity with OpenCLIP

@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind):
    """A wrong head count, activation, normalisation or pooling: features move away from OpenCLIP's."""
    io, model = expected(kind), weights.load(FIXTURES / kind / KINDS[kind], "base")
    image, text = features(model, io)
    assert error(image, io["image_features"]) < 1e-4
    assert error(text, io["text_features"]) < 1e-4
    with torch.no_grad():
        logits = model(io["image"][:3], io["tokens"][:3])  # one caption an image
        scores = model.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    assert error(scores, io["logits_per_image"]) < 1e-4
    assert error(logits[:3], io["logits_per_image"][:, :3]) < 1e-4
    assert error(logits[3:], io["logits_per_image"][:, :3].T) < 1e-4
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())


def test_quick_gelu_matters(tmp_path):
    """Dropping the flag of open_clip_config.json: no error anywhere, but other features."""
    folder = shutil.copytree(FIXTURES / "openclip_vit_quickgelu", tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    assert config["model_cfg"].pop("quick_gelu") is True
    file.write_text(json.dumps(config))
    io = expected("openclip_vit_quickgelu")
    image, text = features(weights.load(folder), io)
    assert error(image, io["image_features"]) > 1e-3 and error(text, io["text_features"]) > 1e-3


def test_pixel_mean_and_std_belong_to_the_weights():
    """CLIP's own mean and std applied to weights that were trained with others."""
    model, images = weights.load(VIT), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = expected("openclip_vit")["tokens"][:2]
    with torch.no_grad():
        assert error(model(images, tokens), model((images / 255 - 0.5) / 0.25, tokens)) < 1e-5
    assert weights.load(BARE).arch["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


@pytest.mark.parametrize("kind", KINDS)
def test_text_padding_is_never_read(kind):
    """Reading the text feature at the last position, or attending to padding."""
    io, model = expected(kind), weights.load(FIXTURES / kind / KINDS[kind])
    with torch.no_grad():
        for tokens, feature in zip(io["tokens"], io["text_features"]):
            short = tokens[: tokens.argmax() + 1]
            assert error(model.encode_text(short[None])[0], feature) < 1e-4


# Tokenizer

def test_tokens_are_those_of_openclip():
    """Cleaning, merges and the split into words: a single other id moves the whole text feature."""
    cases = json.loads((FIXTURES / "clip_tokens.json").read_text())
    assert len(cases) > 10
    for case, ids in zip(cases, clip_tokens([case["text"] for case in cases]).tolist()):
        assert ids == case["ids"], case["text"]


def test_long_text_keeps_its_end():
    """Cutting the end token off: the text feature is then read at an arbitrary word."""
    long, exact, short = clip_tokens(["word " * 100, "word " * 75, "word " * 74])
    assert long[0] == 49406 and long[76] == 49407 and (long != 49407).sum() == 76
    assert torch.equal(long, exact)
    assert short[75] == 49407 and short[76] == 0
    assert clip_tokens(["word " * 9], context=5).tolist() == [[49406, *long[1:4].tolist(), 49407]]


# Forms of a file

def torchscript(path, tensors):
    """An archive like OpenAI's: half precision, the names nested, three sizes among the buffers."""
    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        node.register_parameter(leaf, torch.nn.Parameter(value.half()))
    for name, value in dict(input_resolution=32, context_length=77, vocab_size=512).items():
        root.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.script(root), path)
    return path


def test_forms_of_a_bare_state_dict(tmp_path):
    """A bare .safetensors file, and one as OpenCLIP's distributed training saves it."""
    wrapped = tmp_path / "wrapped.pt"
    torch.save(dict(epoch=3, state_dict={"module." + k: v for k, v in bare().items()}), wrapped)
    io = expected("openclip_bare")
    for path in (write_safetensors(tmp_path / "bare.safetensors", bare()), wrapped):
        model = weights.load(path, "base")
        assert not model.arch["quick_gelu"] and model.arch["patch"] == 8 and model.arch["image_size"] == 32
        image, text = features(model, io)
        assert error(image, io["image_features"]) < 1e-4 and error(text, io["text_features"]) < 1e-4


def test_half_precision_comes_out_as_float32(tmp_path):
    """Half-precision weights left as they are: rounded features, or an error about mixed types."""
    path = write_safetensors(tmp_path / "half.safetensors", {k: v.bfloat16() for k, v in bare().items()})
    model = weights.load(path)
    assert all(p.dtype == torch.float32 for p in model.state_dict().values())
    features(model, expected("openclip_bare"))


def test_folder_with_bin_file(tmp_path):
    """Older OpenCLIP repositories have open_clip_pytorch_model.bin only."""
    folder = shutil.copytree(VIT, tmp_path / "clip")
    file = folder / "open_clip_model.safetensors"
    tensors = {k: v.clone() for k, v in weights.read(file).items()}
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    file.unlink()
    io = expected("openclip_vit")
    assert error(features(weights.load(folder, "base"), io)[0], io["image_features"]) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_quick_gelu_and_float32(tmp_path):
    """OpenAI's archives do not name their activation: under the exact GELU they lose points in silence."""
    model, io = weights.load(torchscript(tmp_path / "ViT.pt", bare()), "base"), expected("openclip_bare")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    rounded = {k: v.half().float() for k, v in bare().items()}
    same, other = (CLIP(model.arch | dict(quick_gelu=quick)).eval() for quick in (True, False))
    for clip in (same, other):
        clip.load_state_dict(rounded)
    for feature, right, wrong in zip(*(features(m, io) for m in (model, same, other))):
        assert error(feature, right) < 1e-5 and error(feature, wrong) > 1e-3


# Downloads

PATHS = [f"/org/clip/resolve/main/{name}" for name in ("open_clip_config.json", "open_clip_model.safetensors",
                                                       "open_clip_pytorch_model.bin")]


@pytest.fixture
def hub(serve, monkeypatch):
    """A hub with the repository org/clip, its config served directly, its weights by another host."""
    server, store = serve(), serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    store.files["/blob"] = (VIT / "open_clip_model.safetensors").read_bytes()
    server.files |= {PATHS[0]: (VIT / "open_clip_config.json").read_bytes(), PATHS[1]: f"{store.url}/blob"}
    server.store = store
    return server


def test_token_stays_with_the_hub(hub, monkeypatch):
    """The token carried along the redirect to the storage host, and so given away."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    io = expected("openclip_vit")
    assert error(features(weights.load("org/clip", "base"), io)[0], io["image_features"]) < 1e-4
    assert hub.seen == [(path, "Bearer hf_secret") for path in PATHS[:2]]
    assert hub.store.seen == [("/blob", None)]
    weights.download(f"{hub.store.url}/blob", weights.CACHE / "elsewhere")
    assert hub.store.seen[1:] == [("/blob", None)]


def test_no_token_no_header(hub):
    weights.load("org/clip")
    assert {token for _, token in hub.seen} == {None}


def test_token_is_never_printed(hub, monkeypatch):
    """A token with the newline of its file: the header is refused with a message that quotes it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    try:
        weights.load("org/clip")
    except (OSError, ValueError) as error:
        assert "hf_secret" not in str(error)


@pytest.mark.parametrize("binary", [False, True])
def test_downloaded_once(hub, cache, binary):
    """A cached model that still needs the network; without .safetensors that file is asked for again."""
    if binary:
        torch.save({k: v.clone() for k, v in weights.read(VIT / "open_clip_model.safetensors").items()},
                   cache.with_name("clip.bin"))
        hub.files |= {PATHS[1]: 404, PATHS[2]: cache.with_name("clip.bin").read_bytes()}
    weights.load("org/clip")
    asked = len(hub.seen)
    assert asked == 2 + binary
    weights.load("org/clip")
    assert len(hub.seen) == asked


def test_short_body_leaves_nothing(hub, cache):
    """A dropped connection whose half file is taken for the whole one from then on."""
    hub.store.lost = 10
    with pytest.raises(OSError, match="/org/clip/resolve/main/open_clip_model.safetensors"):
        weights.load("org/clip")
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["open_clip_config.json"]
    hub.store.lost = 0
    weights.load("org/clip")


def test_refusals_of_the_hub(hub, cache):
    """A gated model and a misspelt one told apart."""
    hub.files[PATHS[1]] = 404
    with pytest.raises(FileNotFoundError, match="org/clip: holds no .*safetensors and no .*bin"):
        weights.load("org/clip")
    for status in (401, 403):
        hub.files[PATHS[0]] = status
        shutil.rmtree(cache, ignore_errors=True)
        with pytest.raises(OSError, match=PATHS[0]) as caught:
            weights.load("org/clip")
        assert "HF_TOKEN" in str(caught.value) and str(status) in str(caught.value)
        assert not isinstance(caught.value, FileNotFoundError)
        assert not [p for p in cache.rglob("*") if p.is_file()]


def test_no_connection(monkeypatch, cache):
    """Without network the message must say what to fetch and where to put it."""
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    with pytest.raises(OSError) as caught:
        weights.load("org/clip")
    place = cache / "hub/org/clip/open_clip_config.json"
    assert REFUSED + PATHS[0] in str(caught.value) and str(place) in str(caught.value)
    shutil.copytree(VIT, place.parent, dirs_exist_ok=True)  # put there by hand, it is found
    weights.load("org/clip")


@pytest.mark.parametrize("source", ["nothing", "no/such/folder", "/nothing", "../nothing", "out/base.pt"])
def test_mistyped_path_is_no_hub_id(source, serve, monkeypatch):
    """A mistyped path looked up on the hub: the message then speaks of the network."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(FileNotFoundError, match=source):
        weights.load(source)
    assert not server.seen


# safetensors

TENSORS = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor([1.5, -2], dtype=torch.bfloat16),
               none=torch.empty(0, 4), scalar=torch.tensor(3), mask=torch.tensor([True, False]))


def test_safetensors_round_trip(tmp_path):
    """Every type at its offset, empty tensors with their shape, and the metadata left out."""
    read = weights.read(write_safetensors(tmp_path / "t.safetensors", TENSORS))
    assert list(read) == list(TENSORS)
    for name, t in TENSORS.items():
        assert read[name].dtype == t.dtype and read[name].shape == t.shape and torch.equal(read[name], t)


def test_safetensors_is_mapped_copy_on_write(tmp_path):
    """Training through the memory map: it must neither fail nor change the file."""
    path = write_safetensors(tmp_path / "t.safetensors", TENSORS)
    before = path.read_bytes()
    a = weights.read(path)["a"]
    a += 1
    assert torch.equal(a, TENSORS["a"] + 1) and path.read_bytes() == before
    assert torch.equal(weights.read(path)["a"], TENSORS["a"])
    a = weights.read(write_safetensors(tmp_path / "big.safetensors", dict(a=torch.zeros(1 << 20))))["a"]
    if Path("/proc/self/maps").exists():  # Linux: the tensor lies in a private mapping of the file
        maps = [line.split() for line in open("/proc/self/maps") if "big.safetensors" in line]
        (low, high, mode), = ((*(int(end, 16) for end in span.split("-")), mode) for span, mode, *_ in maps)
        assert low < a.data_ptr() < high and mode == "rw-p"


DAMAGE = {
    "bad header length": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "header length one short": lambda data: bytes([data[0] - 1]) + data[1:],
    "header is a list": lambda data: (2).to_bytes(8, "little") + b"[]",
    "no utf-8": lambda data: data[:9] + b"\xff" + data[10:],
    "truncated data": lambda data: data[:-1],
    "truncated header": lambda data: data[:40],
    "truncated length": lambda data: data[:5],
    "empty": lambda data: b"",
}
ENTRY = {
    "offsets beyond the end": dict(data_offsets=[0, 800], shape=[200]),
    "negative offset": dict(data_offsets=[-8, 0]),
    "offsets swapped": dict(data_offsets=[8, 0]),
    "shape too small": dict(shape=[1]),
    "shape too large": dict(shape=[3]),
    "negative shape": dict(shape=[-2]),
    "two negative sizes": dict(shape=[-1, -2]),
    "fractional shape": dict(shape=[0.5, 4]),
    "shape beyond 64 bits": dict(shape=[1 << 70, 0], data_offsets=[0, 0]),
    "unknown dtype": dict(dtype="F4"),
    "no dtype": dict(dtype=None),
    "entry without offsets": dict(data_offsets=None),
    "one offset": dict(data_offsets=[0]),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *ENTRY])
def test_damaged_safetensors(tmp_path, damage):
    """Reading past the end of the file, or an exception that does not say which file it was."""
    path = write_safetensors(tmp_path / "t.safetensors", dict(a=torch.arange(2.0)), **ENTRY.get(damage, {}))
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match="t.safetensors"):
        weights.read(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_pt(tmp_path, keep):
    """A .pt file cut by a full disk or an aborted copy."""
    data = BARE.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(ValueError, match="cut.pt"):
        weights.load(path)


def test_pickles_run_no_code(tmp_path):
    """Unpickling a checkpoint from elsewhere runs whatever it asks for."""
    class Trap:
        def __reduce__(self):
            return (tmp_path / "trapped").touch, ()

    torch.save(dict(state_dict=Trap()), tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="trap.pt"):
        weights.load(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()


# Writing

def test_save_is_atomic(tmp_path, monkeypatch):
    """A full disk in the middle of a write: the old checkpoint must survive, no half one may stay."""
    path = tmp_path / "out" / "model.pt"
    checkpoint = dict(kind="clip", arch=dict(layers=[1, 2]), model=dict(a=torch.ones(2)), step=3)
    weights.save(path, checkpoint)
    assert torch.load(path, weights_only=True)["arch"] == dict(layers=[1, 2])
    before = path.read_bytes()

    def full(checkpoint, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for target in (path, path.with_name("new.pt")):
        with pytest.raises(OSError) as caught:
            weights.save(target, checkpoint)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    assert "new.pt" in str(caught.value)  # which disk is full


# CLIPs that do not fit

def folder_with(tmp_path, vision=None, text=None, **model):
    folder = shutil.copytree(VIT, tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"] |= model
    config["model_cfg"]["vision_cfg"] |= vision or {}
    config["model_cfg"]["text_cfg"] |= text or {}
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("part, key, value", [
    ("vision", "pool_type", "avg"), ("vision", "timm_model_name", "vit"),
    ("text", "hf_model_name", "roberta"), ("model", "custom_text", True)])
def test_unknown_config_key(tmp_path, part, key, value):
    """A variant that is not implemented, loaded as if it were the plain model: other features, no error."""
    change = {key: value} if part == "model" else {part: {key: value}}
    with pytest.raises(ValueError, match=key) as caught:
        weights.load(folder_with(tmp_path, **change))
    assert str(tmp_path / "clip") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": null}', ""])
def test_damaged_config(tmp_path, text):
    folder = folder_with(tmp_path)
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        weights.load(folder)


WRONG = {
    "ln_final.bias missing": {"ln_final.bias": None},
    "text_projection missing": {"text_projection": None},
    "left over": {"visual.extra": torch.ones(2)},
    "bias misshapen": {"ln_final.bias": torch.ones(3)},
    "positions misshapen": {"visual.positional_embedding": torch.ones(19, 128)},
    "positions of another width": {"positional_embedding": torch.ones(77, 3)},
    "convolution misshapen": {"visual.conv1.weight": torch.ones(3)},
    "embedding misshapen": {"token_embedding.weight": torch.ones(3)},
    "projection misshapen": {"text_projection": torch.ones(3)},
    "value is no tensor": {"ln_final.bias": 3},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_do_not_fit(tmp_path, wrong):
    """Tensors dropped or left at random values in silence, or an error that does not name file and tensor."""
    (name, value), = WRONG[wrong].items()
    torch.save({k: v for k, v in (bare() | WRONG[wrong]).items() if v is not None}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt") as caught:
        weights.load(tmp_path / "odd.pt")
    if value is None or torch.is_tensor(value):
        assert name in str(caught.value)


def test_heads_that_do_not_divide_the_width(tmp_path):
    """64 // 48 = 1 head is another model than the config asks for."""
    with pytest.raises(ValueError, match="head"):
        weights.load(folder_with(tmp_path, vision=dict(head_width=48)))


@pytest.mark.parametrize("content", [[1, 2], {}, dict(step=3), dict(kind="clip"), dict(kind="odd", model={})])
def test_other_torch_files(tmp_path, content):
    """A file of torch that is no CLIP and no checkpoint of this project."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        weights.load(tmp_path / "other.pt")


def test_roles(tiny):
    """A reward taken for a base, or plain fine-tuning for a reward: the numbers would only look bad."""
    for name, role in dict(old="prt", reward="base", ft="prt", new="ft").items():
        with pytest.raises(ValueError, match=f"{name}.pt is .* is needed here"):
            weights.load(getattr(tiny, name), role)
