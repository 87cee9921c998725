"""Bases (--method pretrain), from scratch or from --source: a CLIP from captioned images, a GPT from text."""
from pathlib import Path

import torch

import prt
from data import files
from models import runs, scores, watch, weights

TINY = dict(embed_dim=64, image_size=32, patch=8, width=64, layers=2, heads=2, text_width=64, text_layers=2,
            text_heads=2, context=77, vocab=49408, mean=[0.5] * 3, std=[0.25] * 3, quick_gelu=False)
CLIPS = dict(tiny=TINY, small=TINY | dict(width=128, layers=3, heads=4))
LLAMA = dict(rope=dict(theta=10000.0), eps=1e-5, layer_norm=False, gated_mlp=True, qkv_bias=False, bias=False)
OLD = LLAMA | dict(width=64, layers=2, heads=4, kv_heads=4, head_width=16, mlp=168, positions=256, tied=False)
GPTS = dict(old=OLD, new=OLD | dict(width=96, layers=3, head_width=24, mlp=256),
            large=OLD | dict(width=256, layers=8, head_width=64, mlp=688))
TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer.json"


def clip(args, device, state):
    """Trains a CLIP, a new one or that of --source, on images and their captions.

    The contrastive loss compares the images and texts of a micro-batch. state: the checkpoint to continue
    from, or None. Raises ValueError if the captions exceed the vocabulary or the context of --source.
    """
    from data import images
    from models.clip import CLIP, resize
    model = weights.load(args.source, "base", text=False) if args.source else CLIP(CLIPS[args.size])
    size = model.arch["image_size"]
    data = images.load(args.data, "captioned" if args.data == "shapes" else "train", size)
    test = images.load(args.data, "test", size)
    info = dict(kind="clip", arch=model.arch, classes=data.classes, templates=data.templates,
                examples=data.examples, data=args.data)
    weights.check_same(args, state, info)
    indices = runs.batches(len(data.labels), args.hold_out, args.batch, args.seed)
    pixels, captions = runs.move_if_it_fits(data.images, device), caption_tokens(data).to(device)  # [N, P, T]
    have, need = (model.arch["vocab"], model.arch["context"]), (int(captions.max()) + 1, captions.shape[-1])
    if need[0] > have[0] or need[1] > have[1]:
        raise ValueError(f"--source {args.source}: the captions need (vocabulary, positions) {need}, but it "
                         f"has {have}")

    def fetch(i, generator):
        chosen = torch.randint(captions.shape[1], (len(i),), generator=generator)  # one caption per image
        tokens = runs.take(captions.flatten(0, 1), i * captions.shape[1] + chosen, device)
        x = runs.take(pixels, i, device)
        x = images.augment(resize(x, size), generator) if args.augment else x
        return (x, tokens), torch.arange(len(i), device=device).repeat(2), None

    runs.place(model, device, compile=args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    used = len(runs.hold_out(len(data.labels), args.hold_out)[0])
    said = dict(images=f"{used} of {len(data.labels)}")
    rows, hooks = watch.begin(args, info, model, optimizer, state, args.steps, said)
    history = prt.fit(
        model, indices, fetch, optimizer=optimizer, steps=args.steps,
        warmup=args.steps // 4 if args.warmup is None else args.warmup, accum=args.accum, seed=args.seed,
        **hooks)
    watch.end(args, rows, history[-1]["step"], args.steps)

    saved = weights.load(args.out, "base", text=False)
    saved = weights.as_classifier(saved, data.classes, data.templates, device).to(device)
    logits = scores.predict(saved, test.images)
    print(f"{args.out}: {scores.accuracy(logits, test.labels):.2%} on the test split")


def caption_tokens(data):
    """Returns the token ids [N, P, T] of the P texts that each image may be paired with."""
    from data import images
    from data.clip_tokenizer import clip_tokens
    if data.captions:
        return images.trim(clip_tokens(data.captions)).unsqueeze(1)
    return images.prompts(data.classes, data.templates)[data.labels]


def gpt(args, examples):
    """Returns a GPT to train, new or that of --source, its tokenizer, its end token's id, and text.Tokens."""
    from data.tokenizer import Tokenizer
    from models.gpt import GPT, same_vocabulary
    if args.source:
        model = weights.load(args.source, "base", text=True)
        tokenizer = same_vocabulary({f"--source {args.source}": model})
    else:
        tokenizer = Tokenizer(TOKENIZER.read_text("utf-8"), str(TOKENIZER))
        model = GPT(GPTS[args.size] | dict(vocab=tokenizer.size, end=tokenizer.size - 1)).eval()
    end = model.arch["end"]
    if end is None:
        raise ValueError(f"{args.source}: its config.json names no eos_token_id, which ends every text")
    return model, tokenizer, end, blocks(examples, tokenizer, end, args.length)


def blocks(examples, tokenizer, end, length):
    """Returns Tokens in blocks of `length` ids: the texts, each with an end token, without the remainder."""
    from data import text
    ids = []
    for name, parts in examples:
        texts = [part for part, _ in parts if part]
        with files.explain(name, ValueError):
            ids += [i for n, part in enumerate(texts) for i in tokenizer.encode(part, first=n == 0)] + [end]
    ids = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if length < 2 or not len(ids):
        raise ValueError(f"--length {length}: must be at least 2 and at most the text's number of tokens")
    return text.Tokens(list(ids), list(torch.ones_like(ids, dtype=torch.bool)))
