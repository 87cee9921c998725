"""Speed and memory as ratios, both sides of each measured in this one process, alternately, the median of
several.

python tests/bench.py                                     ViT-B-16 at 224 pixels, random weights
python tests/bench.py --batch 128 --json bench.json       on a GPU

Where open_clip or transformers is installed, the image tower's forward is compared with theirs on the same
weights.
"""
import argparse
import contextlib
import copy
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluation  # noqa: E402
import prt  # noqa: E402
from data import images  # noqa: E402
from models.clip import CLIP, Classifier, normalize  # noqa: E402

TEXT = dict(embed_dim=512, text_width=512, text_layers=12, text_heads=8, context=77, vocab=49408,
            quick_gelu=False, mean=[0.5] * 3, std=[0.5] * 3)
ARCHS = {"ViT-B-16": TEXT | dict(image_size=224, width=768, layers=12, patch=16, heads=12),
         "ViT-L-14": TEXT | dict(embed_dim=768, image_size=224, width=1024, layers=24, patch=14, heads=16),
         "RN50": TEXT | dict(embed_dim=1024, image_size=224, width=64, layers=[3, 4, 6, 3], heads=32)}


def alternate(device, repeats, *functions):
    """Median seconds of each function; one call of each does not count, then they take turns."""
    seconds = [[] for _ in functions]
    for i in range(repeats + 1):
        for clock, function in zip(seconds, functions):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter() - start)
    return [statistics.median(clock[1:]) for clock in seconds]


def trainer(args, device, mode):
    """A function that runs args.steps of `mode`: ft, prt, ft-augment or prt-augment, with the base that it
    needs."""
    arch = ARCHS[args.model]
    torch.manual_seed(args.seed)
    size, head = arch["image_size"], torch.nn.functional.normalize(torch.randn(100, arch["embed_dim"]))
    policy = Classifier(arch, head).eval().to(device)
    pixels = torch.randint(0, 256, (2 * args.batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 100, (len(pixels),), device=device)
    cached = prt.predict(policy, pixels, args.batch) if mode == "prt" else None
    base = copy.deepcopy(policy).requires_grad_(False) if mode == "prt-augment" else None

    def fetch(i, generator):
        i = i.to(device, non_blocking=True)
        x = images.augment(pixels[i], generator) if mode.endswith("augment") else pixels[i]
        return (x,), labels[i], None if cached is None else cached[i]

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            prt.fit(policy, lambda step: prt.shuffled(step, len(pixels), args.batch, 0), fetch, base=base,
                    steps=args.steps, log_every=args.steps)
    return run


def step_times(args, device):
    """Step time of reward tuning over that of plain fine-tuning, which asks no base at all."""
    found = {}
    for key, view in (("image_step_prt_vs_ft", ""), ("image_step_augment_prt_vs_ft", "-augment")):
        runs = [trainer(args, device, method + view) for method in ("ft", "prt")]
        ft, reward = (seconds / args.steps for seconds in alternate(device, args.repeats, *runs))
        print(f"{args.model} step{view}, batch {args.batch}: ft {ft:.3f} s, prt {reward:.3f} s")
        found[key] = reward / ft
    return found


def peaks(args):
    """Peak memory of tuning over (fine-tuning's + the base's weights), each in a process of its own."""
    mib = {}
    for mode in ("ft", "prt", "prt-augment"):
        command = [sys.executable, __file__, "--peak", mode, "--model", args.model]
        command += ["--batch", str(args.batch), "--steps", str(args.steps)]
        command += ["--device", args.device] if args.device else []
        mib[mode] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = sum(p.nbytes for p in Classifier(ARCHS[args.model], torch.zeros(1)).parameters()) / 2**20
    print(f"{args.model} peak MiB, batch {args.batch}: ft {mib['ft']:.0f}, base's weights {weights:.0f}, prt "
          f"{mib['prt']:.0f}, prt-augment {mib['prt-augment']:.0f}")
    return dict(image_memory_prt_vs_ft_plus_base=mib["prt"] / (mib["ft"] + weights),
                image_memory_augment_prt_vs_ft_plus_base=mib["prt-augment"] / (mib["ft"] + weights))


def peak(args, device):
    """What one mode adds to the memory of this process at its peak, in MiB."""
    return evaluation.measure([], lambda: trainer(args, device, args.peak)(), device, repeats=0)[1]


def forward(args, device):
    """The image tower's forward against open_clip's and transformers', ours over theirs in images per
    second."""
    arch, found = ARCHS[args.model], {}
    torch.manual_seed(args.seed)
    ours = CLIP(arch).eval().to(device)
    x = normalize(torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device), arch)
    for name, build in (("open_clip", open_clip_tower), ("transformers", transformers_tower)):
        try:
            theirs = build(arch, ours.state_dict()).eval().to(device)
        except ImportError:
            print(f"{name} is not installed: not compared")
            continue
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            difference = (ours.encode_image(x) - theirs(x)).abs().max().item()
            a, b = alternate(device, args.repeats, lambda: ours.encode_image(x), lambda: theirs(x))
        print(f"{args.model} forward, batch {args.batch}: {len(x) / a:.2f} images/s, {name} {len(x) / b:.2f} "
              f"(largest difference of the features {difference:.1e})")
        found[f"image_vs_{name}"] = b / a
    return found


def open_clip_tower(arch, tensors):
    from open_clip.model import CLIP as Peer, CLIPTextCfg, CLIPVisionCfg

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
        if "in_proj_" in name:  # one matrix for the three projections here, three there
            for letter, part in zip("qkv", tensor.chunk(3)):
                mapped[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
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


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=ARCHS, default="ViT-B-16")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=2, help="training steps in one measurement")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device")
    p.add_argument("--json", help="write the ratios to this file")
    p.add_argument("--peak", choices=("ft", "prt", "prt-augment"), help="print one mode's peak MiB and end")
    args = p.parse_args()
    device = prt.setup(args.device)
    if args.peak:
        sys.exit(print(peak(args, device)))
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {'bfloat16' if cuda else 'float32'}, torch {torch.__version__}, seed {args.seed}")
    ratios = forward(args, device) | step_times(args, device) | peaks(args)
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=1))
