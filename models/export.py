"""Writes a reward in a layout that other programs read, to share it.

python -m models.export out/gsm8k-prt.pt DIR                  text: Hugging Face's layout
python -m models.export out/cifar100-prt.pt DIR               images: OpenCLIP's layout
python -m models.export out/lora.pt DIR --table table.json    with the table that eval.py --json wrote

The folder holds a whole network, also that of a ticket or of low-rank changes; for images it is the source's
CLIP with the reward's image tower. What makes it a reward is under "prt" in its config: `--reward DIR` works
as with the file, and other programs load the network as any other. Refused are GPT-2's architecture, and
image towers other than ViTs whose source is a single file, and networks of your own.
"""
import json
import tempfile
from pathlib import Path

import torch

from data import files, hub, schema
from models import flags, gpt, runs, weights

# model_type -> class in transformers, and what tells the architecture; the first that fits counts.
FAMILIES = dict(
    olmo2=("Olmo2ForCausalLM", dict(norms="after")), qwen3=("Qwen3ForCausalLM", dict(qk_norm="head")),
    qwen2=("Qwen2ForCausalLM", dict(qkv_bias=True)), llama=("LlamaForCausalLM", {}))
# Entries of a checkpoint that make a network a reward.
ENTRIES = ("method", "beta", "source", "source_sha256", "data", "template", "chat", "classes", "templates")
CARD = Path(__file__).with_name("card.md")


def write_gpt(folder, reward, tokenizer):
    """Writes a reward for text in Hugging Face's layout; tokenizer: the text of its tokenizer.json."""
    tensors = {}
    for name, x in reward.state_dict().items():
        for theirs, ours in gpt.AFTER.items():
            name = name.replace(ours, theirs)
        tensors[name if name.startswith("lm_head") else f"model.{name}"] = x
    write(folder, "model", tensors, "config", gpt_config(reward.arch), reward.info)
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
    if chat := reward.info.get("chat"):
        config = chat["tokens"] | dict(chat_template=chat["template"])
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def gpt_config(arch):
    """Returns the config.json of a GPT's architecture. Raises ValueError for GPT-2's."""
    if arch["layer_norm"]:
        raise ValueError("GPT-2's architecture cannot be exported, only Llama's and its relatives'")
    family, name = next((k, name) for k, (name, kind) in FAMILIES.items() if kind.items() <= arch.items())
    config = {}
    if layers := arch.get("rope_layers"):
        family, name, config = "smollm3", "SmolLM3ForCausalLM", dict(no_rope_layers=[int(x) for x in layers])
    scaling = arch["rope"].get("llama3") or {}
    rope = scaling | dict(rope_theta=arch["rope"]["theta"], rope_type="llama3" if scaling else "default")
    return config | dict(
        architectures=[name], model_type=family, dtype="float32", vocab_size=arch["vocab"], hidden_act="silu",
        hidden_size=arch["width"], intermediate_size=arch["mlp"], num_hidden_layers=arch["layers"],
        num_attention_heads=arch["heads"], num_key_value_heads=arch["kv_heads"], head_dim=arch["head_width"],
        max_position_embeddings=arch["positions"], rms_norm_eps=arch["eps"], tie_word_embeddings=arch["tied"],
        eos_token_id=arch["end"], bos_token_id=None, pad_token_id=None, rope_parameters=rope)


def write_clip(folder, reward, source):
    """Writes the source's CLIP with a reward's image tower in OpenCLIP's layout; source: its name.

    Raises ValueError if it is not the CLIP that the reward was trained on, or has no config.
    """
    info, arch, clip = reward.info, reward.arch, weights.load(source, "base", text=False)
    zero_shot = weights.as_classifier(clip, info["classes"], info["templates"])
    if weights.fingerprint(zero_shot) != info["source_sha256"]:
        raise ValueError(f"{source} has other weights than the CLIP that the reward was trained on: --source")
    if not Path(source).is_file():
        config = files.read_json(hub.find(source, "open_clip_config.json"))
    elif isinstance(arch["layers"], int):
        config = dict(preprocess_cfg=dict(mean=arch["mean"], std=arch["std"]), model_cfg=dict(
            embed_dim=arch["embed_dim"], quick_gelu=arch["quick_gelu"],
            vision_cfg=dict(image_size=arch["image_size"], layers=arch["layers"], width=arch["width"],
                            head_width=arch["width"] // arch["heads"], patch_size=arch["patch"]),
            text_cfg=dict(context_length=arch["context"], vocab_size=arch["vocab"], width=arch["text_width"],
                          heads=arch["text_heads"], layers=arch["text_layers"])))
    else:
        raise ValueError(f"{source}: a single file of no ViT; name its folder or Hub id with --source")
    clip.visual = reward.visual
    tensors = {k.replace(".in_proj.", ".in_proj_"): x for k, x in clip.state_dict().items()}
    tensors["logit_scale"] = tensors["logit_scale"].squeeze()
    write(folder, "open_clip_model", tensors, "open_clip_config", config, info)


def write(folder, model, tensors, name, config, info):
    """Writes the tensors and the config, with the entries of a reward's checkpoint `info`."""
    codes, header, end = {dtype: code for code, dtype in files.DTYPES.items()}, {}, 0
    for key, x in tensors.items():
        header[key] = dict(dtype=codes[x.dtype], shape=[*x.shape], data_offsets=[end, end := end + x.nbytes])
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()  # the format of safetensors
    with open(folder / f"{model}.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    entries = {k: info[k] for k in ENTRIES if info.get(k) is not None}
    (folder / f"{name}.json").write_text(json.dumps(config | dict(prt=entries), indent=1))


def restored(model, entries):
    """Returns the reward in an exported folder; model: the GPT or CLIP that was read from it.

    entries: those under "prt" in its config. Raises ValueError if one of them is not as in a checkpoint.
    """
    is_text = model.info["kind"] == "gpt"
    schema.check(entries, "its config: prt", "tuned", "exported_gpt" if is_text else "classifier_checkpoint")
    if not is_text:
        model = weights.as_classifier(model, entries["classes"], entries["templates"])
        model.info = dict(kind="classifier")
    model.info |= entries
    return model


def table(report):
    """Returns the table of eval.py's --json as Markdown."""
    rows = report["rows"]
    keys = [k for k in rows[0] if any(isinstance(row[k], (str, int, float)) for row in rows)]
    lines = [keys, ["---"] * len(keys), *([row[k] for k in keys] for row in rows)]
    cells = ([f"{x:.4g}" if isinstance(x, float) else str("" if x is None else x) for x in line]
             for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main():
    """Writes the folder, which must not exist."""
    p = flags.parser(__doc__)
    p.add_argument("reward", help="checkpoint of a reward")
    p.add_argument("folder", type=Path, help="folder to write")
    p.add_argument("--source", help="what the reward was trained on (default: as stored in it)")
    p.add_argument("--table", help="file that eval.py --json wrote")
    args = flags.parsed(p, None)
    if args.folder.exists():
        raise FileExistsError(f"{args.folder} exists: choose another folder")
    report = files.read_json(args.table) if args.table else ""
    reward = weights.load(args.reward, "prt", source=args.source)
    info, source = reward.info, args.source or reward.info["source"]
    if "net" in reward.arch:
        raise ValueError(f"{args.reward}: a network of your own, of which no other program knows the layout")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as temporary:  # until the folder is whole
        (part := Path(temporary, "part")).mkdir()
        if info["kind"] == "gpt":
            small = info.keys() & {"ticket", "lora"}  # with the hash of a tokenizer instead of the tokenizer
            write_gpt(part, reward, (weights.load(source, "base") if small else reward).info["tokenizer"])
        else:
            write_clip(part, reward, source)
        card = files.read_text(CARD).format(folder=args.folder, table=report and table(report), **info)
        (part / "README.md").write_text(card, "utf-8")
        part.rename(args.folder)
    print(f"{args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")


if __name__ == "__main__":
    runs.main(main)
