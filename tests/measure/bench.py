"""Speed and memory as ratios: both sides are measured in one process, in turns, and medians are compared.

python tests/measure/bench.py                                   GPT-2 and ViT-B-16, random weights
python tests/measure/bench.py --only speculative --reward s/reward.pt --base s/large.pt --source s/small.pt
python tests/measure/bench.py --only decode --text small --compile
python tests/measure/bench.py --image ViT-L-14 --text qwen2.5-1.5b --batch 128 --json bench.json    on a GPU
python tests/measure/bench.py --only decode text_forward --text qwen2.5-7b                          on a GPU

If open_clip or transformers is installed, their models are compared with ours on the same weights. A ratio
that could not be measured is left out.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import prt
from data import image_files, images, text
from data.tokenizer import Tokenizer
from models import decode as decoding
from models import gpt, memory, pretrain, runs, scores, tickets, weights
from models.clip import CLIP, Classifier, Preprocess, image_tower
from models.gpt import GPT

PROC = Path("/proc/self")
TICKET = dict(kind="random", keep=0.5, freeze=0.0, seed=0)
TOWER = dict(embed_dim=512, text_width=512, text_layers=12, text_heads=8, context=77, vocab=49408,
             quick_gelu=False, mean=[0.5] * 3, std=[0.5] * 3)
IMAGES = {"tiny": pretrain.TINY,
          "ViT-B-16": TOWER | dict(image_size=224, width=768, layers=12, patch=16, heads=12),
          "ViT-L-14": TOWER | dict(embed_dim=768, image_size=224, width=1024, layers=24, patch=14, heads=16),
          "RN50": TOWER | dict(embed_dim=1024, image_size=224, width=64, layers=[3, 4, 6, 3], heads=32)}


def gpt2(width, layers, heads):
    return dict(vocab=50257, width=width, layers=layers, heads=heads, kv_heads=heads, tied=True, rope=None,
                head_width=width // heads, mlp=4 * width, positions=1024, eps=1e-5, end=50256,
                layer_norm=True, gated_mlp=False, qkv_bias=True, bias=True)


def qwen2(width, layers, heads, kv_heads, mlp, vocab, tied):
    return dict(vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads, tied=tied,
                head_width=width // heads, mlp=mlp, positions=32768, eps=1e-6, rope=dict(theta=1e6),
                end=151643, layer_norm=False, gated_mlp=True, qkv_bias=True, bias=False)


TEXTS = {"tiny": pretrain.OLD | dict(vocab=550, end=549),
         "gpt2": gpt2(768, 12, 12), "gpt2-xl": gpt2(1600, 48, 25), "small": gpt2(256, 6, 4),
         "qwen2.5-0.5b": qwen2(896, 24, 14, 2, 4864, 151936, True),
         "qwen2.5-1.5b": qwen2(1536, 28, 12, 2, 8960, 151936, True),
         "qwen2.5-7b": qwen2(3584, 28, 28, 4, 18944, 152064, False)}


def conditions(device, seed):
    """Returns in words where the numbers come from."""
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (f"{where}, {'bfloat16' if cuda else 'float32'}, torch {torch.__version__}, "
            f"commit {git.stdout.strip() or 'unknown'}, seed {seed}")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(device, repeats, *functions):
    """Returns the median seconds of each function. They take turns, and the first turn does not count."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for clock, function in zip(seconds, functions):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            clock.append(time.perf_counter() - start)
    return [statistics.median(clock[1:]) for clock in seconds]


def bandwidth(device):
    """Bytes a second that a sum over 512 MiB reads: no token can come sooner than the weights are read."""
    x = torch.ones(2**27, device=device)
    return x.nbytes / alternate(device, 5, x.sum)[0]


def arithmetic(device):
    """Floating-point operations a second of a large matrix product, in the dtype of training."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=runs.frozen_dtype(device))
    return 2 * n**3 / alternate(device, 5, lambda: x @ x)[0]


def operations(function):
    """Floating-point operations of the matrix products in function()."""
    # The counter of fused attention knows no shared keys, but that of plain matrix products does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def attention_kernels(function):
    """Returns the names of the kernels of scaled_dot_product_attention that function() runs, sorted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    return sorted(n for n in names if n.startswith("_scaled_dot_product_") and not n.endswith("_backward"))


# Images

fused_adamw = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0, fused=True)
plain_adamw = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)


def image_trainer(args, device, mode, make_optimizer=fused_adamw, compile=False, **options):
    """Returns a function that runs args.steps steps; mode: ft, prt, ft-augment, prt-augment, or ticket."""
    arch = IMAGES[args.image]
    torch.manual_seed(args.seed)
    size, head = arch["image_size"], torch.nn.functional.normalize(torch.randn(100, arch["embed_dim"]))
    model = Classifier(arch, image_tower(arch), head).eval().to(device)
    pixels = torch.randint(0, 256, (2 * args.batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 100, (len(pixels),), device=device)
    cached = scores.predict(model, pixels, args.batch) if mode in ("prt", "ticket") else None
    base = copy.deepcopy(model).requires_grad_(False) if mode == "prt-augment" else None
    if mode == "ticket":
        tickets.convert(model, TICKET)
    runs.place(model, device, compile=compile)

    def fetch(i, generator):
        i = i.to(device, non_blocking=True)
        x = images.augment(pixels[i], generator) if mode.endswith("augment") else pixels[i]
        return (x,), labels[i], None if cached is None else cached[i]

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            prt.fit(model, lambda step: runs.shuffled(step, len(pixels), args.batch, 0), fetch, base=base,
                    steps=args.steps, log_every=args.steps, optimizer=make_optimizer(model.parameters()),
                    **options)
    return run


def image_step(args, device):
    """Step time of reward tuning over that of plain fine-tuning, which needs no base at all."""
    ratios = {}
    for key, view in (("image_step_prt_vs_ft", ""), ("image_step_augment_prt_vs_ft", "-augment")):
        work = [image_trainer(args, device, method + view) for method in ("ft", "prt")]
        ft, reward = (seconds / args.steps for seconds in alternate(device, args.repeats, *work))
        done = operations(work[0]) / args.steps / ft / arithmetic(device)
        print(f"{args.image} step{view}, batch {args.batch}: ft {ft:.3f} s ({done:.0%} of the speed of a "
              f"large matrix product), prt {reward:.3f} s")
        ratios[key] = reward / ft
    return ratios


def image_memory(args, device):
    """Peak memory of tuning over (fine-tuning's + the base's weights), each in a process of its own."""
    mib = {}
    for mode in ("ft", "prt", "prt-augment", "ticket"):
        command = [sys.executable, __file__, "--peak", mode, "--image", args.image]
        command += ["--batch", str(args.batch), "--steps", str(args.steps)]
        command += ["--device", args.device] if args.device else []
        mib[mode] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    base = sum(p.nbytes for p in image_tower(IMAGES[args.image]).parameters()) / 2**20
    print(f"{args.image} peak MiB, batch {args.batch}: ft {mib['ft']:.0f}, base's weights {base:.0f}, prt "
          f"{mib['prt']:.0f}, prt-augment {mib['prt-augment']:.0f}, ticket {mib['ticket']:.0f}")
    return dict(image_memory_ticket_vs_prt=mib["ticket"] / mib["prt"],
                image_memory_prt_vs_ft_plus_base=mib["prt"] / (mib["ft"] + base),
                image_memory_augment_prt_vs_ft_plus_base=mib["prt-augment"] / (mib["ft"] + base))


def peak(args, device):
    """Returns what one mode adds to the memory of this process at its peak, in MiB."""
    return added_memory(lambda: image_trainer(args, device, args.peak)(), device)


def added_memory(work, device):
    """Returns how many MiB work() adds at its peak: allocated on CUDA, else to this process.

    Without CUDA, only Linux tells the peak. Elsewhere the result is nan.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # free pages that are still mapped would hide the peak
        (PROC / "clear_refs").write_text("5")  # resets the peak of the resident set
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(key):
    """Returns VmRSS or VmHWM, the resident set now or at its peak, in MiB, or nan without Linux's /proc."""
    try:
        return int((PROC / "status").read_text().split(key + ":")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return math.nan


def image_forward(args, device):
    """Images per second of the image tower's forward, ours over open_clip's and transformers'."""
    arch, ratios = IMAGES[args.image], {}
    torch.manual_seed(args.seed)
    ours = CLIP(arch).eval().to(device)
    x = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    x = Preprocess(arch).to(device)(x)
    for name, build in (("open_clip", open_clip_tower), ("transformers", transformers_tower)):
        try:
            theirs = build(arch, ours.state_dict()).eval().to(device)
        except ImportError:
            print(f"{name} is not installed: not compared")
            continue
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            difference = (ours.visual(x) - theirs(x)).abs().max().item()
            a, b = alternate(device, args.repeats, lambda: ours.visual(x), functools.partial(theirs, x))
        print(f"{args.image} forward, batch {args.batch}: {len(x) / a:.2f} images/s, {name} {len(x) / b:.2f} "
              f"(largest difference of the features {difference:.1e})")
        ratios[f"image_vs_{name}"] = b / a
    return ratios


def open_clip_tower(arch, tensors):
    from open_clip.model import CLIP as Peer
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=arch["layers"], width=arch["width"], patch_size=arch.get("patch"),
                           image_size=224)
    peer = Peer(arch["embed_dim"], vision, CLIPTextCfg(width=512, heads=8, layers=12))
    peer.load_state_dict(tensors)
    return peer.visual


def transformers_tower(arch, tensors):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if isinstance(arch["layers"], list):
        raise ImportError("transformers has no ModifiedResNet")
    width = arch["width"]
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, hidden_act="gelu",
                              num_hidden_layers=arch["layers"], num_attention_heads=arch["heads"],
                              image_size=224, patch_size=arch["patch"], projection_dim=arch["embed_dim"])
    peer, mapped = CLIPVisionModelWithProjection(config), {}
    names = {"conv1.weight": "embeddings.patch_embedding.weight",
             "class_embedding": "embeddings.class_embedding",
             "positional_embedding": "embeddings.position_embedding.weight"}
    parts = (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_1", "layer_norm1"),
             ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
             ("transformer.resblocks", "encoder.layers"), ("attn.out_proj", "self_attn.out_proj"))
    for name, tensor in tensors.items():
        if not name.startswith("visual."):
            continue
        name = name.removeprefix("visual.")
        if name == "proj":
            mapped["visual_projection.weight"] = tensor.T
            continue
        name = names.get(name, name)
        for old, new in parts:
            name = name.replace(old, new)
        name = "vision_model." + name
        if "in_proj." in name:  # one matrix for the three projections here, three there
            for letter, part in zip("qkv", tensor.chunk(3)):
                mapped[name.replace("attn.in_proj.", f"self_attn.{letter}_proj.")] = part
        else:
            mapped[name] = tensor
    missing, left_over = peer.load_state_dict(mapped, strict=False)
    if left_over or any("position_ids" not in name for name in missing):
        raise ValueError(f"transformers' tower: missing {missing}, left over {left_over}")

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, x):
            return self.peer(pixel_values=x).image_embeds

    return Features()


def image_readers(args, device):
    """Time to read 200 photographs of 500 x 375 pixels by one thread over that by two: a folder and a tar."""
    with tempfile.TemporaryDirectory() as name:
        root, rng = Path(name), np.random.default_rng(args.seed)
        for part in ("train/photo", "test"):
            (root / part).mkdir(parents=True)
        with tarfile.open(root / "test/0.tar", "w") as tar:
            (root / "0.cls").write_text("0")
            for i in range(200):
                coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC))
                pixels = pixels + rng.normal(0, 8, (375, 500, 1))
                photo = root / f"train/photo/{i}.jpg"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(photo, quality=90)
                tar.add(photo, photo.name)
                tar.add(root / "0.cls", f"{i}.cls")
        for file, content in {"classnames.txt": "photo", "zeroshot_classification_templates.txt": "a {c}.",
                              "test/nshards.txt": "1"}.items():
            (root / file).write_text(content)
        readers = dict(folder=lambda: image_files.folder(root, "train"),
                       tar=lambda: image_files.webdataset(lambda file: root / file, "test"))

        def run(reader, threads):
            with mock.patch("data.images.THREADS", threads):
                images.pack("bench", "train", 224, *reader())

        ratios = {}
        for kind, reader in readers.items():
            one, two = alternate(device, args.repeats, functools.partial(run, reader, 1),
                                 functools.partial(run, reader, 2))
            print(f"{kind} of photographs: {200 / one:.0f} images/s with one thread, {200 / two:.0f} with "
                  "two")
            ratios[f"image_reader_{kind}_threads"] = one / two
    return ratios


# Text

def text_model(name, device, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(TEXTS[name] | changes).eval().requires_grad_(False).to(device)
    return cast(model, dtype)


def cast(model, dtype):
    """The weights alone: RoPE's angles stay in float32, as models/weights.py leaves them."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def transformers_text(ours):
    """Returns the model of transformers with this architecture, and copies its weights into ours."""
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    a, p = ours.arch, next(ours.parameters())
    if a["rope"] is None:
        config = GPT2Config(n_embd=a["width"], n_layer=a["layers"], n_head=a["heads"])
    else:
        config = Qwen2Config(hidden_size=a["width"], num_hidden_layers=a["layers"], vocab_size=a["vocab"],
                             num_attention_heads=a["heads"], num_key_value_heads=a["kv_heads"],
                             intermediate_size=a["mlp"], tie_word_embeddings=a["tied"],
                             rope_parameters=dict(rope_type="default", rope_theta=a["rope"]["theta"]))
    with torch.device(p.device):
        peer = AutoModelForCausalLM.from_config(config, dtype=p.dtype).eval().requires_grad_(False)
    ours.load_state_dict(gpt.renamed(peer.state_dict(), a))
    ids = torch.arange(5, 37, device=p.device)[None]
    print(f"largest difference of the logits {(ours(ids) - peer(ids).logits).abs().max().item():.1e}")
    return peer


def peer_of(ours):
    try:
        return transformers_text(ours)
    except ImportError:
        print("transformers is not installed: not compared")


def generated(peer, ids, n):
    """Returns a function: greedy generation of n tokens in transformers."""
    return lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                 do_sample=False, pad_token_id=0)


def decode(args, device):
    """Tokens a second of one row: base, base + reward, EFT, of random weights, and transformers'."""
    ratios, dtype, n = {}, runs.frozen_dtype(device), args.tokens
    generate = decoding.compiled if args.compile else prt.generate
    ids = torch.randint(0, 500, (1, 16), device=device, generator=torch.Generator(device).manual_seed(0))
    read = bandwidth(device)
    print(f"memory: {read / 1e9:.1f} GB/s")
    for name in dict.fromkeys((args.text, "small")):
        base = text_model(name, device, dtype)
        reward = text_model("small", device, dtype, vocab=base.arch["vocab"])
        rows = {"base": (base, [])}
        if name != "small":
            rows |= {"reward": (reward, []), "base + reward": (base, [(1.0, reward)]),
                     "base + EFT": (base, [(1.0, reward), (-1.0, copy.deepcopy(reward))])}
            if dtype == torch.float32:
                rows["base in bfloat16"] = cast(copy.deepcopy(base), torch.bfloat16), []
        peer = peer_of(base)
        work = {label: lambda base=base, rewards=rewards: generate(base, rewards, ids, length=n)
                for label, (base, rewards) in rows.items()}
        if peer:
            work["transformers"] = generated(peer, ids, n)
        seconds = dict(zip(work, alternate(device, args.repeats, *work.values())))
        for label, taken in seconds.items():
            models = [rows["base"][0]] if label == "transformers" else [m for m in (
                rows[label][0], *(m for _, m in rows[label][1]))]
            size = sum(p.nbytes for m in models for k, p in m.named_parameters()
                       if "embed" not in k or k == "embed_tokens.weight" and m.arch["tied"])
            mib = sum(t.nbytes for m in set(models) for t in (*m.parameters(), *m.buffers())) / 2**20
            mib += added_memory(work[label], device)
            print(f"{name} decode, {label}: {n / taken:.1f} tokens/s, {n * size / read / taken:.0%} of what "
                  f"the memory allows, {mib:.0f} MiB")
        key = "decode_small" if name == "small" else "decode"
        if peer:
            ratios[f"{key}_vs_transformers"] = seconds["transformers"] / seconds["base"]
        if name != "small":
            ratios["prt_vs_sum"] = seconds["base + reward"] / (seconds["base"] + seconds["reward"])
        if "base in bfloat16" in seconds:
            ratios["decode_bf16_vs_float32"] = seconds["base"] / seconds["base in bfloat16"]
    return ratios


def speculative(args, device):
    """Tokens a second of trained models on the reward's own test prompts, one at a time, greedily.

    The base alone makes as many tokens as the answers of base + reward have. With --source, the reward drafts
    alone and with its source.
    """
    if not (args.reward and args.base):
        print("speculative decoding is not measured without trained models: --reward, --base")
        return {}
    given = dict(reward=args.reward, base=args.base, tuned=args.tuned_source, source=args.source)
    models = {k: weights.load(path, dtype=runs.frozen_dtype(device)).to(device).requires_grad_(False)
              for k, path in given.items() if path}
    tokenizer = gpt.same_vocabulary(models)
    base, reward, end = models["base"], models["reward"], models["reward"].arch["end"]
    examples = text.load(reward.info["data"], "test")[1][:args.prompts]
    prompts = [torch.tensor(text.token_ids(parts[:-1], tokenizer, end)[0], device=device)[None]
               for _, parts in examples]
    longest = min(m.arch["positions"] for m in models.values()) - max(ids.shape[1] for ids in prompts)

    plain = decoding.compiled if args.compile else prt.generate
    fast = functools.partial(decoding.speculative, compile=args.compile)

    def run(base, rewards, lengths, generate=plain, **options):
        return lambda: [generate(base, rewards, ids, length=n, **options) for ids, n in zip(prompts, lengths)]

    methods = dict(prt=[(1.0, reward)])
    if args.tuned_source and args.source:
        methods["eft"] = [(1.0, models["tuned"]), (-1.0, models["source"])]
    size = [sum(p.numel() for p in m.parameters()) for m in (base, reward)]
    print(f"{args.base} has {size[0] / size[1]:.1f} times the weights of {args.reward}")
    ratios = {}
    for name, rewards in methods.items():
        answers = run(base, rewards, [min(args.tokens, longest)] * len(prompts), end=end)()
        answers = [out[0, ids.shape[1]:].tolist() for ids, out in zip(prompts, answers)]
        lengths = [answer.index(end) + 1 if end in answer else len(answer) for answer in answers]
        plain_label, label = f"base + {name}", f"base + {name}, speculative"
        drafters = {label: ("speculative" if name == "prt" else "speculative_eft", None)}
        if name == "prt" and args.source:
            drafters[f"{label}, reward + source"] = "speculative_source", (models["source"], rewards)
        work = {"base alone": run(base, [], lengths), plain_label: run(base, rewards, lengths)}
        expected = work[plain_label]()
        for label, (_, drafter) in drafters.items():
            work[label] = run(base, rewards, lengths, fast, drafter=drafter)
            with mock.patch("models.decode.accept", wraps=decoding.accept) as passes:
                same = statistics.mean(map(torch.equal, expected, work[label]()))  # rounding may decide
            print(f"{label}: {sum(lengths) / passes.call_count:.2f} tokens a pass of the base; "
                  f"{same:.0%} of the answers are those of plain decoding, token by token")
        seconds = dict(zip(work, alternate(device, args.repeats, *work.values())))
        for label, taken in seconds.items():
            print(f"{label}: {sum(lengths) / taken:.1f} tokens/s")
        for label, (key, _) in drafters.items():
            ratios |= {f"{key}_vs_base": seconds["base alone"] / seconds[label],
                       f"{key}_vs_{name}": seconds[plain_label] / seconds[label]}
    return ratios


def text_forward(args, device):
    """Logits of all positions of 4 texts of 128 tokens, ours over transformers' in tokens per second."""
    ours = text_model(args.text, device, runs.frozen_dtype(device))
    ids, peer = torch.randint(0, 500, (4, 128), device=device), peer_of(ours)
    if not peer:
        return {}
    with torch.no_grad():
        a, b = alternate(device, args.repeats, lambda: ours(ids), lambda: peer(ids, use_cache=False).logits)
    print(f"{args.text} forward: {ids.numel() / a:.1f} tokens/s, transformers {ids.numel() / b:.1f}")
    return dict(text_forward_vs_transformers=b / a)


def text_trainer(args, device, method, make_optimizer=fused_adamw, compile=False, **options):
    """Returns a function that runs args.steps steps on args.texts texts; method: ft, prt, or ticket.

    It returns the history of prt.fit.
    """
    model, frozen = text_model(args.text, device).requires_grad_(True), runs.frozen_dtype(device)
    base = text_model(args.text, device, frozen) if method != "ft" else None
    if method == "ticket":
        tickets.convert(model, TICKET)
    runs.place(model, device, compile=compile)
    if base:
        runs.place(base, device, frozen, frozen, compile)
    ids = torch.randint(0, model.arch["vocab"], (args.texts, args.length + 1), device=device)
    index = torch.arange(ids[:, 1:].numel(), device=device)

    def fetch(i, generator):  # any texts will do
        x = ids[:len(i)]
        return (x[:, :-1], index[:len(i) * args.length]), x[:, 1:].flatten(), None

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            return prt.fit(model, lambda step: torch.arange(args.texts), fetch, base=base,
                           method="ft" if method == "ft" else "prt", steps=args.steps, log_every=10**9,
                           head=GPT.head, optimizer=make_optimizer(model.parameters()), **options)
    return run


def step_times(args, device, **options):
    """Returns the median seconds of a step of a text reward, and those until the host has launched it."""
    gc.collect()  # the first optimizer imports torch._dynamo, in a cycle that keeps the model, and its memory
    launched, ended = [], []

    def stop():  # prt.fit calls it at the end of a step, and does not wait for the device before
        launched.append(time.perf_counter())
        synchronize(device)
        ended.append(time.perf_counter())

    text_trainer(args, device, "prt", stop=stop, **options)()
    return [statistics.median(b - a for a, b in zip(ended, ends[1:])) for ends in (ended, launched)]


def expected_memory(args, accum, chunk):
    """Returns the bytes that models/memory.py counts for a step of a text reward, in one process."""
    model, source = (text_model(args.text, torch.device("meta")) for _ in range(2))
    tokens = args.texts // accum * args.length
    return sum(memory.needs(model, source.requires_grad_(False), tokens, accum, chunk, False).values())


def text_step(args, device):
    """Step time of reward tuning over that of plain fine-tuning, which needs no base at all."""
    work = [text_trainer(args, device, method) for method in ("ft", "prt")]
    ft, reward = (seconds / args.steps for seconds in alternate(device, args.repeats, *work))
    done = operations(work[0]) / args.steps / ft / arithmetic(device)
    print(f"{args.text} step, {args.texts} texts of {args.length} tokens: ft {ft:.3f} s ({done:.0%} of the "
          f"speed of a large matrix product), prt {reward:.3f} s")
    return dict(text_step_prt_vs_ft=reward / ft)


def ticket_step(args, device):
    """Step time of training a ticket over that of training a full reward, on images and on text."""
    ratios = {}
    for part, name, trainer in (("image", args.image, image_trainer), ("text", args.text, text_trainer)):
        work = [trainer(args, device, mode) for mode in ("prt", "ticket")]
        full, ticket = (seconds / args.steps for seconds in alternate(device, args.repeats, *work))
        print(f"{part} {name} step: full reward {full:.3f} s, ticket {ticket:.3f} s")
        ratios[f"{part}_step_ticket_vs_prt"] = ticket / full
    return ratios


def padding(data, parts):
    """Returns the fraction of padding in [0, 1] of the micro-batches `parts` (tensors of indices)."""
    lengths = [torch.tensor([len(data.ids[k]) for k in part.tolist()]) for part in parts]
    return 1 - sum(int(n.sum()) for n in lengths) / sum(int(n.max()) * len(n) for n in lengths)


def training(args, device):
    """What `fit` and its flags are worth: a step's time with one thing changed over that of a step as it is.

    Of the text batches, the share of padding with and without grouping by length.
    """
    text_runs = {"": text_trainer(args, device, "prt"),
                 "text_step_compile": text_trainer(args, device, "prt", compile=True),
                 "text_step_logits_at_once": text_trainer(args, device, "prt", chunk=10**9),
                 "text_step_not_fused": text_trainer(args, device, "prt", plain_adamw)}
    image_runs = {"": image_trainer(args, device, "prt"),
                  "image_step_compile": image_trainer(args, device, "prt", compile=True),
                  "image_step_not_fused": image_trainer(args, device, "prt", plain_adamw)}
    ratios = {}
    for trainers in (text_runs, image_runs):
        plain, *others = alternate(device, args.repeats, *trainers.values())
        ratios |= {name: seconds / plain for name, seconds in zip(list(trainers)[1:], others)}
    tokenizer = Tokenizer(pretrain.TOKENIZER.read_text(), "the embedded tokenizer")
    data = text.encode(text.load("gsm8k", "train")[1], tokenizer, tokenizer.size - 1, 1024)
    shuffled = functools.partial(runs.shuffled, n=len(data.ids), batch=128, seed=0)
    lengths = [len(ids) for ids in data.ids]
    orders = dict(grouped=text.group_by_length(shuffled, lengths, 128, 50, 0), shuffled=shuffled)
    for name, indices in orders.items():
        parts = [part for step in range(50) for part in indices(step).chunk(16)]
        ratios[f"text_padding_{name}"] = padding(data, parts)
    return ratios


def tokenizers(args, device):
    """Tokens a second that data/text.py makes of GSM8K by SentencePiece's BPE, over those of byte-level BPE.

    Both tokenizers are the tests' small ones: SentencePiece's with 800 pieces, Llama 3's with 1,500 tokens.
    """
    _, examples = text.load("gsm8k", "train")
    folder, rates = Path(__file__).parents[1] / "fixtures", {}
    for name in ("llama2", "llama3"):
        file = folder / f"{name}_tokenizer/tokenizer.json"
        encoded = functools.partial(text.encode, examples, Tokenizer(file.read_text(), file), 2, 10**6)
        seconds, = alternate(device, args.repeats, encoded)
        rates[name] = sum(map(len, encoded().ids)) / seconds
    print(f"tokens/s: SentencePiece's BPE {rates['llama2']:.0f}, byte-level BPE {rates['llama3']:.0f}")
    return dict(tokenizer_sentencepiece=rates["llama2"] / rates["llama3"])


PARTS = {f.__name__: f for f in (decode, speculative, text_step, text_forward, tokenizers, image_step,
                                 image_forward, image_memory, ticket_step, image_readers, training)}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--image", choices=IMAGES, default="ViT-B-16")
    p.add_argument("--text", choices=TEXTS, default="gpt2")
    p.add_argument("--reward", help="of the part `speculative`: a trained reward on text")
    p.add_argument("--base", help="and the base to put it on")
    p.add_argument("--tuned-source", help="and for EFT the source fine-tuned")
    p.add_argument("--source", help="and the source, which drafts with the reward")
    p.add_argument("--batch", type=int, default=8, help="images in a step or a pass")
    p.add_argument("--texts", type=int, default=8, help="to train on in a step")
    p.add_argument("--length", type=int, default=64, help="of these texts")
    p.add_argument("--tokens", type=int, default=64, help="to generate")
    p.add_argument("--prompts", type=int, default=32, help="of the part `speculative`")
    p.add_argument("--steps", type=int, default=2, help="training steps in one measurement")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="our decoding with torch.compile")
    p.add_argument("--threads", type=int, help="of the CPU")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device")
    p.add_argument("--json", help="write the ratios to this file")
    p.add_argument("--peak", choices=("ft", "prt", "prt-augment", "ticket"), help=argparse.SUPPRESS)
    args = p.parse_args()
    device = runs.setup(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.peak:
        sys.exit(print(peak(args, device)))
    print(conditions(device, args.seed))
    if device.type == "cpu":
        print("no GPU: nothing is measured on one")
    ratios = {}
    for name in args.only:
        ratios |= PARTS[name](args, device)
    ratios = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=1))
