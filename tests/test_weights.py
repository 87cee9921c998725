"""From files to models (models/weights.py): forms, configs, shards, the hub, checkpoints, vocabularies."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, output
from helpers import error, expected, load, random_ids, write_safetensors

import prt
from data import files
from data.tokenizer import Tokenizer
from models import gpt, weights
from models.clip import classifier
from models.gpt import GPT

GPTS = ["gpt2", "gpt2_hub", "llama2", "llama3", "falcon3", "qwen2"]
CLIPS = ["openclip_vit", "openclip_rn", "openclip_bare", "openclip_convnext", "openclip_convnext_mlp"]
TOKENIZERS = {name: (FIXTURES / f"{name}_tokenizer" / "tokenizer.json").read_text()
              for name in ("llama3", "qwen2")}


@torch.no_grad()
def assert_features(model, visual, text=None, tolerance=1e-4):
    """Asserts that a model gives the reference's outputs: those of two fixtures, for a CLIP's two towers."""
    images, texts = expected(visual), expected(text or visual)
    if model.info["kind"] == "gpt":
        assert error(model(images["ids"]), images["logits"]) < tolerance
    else:
        assert error(model.visual(images["image"]), images["image_features"]) < tolerance
        assert error(model.encode_text(texts["tokens"]), texts["text_features"]) < tolerance


def tensors_of(name):
    """Returns the tensors of a fixture in one file."""
    file = next(path for path in (FIXTURES / name).iterdir() if path.suffix not in (".json", ".txt")
                and path.name != "io.pt")
    return {k: x.clone() for k, x in files.read(file).items()}


def saved(path, content):
    torch.save(content, path)
    return path


def merged(old, change):
    """Returns a dict, and those inside of it, with replaced values; None removes a key."""
    new = old | {k: merged(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v
                 for k, v in change.items()}
    return {k: v for k, v in new.items() if v is not None or k not in change}


def edited(path, name, tensors=None, **change):
    """Returns a copy, in the folder `path`, of a fixture with another configuration, or other tensors."""
    folder = shutil.copytree(FIXTURES / name, path / name)
    file, = folder.glob("*config.json")
    file.write_text(json.dumps(merged(json.loads(file.read_text()), change)))
    if tensors:
        file, = folder.glob("*.safetensors")
        write_safetensors(file, tensors)
    return folder


def refused(source, *words, kind=ValueError, **options):
    """Asserts that a source is refused in one line that names it and has these words."""
    with pytest.raises(kind) as caught:
        weights.load(source, **options)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    assert all(str(word) in message for word in (source, *words)), message


# Forms of a file

@pytest.mark.parametrize("name", [*GPTS, *CLIPS])
def test_models_are_loaded_in_eval_mode_and_float32_without_random_numbers(name):
    before = torch.get_rng_state()
    model = load(name, role="base")
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.info["kind"] == ("gpt" if name in GPTS else "clip")


@pytest.mark.parametrize("suffix, change, tolerance", [
    (".safetensors", lambda tensors: tensors, 1e-4),
    (".pt", lambda tensors: dict(epoch=3, state_dict={"module." + k: x for k, x in tensors.items()}), 1e-4),
    (".pt", lambda tensors: tensors | dict(logit_scale=tensors["logit_scale"].reshape(1)), 1e-4),
    (".pt", lambda tensors: {k: x.bfloat16() for k, x in tensors.items()}, 0.1),
], ids=["safetensors", "as distributed training saves it", "scale of one dimension", "bfloat16"])
@pytest.mark.parametrize("visual", ["openclip_bare", "openclip_convnext", "openclip_convnext_mlp"])
def test_bare_state_dict_of_a_clip_is_read_in_any_form(tmp_path, capsys, visual, suffix, change, tolerance):
    """Catches: What shapes do not tell, as a ConvNeXt's image size, is assumed in silence."""
    path, text = tmp_path / f"bare{suffix}", tensors_of("openclip_bare")  # with heads of 64, as assumed
    tensors = {k: x for k, x in text.items() if not k.startswith("visual.")}
    tensors |= {k: x for k, x in tensors_of(visual).items() if k.startswith("visual.")}
    (saved if suffix == ".pt" else write_safetensors)(path, change(tensors))
    model = weights.load(path, "base")
    assert not model.arch["quick_gelu"] and model.logit_scale.shape == (1,)  # FSDP shards no scalars
    assert model.arch["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert model.arch["std"] == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert model.arch["image_size"] == (32 if visual == "openclip_bare" else 256)
    assert all(x.dtype == torch.float32 for x in model.state_dict().values())
    assert_features(model, visual, "openclip_bare", tolerance)
    printed = capsys.readouterr().out
    assert path.name in printed and "GELU" in printed
    assert ("256 pixels" in printed) == ("pixels" in printed) == (visual != "openclip_bare")


def test_gpt_in_half_precision_is_float32_unless_asked(tmp_path):
    half = {k: x.bfloat16() for k, x in tensors_of("llama2").items()}
    folder = edited(tmp_path, "llama2", half)
    for options, dtype in ({}, torch.float32), (dict(dtype=torch.bfloat16), torch.bfloat16):
        model = weights.load(folder, **options)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model.norm.weight, half["model.norm.weight"].to(dtype))


@pytest.mark.parametrize("source", ["nothing", "no/such/folder", "../nothing", "out/base.pt"])
def test_mistyped_path_is_no_hub_id(source, serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    refused(source, "no such file", kind=FileNotFoundError)
    assert not server.seen


# Public files

OLD_ROPE = dict(rope_parameters=None, rope_theta=500000.0)
SCALING = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=64)
STAGES = "visual.trunk.stages."


def vision(**change):
    return dict(model_cfg=dict(vision_cfg=change))


def deepened(tensors):
    """Returns a ConvNeXt's tensors with as many copies of each first block as convnext_xxlarge has blocks."""
    return {k.replace("blocks.0.", f"blocks.{j}."): x for i, blocks in enumerate((3, 4, 30, 3))
            for k, x in tensors.items() if k.startswith(f"{STAGES}{i}.blocks.0.") for j in range(blocks)}


@pytest.mark.parametrize("name, change, arch", [
    ("llama3", OLD_ROPE | dict(rope_scaling=SCALING | dict(rope_type="llama3")), {}),
    ("llama3", OLD_ROPE | dict(rope_scaling=SCALING | dict(type="llama3")), {}),
    ("llama2", dict(rope_parameters=None), {}),  # Llama 2's own config.json names no rope_theta
    *(("gpt2", dict(eos_token_id=value), dict(end=end)) for value, end in (
        (None, None), (0, 0), (511, 511), ([7, 8], 7))),
    ("openclip_convnext", vision(timm_drop=0.1, timm_drop_path=None, timm_model_pretrained=True,
                                 timm_pool="avg", timm_model_name="convnext_large"), dict(image_size=64)),
    ("openclip_convnext", vision(image_size=320), dict(image_size=320))])
def test_older_keys_and_options_that_change_no_feature_are_read(tmp_path, name, change, arch):
    """Catches: A published config is refused, or Llama 3.1's own scaling, which moves all logits, skipped."""
    model = weights.load(edited(tmp_path, name, **change))
    assert arch.items() <= model.arch.items()
    assert_features(model, name)


@pytest.mark.parametrize("name, buffers", [
    ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
              "transformer.h.1.attn.masked_bias": torch.ones(1)}),
    ("llama2", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})], ids=["gpt2", "llama2"])
def test_buffers_of_old_files_are_skipped(tmp_path, name, buffers):
    assert_features(weights.load(edited(tmp_path, name, tensors_of(name) | buffers)), name)


@pytest.mark.parametrize("name, change, word", [
    ("llama3", dict(rope_parameters=dict(rope_type="yarn")), "rope_type is 'yarn'"),
    ("llama3", OLD_ROPE | dict(rope_scaling=dict(type="linear", factor=2.0)), "type is 'linear'"),
    *((name, {key: value}, key) for name, key, value in [
        ("llama2", "model_type", "gemma3_text"), ("llama2", "attention_bias", True),
        ("llama2", "mlp_bias", True), ("llama2", "hidden_act", "gelu"),
        ("llama2", "quantization_config", dict(bits=4)),
        ("qwen2", "use_sliding_window", True), ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_weights", False), ("gpt2", "scale_attn_by_inverse_layer_idx", True)]),
    *(("llama2", {key: None}, key) for key in ("model_type", "vocab_size", "rms_norm_eps")),
    *(("llama2", {key: value}, word) for key, value, word in [
        ("num_hidden_layers", 3000, "num_hidden_layers is 3000"), ("num_hidden_layers", 2, "layers.2."),
        ("num_attention_heads", 5, "5 heads"), ("num_key_value_heads", 3, "3 of keys"),
        ("intermediate_size", 10**12, "intermediate_size"), ("vocab_size", 511, "embed"),
        ("head_dim", 8, "q_proj"),
        ("rope_parameters", [1], ""), ("eos_token_id", 512, "token is 512")]),
    *(("openclip_convnext", vision(**{key: value}), key) for key, value in [
        ("timm_model_name", "convnextv2_base"), ("timm_model_name", "convnext_xxlarge"), ("timm_pool", "max"),
        ("timm_proj", "none"), ("timm_proj_bias", True), ("image_size", 31), ("image_size", 1025),
        ("image_size", [64, 64]), ("image_size", True)]),  # no tensor tells it
    *(("openclip_vit", vision(**{key: value}), word) for key, value, word in [
        ("pool_type", "avg", "pool_type"), ("timm_model_name", "vit", "timm_model_name"),
        ("head_width", 48, "does not split"), ("head_width", 0, ""), ("head_width", "x", "")]),
    ("openclip_vit", dict(model_cfg=dict(text_cfg=dict(heads=1.5))), "heads is 1.5"),
    ("openclip_vit", dict(model_cfg=dict(text_cfg=dict(hf_model_name="roberta"))), "hf_model_name"),
    ("openclip_vit", dict(model_cfg=dict(multimodal_cfg=dict(layers=2))), "multimodal_cfg"),
    ("openclip_vit", dict(preprocess_cfg=dict(mean=[0.5, "x", 0.5])), "")])
def test_unsupported_options_and_values_that_do_not_fit_are_refused(tmp_path, name, change, word):
    """Catches: A variant is loaded as if it were the plain model, or modules are built for hours."""
    refused(edited(tmp_path, name, **change), word)


@pytest.mark.parametrize("name, key, shape", [
    ("llama2", "model.norm.weight", None), ("gpt2", "transformer.ln_f.weight", (3,)),
    ("llama2", "model.extra.weight", (2,)),
    *(("openclip_vit", *misfit) for misfit in [
        ("ln_final.bias", None), ("text_projection", (3,)), ("visual.extra", (2,)),
        ("visual.positional_embedding", (19, 64)), ("positional_embedding", (77, 3)),
        ("visual.conv1.weight", (3,)), ("token_embedding.weight", (3,))]),
    *(("openclip_convnext", *misfit) for misfit in [
        ("visual.trunk.stem.0.weight", (4, 3, 2, 2)), (f"{STAGES}4.blocks.0.gamma", (16,)),
        (f"{STAGES}1.downsample.1.weight", None), (f"{STAGES}0.downsample.1.weight", (4, 4, 2, 2)),
        (f"{STAGES}2.blocks.0.gamma", ()), (f"{STAGES}2.blocks.0.gamma", None),  # as in ConvNeXt V2
        (f"{STAGES}0.blocks.0.mlp.fc1.weight", (16, 4, 1, 1)),  # as in convnext_atto
        ("visual.trunk.norm_pre.weight", (16,)), ("visual.head.proj.weight", None)]),
    ("openclip_convnext_mlp", "visual.head.proj.weight", (32, 12)),  # beside a head that is an MLP
    ("openclip_convnext", "xxlarge", deepened)])  # whose LayerNorms have another epsilon
def test_tensors_that_do_not_fit_are_named(tmp_path, name, key, shape):
    """Catches: Tensors are dropped or left at random values in silence. shape: None if it is missing."""
    tensors = tensors_of(name)
    assert key in tensors or shape
    new = {} if shape is None else shape(tensors) if callable(shape) else {key: torch.ones(shape)}
    folder = edited(tmp_path, name, {k: x for k, x in tensors.items() if k != key} | new)
    refused(folder, key.removeprefix("model.").replace("transformer.ln_f", "norm"))


@pytest.mark.parametrize("name, file", [
    ("llama2", "config.json"), ("openclip_vit", "open_clip_config.json"), ("llama2", "model.safetensors"),
    ("llama3", "model.safetensors.index.json"), ("llama3", "model-00004-of-00009.safetensors")])
def test_damaged_and_missing_files_are_named(tmp_path, name, file):
    path = edited(tmp_path, name) / file
    if path.suffix == ".json":
        for text in "{", "[]", "", "\0", '{"model_cfg": null, "weight_map": 3}':
            path.write_text(text)
            refused(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-1])
        refused(path.parent, file)
        path.unlink()
        refused(path.parent, file, kind=FileNotFoundError)


# The hub

URL = "/org/{}/resolve/main/{}"
INDEX = URL.format("gpt", "model.safetensors.index.json")


@pytest.fixture
def server(serve, monkeypatch):
    """A hub with the sharded repository org/gpt and its tokenizer, and with org/clip."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for repo, name in dict(gpt="llama3", clip="openclip_vit").items():
        paths = [path for path in (FIXTURES / name).iterdir() if path.name != "io.pt"]
        server.files |= {URL.format(repo, path.name): path.read_bytes() for path in paths}
    server.files[URL.format("gpt", "tokenizer.json")] = TOKENIZERS["llama3"].encode()
    return server


@pytest.mark.parametrize("repo, name, binary", [("gpt", "llama3", False), ("clip", "openclip_vit", False),
                                                ("clip", "openclip_vit", True)])
def test_model_of_the_hub_is_downloaded_once(server, tmp_path, repo, name, binary):
    if binary:
        content = saved(tmp_path / "clip.bin", tensors_of(name)).read_bytes()
        server.files |= {URL.format("clip", "open_clip_model.safetensors"): 404,
                         URL.format("clip", "open_clip_pytorch_model.bin"): content}
    for _ in range(2):
        model = weights.load(f"org/{repo}", "base", text=repo == "gpt")
        assert_features(model, name)
        assert model.info.get("tokenizer") == (TOKENIZERS["llama3"] if repo == "gpt" else None)
    urls = [url for url, _ in server.seen]
    assert len(urls) == len(set(urls)) and {url for url in server.files if f"/{repo}/" in url} <= {*urls}


@pytest.mark.parametrize("repo, name, status", [
    ("gpt", "config.json", 404), ("gpt", "model-00003-of-00009.safetensors", 404),
    ("clip", "open_clip_model.safetensors", 404), ("gpt", "tokenizer.json", 403)])
def test_missing_and_gated_files_of_the_hub_are_told_apart(server, repo, name, status):
    server.files[URL.format(repo, name)] = status
    words, kind = {404: ([], FileNotFoundError), 403: (["HF_TOKEN"], OSError)}[status]
    refused(f"org/{repo}", name, *words, kind=kind)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors"])
def test_index_may_not_leave_its_folder(server, name):
    """Catches: An index from elsewhere reads, or on a hub writes, files outside the model's folder."""
    index = merged(json.loads(server.files[INDEX]), dict(weight_map={"model.norm.weight": name}))
    server.files[INDEX] = json.dumps(index).encode()
    refused("org/gpt", "index.json", name)
    assert not any("x.safetensors" in url for url, _ in server.seen)


# Checkpoints and roles

def checkpoint_of(kind, name, **header):
    """Returns a checkpoint of one of the three kinds, made of a fixture, and its model."""
    model = load(name)
    if kind == "classifier":
        model = classifier(model, expected(name)["tokens"][:, None])
    names = [f"class {i}" for i in range(len(model.head))] if kind == "classifier" else ["a class"]
    labels = dict(tokenizer=TOKENIZERS["llama3"], template="{}") if kind == "gpt" else dict(
        classes=names, templates=["a photo of a {c}."])
    if kind == "classifier" or "method" in header:
        labels |= dict(method="prt", beta=0.5, source="old.pt")
    return dict(kind=kind, arch=model.arch, step=3, data="x", args=dict(hold_out=0.0),
                **labels | header, model=model.state_dict()), model


@torch.no_grad()
@pytest.mark.parametrize("kind, name, method", [
    ("gpt", "gpt2", "prt"), ("gpt", "llama3", "ft"), ("clip", "openclip_rn", None),
    ("classifier", "openclip_vit", "prt"), ("classifier", "openclip_convnext", "prt")])
def test_checkpoint_gives_its_model_back(tmp_path, kind, name, method):
    checkpoint, model = checkpoint_of(kind, name, **(dict(method=method) if method else {}))
    files.save(tmp_path / "r.pt", checkpoint)
    again = weights.load(tmp_path / "r.pt", method or "base", text=kind == "gpt")
    assert again.arch == model.arch
    assert again.info == {k: v for k, v in checkpoint.items() if k != "model"}
    inputs = dict(gpt=["ids"], clip=["image", "tokens"], classifier=["image"])[kind]
    inputs = [expected(name)[key][:2] for key in inputs]
    assert torch.allclose(again(*inputs), model(*inputs), atol=1e-5)  # another place in memory may round
    half = weights.load(tmp_path / "r.pt", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16 if kind == "gpt" else torch.float32}


@pytest.mark.parametrize("kind, method, role, text, words", [
    ("gpt", "prt", "base", True, "r.pt is a reward for text; a base for text is needed here"),
    ("gpt", "ft", "prt", None, "r.pt is a fine-tuned model for text; a reward for text is"),
    ("gpt", None, "base", False, "r.pt is a base for text; a base for images is"),
    ("clip", None, "ft", None, "r.pt is a base for images; a fine-tuned model for images is"),
    ("classifier", "prt", None, True, "r.pt is a reward for images; a reward for text is")])
def test_model_of_another_role_is_refused(tmp_path, kind, method, role, text, words):
    header = dict(method=method) if method else {}
    checkpoint, _ = checkpoint_of(kind, "llama3" if kind == "gpt" else "openclip_vit", **header)
    refused(saved(tmp_path / "r.pt", checkpoint), words, role=role, text=text)
    for name, other in ("openclip_vit", True), ("llama3", False):
        refused(FIXTURES / name, "config.json", kind=FileNotFoundError, text=other)


@pytest.mark.parametrize("kind, name, change, word", [
    *((None, "", content, "") for content in (
        {}, dict(kind="clip"), tensors_of("openclip_bare") | {"ln_final.bias": 3})),
    *(("gpt", "llama3", change, "") for change in [
        dict(arch=None), dict(model=None), dict(model=[]), dict(kind="other"), dict(method="rlhf")]),
    *(("gpt", "llama3", dict(arch={key: None}), key) for key in ("vocab", "rope", "layer_norm", "bias")),
    *((kind, name, dict(arch=change), word) for kind, name, change, word in [
        ("gpt", "llama3", dict(layers=3000), "layers is 3000"),
        ("gpt", "llama3", dict(layers=2), "layers.2."),
        ("gpt", "llama3", dict(heads=2), "q_proj"), ("gpt", "llama3", dict(tied=False), "lm_head"),
        ("gpt", "llama3", dict(layer_norm=True), "norm"), ("gpt", "llama3", dict(gated_mlp=False), "gate"),
        ("gpt", "llama3", dict(qkv_bias=True), "q_proj.bias"), ("gpt", "llama3", dict(bias=True), "bias"),
        ("clip", "openclip_vit", dict(layers=[1, 1, 1, 3000]), "layers is"),
        ("clip", "openclip_vit", dict(layers=1), "resblocks"),
        ("clip", "openclip_vit", dict(embed_dim=16), "proj"),
        ("clip", "openclip_vit", dict(image_size=40), "positional_embedding"),
        ("classifier", "openclip_convnext", dict(layers=[1, 1, 3000, 1]), "layers is"),
        ("classifier", "openclip_convnext", dict(layers=[1, 1, 3, 1]), "blocks.2"),
        ("classifier", "openclip_convnext", dict(widths=[10**12] * 4), ""),
        ("classifier", "openclip_convnext", dict(mlp_head=True), "mlp.fc1"),
        ("classifier", "openclip_convnext", dict(image_size=10**9), "image_size is 1000000000")])])
def test_damaged_checkpoint_is_refused(tmp_path, kind, name, change, word):
    """Catches: Modules are built for hours, tensors are dropped in silence, or an image fills all memory."""
    refused(saved(tmp_path / "r.pt", merged(checkpoint_of(kind, name)[0], change) if kind else change), word)


# Numbers of the wrong type

WRONG = ["x", [], True, -1, math.inf]
UNREAD = ("attention_dropout", "initializer_range", "bos_token_id", "pretraining_tp", "max_window_layers")


def numbers(values):
    return [key for key, value in values.items() if type(value) in (int, float)]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "qwen3", "olmo2", "smollm3", "mistral"])
def test_wrong_numbers_in_a_config_are_refused_if_they_are_read(tmp_path, name):
    dropout = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout") if name == "gpt2" else ()
    folder = edited(tmp_path, name, **dict.fromkeys((*UNREAD, *dropout), "x"))
    assert_features(weights.load(folder), name)
    config = json.loads((folder / "config.json").read_text())
    wrong = [{key: value} for key in numbers(config) for value in WRONG]
    rope = numbers(config.get("rope_parameters", {}))
    for change in wrong + [dict(rope_parameters={key: value}) for key in rope for value in WRONG]:
        (folder / "config.json").write_text(json.dumps(merged(config, change)))
        refused(folder)


@pytest.mark.parametrize("kind, name", [("gpt", "llama3"), ("clip", "openclip_vit"),
                                        ("classifier", "openclip_rn"), ("classifier", "openclip_convnext")])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_wrong_values_in_a_checkpoint_are_refused(tmp_path, kind, name):
    checkpoint, _ = checkpoint_of(kind, name)
    arch = checkpoint["arch"]
    wrong = dict.fromkeys(numbers(arch), [*WRONG, 1.5])
    wrong |= dict.fromkeys({"mean", "std"} & arch.keys(), [None, "abc", [0.5] * 2, ["x"] * 3, [[0.5]] * 3])
    wrong |= {key: [5, [1, 2, 1], [1, 2, 1, "x"], [1, 2, 1, 0], [1, 2, 1, -1]] for key, value in arch.items()
              if isinstance(value, list) and len(value) == 4}
    wrong["eps"] = WRONG if kind == "gpt" else []  # 1.5 is odd but works
    if kind == "classifier":
        del wrong["text_width"]  # it has no text tower
    for key, values in wrong.items():
        for value in values:
            refused(saved(tmp_path / "r.pt", checkpoint | dict(arch=arch | {key: value})))


# One vocabulary

def small(rows, tokenizer="llama3", added=()):
    """Returns a GPT with this many rows in its output matrix, and a tokenizer of 1503 tokens."""
    torch.manual_seed(rows)
    model = GPT(load("llama2").arch | dict(vocab=rows)).eval()
    text = json.loads(TOKENIZERS[tokenizer]) if tokenizer else {}
    text.get("added_tokens", []).extend(added)
    model.info = dict(tokenizer=tokenizer and json.dumps(text))
    return model


@torch.no_grad()
@pytest.mark.parametrize("rows, printed", [
    ((1503, 1503), 0), ((1536, 1536), 1), ((1536, 1520), 1)])
def test_padded_rows_are_cut_and_named_once(capsys, rows, printed):
    """Catches: An id without text is chosen (Qwen2.5 has 151,936 or 152,064 rows for 151,665 tokens)."""
    models, ids = dict(base=small(rows[0]), reward=small(rows[1])), random_ids(2, 5)
    want = [model(ids)[..., :1503] for model in models.values()]
    for _ in range(2):
        tokenizer = gpt.same_vocabulary(models)
        assert tokenizer.size == 1503 and tokenizer.hash == Tokenizer(TOKENIZERS["llama3"], "").hash
    assert all(torch.equal(model(ids), logits) for model, logits in zip(models.values(), want))
    assert prt.generate(models["base"], [(1.0, models["reward"])], ids, length=2).max() < 1503
    text = capsys.readouterr().out
    assert text.count("cut to the tokenizer's 1503") == printed
    assert all(str(n) in text for n in rows) or not printed


@pytest.mark.parametrize("base, reward, words", [
    ((1503, "llama3"), (1503, "qwen2"), "org/new.*out/reward.pt"),
    ((1503, ""), (1503, "llama3"), "org/new.*tokenizer.json"),
    ((1503, "llama3"), (1400, "llama3"), "1503.*'out/reward.pt': 1400"),
    ((1503, "llama3"), (1504, "llama3", [dict(id=1503, content="<|tool|>", special=True)]),
     "same tokenizer")])
def test_different_tokenizers_and_too_few_rows_are_refused(base, reward, words):
    """Catches: Special tokens are not compared, and Qwen2.5's have another meaning in Qwen3."""
    with pytest.raises(ValueError, match=words):
        gpt.same_vocabulary({"org/new": small(*base), "out/reward.pt": small(*reward)})


MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
from models import weights
def mib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
for folder in sys.argv[2:]:
    model = None  # frees the one before
    before = mib("VmRSS")
    try:
        model = weights.load(folder)
        [p.sum() for p in model.parameters()]
    except ValueError:
        pass
    print(mib("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20 if model else 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_weight_is_in_memory_twice_and_a_damaged_head_width_takes_none(tmp_path):
    folders = [FIXTURES / "llama2", edited(tmp_path / "damaged", "llama2", head_dim=5 * 10**7)]
    # The first folder also loads libraries. bfloat16, of half the size, is in memory beside float32.
    for dtype, vocab in (torch.bfloat16, 24 << 10), (torch.float32, 48 << 10):
        sizes = {512: vocab, 96: 1024, 64: 512}
        tensors = {name: torch.zeros([sizes[n] for n in x.shape], dtype=dtype)
                   for name, x in tensors_of("llama2").items()}
        folders.append(edited(tmp_path / str(vocab), "llama2", tensors, vocab_size=vocab, hidden_size=512,
                              intermediate_size=1024, head_dim=128))
    printed = output("-c", MEASURE, ROOT, *folders, cwd=tmp_path)
    _, damaged, half, full = ([float(word) for word in line.split()] for line in printed.splitlines())
    assert damaged[0] < 60 and damaged[1] == 0
    for (growth, size), least, limit in (half, 100, 1.8), (full, 200, 1.5):
        assert size > least
        assert 0.8 * size < growth < limit * size


# Every key of a file is read, known to be without effect, or refused

@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, None])
def test_an_output_matrix_of_its_own_is_used_although_the_config_ties_it(tmp_path, name, tied):
    """Catches: lm_head.weight is skipped unseen, and all logits are others. None: as the family's default."""
    tensors = tensors_of(name)
    embedding = next(x for k, x in tensors.items() if k.endswith(("wte.weight", "embed_tokens.weight")))
    config = {} if tied is None and name == "gpt2" else dict(tie_word_embeddings=True)
    same = edited(tmp_path / "same", name, tensors | {"lm_head.weight": embedding.clone()}, **config)
    other = edited(tmp_path / "other", name, tensors | {"lm_head.weight": 2 * embedding.flip(0)}, **config)
    ids, tied_model, model = expected(name)["ids"], weights.load(same), weights.load(other)
    assert tied_model.arch["tied"] and tied_model.lm_head is None and not model.arch["tied"]
    assert torch.allclose(model(ids), 2 * tied_model(ids).flip(-1), atol=1e-5)


def model_cfg(**change):
    return dict(model_cfg=change)


@pytest.mark.parametrize("name, change, word", [
    *(("llama3", change, word) for change, word in [
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "disagree"),
        (dict(rope_theta=3.0), "disagree"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5"),
        (dict(rope_parameters=dict(factor=None)), "factor is missing"),
        (dict(layer_types=["sliding_attention"]), "layer_types"),
        (dict(sliding_window=64), "sliding_window 64"),
        (dict(embedding_multiplier=12.0), "embedding_multiplier"),
        (dict(model_type="qwen3_next"), "qwen3_next"), (dict(text_config=dict(x=64)), "text_config"),
        (dict(model_type="gemma3", text_config={}), "gemma3"), (dict(query_pre_attn_scalar=256), "query_pre"),
        (dict(is_causal=False), "is_causal"), (dict(pruned_heads={"0": [1]}), "pruned_heads")]),
    ("gpt2", dict(hidden_size=64), "n_embd or hidden_size"),
    ("gpt2", dict(add_cross_attention=True), "add_cross"),
    *((name, dict(num_key_value_heads=None), "num_key_value_heads is missing")
      for name in ("qwen2", "qwen3", "smollm3", "mistral")),
    *(("qwen3", change, word) for change, word in [
        (dict(head_dim=None), "head_dim is missing"), (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(attention_bias=True), "attention_bias")]),
    *(("smollm3", change, word) for change, word in [
        (dict(no_rope_layers=[1, 2, 1, 1]), "no_rope_layers"),
        (dict(no_rope_layers=[1]), "1 layers are said"), (dict(no_rope_layer_interval=0), "interval"),
        (dict(use_sliding_window=True), "use_sliding_window")]),
    ("olmo2", dict(clip_qkv=8.0), "clip_qkv 8.0"), ("olmo2", dict(sliding_window=4096), "sliding_window"),
    ("olmo2", dict(rope_scaling=dict(type="yarn", factor=8.0)), "yarn"),
    ("mistral", dict(layer_types=["sliding_attention"] * 2), "layer_types"),
    ("mistral", dict(sliding_window=0.5), "sliding_window"),
    *(("openclip_vit", dict(preprocess_cfg={key: value}), key) for key, value in [
        ("resize_mode", "squash"), ("interpolation", "bilinear"), ("mode", "L"), ("std", [0.5, 0, 0.5]),
        ("center_crop", 0.9)]),
    *(("openclip_vit", change, word) for change, word in [
        (model_cfg(embed_dim=64), "embed_dim 64"), (vision(image_size=64), "image_size 64"),
        (vision(layers=3), "layers 3"), (vision(mlp_ratio=2.0), "mlp_ratio"),
        (vision(no_ln_pre=True), "no_ln_pre"),
        (model_cfg(text_cfg=dict(context_length=50)), "context 50"),
        (model_cfg(init_logit_bias=-10), "init_logit_bias"),
        (model_cfg(text_cfg=dict(proj_type="none")), "proj_type"), (dict(tokenizer="x"), "tokenizer 'x'")])])
def test_no_key_of_a_config_is_ignored_unseen(tmp_path, name, change, word):
    """Catches: Half of a configuration is read, and the model gives other logits or features."""
    refused(edited(tmp_path, name, **change), word)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "qwen3", "olmo2", "smollm3", "mistral"])
def test_a_config_that_transformers_writes_is_read(tmp_path, name):
    """Catches: A key that transformers always writes is taken for one that matters."""
    transformers = pytest.importorskip("transformers")
    folder = edited(tmp_path, name)
    config = transformers.AutoConfig.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert_features(weights.load(folder), name)


def test_what_generation_config_asks_for_is_told(tmp_path, capsys):
    folder = edited(tmp_path, "llama2")
    for content, words in [(dict(eos_token_id=2, temperature=0.6, repetition_penalty=1.0), None),
                           (dict(repetition_penalty=1.1), ["repetition_penalty 1.1"])]:
        (folder / "generation_config.json").write_text(json.dumps(content))
        weights.load(folder)
        printed = capsys.readouterr().out
        assert ("not applied of generation_config.json" in printed) == bool(words)
        assert all(word in printed for word in words or ())


@pytest.mark.parametrize("config, generation, ends", [
    (2, None, [2]), (2, 2, [2]), (2, [5, 2], [2, 5]), ([7, 8], 9, [7, 8, 9]), (None, [9, 7], [9, 7]),
    (None, None, [])])
def test_the_first_end_token_of_the_config_ends_training(tmp_path, config, generation, ends):
    """Catches: An answer of Llama 3.1 goes on after <|eot_id|>, which only generation_config.json names."""
    folder = edited(tmp_path, "llama2", eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=generation)))
    arch = weights.load(folder).arch
    assert gpt.end_ids(arch) == ends and arch["end"] == (ends[0] if ends else None)
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[5, "x"])))
    refused(folder, "generation_config.json: eos_token_id")


OLD_KEYS = dict(rope_parameters=None, rope_theta=5e5)


@pytest.mark.parametrize("name, change, arch", [
    ("qwen3", OLD_KEYS | dict(sliding_window=4096, max_window_layers=2), dict(tied=True, head_width=24)),
    ("olmo2", OLD_KEYS, dict(tied=False, qk_norm="full", norms="after")), ("mistral", OLD_KEYS, {}),
    ("smollm3", OLD_KEYS | dict(rope_theta=None, tie_word_embeddings=None), dict(tied=True)),
    ("smollm3", OLD_KEYS | dict(rope_theta=2e6), dict(rope_layers=[True, False, True, True]))])
def test_the_families_are_read_with_old_and_new_keys_of_rope(tmp_path, name, change, arch):
    model = weights.load(edited(tmp_path, name, **change))
    assert arch.items() <= model.arch.items()
    assert_features(model, name)


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path, capsys):
    """Catches: SmolLM3 is untied, or has RoPE in every layer or another theta; Mistral reads far tokens."""
    config = json.loads((FIXTURES / "smollm3/config.json").read_text())
    for key in ("tie_word_embeddings", "no_rope_layers", "rope_parameters"):
        del config[key]
    arch = gpt.architecture(config)
    assert arch["tied"] and arch["rope"]["theta"] == 2e6 and arch["rope_layers"] == [True, True, True, False]
    assert gpt.architecture(config | dict(no_rope_layers=[0] * 9))["rope_layers"] == [False] * 4
    config = json.loads((FIXTURES / "mistral/config.json").read_text())
    for window, positions in ((32, 32), (None, 64), (100, 64)):
        assert gpt.architecture(config | dict(sliding_window=window))["positions"] == positions
        assert ("only 32 of 64 positions" in capsys.readouterr().out) == (window == 32)
    del config["sliding_window"]
    assert gpt.architecture(config | dict(max_position_embeddings=32768))["positions"] == 4096


@pytest.mark.parametrize("sharded", [False, True])
def test_a_generation_config_of_the_hub_is_read_and_not_asked_for_again(tmp_path, capsys, monkeypatch, serve,
                                                                        sharded):
    """Catches: It is never downloaded, or a load without network asks for one that the hub does not have."""
    server, folder = serve(), edited(tmp_path, "llama2")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    (folder / "generation_config.json").write_text(json.dumps(dict(repetition_penalty=1.1)))
    if sharded:
        tensors = (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
        index = dict(weight_map=dict.fromkeys(files.read(tensors), tensors.name))
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for repo, left_out in (("org/one", None), ("org/two", "generation_config.json")):
        server.files |= {f"/{repo}/resolve/main/{path.name}": path.read_bytes() for path in folder.iterdir()
                         if path.name != left_out}
        capsys.readouterr()
        weights.load(repo)
        assert ("repetition_penalty 1.1" in capsys.readouterr().out) == (not left_out)
        server.seen.clear()
        weights.load(repo)
        seen = {path.rpartition("/")[2] for path, _ in server.seen}  # this fixture has no tokenizer
        assert not seen & {"generation_config.json", "model.safetensors", "config.json"}


@pytest.mark.parametrize("name, change, word", [
    ("qwen2", dict(add_prefix_space=True), "add_prefix_space is True"),
    ("qwen2", dict(added_tokens_decoder={"1500": dict(content="<|im_start|>")}), "added_tokens_decoder"),
    ("llama3", dict(added_tokens_decoder={"1500": dict(content="<|end_of_text|>", lstrip=True)}),
     "added_tokens_decoder"),
    ("qwen2", dict(add_bos_token=True, chat_template="x", bos_token="y"), None)])
def test_a_tokenizer_config_that_changes_ids_is_refused(tmp_path, name, change, word):
    folder = edited(tmp_path, name)
    (folder / "tokenizer.json").write_text(TOKENIZERS[name])
    (folder / "tokenizer_config.json").write_text(json.dumps(change))
    if word:
        refused(folder, word)
    else:
        assert weights.load(folder).info["tokenizer"] == TOKENIZERS[name]


@pytest.mark.parametrize("kind, name, change, word", [
    *(("gpt", "llama3", change, word) for change, word in [
        (dict(beta=math.nan), "beta is nan"), (dict(beta=True), "beta"),
        (dict(source=None), "source is missing"),
        (dict(step=-5), "step is -5"), (dict(template="no gap"), "template is 'no gap'"),
        (dict(data=7), "data is 7"),
        (dict(tokenizer=5), "tokenizer is 5"), (dict(args=dict(hold_out=2.0)), "args: hold_out is 2.0"),
        (dict(quantized=dict(bits=4)), "quantized {'bits': 4}"), (dict(arch=dict(window=64)), "window 64"),
        (dict(optimizer=dict(state={})), "unfinished run, of 3 steps"),
        (dict(model=dict(x=torch.ones(2).int())), "int32"),
        (dict(examples=dict(count=0, sha256="x")), "examples: count is 0"),
        (dict(arch=dict(heads=3)), "3 heads"), (dict(arch=dict(end=10**6)), "end token is 1000000")]),
    *(("classifier", "openclip_vit", change, word) for change, word in [
        (dict(classes=["a"]), "for 1 classes"), (dict(templates=["a {}"]), "templates is ['a {}']"),
        (dict(classes=[]), "classes is []"), (dict(method="base"), "method is 'base'")])])
def test_an_entry_of_a_checkpoint_that_is_not_as_listed_is_refused(tmp_path, kind, name, change, word):
    """Catches: A reward with beta nan answers "!!!!", or an unfinished run is taken for a reward."""
    checkpoint, _ = checkpoint_of(kind, name, **({} if kind == "classifier" else dict(method="prt")))
    refused(saved(tmp_path / "r.pt", merged(checkpoint, change)), word)
