"""From files to models (models/weights.py): forms, configs, shards, the hub, checkpoints, vocabularies."""
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, REFUSED, ROOT
from helpers import (
    edited,
    error,
    expected,
    load,
    random_ids,
    write_safetensors,
    write_trap,
    write_truncated,
)

import prt
from data import files
from models import weights
from models.clip import CLIP, classifier
from models.gpt import GPT
from models.tokenizer import Tokenizer

GPTS = ["gpt2", "gpt2_hub", "llama2", "llama3", "falcon3", "qwen2"]
CLIPS = ["openclip_vit", "openclip_vit_quickgelu", "openclip_rn", "openclip_bare", "openclip_convnext",
         "openclip_convnext_mlp"]
VIT = FIXTURES / "openclip_vit"
TOKENIZERS = {name: (FIXTURES / f"{name}_tokenizer" / "tokenizer.json").read_text()
              for name in ("llama3", "qwen2")}
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@torch.no_grad()
def assert_gpt(model, name, tolerance=1e-4):
    io = expected(name)
    assert error(model(io["ids"]).float(), io["logits"]) < tolerance


@torch.no_grad()
def assert_clip(model, name):
    io = expected(name)
    assert error(model.encode_image(io["image"]), io["image_features"]) < 1e-4
    assert error(model.encode_text(io["tokens"]), io["text_features"]) < 1e-4


def bare():
    return torch.load(FIXTURES / "openclip_bare" / "weights.pt", weights_only=True)


def tensors_of_clip(name):
    return {k: x.clone() for k, x in files.read(FIXTURES / name / "open_clip_model.safetensors").items()}


def tensors_of(name):
    return {k: x.clone() for k, x in files.read(FIXTURES / name / "model.safetensors").items()}


# Forms of a file

@pytest.mark.parametrize("name", [*GPTS, *CLIPS])
def test_models_are_loaded_in_eval_mode_and_float32(name):
    model = load(name, role="base")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert model.info["kind"] == ("gpt" if name in GPTS else "clip")


def test_bare_state_dict_may_be_a_safetensors_file(tmp_path):
    model = weights.load(write_safetensors(tmp_path / "bare.safetensors", bare()), "base")
    assert not model.arch["quick_gelu"]
    assert model.arch["patch"] == 8 and model.arch["image_size"] == 32
    assert_clip(model, "openclip_bare")


def test_state_dict_may_be_wrapped_as_distributed_training_saves_it(tmp_path):
    """Catches: OpenCLIP's own training checkpoints, with state_dict and "module.", are not read."""
    path = tmp_path / "wrapped.pt"
    torch.save(dict(epoch=3, state_dict={"module." + k: x for k, x in bare().items()}), path)
    model = weights.load(path, "base")
    assert not model.arch["quick_gelu"]
    assert model.arch["patch"] == 8 and model.arch["image_size"] == 32
    assert_clip(model, "openclip_bare")


def test_bare_state_dict_has_the_mean_and_std_of_clip(capsys):
    """Catches: What a state dict does not name is assumed in silence."""
    model = load("openclip_bare")
    assert model.arch["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert model.arch["std"] == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    printed = capsys.readouterr().out
    assert "weights.pt" in printed and "GELU" in printed


@torch.no_grad()
@pytest.mark.parametrize("name, mlp_head", [("openclip_convnext", False), ("openclip_convnext_mlp", True)])
def test_bare_state_dict_may_be_a_convnext(tmp_path, capsys, name, mlp_head):
    """Catches: A size is not read off the shapes, or the image size is assumed in silence.

    The text tower is another fixture's, since without a config its heads must have a width of 64.
    """
    visual = {k: x for k, x in tensors_of_clip(name).items() if k.startswith("visual.")}
    text = {k: x for k, x in bare().items() if not k.startswith("visual.")}
    torch.save(visual | text, tmp_path / "bare.pt")
    model = weights.load(tmp_path / "bare.pt", "base")
    assert error(model.encode_image(expected(name)["image"]), expected(name)["image_features"]) < 1e-4
    io = expected("openclip_bare")
    assert error(model.encode_text(io["tokens"]), io["text_features"]) < 1e-4
    assert model.arch["image_size"] == 256 and model.arch["mlp_head"] is mlp_head
    printed = capsys.readouterr().out
    assert "bare.pt" in printed and "GELU" in printed and "256 pixels" in printed


def test_only_an_image_size_that_is_assumed_is_printed(capsys):
    load("openclip_bare")
    assert "pixels" not in capsys.readouterr().out


def test_logit_scale_is_a_vector_of_one(tmp_path):
    """Catches: FSDP shards no scalars, which is what the files hold."""
    assert bare()["logit_scale"].shape == ()
    assert load("openclip_bare").logit_scale.shape == (1,)
    wrapped = bare() | dict(logit_scale=bare()["logit_scale"].reshape(1))
    torch.save(wrapped, tmp_path / "one.pt")
    assert torch.equal(weights.load(tmp_path / "one.pt").logit_scale, load("openclip_bare").logit_scale)


def test_clip_in_half_precision_comes_out_as_float32(tmp_path):
    """Catches: Half-precision weights give rounded features, or an error about mixed types."""
    path = write_safetensors(tmp_path / "half.safetensors", {k: x.bfloat16() for k, x in bare().items()})
    model, io = weights.load(path), expected("openclip_bare")
    assert all(x.dtype == torch.float32 for x in model.state_dict().values())
    with torch.no_grad():
        model.encode_image(io["image"])
        model.encode_text(io["tokens"])


@pytest.mark.parametrize("options", [{}, dict(dtype=torch.float32), dict(dtype=torch.bfloat16)], ids=str)
def test_gpt_in_half_precision_is_float32_unless_asked(tmp_path, options):
    """Catches: Weights to train that stay in their file's half precision lose small steps."""
    folder = edited(tmp_path, "llama2")
    half = {k: x.bfloat16() for k, x in tensors_of("llama2").items()}
    write_safetensors(folder / "model.safetensors", half)
    model, dtype = weights.load(folder, **options), options.get("dtype", torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.norm.weight, half["model.norm.weight"].to(dtype))


def test_folder_may_hold_a_bin_file(tmp_path):
    """Catches: Older OpenCLIP repositories, which have open_clip_pytorch_model.bin only, are not read."""
    folder = shutil.copytree(VIT, tmp_path / "clip")
    file = folder / "open_clip_model.safetensors"
    torch.save({k: x.clone() for k, x in files.read(file).items()}, folder / "open_clip_pytorch_model.bin")
    file.unlink()
    assert_clip(weights.load(folder, "base"), "openclip_vit")


def write_torchscript(path, tensors):
    """Writes an archive like OpenAI's: half precision, nested names, three sizes among the buffers."""
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


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_quick_gelu_and_float32(tmp_path):
    """Catches: OpenAI's archives, which do not name their activation, run with the exact GELU."""
    io = expected("openclip_bare")
    model = weights.load(write_torchscript(tmp_path / "ViT.pt", bare()), "base")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    quick, exact = (CLIP(model.arch | dict(quick_gelu=flag)).eval() for flag in (True, False))
    rounded = {k: x.half().float() for k, x in bare().items()}
    rounded["logit_scale"] = rounded["logit_scale"].reshape(1)
    for clip in (quick, exact):
        clip.load_state_dict(rounded)
    for encode, x in ((CLIP.encode_image, io["image"]), (CLIP.encode_text, io["tokens"])):
        assert error(encode(model, x), encode(quick, x)) < 1e-5
        assert error(encode(model, x), encode(exact, x)) > 1e-3


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="cut.pt"):
        weights.load(write_truncated(tmp_path, keep))


@pytest.mark.parametrize("content", [[1, 2], {}, dict(step=3), dict(kind="clip"), dict(kind="odd", model={})])
def test_other_files_of_torch_are_refused(tmp_path, content):
    """Catches: A file that is neither a CLIP nor a checkpoint of this project is taken for one."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt"):
        weights.load(tmp_path / "other.pt")


def test_pickles_run_no_code(tmp_path):
    """Catches: A checkpoint from elsewhere runs whatever it asks for."""
    with pytest.raises(ValueError, match="trap.pt"):
        weights.load(write_trap(tmp_path))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("source", ["nothing", "no/such/folder", "/nothing", "../nothing", "out/base.pt"])
def test_mistyped_path_is_no_hub_id(source, serve, monkeypatch):
    """Catches: A mistyped path is looked up on the hub, and the message speaks of the network."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(FileNotFoundError, match=source):
        weights.load(source)
    assert not server.seen


# config.json

SCALING = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_under_its_old_keys_is_read(tmp_path, key):
    """Catches: The scaling in Llama 3.1's own config.json is overlooked, which moves every logit a little."""
    folder = edited(tmp_path, "llama3", drop=["rope_parameters"], rope_theta=500000.0,
                    rope_scaling=SCALING | {key: "llama3"})
    model = weights.load(folder)
    assert torch.equal(model.rope, load("llama3").rope)
    assert_gpt(model, "llama3")


def test_rope_scaling_changes_the_logits(tmp_path):
    """Catches: The test above would pass without any scaling."""
    plain = edited(tmp_path, "llama3", drop=["rope_parameters"], rope_theta=500000.0, rope_scaling=None)
    io = expected("llama3")
    with torch.no_grad():
        assert error(weights.load(plain)(io["ids"]), io["logits"]) > 1e-3


def test_default_theta_is_10000(tmp_path):
    """Catches: Llama 2's config.json, which names no rope_theta, is refused or read with another."""
    assert_gpt(weights.load(edited(tmp_path, "llama2", drop=["rope_parameters"])), "llama2")


def test_end_token_is_the_first_of_several(tmp_path):
    """Catches: Llama 3's list of end tokens reaches a tensor operation."""
    assert weights.load(edited(tmp_path, "llama3", eos_token_id=[5, 6])).arch["end"] == 5


def test_end_token_may_be_missing():
    assert load("llama2").arch["end"] == 2
    assert load("qwen2").arch["end"] is None


@pytest.mark.parametrize("name, change, word", [
    ("llama3", dict(rope_parameters=SCALING | dict(rope_type="yarn", rope_theta=1e4)), "rope_type yarn"),
    ("llama3", dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "rope_type linear"),
    ("llama2", dict(model_type="mistral"), "model_type mistral"),
    ("llama2", dict(model_type=None), "model_type None"),
    ("llama2", dict(attention_bias=True), "attention_bias True"),
    ("llama2", dict(mlp_bias=True), "mlp_bias True"),
    ("llama2", dict(hidden_act="gelu"), "hidden_act gelu"),
    ("llama2", dict(quantization_config=dict(bits=4)), "quantization_config"),
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window True"),
    ("gpt2", dict(activation_function="relu"), "activation_function relu"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights False"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
])
def test_unsupported_options_are_refused(tmp_path, name, change, word):
    """Catches: A variant that is not implemented is loaded as if it were the plain model."""
    with pytest.raises(ValueError, match=word) as caught:
        weights.load(edited(tmp_path, name, **change))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                                 "num_attention_heads", "max_position_embeddings", "rms_norm_eps"])
def test_missing_keys_are_named(tmp_path, key):
    """Catches: A value that no default can replace is None until the first forward pass."""
    with pytest.raises(ValueError, match=f"config.json.* lacks .*{key}"):
        weights.load(edited(tmp_path, "llama2", drop=[key]))


@pytest.mark.parametrize("change", [
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=2), dict(num_hidden_layers=4),
    dict(num_hidden_layers=-1), dict(num_hidden_layers=2.5), dict(num_hidden_layers="3"),
    dict(num_attention_heads=0), dict(num_attention_heads=5), dict(num_key_value_heads=3),
    dict(hidden_size=72), dict(intermediate_size=10**12), dict(vocab_size=511), dict(vocab_size=10**12),
    dict(head_dim=8), dict(rope_parameters=[1])])
def test_config_that_does_not_fit_the_tensors_is_refused(tmp_path, change):
    """Catches: Modules are built for hours, tensors are dropped in silence, or the error names no file."""
    with pytest.raises(ValueError, match="config.json"):
        weights.load(edited(tmp_path, "llama2", **change))


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "null", '{"model_type": "llama"}', "\0"])
def test_damaged_config_of_a_gpt_is_refused(tmp_path, text):
    folder = edited(tmp_path, "llama2")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder / "config.json")):
        weights.load(folder)


# open_clip_config.json

def edited_clip(tmp_path, name="openclip_vit", vision=None, text=None, **model):
    """Returns a copy of a CLIP's fixture with another open_clip_config.json."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / "clip")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"] |= model
    config["model_cfg"]["vision_cfg"] |= vision or {}
    config["model_cfg"]["text_cfg"] |= text or {}
    file.write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_quick_gelu_is_read_from_the_config(tmp_path):
    """Catches: The flag of open_clip_config.json is dropped: other features, without any error."""
    folder, io = edited_clip(tmp_path, "openclip_vit_quickgelu"), expected("openclip_vit_quickgelu")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    assert config["model_cfg"].pop("quick_gelu") is True
    file.write_text(json.dumps(config))
    model = weights.load(folder)
    assert error(model.encode_image(io["image"]), io["image_features"]) > 1e-3
    assert error(model.encode_text(io["tokens"]), io["text_features"]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("change", [
    dict(timm_drop=0.1, timm_drop_path=None), dict(timm_model_pretrained=True), dict(timm_pool="avg"),
    dict(timm_model_name="convnext_large"), dict(image_size=320)], ids=str)
def test_options_of_a_convnext_that_its_features_do_not_depend_on_are_read(tmp_path, change):
    """Catches: Published configs, which set them for pretraining or differ in size, are refused."""
    model = weights.load(edited_clip(tmp_path, "openclip_convnext", vision=change))
    assert model.arch["image_size"] == change.get("image_size", 64)
    assert_clip(model, "openclip_convnext")


@pytest.mark.parametrize("key, value", [
    ("timm_model_name", "convnextv2_base"), ("timm_model_name", "convnext_xxlarge"),
    ("timm_model_name", "convnext_atto"), ("timm_model_name", "vit_base_patch16_224"),
    ("timm_pool", "abs_attn"), ("timm_pool", "max"), ("timm_proj", "none"), ("timm_proj_bias", True),
    ("image_size", 31), ("image_size", 1025), ("image_size", 10**9), ("image_size", [64, 64]),
    ("image_size", "64"), ("image_size", None), ("image_size", True)])
def test_unknown_options_of_a_convnext_are_refused(tmp_path, key, value):
    """Catches: A variant with another pooling or epsilon is loaded as if it were the plain model.

    No tensor tells the image size, so that a wrong one would be found with the first image, or fill memory.
    """
    with pytest.raises(ValueError, match=key) as caught:
        weights.load(edited_clip(tmp_path, "openclip_convnext", vision={key: value}))
    assert str(tmp_path / "clip") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part, key, value", [
    ("vision", "pool_type", "avg"), ("vision", "timm_model_name", "vit"),
    ("text", "hf_model_name", "roberta"), ("model", "custom_text", True)])
def test_unknown_options_of_a_clip_are_refused(tmp_path, part, key, value):
    """Catches: A variant that is not implemented is loaded as if it were the plain model."""
    change = {key: value} if part == "model" else {part: {key: value}}
    with pytest.raises(ValueError, match=key) as caught:
        weights.load(edited_clip(tmp_path, **change))
    assert str(tmp_path / "clip") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": null}', ""])
def test_damaged_config_of_a_clip_is_refused(tmp_path, text):
    folder = edited_clip(tmp_path)
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        weights.load(folder)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    """Catches: 64 // 48 = 1 head is another model than the config asks for."""
    with pytest.raises(ValueError, match="head"):
        weights.load(edited_clip(tmp_path, vision=dict(head_width=48)))


# Tensors, shards, the index

@pytest.mark.parametrize("name, norm", [("gpt2", "transformer.ln_f.weight"), ("llama2", "model.norm.weight")])
@pytest.mark.parametrize("change, word", [
    (lambda tensors, norm: tensors.pop(norm), "norm.weight"),
    (lambda tensors, norm: tensors.update({"model.extra.weight": torch.ones(2)}), "extra.weight"),
    (lambda tensors, norm: tensors.update({norm: torch.ones(3)}), "norm.weight")],
    ids=["missing", "left over", "misshapen"])
def test_tensors_that_do_not_fit_a_gpt_are_named(tmp_path, name, norm, change, word):
    """Catches: Tensors are dropped, or weights left without a value, in silence."""
    folder, tensors = edited(tmp_path, name), tensors_of(name)
    assert norm in tensors
    change(tensors, norm)
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=str(folder)) as caught:
        weights.load(folder)
    assert word in str(caught.value)


MISFITS = {
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


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_a_clip_are_named(tmp_path, misfit):
    """Catches: Tensors are dropped or left at random values, or the error does not name file and tensor."""
    (name, value), = MISFITS[misfit].items()
    tensors = {k: x for k, x in (bare() | MISFITS[misfit]).items() if x is not None}
    torch.save(tensors, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt") as caught:
        weights.load(tmp_path / "odd.pt")
    if value is None or torch.is_tensor(value):
        assert name in str(caught.value)


TRUNK = "visual.trunk."
MISFITS_OF_A_CONVNEXT = {
    "stem missing": {f"{TRUNK}stem.0.weight": None},
    "stem misshapen": {f"{TRUNK}stem.0.weight": torch.ones(4)},
    "stem of 2 x 2 pixels": {f"{TRUNK}stem.0.weight": torch.ones(4, 3, 2, 2)},
    "norm of the stem missing": {f"{TRUNK}stem.1.bias": None},
    "downsample missing": {f"{TRUNK}stages.1.downsample.1.weight": None},
    "downsample of the first stage": {f"{TRUNK}stages.0.downsample.1.weight": torch.ones(4, 4, 2, 2)},
    "layer scale missing, as in ConvNeXt V2": {f"{TRUNK}stages.2.blocks.0.gamma": None},
    "layer scale misshapen": {f"{TRUNK}stages.2.blocks.0.gamma": torch.ones(())},
    "MLP of convolutions, as in convnext_atto": {f"{TRUNK}stages.0.blocks.0.mlp.fc1.weight":
                                                 torch.ones(16, 4, 1, 1)},
    "fifth stage": {f"{TRUNK}stages.4.blocks.0.gamma": torch.ones(16)},
    "norm before the pool": {f"{TRUNK}norm_pre.weight": torch.ones(16)},
    "norm of the head missing": {f"{TRUNK}head.norm.weight": None},
    "no head": {"visual.head.proj.weight": None},
    "bias of the head": {"visual.head.proj.bias": torch.ones(32)},
    "projection misshapen": {"visual.head.proj.weight": torch.ones(31, 16)},
}


@pytest.mark.parametrize("misfit", MISFITS_OF_A_CONVNEXT)
def test_tensors_that_do_not_fit_a_convnext_are_named(tmp_path, misfit):
    """Catches: Tensors are dropped or left at random values, or the error does not name file and tensor."""
    folder, tensors = edited_clip(tmp_path, "openclip_convnext"), tensors_of_clip("openclip_convnext")
    (name, value), = MISFITS_OF_A_CONVNEXT[misfit].items()
    assert value is not None or name in tensors
    tensors = {k: x for k, x in (tensors | {name: value}).items() if x is not None}
    file = write_safetensors(folder / "open_clip_model.safetensors", tensors)
    with pytest.raises(ValueError, match=str(file)) as caught:
        weights.load(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_convnext_with_both_kinds_of_head_is_refused(tmp_path):
    """Catches: One of the two is dropped in silence."""
    folder, tensors = edited_clip(tmp_path, "openclip_convnext_mlp"), tensors_of_clip("openclip_convnext_mlp")
    tensors["visual.head.proj.weight"] = torch.ones(32, 12)
    file = write_safetensors(folder / "open_clip_model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"{file}: .*visual.head.proj.weight"):
        weights.load(folder)


def test_convnext_of_another_epsilon_is_refused(tmp_path):
    """Catches: convnext_xxlarge, whose shapes alone look like the others', gives slightly wrong features."""
    folder, tensors = edited_clip(tmp_path, "openclip_convnext"), tensors_of_clip("openclip_convnext")
    for i, blocks in enumerate((3, 4, 30, 3)):
        first = {k: x for k, x in tensors.items() if k.startswith(f"{TRUNK}stages.{i}.blocks.0.")}
        for j in range(blocks):
            tensors |= {k.replace("blocks.0.", f"blocks.{j}."): x for k, x in first.items()}
    file = write_safetensors(folder / "open_clip_model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"{file}: .*xxlarge"):
        weights.load(folder)


@pytest.mark.parametrize("name, buffers", [
    ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
              "transformer.h.1.attn.masked_bias": torch.ones(1),
              "lm_head.weight": torch.ones(512, 48)}),
    ("llama2", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})], ids=["gpt2", "llama2"])
def test_buffers_of_old_files_are_skipped(tmp_path, name, buffers):
    """Catches: Causal masks, RoPE tables, and tied matrices that older files hold are refused."""
    folder = edited(tmp_path, name)
    write_safetensors(folder / "model.safetensors", tensors_of(name) | buffers)
    assert_gpt(weights.load(folder), name)


@pytest.mark.parametrize("name, file", [("llama3", "model-00005-of-00009.safetensors"),
                                        ("llama2", "model.safetensors")])
def test_missing_file_is_named(tmp_path, name, file):
    """Catches: A download that stopped between two shards gives an error about tensors."""
    folder = edited(tmp_path, name)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=file) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)


def test_damaged_shard_is_named(tmp_path):
    """Catches: The folder is named, but not the shard that must be downloaded again."""
    folder = edited(tmp_path, "llama3")
    shard = folder / "model-00004-of-00009.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=shard.name):
        weights.load(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 3])
def test_index_may_not_leave_its_folder(tmp_path, name):
    """Catches: An index from elsewhere reads, or on a hub writes, files outside the model's folder."""
    folder = edited(tmp_path, "llama3")
    shutil.copy(folder / "model-00001-of-00009.safetensors", tmp_path / "x.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=str(folder)) as caught:
        weights.load(folder)
    if "x.safetensors" in str(name):
        assert isinstance(caught.value, ValueError)
        assert name in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', ""])
def test_damaged_index_is_refused(tmp_path, text):
    folder = edited(tmp_path, "llama3")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        weights.load(folder)


# GPTs on the hub

def gpt_url(name):
    return f"/org/gpt/resolve/main/{name}"


@pytest.fixture
def gpt_hub(serve, monkeypatch):
    """A hub with the sharded repository org/gpt and its tokenizer."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    paths = [path for path in (FIXTURES / "llama3").iterdir() if path.name != "io.pt"]
    server.files |= {gpt_url(path.name): path.read_bytes() for path in paths}
    server.files[gpt_url("tokenizer.json")] = TOKENIZERS["llama3"].encode()
    return server


def test_gpt_of_the_hub_is_downloaded_once(gpt_hub):
    """Catches: Shards or the tokenizer are missed, or a cached model still needs the network."""
    for _ in range(2):
        model = weights.load("org/gpt", "base", text=True)
        assert_gpt(model, "llama3")
        assert model.info["tokenizer"] == TOKENIZERS["llama3"]
    urls = [url for url, _ in gpt_hub.seen]
    assert all(urls.count(url) == 1 for url in gpt_hub.files)


@pytest.mark.parametrize("name", ["config.json", "model-00003-of-00009.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("status", [401, 403])
def test_gated_gpt_is_refused_with_a_hint(gpt_hub, name, status):
    """Catches: The message does not say which file is gated, where its license is, and what to set."""
    gpt_hub.files[gpt_url(name)] = status
    with pytest.raises(OSError, match=gpt_url(name)) as caught:
        weights.load("org/gpt")
    assert not isinstance(caught.value, FileNotFoundError)
    assert f"license at {gpt_hub.url}/org/gpt," in str(caught.value)
    assert "HF_TOKEN" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json",
                                  "model-00003-of-00009.safetensors"])
def test_missing_file_of_the_hub_is_named(gpt_hub, name):
    gpt_hub.files[gpt_url(name)] = 404
    with pytest.raises(FileNotFoundError, match=name) as caught:
        weights.load("org/gpt")
    assert "org/gpt" in str(caught.value)


def test_index_of_the_hub_may_not_leave_its_folder(gpt_hub, cache):
    index = json.loads(gpt_hub.files[gpt_url("model.safetensors.index.json")])
    index["weight_map"]["model.norm.weight"] = "../../../x.safetensors"
    gpt_hub.files[gpt_url("model.safetensors.index.json")] = json.dumps(index).encode()
    with pytest.raises(ValueError, match="x.safetensors"):
        weights.load("org/gpt")
    assert not any("x.safetensors" in url for url, _ in gpt_hub.seen)
    assert not list(cache.rglob("x.safetensors"))


# CLIPs on the hub

CONFIG, SAFETENSORS, BIN = (f"/org/clip/resolve/main/{name}" for name in (
    "open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"))


@pytest.fixture
def clip_hub(serve, monkeypatch):
    """A hub with the repository org/clip: its config served directly, its weights by another host."""
    server, store = serve(), serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    store.files["/blob"] = (VIT / "open_clip_model.safetensors").read_bytes()
    server.files |= {CONFIG: (VIT / "open_clip_config.json").read_bytes(), SAFETENSORS: f"{store.url}/blob"}
    server.store = store
    return server


def test_clip_of_the_hub_needs_the_token_for_its_two_files_only(clip_hub, monkeypatch):
    """Catches: The token follows the redirect to the storage host, and so is given away."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_clip(weights.load("org/clip", "base"), "openclip_vit")
    assert clip_hub.seen == [(CONFIG, "Bearer hf_secret"), (SAFETENSORS, "Bearer hf_secret")]
    assert clip_hub.store.seen == [("/blob", None)]


@pytest.mark.parametrize("name", ["openclip_convnext", "openclip_convnext_mlp"])
def test_clip_of_the_hub_may_be_a_convnext(clip_hub, name):
    clip_hub.files[CONFIG] = (FIXTURES / name / "open_clip_config.json").read_bytes()
    clip_hub.store.files["/blob"] = (FIXTURES / name / "open_clip_model.safetensors").read_bytes()
    assert_clip(weights.load("org/clip", "base"), name)


def test_clip_of_the_hub_needs_no_token(clip_hub):
    weights.load("org/clip")
    assert {token for _, token in clip_hub.seen} == {None}


@pytest.mark.parametrize("binary", [False, True])
def test_clip_of_the_hub_is_downloaded_once(clip_hub, binary, tmp_path):
    """Catches: A cached model needs the network, or asks again for the .safetensors that it does not have."""
    if binary:
        tensors = {k: x.clone() for k, x in files.read(VIT / "open_clip_model.safetensors").items()}
        torch.save(tensors, tmp_path / "clip.bin")
        clip_hub.files |= {SAFETENSORS: 404, BIN: (tmp_path / "clip.bin").read_bytes()}
    weights.load("org/clip")
    assert len(clip_hub.seen) == 2 + binary
    weights.load("org/clip")
    assert len(clip_hub.seen) == 2 + binary


def test_short_body_of_the_hub_leaves_nothing(clip_hub, cache):
    """Catches: The half file of a dropped connection is taken for the whole one from then on."""
    clip_hub.store.lost = 10
    with pytest.raises(OSError, match=SAFETENSORS):
        weights.load("org/clip")
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["open_clip_config.json"]
    clip_hub.store.lost = 0
    weights.load("org/clip")


def test_clip_of_the_hub_without_weights_is_missing(clip_hub):
    clip_hub.files[SAFETENSORS] = 404
    with pytest.raises(FileNotFoundError, match="org/clip: holds no .*safetensors and no .*bin"):
        weights.load("org/clip")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_clip_is_told_from_a_misspelled_one(clip_hub, cache, status):
    """Catches: A gated model is reported as missing."""
    clip_hub.files[CONFIG] = status
    with pytest.raises(OSError, match=CONFIG) as caught:
        weights.load("org/clip")
    assert "HF_TOKEN" in str(caught.value)
    assert str(status) in str(caught.value)
    assert not isinstance(caught.value, FileNotFoundError)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_network_a_clip_may_be_put_into_the_cache_by_hand(monkeypatch, cache):
    """Catches: The message does not say what to download, or where to put it."""
    monkeypatch.setenv("HF_ENDPOINT", REFUSED)
    file = cache / "hub/org/clip/open_clip_config.json"
    with pytest.raises(OSError) as caught:
        weights.load("org/clip")
    assert REFUSED + CONFIG in str(caught.value)
    assert str(file) in str(caught.value)
    shutil.copytree(VIT, file.parent, dirs_exist_ok=True)
    weights.load("org/clip")


# Checkpoints and roles

def gpt_checkpoint(model, **header):
    return dict(kind="gpt", arch=model.arch, tokenizer=TOKENIZERS["llama3"], template="{}", data="x",
                args={}, model=model.state_dict(), step=3) | header


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
@pytest.mark.parametrize("role, dtype", [("prt", torch.float32), (None, torch.bfloat16)])
def test_checkpoint_of_a_gpt_gives_its_model_back(tmp_path, name, role, dtype):
    """Catches: A saved reward answers otherwise than the one that was trained."""
    header = dict(method="prt", beta=0.5, source="here")
    checkpoint = gpt_checkpoint(load(name), **header, optimizer=dict(step=torch.ones(())))
    files.save(tmp_path / "r.pt", checkpoint)
    model = weights.load(tmp_path / "r.pt", role, text=True, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.arch == load(name).arch
    assert model.info.items() >= dict(header, step=3, template="{}").items()
    assert "model" not in model.info and "optimizer" not in model.info
    assert_gpt(model, name, 1e-4 if role else 0.3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip_rn", "openclip_convnext"])
def test_checkpoint_of_a_clip_gives_its_model_back(tmp_path, name):
    model = load(name)
    files.save(tmp_path / "clip.pt", dict(kind="clip", arch=model.arch, model=model.state_dict(), step=3))
    again = weights.load(tmp_path / "clip.pt", "base", text=False)
    assert again.arch == model.arch and again.info == dict(kind="clip", arch=model.arch, step=3)
    assert_clip(again, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip_vit", "openclip_rn", "openclip_convnext"])
def test_checkpoint_of_a_classifier_gives_its_model_back(tmp_path, name):
    io = expected(name)
    model = classifier(load(name), io["tokens"][:, None])
    checkpoint = dict(kind="classifier", method="prt", arch=model.arch, model=model.state_dict(), beta=0.5)
    files.save(tmp_path / "reward.pt", checkpoint)
    again = weights.load(tmp_path / "reward.pt", "prt", text=False)
    assert again.arch == model.arch and again.info["beta"] == 0.5
    assert torch.equal(again(io["image"]), model(io["image"]))


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny):
    """Checkpoints of each role for text, and one for images."""
    root = tmp_path_factory.mktemp("roles")
    for name, header in dict(base={}, reward=dict(method="prt"), tuned=dict(method="ft")).items():
        files.save(root / f"{name}.pt", gpt_checkpoint(load("llama3"), **header))
    return dict(base=root / "base.pt", reward=root / "reward.pt", tuned=root / "tuned.pt",
                folder=FIXTURES / "llama3", images=tiny.reward)


@pytest.mark.parametrize("name, role", [("base", "base"), ("reward", "prt"), ("tuned", "ft"),
                                        ("folder", "base")])
def test_model_of_the_needed_role_is_loaded(paths, name, role):
    assert weights.load(paths[name], role, text=True).info["kind"] == "gpt"


@pytest.mark.parametrize("name, role, text, words", [
    ("reward", "base", True, "reward.pt is a reward for text; a base for text is needed here"),
    ("tuned", "prt", None, "tuned.pt is a fine-tuned model for text; a reward for text is"),
    ("base", "base", False, "base.pt is a base for text; a base for images is"),
    ("folder", "prt", None, "llama3 is a base for text; a reward for text is"),
    ("images", None, True, "reward.pt is a reward for images; a reward for text is")])
def test_model_of_another_role_is_refused(paths, name, role, text, words):
    """Catches: A reward is taken for a base, or an image model for a text model: bad figures, no error."""
    with pytest.raises(ValueError, match=words):
        weights.load(paths[name], role, text=text)


@pytest.mark.parametrize("name, role", [("old", "prt"), ("reward", "base"), ("ft", "prt"), ("new", "ft")])
def test_image_model_of_another_role_is_refused(tiny, name, role):
    """Catches: A reward is taken for a base, or plain fine-tuning for a reward: bad figures, no error."""
    with pytest.raises(ValueError, match=f"{name}.pt is .* is needed here"):
        weights.load(getattr(tiny, name), role)


@pytest.mark.parametrize("name, text", [("openclip_vit", True), ("llama3", False)])
def test_folder_of_the_other_layout_is_refused(name, text):
    with pytest.raises((ValueError, OSError), match=f"{name}.*config.json"):
        weights.load(FIXTURES / name, text=text)


@pytest.mark.parametrize("change", [dict(arch=None), dict(arch={}), dict(model={}), dict(model=None),
                                    dict(kind="other"), dict(method="rlhf")], ids=str)
def test_damaged_checkpoint_is_refused(tmp_path, change):
    files.save(tmp_path / "r.pt", gpt_checkpoint(load("llama3")) | change)
    with pytest.raises(ValueError, match="r.pt"):
        weights.load(tmp_path / "r.pt")


@pytest.mark.parametrize("change", [
    dict(layers=10**9), dict(layers=2), dict(width=32), dict(vocab=511), dict(heads=2), dict(kv_heads=4),
    dict(mlp=97), dict(tied=False), dict(layer_norm=True), dict(gated_mlp=False), dict(qkv_bias=True),
    dict(bias=True), dict(rope=None)], ids=str)
def test_checkpoint_with_another_architecture_is_refused(tmp_path, change):
    """Catches: Modules are built for hours, or tensors are dropped in silence."""
    checkpoint = gpt_checkpoint(load("llama3"))
    files.save(tmp_path / "r.pt", checkpoint | dict(arch=checkpoint["arch"] | change))
    with pytest.raises(ValueError, match="r.pt"):
        weights.load(tmp_path / "r.pt")


@pytest.mark.parametrize("key", ["vocab", "layers", "rope", "layer_norm", "gated_mlp", "qkv_bias", "bias"])
def test_checkpoint_without_a_part_of_its_architecture_is_refused(tmp_path, key):
    checkpoint = gpt_checkpoint(load("llama3"))
    arch = {k: value for k, value in checkpoint["arch"].items() if k != key}
    files.save(tmp_path / "r.pt", checkpoint | dict(arch=arch))
    with pytest.raises(ValueError, match=f"r.pt.*{key}"):
        weights.load(tmp_path / "r.pt")


@pytest.mark.parametrize("name, change, word", [
    *(("openclip_vit", *case) for case in [
        (dict(layers=3000), "layers in"), (dict(layers=[1, 1, 1, 3000]), "layers in"),
        (dict(layers=1), "resblocks"), (dict(embed_dim=16), "proj"),
        (dict(image_size=40), "positional_embedding"), (dict(context=76), "positional_embedding"),
        (dict(mean=[0.5, 0.5]), ""), (dict(std=None), "")]),
    *(("openclip_convnext", *case) for case in [
        (dict(layers=[1, 1, 3000, 1]), "layers in"), (dict(layers=[1, 1, 3, 1]), "blocks.2"),
        (dict(layers=[1, 1, 1, 1]), "blocks.1"), (dict(widths=[4, 8, 12, 10**12]), ""),
        (dict(widths=[10**12] * 4), ""), (dict(embed_dim=16), "head.proj"), (dict(mlp_head=True), "mlp.fc1"),
        (dict(image_size=16), "image_size is 16"), (dict(image_size=10**9), "image_size is 1000000000")])],
    ids=str)
def test_clip_checkpoint_with_another_architecture_is_refused(tmp_path, name, change, word):
    """Catches: Modules are built for hours, the mean has too few channels, or an image fills all memory."""
    model = load(name)
    checkpoint = dict(kind="clip", arch=model.arch | change, model=model.state_dict())
    files.save(tmp_path / "clip.pt", checkpoint)
    with pytest.raises(ValueError, match=f"clip.pt.*{word}"):
        weights.load(tmp_path / "clip.pt")


# Numbers of the wrong type

WRONG = [[], {}, "x", True, None, -1, 1.5]
NULLABLE = {"n_inner", "num_key_value_heads", "head_dim"}  # null stands for a default
UNREAD = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "attention_dropout",
          "initializer_range", "bos_token_id", "pretraining_tp", "max_window_layers"}


def numbers(config):
    """Returns the keys of the numbers in a dict."""
    return [k for k, v in config.items() if type(v) in (int, float)]


@torch.no_grad()
def run(model):
    """Runs what a model is for, with all its numbers in use; the results must be finite."""
    ids = random_ids(2, 9)
    if model.info["kind"] == "gpt":
        end = model.arch["end"]
        outputs = [model(ids if end is None else torch.cat([ids, torch.full((2, 1), end)], 1))]
        tokens = prt.generate(model, [], ids[:1], length=3, end=end)
        assert tokens.shape[1] <= 12
    else:
        pixels = torch.full((2, 3, 20, 20), 77, dtype=torch.uint8)
        outputs = [model(pixels, ids) if model.info["kind"] == "clip" else model(pixels)]
    state = (*outputs, *model.parameters(), *model.buffers())
    assert all(x.isfinite().all() for x in state if x.is_floating_point())


def outcome(path):
    """Returns the one-line error of loading a file, which names it, or "" for a model that runs."""
    try:
        model = weights.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return str(error)
    run(model)
    return ""


def gpt_config(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


CASES = [(name, key) for name in ("gpt2", "llama2", "qwen2") for key in numbers(gpt_config(name))
         if key not in UNREAD | {"eos_token_id"}] + [("gpt2", "n_inner")]


@pytest.mark.parametrize("name, key", CASES)
def test_a_wrong_number_in_a_config_is_refused_or_harmless(tmp_path, name, key):
    """Catches: A damaged config.json gives an error in the first forward pass, or a model that gives nan."""
    folder, config = edited(tmp_path, name), gpt_config(name)
    for value in WRONG:
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        if not outcome(folder):
            assert value is None and key in NULLABLE or value == 1.5 and "_eps" in key, value


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen2"])
def test_numbers_that_are_not_read_may_be_anything(tmp_path, name):
    """Catches: A model is refused for a value that does not matter."""
    for i, value in enumerate(WRONG):
        assert not outcome(edited(tmp_path / str(i), name, **dict.fromkeys(UNREAD, value)))


@pytest.mark.parametrize("value, end", [(None, None), (0, 0), ([7, 8], 7), ([], "refused"), ({}, "refused"),
                                        ("x", "refused"), (True, "refused"), (1.5, "refused"),
                                        ([{}], "refused"), ([True], "refused"), ([None], None)], ids=str)
def test_end_token_is_a_number_or_none(tmp_path, value, end):
    """Catches: Texts are encoded with an end token that is no number."""
    folder = edited(tmp_path, "gpt2", eos_token_id=value)
    if end == "refused":
        assert outcome(folder)
    else:
        assert weights.load(folder).arch["end"] == end


def checkpoint_of(kind, name):
    """Returns a checkpoint of one of the three kinds, made of a fixture."""
    model = load(name)
    if kind == "classifier":
        model = classifier(model, expected(name)["tokens"][:, None])
    extra = dict(tokenizer=TOKENIZERS["llama3"]) if kind == "gpt" else dict(method="prt", beta=0.5)
    return dict(kind=kind, arch=model.arch, model=model.state_dict(), step=3) | extra


@pytest.mark.parametrize("key", ["rope_theta", "factor", "high_freq_factor", "low_freq_factor",
                                 "original_max_position_embeddings"])
def test_wrong_numbers_of_rope_are_refused(tmp_path, key):
    """Catches: The angles are nan, which the first layer turns into text without sense and without error."""
    folder, config, path = edited(tmp_path, "llama3"), gpt_config("llama3"), tmp_path / "r.pt"
    checkpoint, accepted = checkpoint_of("gpt", "llama3"), []
    for value in [[], {}, "x", True, None, -1]:
        parameters = config["rope_parameters"] | {key: value}
        (folder / "config.json").write_text(json.dumps(config | dict(rope_parameters=parameters)))
        rope = dict(theta=parameters["rope_theta"], llama3=parameters)
        torch.save(checkpoint | dict(arch=checkpoint["arch"] | dict(rope=rope)), path)
        for source in (folder, path):
            with contextlib.suppress(ValueError):
                weights.load(source)
                accepted.append((source.name, value))
    assert not accepted


KINDS = [("gpt", "llama3"), ("clip", "openclip_vit"), ("classifier", "openclip_vit"),
         ("clip", "openclip_convnext"), ("classifier", "openclip_convnext")]


@pytest.mark.parametrize("kind, name", KINDS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_wrong_number_in_a_checkpoint_is_refused_or_harmless(tmp_path, kind, name):
    """Catches: A damaged checkpoint gives an error in the first forward pass."""
    checkpoint = checkpoint_of(kind, name)
    arch, path, loaded = checkpoint["arch"], tmp_path / "r.pt", set()
    for key in numbers(arch):
        for value in WRONG:
            torch.save(checkpoint | dict(arch=arch | {key: value}), path)
            if (key, value) != ("end", -1) and not outcome(path):  # -1: see the test of end tokens
                loaded.add(key)
    # A classifier has no text tower, and an epsilon of 1.5 is odd but works.
    assert loaded <= dict(gpt={"end", "eps"}, clip=set(), classifier={"text_width"})[kind]


@pytest.mark.parametrize("kind, name", KINDS[1:])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_wrong_means_of_a_checkpoint_are_refused(tmp_path, kind, name, key):
    checkpoint, path = checkpoint_of(kind, name), tmp_path / "r.pt"
    for value in [*WRONG, [0.5] * 2, [0.5] * 4, ["x"] * 3, [None] * 3, [[]] * 3, [[0.5]] * 3, "abc"]:
        torch.save(checkpoint | dict(arch=checkpoint["arch"] | {key: value}), path)
        assert outcome(path), value


@pytest.mark.parametrize("name, key", [("openclip_rn", "layers"), ("openclip_convnext", "layers"),
                                       ("openclip_convnext", "widths")])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_wrong_depths_and_widths_of_a_convnet_are_refused(tmp_path, name, key):
    checkpoint, path = checkpoint_of("classifier", name), tmp_path / "r.pt"
    for value in [[], [1], [1, 2, 1], [1, 2, 1, 1, 1], [1, 2, 1, "x"], [1, 2, 1, None], [1, 2, 1, 1.0],
                  [1, 2, 1, 0], [1, 2, 1, -1], [1, 2, 1, []], 5, "x", {}, None, True]:
        torch.save(checkpoint | dict(arch=checkpoint["arch"] | {key: value}), path)
        assert outcome(path), value


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_an_end_token_outside_of_the_vocabulary_is_refused_or_none(tmp_path, name):
    """Catches: Training fails at the first text, which ends in a token without a row in the embedding."""
    for value in (-1, 512, 10**30):
        outcome(edited(tmp_path / str(value), name, eos_token_id=value))


@pytest.mark.parametrize("part, key", [("vision", "head_width"), ("text", "heads"), ("preprocess", "mean"),
                                       ("preprocess", "std")])
def test_a_wrong_number_in_the_config_of_a_clip_is_refused_or_harmless(tmp_path, part, key):
    folder = edited_clip(tmp_path)
    file = folder / "open_clip_config.json"
    for value in [*WRONG, 0, [1.0], [0.5, "x", 0.5]]:
        config = json.loads((VIT / file.name).read_text())
        section = "preprocess_cfg" if part == "preprocess" else f"{part}_cfg"
        parent = config if part == "preprocess" else config["model_cfg"]
        parent[section] = parent[section] | {key: value}
        file.write_text(json.dumps(config))
        outcome(folder)


# One vocabulary

ARCH = dict(vocab=1503, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp=24, positions=32, eps=1e-5,
            tied=False, rope=dict(theta=10000.0), end=1501, layer_norm=False, gated_mlp=True, qkv_bias=False,
            bias=False)


def small(rows, tokenizer="llama3"):
    """Returns a GPT with this many rows in its output matrix, and a tokenizer of 1503 tokens."""
    torch.manual_seed(rows)
    model = GPT(ARCH | dict(vocab=rows)).eval()
    model.info = dict(tokenizer=tokenizer and TOKENIZERS[tokenizer])
    return model


def test_equal_tokenizers_are_shared(capsys):
    models = dict(a=small(1503), b=small(1503))
    tokenizer = weights.same_vocabulary(models)
    assert tokenizer.size == 1503
    assert tokenizer.hash == Tokenizer(TOKENIZERS["llama3"], "").hash
    assert [model.size for model in models.values()] == [1503, 1503]
    assert not capsys.readouterr().out


def test_equally_padded_rows_are_cut(capsys):
    """Catches: An id that decodes to nothing is chosen, since both models have a row for it."""
    models = dict(a=small(1536), b=small(1536))
    weights.same_vocabulary(models)
    assert [model.size for model in models.values()] == [1503, 1503]
    assert "1536" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizers, words", [(("llama3", "qwen2"), "org/new.*out/reward.pt"),
                                               (("", "llama3"), "org/new.*tokenizer.json")])
def test_different_tokenizers_are_refused(tokenizers, words):
    """Catches: Ids of one tokenizer are read as another's, which gives fluent nonsense."""
    models = zip(("org/new", "out/reward.pt"), (small(1503, name) for name in tokenizers))
    with pytest.raises(ValueError, match=words):
        weights.same_vocabulary(dict(models))


@pytest.fixture
def padded():
    """Matrices of 1536 and 1520 rows for 1503 tokens, as Qwen2.5's of 151936 and 152064 for 151665."""
    return dict(base=small(1536), reward=small(1520))


@torch.no_grad()
def test_padded_rows_are_cut(padded):
    """Catches: Logits of different lengths are added, or those of real tokens change."""
    ids = random_ids(2, 5)
    want = [model(ids)[..., :1503] for model in padded.values()]
    with pytest.raises((ValueError, RuntimeError)):
        prt.generate(padded["base"], [(1.0, padded["reward"])], ids, length=2)
    weights.same_vocabulary(padded)
    assert all(torch.equal(model(ids), logits) for model, logits in zip(padded.values(), want))
    assert prt.generate(padded["base"], [(1.0, padded["reward"])], ids, length=2).max() < 1503


def test_padded_rows_are_named_once(padded, capsys):
    weights.same_vocabulary(padded)
    printed = capsys.readouterr().out
    assert printed.count("1503") == 1
    assert "1536" in printed and "1520" in printed
    weights.same_vocabulary(padded)
    assert not capsys.readouterr().out


def test_special_token_of_one_tokenizer_only_is_cut():
    """Catches: A chat model's tokenizer with one more special token, and the row for it, is refused."""
    base, chat = small(1503), small(1504)
    tokenizer = json.loads(TOKENIZERS["llama3"])
    tokenizer["added_tokens"].append(dict(id=1503, content="<|tool|>"))
    chat.info["tokenizer"] = json.dumps(tokenizer)
    weights.same_vocabulary(dict(base=base, chat=chat))
    assert base.size == chat.size == 1503


def test_matrix_smaller_than_the_tokenizer_is_refused():
    """Catches: Ids without a logit give an index error, on a GPU one without a message."""
    with pytest.raises(ValueError, match="1503.*'b': 1400"):
        weights.same_vocabulary(dict(a=small(1503), b=small(1400)))


# Memory and time

@LINUX
def test_float32_weights_lie_in_the_file(tmp_path):
    """Catches: Every weight is copied on loading."""
    folder = edited(tmp_path, "llama2")
    model = weights.load(folder)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    (low, high), = ([int(end, 16) for end in line.split()[0].split("-")] for line in maps)
    assert all(low < p.data_ptr() < high for p in model.parameters())


MEASURE = """
import sys
from models import weights
def mib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
for folder in sys.argv[1:]:
    model = None  # frees the one before
    before = mib("VmRSS")
    try:
        model = weights.load(folder)
        [p.sum() for p in model.parameters()]
    except ValueError:
        pass
    print(mib("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20 if model else 0)
"""


def write_zeros(path, shapes, code, itemsize):
    """Writes a safetensors file of zeros, which take no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + itemsize * math.prod(shape)
        header[name] = dict(dtype=code, shape=shape, data_offsets=[begin, end])
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """MiB by which the resident set grows at most while a folder is loaded and read, and MiB of its weights.

    Of a small one, one with a damaged head width, and large ones in two types, in the order of their growth.
    """
    folders = dict(first=FIXTURES / "llama2")  # loads libraries, too: some 100 MiB in a build with CUDA
    folders |= dict(damaged=edited(tmp_path_factory.mktemp("damaged"), "llama2", head_dim=5 * 10**7))
    for code, itemsize, vocab in ("BF16", 2, 24 << 10), ("F32", 4, 48 << 10):
        folders[code] = edited(tmp_path_factory.mktemp(code), "llama2", vocab_size=vocab, hidden_size=512,
                               intermediate_size=1024, head_dim=128)
        sizes = {512: vocab, 96: 1024, 64: 512}
        shapes = {name: [sizes[n] for n in x.shape] for name, x in tensors_of("llama2").items()}
        write_zeros(folders[code] / "model.safetensors", shapes, code, itemsize)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", MEASURE, *folders.values()], env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    return dict(zip(folders, figures, strict=True))


@LINUX
def test_damaged_head_width_takes_no_memory(memory):
    """Catches: A table is allocated before its size is checked: with more zeros, it takes all memory."""
    growth, size = memory["damaged"]
    assert size == 0
    assert growth < 60


@LINUX
@pytest.mark.parametrize("code, least, limit", [("F32", 200, 1.5), ("BF16", 100, 1.8)])
def test_no_weight_is_in_memory_twice(memory, code, least, limit):
    """Catches: Every weight is copied, or a random initialization is allocated first.

    A file in bfloat16, of half the size, is in memory beside the float32 weights that are made of it.
    """
    growth, size = memory[code]
    assert size > least
    assert 0.8 * size < growth < limit * size


def test_weights_that_are_replaced_are_not_initialized(monkeypatch):
    """Catches: Random numbers for weights that are replaced at once take seconds to minutes."""
    devices, normal = [], torch.nn.init.normal_

    def watched(tensor, *args, **options):
        devices.append(tensor.device.type)
        return normal(tensor, *args, **options)

    monkeypatch.setattr(torch.nn.init, "normal_", watched)
    model = load("llama2")
    assert set(devices) == {"meta"}
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["llama2", "openclip_vit", "openclip_rn", "openclip_convnext"])
def test_loading_draws_no_random_numbers(name):
    """Catches: The same seed gives another run, depending on how the model was loaded."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    load(name)
    assert torch.equal(state, torch.get_rng_state())
