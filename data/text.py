"""Text data sets as token ids, with a mask of the tokens in the loss, in batches of similar lengths.

An example is a list of segments (text, counts). If counts is True, the loss includes the segment and an end
token after it; if it is None, for an answer that is not trained on, the loss includes neither of them. `load`
reads examples, `encode` turns them into Tokens, and `collate` into a batch.
"""
import gzip
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from data import files
from data.tokenizer import alternatives

GSM8K = "Question: {}\n\nAnswer:"


class Tokens(NamedTuple):
    """N examples as token ids, and which of these the loss includes."""

    ids: list  # N LongTensors [T]
    counts: list  # N BoolTensors [T]: whether the loss counts that token


def load(source, split, chat=None):
    """Returns a split's prompt template, and its examples as (name for errors, segments).

    source: arithmetic, gsm8k, or a file or folder as in data/text_files.py; for pretraining also
    arithmetic-old and arithmetic-new. chat: as in data/chat.py, to give conversations its form. Raises
    ValueError or OSError that names the file and line, and FileNotFoundError if there is no such split.
    """
    if chat:
        from data import chat as chats  # an optional file
        return chats.load(source, split, chat)
    if source == "gsm8k":
        lines = gzip.decompress(Path(__file__).with_name(f"gsm8k-{split}.jsonl.gz").read_bytes()).splitlines()
        rows = [json.loads(line) for line in lines]
        return GSM8K, [(f"gsm8k {split} {i}", gsm8k_segments(row)) for i, row in enumerate(rows)]
    if source in ("arithmetic", "arithmetic-old", "arithmetic-new"):
        from data import arithmetic
        return arithmetic.load(source, split)
    from data import text_files
    return text_files.load(source, split)


def gsm8k_segments(row):
    """Returns the segments of a row of GSM8K, without the calculator's <<7-3=4>>."""
    answer = re.sub(r"<<[^>]*>>", "", row["answer"])
    return [(GSM8K.replace("{}", row["question"]), False), (" " + answer, True)]


def fingerprint(examples):
    """Returns the count and sha256 of examples, which tell whether a file is still the same."""
    digest = hashlib.sha256()
    for _, parts in examples:
        digest.update(repr(parts).encode())
    return dict(count=len(examples), sha256=digest.hexdigest())


def token_ids(parts, tokenizer, end):
    """Returns an example's ids, from tokenizer.begin on, and for each of them if the loss includes it."""
    ids, counts = [], []
    for text, counted in parts:
        first = not ids or ids[-1] in tokenizer.breaks
        part = tokenizer.encode(text, first) + ([] if counted is False else [end])
        ids += part
        counts += [bool(counted)] * len(part)
    return tokenizer.begin + ids, [False] * len(tokenizer.begin) + counts


def encode(examples, tokenizer, end, length, drop=False):
    """Returns examples as Tokens of at most `length` ids; longer ones are truncated, or dropped if `drop`.

    Examples without a target within the first `length` ids are always dropped. Prints how many are too long.
    """
    rows = []
    for name, parts in examples:
        with files.explain(name, ValueError):
            rows.append([torch.tensor(x) for x in token_ids(parts, tokenizer, end)])
    report_special([parts for _, parts in examples], tokenizer)
    too_long = sum(len(ids) > length for ids, _ in rows)
    used = [(ids[:length], counts[:length]) for ids, counts in rows
            if counts[1:length].any() and not (drop and len(ids) > length)]
    dropped = len(rows) - len(used)
    if too_long or dropped:
        print(f"{too_long} of {len(rows)} examples exceed {length} tokens; {dropped} are dropped")
    if not used:
        raise ValueError(f"none of {len(rows)} examples has a response that begins within --length {length}")
    return Tokens([ids for ids, _ in used], [counts for _, counts in used])


def report_special(examples, tokenizer):
    """Prints how many examples (lists of segments) hold the text of a special token."""
    tokens = alternatives(tokenizer.special)  # one pass: Llama 3 has 256 of them
    found = Counter(t for parts in examples for t in {t for part, _ in parts for t in tokens.findall(part)})
    for token, n in found.most_common(1):
        print(f"{n} of {len(examples)} texts hold {token}; special tokens in text are taken as plain text")


def group_by_length(indices, lengths, batch, steps, seed, pool=50):
    """Returns a function like `indices` whose batches hold examples of similar lengths.

    indices: function from a step to the indices [batch] of examples. The examples of `pool` consecutive steps
    are sorted by length and divided into batches again, and the order of the batches is shuffled. But the two
    batches with the longest examples come first: a run that exceeds the memory ends there, and not after
    hours. (Two, since Adam's averages exist from the second step on.)
    """
    lengths = torch.tensor(lengths)
    pool = max(1, min(pool, len(lengths) // batch))  # at most an epoch, so that few batches repeat an example
    batches = []  # each [batch]
    for start in range(0, steps, pool):
        examples = torch.cat([indices(step) for step in range(start, min(start + pool, steps))])
        examples = examples[lengths[examples].argsort(stable=True)].view(-1, batch)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + start))
        batches += examples[order]
    longest = sorted(range(steps), key=lambda step: -int(lengths[batches[step]].max()))[:2]
    order = longest + [step for step in range(steps) if step not in longest]
    return lambda step: batches[order[step]]


def by_length(texts, count=math.inf, tokens=math.inf):
    """Returns the indices of texts (ids) in lists, each a batch of similar lengths, and the longest first.

    A batch has at most `count` texts, and at most `tokens` ids with padding, but for a text that is longer.
    With the longest first, a program that exceeds the memory ends at once.
    """
    batches, longest = [], 0
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not batches or len(batches[-1]) == count or (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
            longest = len(texts[i])
        batches[-1].append(i)
    return batches


def batches(data, i, tokens):
    """Returns the examples i [N] of Tokens, collated `by_length` into batches of at most so many tokens."""
    return [collate(data, i[part]) for part in by_length([data.ids[k] for k in i], tokens=tokens)]


def collate(data, i):
    """Returns ((ids [B, T], index [N]), targets [N]) for the examples i, padded on the right.

    index: positions in ids.flatten() whose next token is a target.
    """
    rows = [(data.ids[k], data.counts[k]) for k in i.tolist()]
    inputs = pad_sequence([ids[:-1] for ids, _ in rows], batch_first=True)  # [B, T]
    is_target = pad_sequence([counts[1:] for _, counts in rows], batch_first=True)  # [B, T]: the next token
    targets = torch.cat([ids[1:][counts[1:]] for ids, counts in rows])
    return (inputs, is_target.flatten().nonzero().flatten()), targets
