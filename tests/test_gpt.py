"""GPTs: parity with transformers, the KV cache, files, generation, rewards while decoding, chunked losses."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import prt
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, ROOT

from models import weights
from models.gpt import GPT
from models.tokenizer import Tokenizer

NAMES = ["gpt2", "gpt2_hub", "llama2", "llama3", "falcon3", "qwen2"]
TOKENIZERS = {name: (FIXTURES / f"{name}_tokenizer" / "tokenizer.json").read_text()
              for name in ("llama3", "qwen2")}
ARCH = dict(family="llama", vocab=1503, width=16, layers=1, heads=2, kv_heads=1, head_width=8, mlp=24,
            positions=32, eps=1e-5, tied=False, rope=dict(theta=10000.0), end=1501)


def expected(name):
    return torch.load(FIXTURES / name / "io.pt", weights_only=True)


def load(name, **options):
    return weights.load(FIXTURES / name, **options)


def random_ids(*shape, seed=0):
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def alone(model, ids, pad):
    """Logits [B, T, V] of left-padded rows, each without its padding (nan there) and without a cache."""
    out = torch.full((*ids.shape, model.size), math.nan)
    for row, n in enumerate(pad.tolist()):
        out[row, n:] = model(ids[row:row + 1, n:])[0]
    return out


def edited(tmp_path, name, drop=(), **changes):
    """A copy of a fixture with another config.json."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return folder


def write_safetensors(path, shapes, values=None):
    """A float32 file written by hand: values, or else zeros, for which the disk needs no place."""
    header, size = {}, 0
    for key, shape in shapes.items():
        end = size + 4 * math.prod(shape)
        header[key], size = dict(dtype="F32", shape=list(shape), data_offsets=[size, end]), end
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in values or ():
            f.write(t.detach().float().contiguous().numpy().tobytes())
        f.truncate(8 + len(text) + size)


def write_tensors(path, tensors):
    write_safetensors(path, {k: t.shape for k, t in tensors.items()}, list(tensors.values()))


# Parity

@pytest.mark.parametrize("name", NAMES)
def test_parity(name):
    """A wrong norm, rotation, head grouping, bias or matrix: logits move away from transformers'."""
    io, model = expected(name), load(name)
    with torch.no_grad():
        assert error(model(io["ids"]), io["logits"]) < 1e-4
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    # transformers took the id 0 in the second prompt for padding (pad_token_id=0): nothing looked at it, and
    # positions were counted without it. That is the prompt less its 0, with one place of padding at the left.
    prompt = io["prompt"].clone()
    assert prompt[1, 3] == 0
    prompt[1] = torch.cat([prompt[1, 3:4], prompt[1, :3], prompt[1, 4:]])
    out = prt.generate(model, [], prompt, length=24, pad=torch.tensor([0, 1]))
    assert torch.equal(out[:, :8], prompt) and torch.equal(out[:, 8:], io["greedy"][:, 8:])


def test_stories260k():
    """Trained weights over 200 tokens: a rotation or cache that drifts tells another story."""
    io = json.loads((FIXTURES / "stories260k" / "expected.json").read_text())
    ids = torch.tensor([io["prompt"]])
    out = prt.generate(load("stories260k"), [], ids, length=len(io["greedy"]) - len(io["prompt"]))
    assert len(io["greedy"]) >= 200 and out[0].tolist() == io["greedy"]


# The cache

@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2"])
@pytest.mark.parametrize("pad", [None, [0, 3, 5]])
def test_cache(name, pad):
    """Tokens that look at wrong places, positions that start anew, or padding that is looked at."""
    model, ids, n = load(name), random_ids(3, 20), None if pad is None else torch.tensor(pad)
    want = alone(model, ids, torch.zeros(3, dtype=torch.long) if n is None else n)
    asked = ~want.isnan()
    cache = model.cache(3, 20, n)
    with torch.no_grad():
        got = torch.cat([model(part, cache=cache) for part in ids.split([7, 1, 1, 4, 1, 6], 1)], 1)
        assert cache.at == 20 and got.isfinite().all() and error(got[asked], want[asked]) < 1e-4
        for at, tokens in ((9, 3), (9, 1), (1, 8)):  # rolled back: other tokens there, then the old ones
            cache.at = at
            model(random_ids(3, tokens, seed=1), cache=cache)
            cache.at = at
            again = model(ids[:, at:], cache=cache)
            assert error(again[asked[:, at:]], want[:, at:][asked[:, at:]]) < 1e-4
        whole = model(ids, cache=model.cache(3, 20, n))  # in one piece
    assert error(whole[asked], want[asked]) < 1e-4


def test_padding_longer_than_the_first_part():
    """A row of padding alone has no key to look at: nan, which then spreads through the cache."""
    model, ids, pad = load("llama2"), random_ids(2, 9), torch.tensor([0, 6])
    cache, want = model.cache(2, 9, pad), alone(model, ids, pad)
    with torch.no_grad():
        got = torch.cat([model(part, cache=cache) for part in ids.split([2, 1, 2, 4], 1)], 1)
    assert got.isfinite().all() and error(got[~want.isnan()], want[~want.isnan()]) < 1e-4


def test_no_room():
    """GPT-2's 65th position read beyond its table, or keys written beyond the cache."""
    model = load("gpt2")
    with torch.no_grad():
        model(random_ids(1, 64))
        with pytest.raises(ValueError, match="65 tokens.* 64"):
            model(random_ids(1, 65))
        cache = model.cache(1, 6)
        model(random_ids(1, 4), cache=cache)
        with pytest.raises(ValueError, match="7 tokens.* 6"):
            model(random_ids(1, 3), cache=cache)
        model(random_ids(1, 2), cache=cache)
        with pytest.raises(ValueError, match="65 tokens.* 64"):
            model(random_ids(1, 65), cache=model.cache(1, 80))
    assert prt.generate(model, [], random_ids(1, 60), length=4).shape == (1, 64)
    for compile in (False, True):  # known before the first step
        with pytest.raises(ValueError, match="60 tokens and 8 new .* room for 64"):
            prt.generate(model, [], random_ids(1, 60), length=8, compile=compile)


# Types and memory

@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_bfloat16(name):
    """Half of the memory for frozen weights, but angles in bfloat16 would turn far positions arbitrarily."""
    model, io = load(name, dtype=torch.bfloat16), expected(name)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope is None or model.rope.dtype == torch.float32
    if name == "llama3":
        assert torch.equal(model.rope, load(name).rope)
    with torch.no_grad():
        logits = model(io["ids"])
        cache = model.cache(2, 24)
        parts = torch.cat([model(part, cache=cache) for part in io["ids"].split([20, 4], 1)], 1)
    assert logits.dtype == torch.bfloat16 and cache.kv[0][1].dtype == torch.bfloat16
    for got in (logits, parts):
        assert error(got.float(), io["logits"]) < 0.05 * io["logits"].abs().max()


def test_half_precision_file_is_float32_unless_asked(tmp_path):
    """Weights to train that stay in a file's half precision lose small steps."""
    folder = edited(tmp_path, "llama2")
    file = folder / "model.safetensors"
    half = {k: t.bfloat16() for k, t in weights.read(file).items()}
    file.unlink()
    size, header, data = 0, {}, b""
    for key, t in half.items():
        data += t.view(torch.uint8).numpy().tobytes()
        header[key] = dict(dtype="BF16", shape=list(t.shape), data_offsets=[size, len(data)])
        size = len(data)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for dtype in (torch.float32, torch.bfloat16):
        model = weights.load(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model.norm.weight, half["model.norm.weight"].to(dtype))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_float32_weights_lie_in_the_file(tmp_path):
    """A copy of every weight on loading."""
    folder = edited(tmp_path, "llama2")
    model = weights.load(folder)
    maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if str(folder) in line]
    (low, high), = [(int(low, 16), int(high, 16)) for low, high in maps]
    assert all(low < p.data_ptr() < high for p in model.parameters())


MEASURE = """
import sys
from models import weights
def mib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024
before, model = mib("VmRSS"), None
try:
    model = weights.load(sys.argv[1])
    [p.sum() for p in model.parameters()]
except ValueError:
    pass
print(mib("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20 if model else 0)
"""


def peak(folder):
    """MiB by which the resident set grows at most while a folder is loaded and read, and of its weights."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", MEASURE, folder], env=env, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return map(float, done.stdout.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_no_weight_is_in_memory_twice(tmp_path):
    """A random initialisation that is allocated first, or a dict of tensors kept beside the model."""
    folder = edited(tmp_path, "llama2", vocab_size=48 << 10, hidden_size=512, intermediate_size=1024,
                    head_dim=128)
    sizes = {512: 48 << 10, 96: 1024, 64: 512}
    shapes = {k: [sizes[n] for n in t.shape] for k, t in weights.read(folder / "model.safetensors").items()}
    write_safetensors(folder / "model.safetensors", shapes)
    growth, size = peak(folder)
    assert size > 200 and 0.8 * size < growth < 1.5 * size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_damaged_head_width_takes_no_memory(tmp_path):
    """A table that is allocated before its size is held to the tensors: with more zeros, all of the RAM."""
    growth, size = peak(edited(tmp_path, "llama2", head_dim=5 * 10**7))
    assert size == 0 and growth < 60


def test_nothing_is_initialised(monkeypatch):
    """Seconds to minutes of random numbers for weights that are replaced at once."""
    drawn, normal = [], torch.nn.init.normal_
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *args, **options: (
        drawn.append(tensor.device.type), normal(tensor, *args, **options))[1])
    model = load("llama2")
    assert set(drawn) == {"meta"} and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    load("llama2")
    assert torch.equal(state, torch.get_rng_state())


# config.json

SCALING = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_old_rope_keys(tmp_path, key):
    """Llama 3.1's own config.json: a scaling that is not found changes every logit a little."""
    folder = edited(tmp_path, "llama3", drop=["rope_parameters"], rope_theta=500000.0,
                    rope_scaling=SCALING | {key: "llama3"})
    model, new, io = weights.load(folder), load("llama3"), expected("llama3")
    assert torch.equal(model.rope, new.rope)
    with torch.no_grad():
        assert error(model(io["ids"]), io["logits"]) < 1e-4
    plain = edited(tmp_path / "plain", "llama3", drop=["rope_parameters"], rope_theta=500000.0,
                   rope_scaling=None)
    with torch.no_grad():
        assert error(weights.load(plain)(io["ids"]), io["logits"]) > 1e-3


def test_default_theta(tmp_path):
    """Llama 2's config.json names no rope_theta: it is 10,000."""
    folder, io = edited(tmp_path, "llama2", drop=["rope_parameters"]), expected("llama2")
    with torch.no_grad():
        assert error(weights.load(folder)(io["ids"]), io["logits"]) < 1e-4


def test_end_token_is_the_first_of_several(tmp_path):
    """Llama 3's list of end tokens, which no tensor operation takes."""
    assert load("llama2").arch["end"] == 2 and load("qwen2").arch["end"] is None
    assert weights.load(edited(tmp_path, "llama3", eos_token_id=[5, 6])).arch["end"] == 5


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
def test_unsupported_option(tmp_path, name, change, word):
    """A variant that is not implemented, loaded as if it were the plain model: other logits, no error."""
    with pytest.raises(ValueError, match=word) as caught:
        weights.load(edited(tmp_path, name, **change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                                 "num_attention_heads", "max_position_embeddings", "rms_norm_eps"])
def test_missing_key(tmp_path, key):
    """A value that no default can replace left None: an error in the first forward pass, or none at all."""
    with pytest.raises(ValueError, match="config.json"):
        weights.load(edited(tmp_path, "llama2", drop=[key]))


@pytest.mark.parametrize("change", [
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=2), dict(num_hidden_layers=4),
    dict(num_hidden_layers=-1), dict(num_hidden_layers=2.5), dict(num_hidden_layers="3"),
    dict(num_attention_heads=0), dict(num_attention_heads=5), dict(num_key_value_heads=3),
    dict(hidden_size=72), dict(intermediate_size=10**12), dict(vocab_size=511), dict(vocab_size=10**12),
    dict(head_dim=8), dict(rope_parameters=[1])])
def test_config_that_does_not_fit_the_tensors(tmp_path, change):
    """Modules built for hours, tensors dropped in silence, or an error that names no file."""
    with pytest.raises(ValueError, match="config.json"):
        weights.load(edited(tmp_path, "llama2", **change))


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "null", '{"model_type": "llama"}', "\0"])
def test_damaged_config(tmp_path, text):
    folder = edited(tmp_path, "llama2")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder / "config.json")):
        weights.load(folder)


# Tensors, shards, the index

def refused(tmp_path, tensors, *words, name="llama2"):
    folder = edited(tmp_path, name)
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=str(folder)) as caught:
        weights.load(folder)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_tensors_that_do_not_fit(tmp_path, name):
    """Tensors dropped, or left at nothing, in silence."""
    tensors = weights.read(FIXTURES / name / "model.safetensors")
    norm = next(k for k in tensors if k.endswith(("ln_f.weight", "model.norm.weight")))
    refused(tmp_path / "less", {k: t for k, t in tensors.items() if k != norm}, "norm.weight", name=name)
    refused(tmp_path / "more", tensors | {"model.extra.weight": torch.ones(2)}, "extra.weight", name=name)
    refused(tmp_path / "odd", tensors | {norm: torch.ones(3)}, "norm.weight", name=name)


def test_buffers_of_old_files_are_skipped(tmp_path):
    """Causal masks and RoPE tables that older transformers saved with the weights, and a tied matrix."""
    more = {"gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
                     "transformer.h.1.attn.masked_bias": torch.ones(1),
                     "lm_head.weight": torch.ones(512, 48)},
            "llama2": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}}
    for name, buffers in more.items():
        folder, io = edited(tmp_path, name), expected(name)
        file = folder / "model.safetensors"
        tensors = {k: t.clone() for k, t in weights.read(file).items()}
        write_tensors(file, tensors | buffers)
        with torch.no_grad():
            assert error(weights.load(folder)(io["ids"]), io["logits"]) < 1e-4


def test_missing_shard(tmp_path):
    """A download that stopped between two shards."""
    folder = edited(tmp_path, "llama3")
    (folder / "model-00005-of-00009.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00005-of-00009.safetensors") as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value)
    shutil.rmtree(folder)
    folder = edited(tmp_path, "llama2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        weights.load(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 3])
def test_index_that_leaves_its_folder(tmp_path, name):
    """An index from elsewhere that reads, or on a hub writes, files outside the model's folder."""
    folder = edited(tmp_path, "llama3")
    shutil.copy(folder / "model-00001-of-00009.safetensors", tmp_path / "x.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = name
    file.write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match=str(folder)) as caught:
        weights.load(folder)
    if "x.safetensors" in str(name):
        assert isinstance(caught.value, ValueError) and name in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', ""])
def test_damaged_index(tmp_path, text):
    folder = edited(tmp_path, "llama3")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=str(folder)):
        weights.load(folder)


def test_damaged_shard(tmp_path):
    """The shard that is cut, and not only the folder, is what must be fetched again."""
    folder = edited(tmp_path, "llama3")
    shard = folder / "model-00004-of-00009.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=shard.name):
        weights.load(folder)


# The hub

@pytest.fixture
def hub(serve, monkeypatch):
    """A hub with the sharded repository org/gpt and its tokenizer."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    files = [f for f in (FIXTURES / "llama3").iterdir() if f.name != "io.pt"]
    server.files |= {at(f.name): f.read_bytes() for f in files}
    server.files[at("tokenizer.json")] = TOKENIZERS["llama3"].encode()
    return server


def at(name):
    return f"/org/gpt/resolve/main/{name}"


def test_hub(hub):
    """Shards and tokenizer found, and not asked for again: a cached model works without the network."""
    io = expected("llama3")
    for _ in range(2):
        model = weights.load("org/gpt", "base", text=True)
        with torch.no_grad():
            assert error(model(io["ids"]), io["logits"]) < 1e-4
        assert model.info["tokenizer"] == TOKENIZERS["llama3"]
    asked = [path for path, _ in hub.seen]
    assert all(asked.count(path) == 1 for path in hub.files)


@pytest.mark.parametrize("name", ["config.json", "model-00003-of-00009.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub, name, status):
    """A licence not yet accepted: the message says which file, where the licence is and what to set."""
    hub.files[at(name)] = status
    with pytest.raises(OSError, match=at(name)) as caught:
        weights.load("org/gpt")
    assert not isinstance(caught.value, FileNotFoundError)
    assert f"licence at {hub.url}/org/gpt," in str(caught.value) and "HF_TOKEN" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json",
                                  "model-00003-of-00009.safetensors"])
def test_missing_file_on_the_hub(hub, name):
    hub.files[at(name)] = 404
    with pytest.raises(FileNotFoundError, match=name) as caught:
        weights.load("org/gpt")
    assert "org/gpt" in str(caught.value)


def test_index_on_the_hub_that_leaves_its_folder(hub, cache):
    index = json.loads(hub.files[at("model.safetensors.index.json")])
    index["weight_map"]["model.norm.weight"] = "../../../x.safetensors"
    hub.files[at("model.safetensors.index.json")] = json.dumps(index).encode()
    with pytest.raises(ValueError, match="x.safetensors"):
        weights.load("org/gpt")
    assert not any("x.safetensors" in path for path, _ in hub.seen) and not list(cache.rglob("x.safetensors"))


# Checkpoints and roles

def checkpoint(model, **header):
    return dict(kind="gpt", arch=model.arch, tokenizer=TOKENIZERS["llama3"], template="{}", data="x",
                args={}, model=model.state_dict(), step=3) | header


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_own_checkpoint(tmp_path, name):
    """A saved reward that answers otherwise than the one that was trained."""
    model, io = load(name), expected(name)
    header = dict(method="prt", beta=0.5, source="here")
    weights.save(tmp_path / "r.pt", checkpoint(model, **header, optimizer=dict(step=torch.ones(()))))
    for role, dtype in (("prt", torch.float32), (None, torch.bfloat16)):
        again = weights.load(tmp_path / "r.pt", role, text=True, dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {dtype} and again.arch == model.arch
        assert again.info.items() >= dict(header, step=3, template="{}").items()
        assert "model" not in again.info and "optimizer" not in again.info
        with torch.no_grad():
            assert error(again(io["ids"]).float(), io["logits"]) < (1e-4 if role else 0.3)


def test_roles_and_worlds(tiny, tmp_path):
    """A reward taken for a base, an image model for a text model: the numbers would only look bad."""
    paths = dict(base=tmp_path / "base.pt", prt=tmp_path / "reward.pt", ft=tmp_path / "tuned.pt")
    for role, path in paths.items():
        weights.save(path, checkpoint(load("llama3"), **({} if role == "base" else dict(method=role))))
        assert weights.load(path, role, text=True).info["kind"] == "gpt"
    for path, role, text, words in (
            (paths["prt"], "base", True, "reward.pt is a reward for text; a base for text is needed here"),
            (paths["ft"], "prt", None, "tuned.pt is a fine-tuned model for text; a reward for text is"),
            (paths["base"], "base", False, "base.pt is a base for text; a base for images is"),
            (FIXTURES / "llama3", "prt", None, "llama3 is a base for text; a reward for text is"),
            (tiny.reward, None, True, "reward.pt is a reward for images; a reward for text is")):
        with pytest.raises(ValueError, match=words):
            weights.load(path, role, text=text)
    for name, text in dict(openclip_vit=True, llama3=False).items():  # a folder of the other world's layout
        with pytest.raises((ValueError, OSError), match=f"{name}.*config.json"):
            weights.load(FIXTURES / name, text=text)


@pytest.mark.parametrize("change", [dict(arch=None), dict(arch={}), dict(model={}), dict(model=None),
                                    dict(arch=dict(ARCH, layers=10**9)), dict(kind="other"),
                                    dict(arch=dict(ARCH, family="bert")), dict(method="rlhf")])
def test_damaged_checkpoint(tmp_path, change):
    weights.save(tmp_path / "r.pt", checkpoint(load("llama3")) | change)
    with pytest.raises(ValueError, match="r.pt"):
        weights.load(tmp_path / "r.pt")


# One vocabulary

def small(rows, tokenizer="llama3"):
    torch.manual_seed(rows)
    model = GPT(ARCH | dict(vocab=rows)).eval()
    model.info = dict(tokenizer=tokenizer and TOKENIZERS[tokenizer])
    return model


def test_equal_tokenizers(capsys):
    models = dict(a=small(1503), b=small(1503))
    tokenizer = weights.same_vocabulary(models)
    assert tokenizer.size == 1503 and tokenizer.hash == Tokenizer(TOKENIZERS["llama3"], "").hash
    assert [m.size for m in models.values()] == [1503, 1503] and not capsys.readouterr().out
    padded = dict(a=small(1536), b=small(1536))  # no id that decodes to nothing may be chosen
    weights.same_vocabulary(padded)
    assert [m.size for m in padded.values()] == [1503, 1503] and "1536" in capsys.readouterr().out


def test_different_tokenizers():
    """Ids of one tokenizer read as another's: fluent nonsense."""
    with pytest.raises(ValueError, match="org/new.*out/reward.pt"):
        weights.same_vocabulary({"org/new": small(1503), "out/reward.pt": small(1503, "qwen2")})
    with pytest.raises(ValueError, match="org/new.*tokenizer.json"):
        weights.same_vocabulary({"org/new": small(1503, ""), "out/reward.pt": small(1503)})


def test_padded_rows_are_cut(capsys):
    """Matrices of 1,536 and 1,520 rows for 1,503 tokens, as Qwen2.5's 151,936 and 152,064 for 151,665."""
    base, reward = small(1536), small(1520)
    ids = random_ids(2, 5)
    with torch.no_grad():
        want = base(ids)[..., :1503], reward(ids)[..., :1503]
        with pytest.raises((ValueError, RuntimeError)):
            prt.generate(base, [(1.0, reward)], ids, length=2)
        weights.same_vocabulary(dict(base=base, reward=reward))
        printed = capsys.readouterr().out
        assert printed.count("1503") == 1 and "1536" in printed and "1520" in printed
        assert torch.equal(base(ids), want[0]) and torch.equal(reward(ids), want[1])
        weights.same_vocabulary(dict(base=base, reward=reward))
    assert not capsys.readouterr().out  # said once
    assert prt.generate(base, [(1.0, reward)], ids, length=2).max() < 1503


def test_fewer_special_tokens_in_one_tokenizer(capsys):
    """A chat model's tokenizer with one more special token, and the row for it."""
    base, chat = small(1503), small(1504)
    d = json.loads(TOKENIZERS["llama3"])
    d["added_tokens"].append(dict(id=1503, content="<|tool|>"))
    chat.info["tokenizer"] = json.dumps(d)
    weights.same_vocabulary(dict(base=base, chat=chat))
    assert base.size == chat.size == 1503


def test_matrix_smaller_than_the_tokenizer():
    """Ids without a logit: an index error, on a GPU one without a message."""
    with pytest.raises(ValueError, match="1503.*'b': 1400"):
        weights.same_vocabulary(dict(a=small(1503), b=small(1400)))


# Training

@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_recompute_gives_the_same_gradients(name):
    """Activation checkpointing that recomputes something else, or that does not recompute at all."""
    ids, gradients, calls = random_ids(2, 12), [], []
    for recompute in (False, True):
        model = load(name)
        model.recompute = recompute
        model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(recompute))
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls == [False, True, True]
    assert all(error(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))


class Plain(torch.nn.Module):
    """A policy that returns all logits, as an image model does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, where):
        return self.model(ids).flatten(0, 1)[where]


TEXTS = random_ids(8, 11, seed=5)


def batch(i, ignore=False):
    """Of every text a few targets; some may be ignored."""
    ids, where = TEXTS[i], torch.cat([10 * row + torch.arange(2 + row, 10) for row in range(len(i))])
    targets = ids[:, 1:].flatten()[where]
    return (ids[:, :-1], where), torch.where(targets % 5 == 0, -100, targets) if ignore else targets


def gradients(monkeypatch, method="prt", plain=False, ignore=False, **options):
    """What one step of prt.fit logs, and the gradient of each weight in it."""
    policy, base = load("llama3"), load("falcon3").requires_grad_(False)
    found, parameters = [], list(policy.parameters())
    if plain:
        policy, base = Plain(policy), Plain(base)
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, clip_at: (
            found.extend(p.grad.clone() for p in parameters), clip(params, clip_at))[1])
        log, = prt.fit(policy, lambda step: torch.arange(4), lambda i, g: (*batch(i, ignore), None), steps=1,
                       base=base, method=method, lr=1e-5, **options)
    return {k: log[k] for k in ("loss", "accuracy", "kl")}, found


@pytest.mark.parametrize("method", ["prt", "ft"])
@pytest.mark.parametrize("options", [dict(), dict(alpha=0.1, beta=0.7), dict(ignore=True), dict(accum=2)])
def test_loss_in_chunks(monkeypatch, method, options):
    """Chunks weighed by their number and not by their targets, or a chunk left out."""
    sizes = []

    def head(policy, features):
        sizes.append(len(features))
        return policy.head(features)

    options = dict(options, method=method)
    want, gradient = gradients(monkeypatch, head=GPT.head, chunk=1000, **options)
    plain = gradients(monkeypatch, plain=True, **options)
    for chunk in (5, 7):
        sizes.clear()
        for log, other in (plain, gradients(monkeypatch, head=head, chunk=chunk, **options)):
            assert log == pytest.approx(want, rel=1e-4, abs=1e-6)
            assert max(map(error, gradient, other)) < 1e-5 and len(gradient) == len(other)
        assert max(sizes) <= chunk < len(batch(torch.arange(4))[1])
    assert max(g.abs().max() for g in gradient) > 1e-2


# Generation

@torch.no_grad()
def by_hand(base, rewards, ids, length):
    """Algorithm 2 without a cache."""
    for _ in range(length):
        scores = base(ids)[:, -1].log_softmax(-1)
        for weight, policy in rewards:
            scores = scores + weight * policy(ids)[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.fixture(scope="module")
def models():
    """A base, a tuned model and its base, all of one vocabulary."""
    return SimpleNamespace(base=load("llama3"), tuned=load("falcon3"), old=load("qwen2"))


def test_mixtures(models):
    """A policy's cache filled with another's keys, a weight left out, or a sign lost."""
    m, ids = models, random_ids(2, 6)
    mixtures = [[], [(1.0, m.tuned)], [(2.0, m.tuned)], [(1.0, m.tuned), (-1.0, m.old)],
                [(1.0, m.old), (1.0, m.base)]]
    made = [prt.generate(m.base, rewards, ids, length=16) for rewards in mixtures]
    for rewards, out in zip(mixtures, made):
        assert torch.equal(out, by_hand(m.base, rewards, ids, 16))
    assert len({tuple(out.flatten().tolist()) for out in made}) == len(made)


class Counter:
    """A policy of 20 tokens that counts: 3 4 5 …"""
    asked = 0

    def cache(self, batch, length, pad):
        return SimpleNamespace(length=length)

    def features(self, ids, cache, at=None):
        self.asked += 1
        return ids

    def head(self, features):
        return F.one_hot((features + 1) % 20, 20).float()


def test_end_token():
    """What follows the end token is noise, and takes time until all rows have ended."""
    ids = torch.tensor([[2, 3], [9, 7], [9, 9], [0, 15]])  # one in a prompt ends nothing
    policy = Counter()
    out = prt.generate(policy, [], ids, length=60, end=9)
    assert out.shape == (4, 62) and 20 < policy.asked < 40
    assert out[0, 2:].tolist() == [4, 5, 6, 7, 8] + [9] * 55
    assert out[1, 2:].tolist() == [8] + [9] * 59
    assert out[2, 2:].tolist() == [*range(10, 20), *range(10)] + [9] * 40
    assert out[3, 2:].tolist() == [*range(16, 20), *range(10)] + [9] * 46
    policy = Counter()
    assert prt.generate(policy, [], ids[:2], length=60, end=9).shape == (2, 62) and policy.asked < 10
    assert prt.generate(Counter(), [], ids, length=5, end=9).shape == (4, 7)
    assert prt.generate(Counter(), [], ids, length=60)[1].tolist() == [9, *(i % 20 for i in range(7, 68))]


def test_prompts_of_different_lengths(models):
    """Padding that is looked at, or counted: a prompt's continuation then depends on its neighbours."""
    rewards = [(1.0, models.tuned), (-1.0, models.old)]
    ids, pad = random_ids(3, 9, seed=3), torch.tensor([0, 2, 7])
    for value in (0, 7):  # whatever stands there
        for row, n in enumerate(pad):
            ids[row, :n] = value
        out = prt.generate(models.base, rewards, ids, length=12, pad=pad)
        assert torch.equal(out[:, :9], ids)
        for row, n in enumerate(pad):
            want = prt.generate(models.base, rewards, ids[row:row + 1, n:], length=12)
            assert torch.equal(out[row, n:], want[0])


def test_sampling_is_reproducible(models):
    """Samples drawn from the global generator: no run could be repeated."""
    def sample(seed, temperature=1.0, **options):
        torch.seed()  # the global generator must not matter
        return prt.generate(models.base, [(1.0, models.tuned)], random_ids(2, 6), length=10,
                            temperature=temperature, generator=torch.Generator().manual_seed(seed), **options)

    greedy = prt.generate(models.base, [(1.0, models.tuned)], random_ids(2, 6), length=10)
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    assert not torch.equal(sample(1), greedy)
    assert torch.equal(sample(1, top_p=1e-9), greedy) and torch.equal(sample(2, 1e-4), greedy)


def test_draw():
    """Too large a nucleus, one without the token that crosses top_p, or temperature on the wrong side."""
    p = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
    g = torch.Generator().manual_seed(0)

    def shares(temperature=1.0, top_p=1.0):
        found = prt.probabilities((p.log() + 3).expand(20_000, 5), temperature, top_p)
        drawn = prt.draw(found, temperature, g)
        assert drawn.shape == (20_000,)
        return torch.bincount(drawn, minlength=5) / 20_000

    def near(found, want):
        want = torch.tensor(want)
        assert torch.equal(found > 0, want > 0) and error(found, want / want.sum()) < 0.02

    near(shares(), p[0].tolist())
    near(shares(top_p=0.6), [0, 0.4, 0, 0.25, 0])
    near(shares(top_p=0.7), [0, 0.4, 0, 0.25, 0.2])  # 0.65 is not enough
    near(shares(top_p=0.3), [0, 1.0, 0, 0, 0])
    near(shares(0.5), (p[0] ** 2).tolist())
    near(shares(2.0, 0.6), [0, 0.4**0.5, 0, 0.25**0.5, 0.2**0.5])  # the nucleus of what is sampled
    two = torch.tensor([[0.0, 9, 0], [0, 0, 9]])
    for how in ((0.0, 1.0), (1.0, 1e-9)):
        found = prt.probabilities(two, *how)
        assert found.tolist() == [[0, 1, 0], [0, 0, 1]] and prt.draw(found, how[0]).tolist() == [1, 2]


def test_score(models):
    """Batches weighed equally whatever their targets, or figures of another distribution."""
    batches = [batch(torch.tensor(i)) for i in ([0, 1, 2], [3], [4, 5])]
    rewards = [(0.7, models.tuned), (-0.3, models.old)]
    nll, right, moved = [], [], []
    with torch.no_grad():
        for (ids, where), targets in batches:
            base = models.base(ids).flatten(0, 1)[where].log_softmax(-1)
            r = sum(w * m(ids).flatten(0, 1)[where] for w, m in rewards)
            log_probs = (base + r).log_softmax(-1)
            nll += (-log_probs[torch.arange(len(targets)), targets]).tolist()
            right += (log_probs.argmax(-1) == targets).tolist()
            moved += (log_probs.exp() * (log_probs - base)).sum(-1).tolist()
    want = dict(nll=sum(nll) / len(nll), accuracy=sum(right) / len(nll), kl=sum(moved) / len(nll))
    assert want["kl"] > 0.01
    for chunk in (512, 5, 1):
        assert prt.score(models.base, rewards, batches, chunk) == pytest.approx(want, rel=1e-4)
    base = prt.score(models.base, [], batches)
    assert abs(base["kl"]) < 1e-6 and base["nll"] != pytest.approx(want["nll"], rel=1e-3)


# A reward inside another library's decoding

def whole(reward, ids, scores, beta=1.0, pad=None):
    """What RewardProcessor must answer, computed without a cache."""
    n = torch.zeros(len(ids), dtype=torch.long) if pad is None else pad
    return prt.tilt(scores, alone(reward, ids, n)[:, -1], beta)


def scores_for(ids, width=512):
    return 3 * torch.randn(len(ids), width, generator=torch.Generator().manual_seed(ids.numel()))


@pytest.fixture
def asked(models, monkeypatch):
    """How many tokens a row the reward was asked for, per call."""
    counts, features = [], models.tuned.features
    monkeypatch.setattr(models.tuned, "features",
                        lambda ids, cache=None: counts.append(ids.shape[1]) or features(ids, cache))
    return counts


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_processor(models, asked, beta):
    """Keys of a prefix that has changed, of another beam or of another batch."""
    processor = prt.RewardProcessor(models.tuned, beta)
    ids, other = random_ids(3, 30), random_ids(3, 30, seed=1)
    changed = torch.cat([ids[:, :7], other[:, 7:12]], 1)
    one_row = ids[:, :9].clone()
    one_row[1, 4] = other[1, 4]
    calls = [(ids[:, :5], 5), (ids[:, :6], 1), (ids[:, :7], 1), (ids[:, :10], 3), (ids[:, :10], 1),
             (changed, 5), (ids[:, :4], 1), (ids[:, :9], 5), (one_row, 5), (ids[:, :9], 5),
             (ids[[2, 0, 0], :10], 10), (ids[[2, 0, 0], :11], 1), (ids[:2, :8], 8), (ids[:, :8], 8),
             (other[:, :8], 8), (other[:1, :1], 1), (other[:1, :2], 1)]
    for call, tokens in calls:
        scores = scores_for(call)
        got = processor(call, scores)
        want = whole(load("falcon3"), call, scores, beta)
        assert got.dtype == torch.float32 and got.shape == scores.shape and error(got, want) < 1e-4
    assert asked == [tokens for _, tokens in calls]


def test_processor_grows(models):
    """Keys written beyond the cache that the first call made, or lost when it is made anew."""
    processor, ids = prt.RewardProcessor(models.tuned), random_ids(2, 200)
    for n in (1, 60, 66, 67, 68, 150, 200):
        scores = scores_for(ids[:, :n])
        assert error(processor(ids[:, :n], scores), whole(models.tuned, ids[:, :n], scores)) < 1e-4


def test_processor_of_ids_in_one_buffer(models):
    """A decoder that writes into the ids it has passed: what the reward has seen must not change with them.
    """
    processor, ids = prt.RewardProcessor(models.tuned), random_ids(2, 8)
    scores = scores_for(ids)
    processor(ids[:, :6], scores)
    ids[:, 3] += 1
    assert error(processor(ids, scores), whole(models.tuned, ids, scores)) < 1e-4


def test_processor_with_padding(models, asked):
    """Padding that the reward looks at; keys kept for a batch whose padding is another."""
    pad, ids = torch.tensor([0, 3, 1]), random_ids(3, 16)
    other = ids.clone()
    for row, n in enumerate(pad):
        ids[row, :n] = 0
    other[:, :2], other[1, :5] = ids[:, :2], 0
    ids[0, 8] = 0  # no padding: it has text at its left
    processor, reward = prt.RewardProcessor(models.tuned, pad=0), load("falcon3")
    calls = [(ids[:, :6], pad, 6), (ids[:, :7], pad, 1), (ids[:, :10], pad, 3), (ids[:, :8], pad, 1),
             (other[:, :9], torch.tensor([0, 5, 1]), 9), (ids[:, :11], pad, 11)]
    for call, n, tokens in calls:
        scores = scores_for(call)
        assert error(processor(call, scores), whole(reward, call, scores, pad=n)) < 1e-4
    assert asked == [tokens for *_, tokens in calls]


def test_processor_cuts_padded_rows(models):
    """A base whose output matrix has more rows than the reward's; none of them may be sampled."""
    ids, scores = random_ids(2, 5), scores_for(random_ids(2, 5), 520)
    out = prt.RewardProcessor(models.tuned, size=500)(ids, scores)
    with torch.no_grad():
        want = prt.tilt(scores[:, :500], models.tuned(ids)[:, -1, :500])
    assert out.shape == (2, 520) and (out[:, 500:] == -math.inf).all() and error(out[:, :500], want) < 1e-4
    with pytest.raises(ValueError, match="520.*512"):
        prt.RewardProcessor(models.tuned)(ids, scores)


@pytest.mark.parametrize("fault", ["too long", "interrupted"])
def test_processor_after_an_error(models, monkeypatch, fault):
    """A call that failed half-way, in a new cache or in the old one, whose keys are then taken for another's.
    """
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
    assert error(processor(ids, scores), whole(models.tuned, ids, scores)) < 1e-4


@pytest.fixture(scope="module")
def theirs():
    """The base in transformers, and generate's options."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "llama3").eval()

    def generate(ids, processor=None, **options):
        given = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
                     attention_mask=(ids != 0).long(), logits_processor=[processor] if processor else [])
        return model.generate(ids, **given | options)

    return generate


def test_in_transformers(theirs, models):
    """The tokens of prt.generate out of transformers' own decoding loop, padded prompts included."""
    ids = random_ids(2, 8)
    assert torch.equal(theirs(ids), prt.generate(models.base, [], ids, length=20))
    for beta in (1.0, 0.5):
        want = prt.generate(models.base, [(1 / beta, models.tuned)], ids, length=20)
        assert torch.equal(theirs(ids, prt.RewardProcessor(models.tuned, beta)), want)
    ids[1, :3] = 0
    want = prt.generate(models.base, [(1.0, models.tuned)], ids, length=20, pad=torch.tensor([0, 3]))
    assert torch.equal(theirs(ids, prt.RewardProcessor(models.tuned, pad=0)), want)


def test_beams_in_transformers(theirs, models):
    """Beam search permutes the rows in every step: keys of one beam read for another."""
    @torch.no_grad()
    def slow(ids, scores):
        return prt.tilt(scores, models.tuned(ids)[:, -1])

    ids, orders = random_ids(2, 8), []
    watched = prt.RewardProcessor(models.tuned)

    def watch(now, scores):
        orders.append(watched.seen is None or torch.equal(now[:, :-1], watched.seen))
        return watched(now, scores)

    want = theirs(ids, slow, num_beams=4)
    assert torch.equal(theirs(ids, watch, num_beams=4), want)
    assert not all(orders) and not torch.equal(want, theirs(ids, num_beams=4))
