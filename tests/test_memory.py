"""What training and loading take of memory: models/memory.py, runs.place, and errors of GPUs that lack it."""
import contextlib
import copy
import re
import shutil
import weakref
from types import SimpleNamespace
from unittest import mock

import bench
import helpers
import pytest
import torch
import torch.nn.functional as F
from conftest import EVAL_LM, FIXTURES, OLD, ROOT, TUNE_LM, call, one_line
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prt
import train_lm
from data import files
from models import lora, memory, processes, runs, weights
from models.clip import classifier
from models.gpt import GPT

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
QWEN = bench.TEXTS["qwen2.5-0.5b"]
FALCON = QWEN | dict(width=2048, layers=18, heads=8, kv_heads=4, head_width=256, mlp=8192, vocab=131072,
                     tied=False, qkv_bias=False)
ARCHS = {"Qwen2.5-0.5B": QWEN, "Qwen2.5-1.5B": bench.TEXTS["qwen2.5-1.5b"], "Falcon3-1B": FALCON,
         "Qwen2.5-3B": bench.qwen2(2048, 36, 16, 2, 11008, 151936, True),
         "Qwen2.5-7B": bench.TEXTS["qwen2.5-7b"],
         "Qwen2.5-14B": bench.qwen2(5120, 48, 40, 8, 13824, 152064, False),
         "Falcon3-7B": FALCON | dict(width=3072, layers=28, heads=12, mlp=23040),
         "Llama2-7B": bench.qwen2(4096, 32, 32, 32, 11008, 32000, False) | dict(qkv_bias=False)}
TABLE = re.findall(r"^\| (\w+[\d.]+-[\d.]+B) \| (\d+)(.*?) \| (.*) \|$",
                   (ROOT / "models/README.md").read_text(), re.M)


def on_meta(arch):
    with torch.device("meta"):
        return GPT(arch)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that a GPU has this much memory: gpu(free, total) in GB."""
    return lambda free, total: monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (int(free * 1e9), int(total * 1e9)))


def norms_as_on_cuda(monkeypatch):
    """Lets norms run in float32 if there is autocast, and keep their inputs alone."""
    def norm(self, x):
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        with torch.autocast("cpu", enabled=False):
            return Kept.apply(x)

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.rms_norm(x, x.shape[-1:])

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clone()

    for kind in (torch.nn.RMSNorm, torch.nn.LayerNorm):
        monkeypatch.setattr(kind, "forward", norm)


QWEN3 = bench.qwen2(1024, 28, 16, 8, 3072, 151936, True) | dict(
    head_width=128, qkv_bias=False, qk_norm="head")
OLMO2 = bench.qwen2(2048, 16, 16, 16, 8192, 100352, False) | dict(
    qkv_bias=False, qk_norm="full", norms="after")


@pytest.mark.parametrize("arch", [bench.TEXTS["qwen2.5-0.5b"], FALCON, bench.TEXTS["gpt2"], QWEN3, OLMO2])
def test_a_layer_keeps_what_the_docstring_adds_up(arch, monkeypatch):
    """The tensors that autograd saves."""
    norms_as_on_cuda(monkeypatch)

    def saved(layers):
        model, found = GPT(arch | dict(vocab=64, positions=64, layers=layers)), {}
        own = {p.numel() for p in model.parameters()}  # autocast's copies of weights have these sizes

        def pack(x):
            if x.numel() not in own:
                found[x.untyped_storage().data_ptr()] = x
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model.features(torch.zeros(1, 61, dtype=torch.long))
        return sum(x.untyped_storage().nbytes() for x in found.values())

    layer = memory.bytes_per_token(arch, False) / (arch["layers"] + memory.BACKWARD)
    assert (saved(2) - saved(1)) / 61 == pytest.approx(layer, rel=0.03)


@pytest.mark.parametrize("arch", [QWEN3, OLMO2])
def test_normalized_queries_have_the_dtype_of_autocast(arch, monkeypatch):
    """Catches: Norms make them float32, so that shared keys are copied for each head on CUDA."""
    norms_as_on_cuda(monkeypatch)
    seen, attention = set(), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **options: seen.update(
        x.dtype for x in qkv) or attention(*qkv, **options))
    with torch.autocast("cpu", torch.bfloat16):
        GPT(arch | dict(vocab=64, positions=64, layers=1)).features(torch.zeros(1, 9, dtype=torch.long))
    assert seen == {torch.bfloat16}


def test_the_arithmetic_in_the_docstrings_is_right():
    assert memory.chunk_size(151_936, 80 * 10**9) == 2991 and "2,991 targets" in memory.chunk_size.__doc__
    assert memory.bytes_per_token(QWEN, False) == pytest.approx(24.4 * 59_136)
    assert memory.bytes_per_token(QWEN, True) == pytest.approx(24 * 4 * 896 + 1.4 * 59_136)
    assert "59,136" in memory.bytes_per_token.__doc__


class Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors in memory; `most` is the largest sum."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def add(self, x):
        storage = x.untyped_storage()
        if storage.nbytes() and storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata)
            self.most = max(self.most, sum(self.sizes.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x):
                self.add(x)
        return result


SMALL = QWEN | dict(width=256, heads=4, head_width=64, mlp=1024, layers=4, positions=256)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("accum, tokens, targets, vocab, recompute", [
    (1, 1024, 8, 2000, False), (1, 1024, 8, 2000, True), (1, 128, 8, 2000, False), (2, 128, 8, 2000, False),
    (1, 512, 512, 20_000, True)])
def test_the_sum_is_within_a_tenth_of_the_measured_peak(monkeypatch, rank, accum, tokens, targets, vocab,
                                                        recompute):
    """The bytes of all tensors in three steps, with autocast on the CPU, and norms as above."""
    norms_as_on_cuda(monkeypatch)
    model = GPT(SMALL | dict(vocab=vocab))
    source = copy.deepcopy(model).bfloat16().requires_grad_(False)
    if rank:
        lora.convert(model, rank, False)
        source = lora.Source(model)
        runs.place(model, CPU, torch.bfloat16, torch.bfloat16)
    model.recompute, autocast, peak = recompute, torch.autocast, Peak()
    for x in (*model.parameters(), *source.parameters()):
        peak.add(x)

    def fetch(i, generator):
        ids = torch.randint(0, vocab, (len(i), 128), generator=generator)
        return (ids, torch.arange(targets)), torch.randint(0, vocab, (targets,), generator=generator), None

    monkeypatch.setattr(torch, "autocast", lambda device, *dtype, enabled=True: autocast(
        "cpu", torch.bfloat16, enabled=bool(dtype) and not rank if device == "cuda" else enabled))
    with peak:
        prt.fit(model, lambda step: torch.arange(tokens // 128 * accum), fetch, steps=3, base=source,
                head=lambda model, x: model.head(x), chunk=max(8, targets // 2), accum=accum)
    found = memory.needs(model, None if rank else source, tokens, accum, max(8, targets // 2), recompute,
                         not rank)
    assert sum(found.values()) == pytest.approx(peak.most, rel=0.1), found


@pytest.mark.parametrize("name, longest, options, cells", TABLE)
def test_the_table_of_memory_has_what_is_chosen(gpu, monkeypatch, name, longest, options, cells):
    assert len(TABLE) == 18
    args = train_lm.parse(["--data", "gsm8k", *options.split()])
    model, source = on_meta(ARCHS[name]), on_meta(ARCHS[name]).requires_grad_(False)
    if args.lora:
        source = lora.convert(model, args.lora, False)  # None
    for cell, (size, n) in zip(cells.split(" | "), ((24, 1), (40, 1), (80, 1), (80, 8)), strict=True):
        gpu(1, size)  # free memory does not matter, so that a run does not depend on its neighbors
        monkeypatch.setattr(runs, "world_size", lambda n=n: n)
        monkeypatch.setattr(memory.dist, "all_reduce", lambda memory, operation: memory)
        with contextlib.nullcontext() if cell != "-" else pytest.raises(ValueError, match="does not fit"):
            accum, chunk = memory.choose(args, int(longest), model, source, CUDA)
            assert accum == int(cell) and chunk == args.chunk or not args.chunk


def test_a_model_that_is_too_large_is_refused_before_it_is_placed(gpu, monkeypatch):
    gpu(24, 40)
    model = on_meta(FALCON)
    args = SimpleNamespace(batch=128, recompute=True, chunk=512, accum=None, lora=None)
    with pytest.raises(ValueError, match="4096 tokens does not fit .*add --recompute.*torchrun"):
        memory.choose(args, 4096, model, model, CUDA)
    args.accum = 128
    assert memory.choose(args, 4096, model, model, CUDA) == (128, 512)  # who gives it, may try
    with pytest.raises(ValueError, match=r"cuda:0 has 24.0 GB free, and 26.7 are needed: .*torchrun"):
        runs.place(model, CUDA)
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    with pytest.raises(Exception, match="rocess group"):  # goes on, to the processes that are not there
        runs.place(model, CUDA)


OOM = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which "
       "1.02 GiB is free. Including non-PyTorch memory, this process has 78.00 GiB memory in use. Of the")


@pytest.mark.parametrize("command, module, name, words", [
    ((*TUNE_LM, "--steps", "1", "--out", "oom.pt"), prt, "fit", "raise --accum, add --recompute, .*torchrun"),
    ((*EVAL_LM, "--limit", "2"), prt, "generate", "lower --batch")])
def test_out_of_memory_is_one_line_with_a_remedy(in_texts, monkeypatch, capfd, command, module, name, words):
    def fail(*args, **options):
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(module, name, fail)
    code = call(*command)
    error = capfd.readouterr().err
    one_line(code, error, "Tried to allocate 2.00 GiB", "1.02 GiB is free:")
    assert re.search(words, error) and "non-PyTorch" not in error


def test_models_that_exceed_a_gpu_are_refused_before_they_are_moved(in_texts, monkeypatch, capfd, gpu):
    gpu(0.001, 80)
    monkeypatch.setattr(runs, "setup", lambda device: CUDA)
    one_line(call(*EVAL_LM, "--limit", "2"), capfd.readouterr().err, "cuda:0 has 0.0 GB free", "--base")


def test_a_process_holds_one_block_beside_its_share(monkeypatch):
    """Catches: All of a model is cast to float32, or moved, before its first block is spread."""
    model, whole = weights.load(FIXTURES / "llama2", dtype=torch.bfloat16), []

    def shard(part):  # frees what is spread: a process has a small share of it
        mine = [p for p in model.parameters() if p.dtype == torch.float32]
        assert {id(p) for p in mine} == {id(p) for p in part.parameters() if p.dtype == torch.float32}
        whole.append(len(mine))
        for p in mine:
            p.data = p.data.half()

    monkeypatch.setattr(runs, "world_size", lambda: 2)
    monkeypatch.setattr(runs, "DTensor", ())
    monkeypatch.setattr(processes, "sharding", lambda device: shard)
    runs.place(model.requires_grad_(False), CPU)
    assert whole[:3] == [9, 9, 9] and len(whole) == model.arch["layers"] + 1


@pytest.mark.parametrize("frozen", [True, False])
def test_a_trained_model_may_share_the_weights_of_a_file_or_of_another_one(tmp_path, frozen):
    """Catches: Training changes the source, which has the same weights, or the file that both come from."""
    path = shutil.copytree(FIXTURES / "llama2", tmp_path / "llama2") / "model.safetensors"
    before, source = path.read_bytes(), weights.load(tmp_path / "llama2", dtype=None)
    model = weights.build(source.info, source.arch, source.state_dict(), None).requires_grad_(not frozen)
    runs.place(model, CPU)
    for a, b in zip(model.parameters(), source.parameters()):
        assert (a.data_ptr() == b.data_ptr()) == (frozen and b.dtype == torch.float32)
        a.data.zero_()
    assert path.read_bytes() == before


def test_a_source_in_bfloat16_is_tuned_as_its_float32_copy(in_texts, tmp_path):
    """Catches: What most public files hold, bfloat16, is trained in bfloat16, or has another fingerprint."""
    old, paths = weights.load(OLD), {dtype: tmp_path / f"{dtype}.pt" for dtype in ("bfloat16", "float32")}
    for dtype, path in paths.items():
        rounded = {k: x.bfloat16().to(getattr(torch, dtype)) for k, x in old.state_dict().items()}
        files.save(path, old.info | dict(model=rounded))
        assert call(*TUNE_LM, "--source", path, "--steps", "2", "--out", tmp_path / f"{dtype}-tuned.pt") == 0
    tuned = [files.read(tmp_path / f"{dtype}-tuned.pt") for dtype in paths]
    assert tuned[0]["source_sha256"] == tuned[1]["source_sha256"]
    for name, x in tuned[0]["model"].items():
        assert x.dtype == torch.float32 and x.equal(tuned[1]["model"][name])


def test_an_image_tower_is_mapped_as_it_is_in_the_file(tmp_path):
    """Catches: A process holds a CLIP in float32 beside the file, or its text tower runs in float16."""
    content = files.read(FIXTURES / "openclip_bare/weights.pt")
    torch.save({k: x.half() for k, x in content.items()}, tmp_path / "half.pt")
    clip = weights.load(tmp_path / "half.pt", dtype=None)
    assert {p.dtype for p in clip.parameters()} == {torch.float16}
    prompts = helpers.expected("openclip_bare")["tokens"][:, None]
    model, whole = classifier(clip, prompts, CPU), classifier(weights.load(tmp_path / "half.pt"), prompts)
    assert model.head.equal(whole.head) and {p.dtype for p in model.parameters()} == {torch.float16}
    runs.place(model, CPU)
    assert all(a.equal(b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("batch, want", [(128, 16), (64, 8), (16, 2), (7, 1)])
def test_on_a_cpu_a_micro_batch_has_up_to_eight_examples(in_texts, monkeypatch, batch, want):
    monkeypatch.setattr(prt, "fit", fit := mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call("train_lm.py", "--data", "sums.jsonl", "--source", OLD, "--batch", batch, "--out", f"{batch}.pt")
    assert fit.call_args.kwargs["accum"] == want and fit.call_args.kwargs["chunk"] == 512


def test_weights_in_bfloat16_are_not_autocast_and_rope_is_cast_once():
    """Catches: The frozen source computes its norms in float32, or every layer casts the same tables."""
    model, ids, seen = weights.load(FIXTURES / "llama2"), torch.arange(3, 9)[None], []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(
            [torch.is_autocast_enabled("cpu"), *(x.dtype for x in inputs[1])]))
    plain = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids)
        frozen = model.bfloat16()
        inside = frozen(ids)
    assert torch.equal(inside, frozen(ids)) and inside.dtype == torch.bfloat16
    assert (plain - rounded).abs().max() > 0
    n = len(model.layers)
    in_bfloat16 = [False, torch.bfloat16, torch.bfloat16]
    assert seen[:2 * n] == [[False] + [torch.float32] * 2] * n + [[True, *in_bfloat16[1:]]] * n
    assert seen[2 * n:] == [in_bfloat16] * 2 * n

