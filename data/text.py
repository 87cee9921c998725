"""Text data sets as token ids, with a mask of the tokens in the loss, in batches of similar lengths.

An example is a list of segments (text, counts). If counts is True, the loss includes the segment and an end
token after it. `load` reads examples, `encode` turns them into Tokens, and `collate` into a batch.
"""
import functools
import gzip
import json
import random
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from data import files

GSM8K = "Question: {}\n\nAnswer:"
TULU = "<|user|>\n{}\n<|assistant|>\n"  # Tulu v2's chat template


class Tokens(NamedTuple):
    """N examples as token ids, and which of these the loss includes."""

    ids: list  # N LongTensors [T]
    counts: list  # N BoolTensors [T]: whether the loss counts that token


def load(source, split):
    """Returns a split's prompt template, and its examples as (name for errors, segments).

    source: arithmetic, gsm8k, a file, or a folder with files train.* and test.*. Rows of .jsonl and .parquet
    files have "prompt" and "response", "question" and "answer", or "messages": [{"role", "content"}, ...].
    For pretraining: .txt, arithmetic-old, and arithmetic-new. Raises ValueError or OSError that names the
    file and line, and FileNotFoundError if there is no such split.
    """
    path = Path(source)
    if source in ("arithmetic", "arithmetic-old", "arithmetic-new"):
        if split == "test" and source != "arithmetic":
            raise FileNotFoundError(f"--data {source}: it has no test split")
        split = source.partition("-")[2] or split
        return " {}", [(f"arithmetic {i}", parts) for i, parts in enumerate(arithmetic(split))]
    if source == "gsm8k":
        path = Path(__file__).with_name(f"gsm8k-{split}.jsonl.gz")
    elif path.is_dir():
        paths = sorted(path.glob(f"{split}.*"))
        if len(paths) != 1:
            kind = ValueError if paths else FileNotFoundError
            raise kind(f"--data {source}: holds {len(paths)} files named {split}.*, not one")
        path = paths[0]
    elif not path.exists():
        raise ValueError(f"--data {source}: unknown. Use arithmetic, gsm8k, a .jsonl, .parquet, or .txt file,"
                         " or a folder with train.* and test.*")
    elif split == "test":
        raise FileNotFoundError(f"--data {source}: no test split; use a folder with train.* and "
                                f"test.*, or, to score on this file itself, eval.py --data {source}")
    if path.suffix == ".txt":
        with files.explain(path, UnicodeDecodeError):
            return "{}", [(str(path), [(read(path).decode("utf-8-sig"), True)])]
    examples = [(name, *segments(name, row)) for name, row in rows(path)]
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples[0][1], [(name, parts) for name, _, parts in examples]


def read(path):
    """Returns the content of a file, decompressed if it is a .gz file."""
    with files.explain(path, EOFError, zlib.error, gzip.BadGzipFile):
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data


def rows(path):
    """Yields (name for errors, dict) for every line of a .jsonl file or row of a .parquet file."""
    if path.suffix == ".parquet":
        with files.explain(f"{path}: parquet needs pyarrow (pip install pyarrow)", ImportError):
            import pyarrow.parquet
        with files.explain(path, pyarrow.ArrowException, OSError):
            table = pyarrow.parquet.read_table(path).to_pylist()
        yield from ((f"{path} row {i + 1}", row) for i, row in enumerate(table))
        return
    for i, line in enumerate(read(path).split(b"\n")):
        if not line.strip():
            continue
        with files.explain(f"{path} line {i + 1}", ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {i + 1}: {line!r:.60} is not a JSON object")
        yield f"{path} line {i + 1}", row


def segments(name, row):
    """Returns the prompt template and the segments of a row. Raises ValueError that begins with name."""
    with files.explain(f"{name}: not messages, prompt/response, or question/answer", LookupError, TypeError):
        if "messages" in row:
            parts = []
            for message in row["messages"]:
                role, content = message["role"], message["content"]
                if role == "assistant":
                    parts += [("<|assistant|>\n", False), (content, True), ("\n", False)]
                else:
                    parts.append((f"<|{role}|>\n" + content + "\n", False))
            while parts and not parts[-1][1]:  # nothing counts after the last answer
                parts.pop()
            template = TULU
        elif "question" in row:  # GSM8K, without the calculator's <<7-3=4>>
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])
            template, parts = GSM8K, [(GSM8K.replace("{}", row["question"]), False), (" " + answer, True)]
        else:
            template, parts = "{}", [(row["prompt"], False), (row["response"], True)]
    if invalid := [text for text, _ in parts if not isinstance(text, str)]:
        raise ValueError(f"{name}: {invalid[0]!r:.100} is not text")
    if not any(counts for _, counts in parts) or not all(text.strip() for text, counts in parts if counts):
        raise ValueError(f"{name}: its response is empty")
    return template, parts


def token_ids(parts, tokenizer, end):
    """Returns an example's ids, from tokenizer.begin on, and for each of them if the loss includes it."""
    ids, counts = [], []
    for text, counted in parts:
        part = tokenizer.encode(text, first=not ids) + ([end] if counted else [])
        ids += part
        counts += [counted] * len(part)
    return tokenizer.begin + ids, [False] * len(tokenizer.begin) + counts


def encode(examples, tokenizer, end, length, drop=False):
    """Returns examples as Tokens of at most `length` ids; longer ones are truncated, or dropped if `drop`.

    Examples without a target within the first `length` ids are always dropped. Prints how many are too long.
    """
    rows = [[torch.tensor(x) for x in token_ids(parts, tokenizer, end)] for _, parts in examples]
    too_long = sum(len(ids) > length for ids, _ in rows)
    used = [(ids[:length], counts[:length]) for ids, counts in rows
            if counts[1:length].any() and not (drop and len(ids) > length)]
    dropped = len(rows) - len(used)
    if too_long or dropped:
        print(f"{too_long} of {len(rows)} examples exceed {length} tokens; {dropped} are dropped")
    if not used:
        raise ValueError(f"none of {len(rows)} examples has a response that begins within --length {length}")
    return Tokens([ids for ids, _ in used], [counts for _, counts in used])


def blocks(examples, tokenizer, end, length):
    """Returns Tokens in blocks of `length` ids: the texts, each with an end token, without the remainder."""
    ids = []
    for _, parts in examples:
        texts = [text for text, _ in parts if text]
        ids += [i for n, text in enumerate(texts) for i in tokenizer.encode(text, first=n == 0)] + [end]
    ids = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if length < 2 or not len(ids):
        raise ValueError(f"--length {length}: must be at least 2 and at most the text's number of tokens")
    return Tokens(list(ids), list(torch.ones_like(ids, dtype=torch.bool)))


def group_by_length(indices, lengths, batch, steps, seed, pool=50):
    """Returns a function like `indices` whose batches hold examples of similar lengths.

    indices: function from a step to the indices [batch] of examples. The examples of `pool` consecutive steps
    are sorted by length and divided into batches again, and the order of the batches is shuffled.
    """
    lengths = torch.tensor(lengths)
    pool = max(1, min(pool, len(lengths) // batch))  # at most an epoch, so that few batches repeat an example

    @functools.lru_cache(maxsize=1)
    def pooled(start):
        examples = torch.cat([indices(step) for step in range(start, min(start + pool, steps))])
        examples = examples[lengths[examples].argsort(stable=True)].view(-1, batch)  # [pool, batch]
        return examples[torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + start))]

    return lambda step: pooled(step // pool * pool)[step % pool]


def by_length(sequences, size):
    """Returns the indices of sequences in lists of `size`, each of similar lengths."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return [order[start:start + size] for start in range(0, len(order), size)]


def collate(data, i):
    """Returns ((ids [B, T], index [N]), targets [N]) for the examples i, padded on the right.

    index: positions in ids.flatten() whose next token is a target.
    """
    rows = [(data.ids[k], data.counts[k]) for k in i.tolist()]
    inputs = pad_sequence([ids[:-1] for ids, _ in rows], batch_first=True)  # [B, T]
    is_target = pad_sequence([counts[1:] for _, counts in rows], batch_first=True)  # [B, T]: the next token
    targets = torch.cat([ids[1:][counts[1:]] for ids, counts in rows])
    return (inputs, is_target.flatten().nonzero().flatten()), targets


# The built-in data set: word problems of one step. The old base's text has half of the facts, the new base's
# all. Training problems use the facts in the old base's text, and test problems use the others.
NAMES = ["Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Ida", "Max", "Zoe"]
ITEMS = ["apples", "books", "coins", "eggs", "shells", "stamps", "cards", "pens", "stones", "cakes"]
STORIES = {"+": ["{n} has {a} {i} and buys {b} more.", "{n} has {a} {i} and finds {b} more.",
                 "{n} picks {a} {i} and then {b} more."],
           "-": ["{n} has {a} {i} and sells {b}.", "{n} has {a} {i} and loses {b}.",
                 "{n} had {a} {i} and gave {b} away."],
           "x": ["{n} has {a} bags of {b} {i} each.", "{n} fills {a} boxes with {b} {i} each.",
                 "{n} buys {a} packs of {b} {i}."]}
ENDS = {"+": "Now it is {c} in all.", "-": "Now {c} are left.", "x": "That makes {c} in all."}
COUNTS = dict(old=40_000, new=40_000, train=4_000, test=1_000)


def facts():
    """Returns all facts as (a, sign, b, result); a <= b for the signs "+" and "x", which commute."""
    sums = [(a, "+", b, a + b) for a in range(1, 21) for b in range(a, 21)]
    products = [(a, "x", b, a * b) for a in range(2, 13) for b in range(a, 13)]
    return sums + products + [(a, "-", b, a - b) for a in range(2, 21) for b in range(1, a)]


def arithmetic(split):
    """Yields segments: pages of text for the splits "old" and "new", problems for "train" and "test"."""
    known = {fact: random.Random(f"{fact}").random() < 0.5 for fact in facts()}
    pool = [fact for fact, old in known.items() if split == "new" or (not old if split == "test" else old)]
    rng = random.Random(f"arithmetic {split}")
    problems = split in ("train", "test")

    def item():
        a, sign, b, c = rng.choice(pool)
        a, b = (b, a) if sign != "-" and rng.random() < 0.5 else (a, b)
        values = dict(n=rng.choice(NAMES), i=rng.choice(ITEMS), a=a, b=b, c=c)
        story, equation = " " + rng.choice(STORIES[sign]).format(**values), f" {a} {sign} {b} = {c}"
        if problems:
            return [(story + " How many?", False), (f"{equation} #### {c}", True)]
        heading = f" #### {values['i']}" if rng.random() < 0.2 else ""
        question = " How many?" if rng.random() < 0.5 else ""
        end = " " + ENDS[sign].format(**values)
        return heading + rng.choice([equation, story + question + end, story + question + equation])

    for _ in range(COUNTS[split]):
        yield item() if problems else [("".join(item() for _ in range(rng.randint(1, 4))), True)]
