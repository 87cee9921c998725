"""Text data sets as token ids: what is asked, what counts as answer, in batches of similar lengths.

An example is a list of (text, counts) segments. The loss counts the segments that say so, and the end token
behind each of them. `load` reads examples, `encode` makes Tokens of them, `collate` a batch.
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

import prt

GSM8K = "Question: {}\n\nAnswer:"
TULU = "<|user|>\n{}\n<|assistant|>\n"  # Tulu v2's chat template


class Tokens(NamedTuple):
    ids: list  # N LongTensors [T]
    counts: list  # N BoolTensors [T]: whether the loss counts that token


def load(source, split):
    """(prompt template, [(place, segments), …]) of a split; place: what errors call it.

    source: arithmetic, gsm8k, or a file: .jsonl or .parquet with {"messages": [{"role", "content"}, …]} or
    {"prompt", "response"} in each row, .txt for pretraining; or a folder with train.* and test.* of those;
    arithmetic-old and arithmetic-new are the bases' pretraining texts. Raises ValueError or OSError that
    names file and line, FileNotFoundError where there is no such split.
    """
    path = Path(source)
    if source in ("arithmetic", "arithmetic-old", "arithmetic-new"):
        if split == "test" and source != "arithmetic":
            raise FileNotFoundError(f"--data {source}: it has no test split")
        split = source.partition("-")[2] or split
        return " {}", [(f"arithmetic {i}", segments) for i, segments in enumerate(arithmetic(split))]
    if source == "gsm8k":
        path = Path(__file__).with_name(f"gsm8k-{split}.jsonl.gz")
    elif path.is_dir():
        found = sorted(path.glob(f"{split}.*"))
        if len(found) != 1:
            kind = ValueError if found else FileNotFoundError
            raise kind(f"--data {source}: holds {len(found)} files named {split}.*, not one")
        path = found[0]
    elif not path.exists():
        raise ValueError(f"--data {source}: unknown. There are arithmetic, gsm8k, .jsonl, .parquet and .txt "
                         "files, and folders with train.* and test.*")
    elif split == "test":
        raise FileNotFoundError(f"--data {source}: a file has no test split, a folder of train.*, test.* has")
    if path.suffix == ".txt":
        try:
            return "{}", [(str(path), [(read(path).decode(), True)])]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    examples = [(place, *segments(place, row)) for place, row in rows(path)]
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples[0][1], [(place, parts) for place, _, parts in examples]


def read(path):
    """The bytes of a file, .gz or not."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None


def rows(path):
    """(place, dict) of every line of a .jsonl file or row of a .parquet file."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
        yield from ((f"{path} row {i + 1}", row) for i, row in enumerate(table))
        return
    for i, line in enumerate(read(path).split(b"\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {i + 1}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {i + 1}: {line!r:.60} is no JSON object")
        yield f"{path} line {i + 1}", row


def segments(place, row):
    """(template, segments) of a row."""
    try:
        if "messages" in row:
            parts = []
            for message in row["messages"]:
                role, content = message["role"], message["content"]
                if role == "assistant":
                    parts += [("<|assistant|>\n", False), (content, True), ("\n", False)]
                else:
                    parts.append((f"<|{role}|>\n" + content + "\n", False))
            while parts and not parts[-1][1]:  # what follows the last answer teaches nothing
                parts.pop()
            template = TULU
        elif "question" in row:  # GSM8K, without the calculator's <<7-3=4>>
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])
            template, parts = GSM8K, [(GSM8K.replace("{}", row["question"]), False), (" " + answer, True)]
        else:
            template, parts = "{}", [(row["prompt"], False), (row["response"], True)]
    except (LookupError, TypeError) as error:
        raise ValueError(f'{place}: no {{"messages"}}, no {{"prompt", "response"}} ({error!r})') from None
    if strange := [text for text, _ in parts if not isinstance(text, str)]:
        raise ValueError(f"{place}: {strange[0]!r:.100} is no text")
    if not any(counts for _, counts in parts) or not all(text.strip() for text, counts in parts if counts):
        raise ValueError(f"{place}: its response is empty")
    return template, parts


def token_ids(parts, tokenizer, end):
    """(ids, counts) of the segments of an example, behind what opens every text."""
    ids, counts = list(tokenizer.begin), [False] * len(tokenizer.begin)
    for text, counted in parts:
        part = tokenizer.encode(text) + [end] * counted
        ids += part
        counts += [counted] * len(part)
    return ids, counts


def encode(examples, tokenizer, end, length, drop=False):
    """The examples as Tokens of at most `length`; longer ones are cut or dropped, their number is printed."""
    found, cut, lost = Tokens([], []), 0, 0
    for _, parts in examples:
        ids, counts = token_ids(parts, tokenizer, end)
        cut += len(ids) > length
        if len(ids) > length and drop or not any(counts[1:length]):
            lost += 1
            continue
        found.ids.append(torch.tensor(ids[:length]))
        found.counts.append(torch.tensor(counts[:length]))
    if cut or lost:
        print(f"{cut} of {len(examples)} examples exceed {length} tokens: {lost} dropped, the others cut")
    if not found.ids:
        raise ValueError(f"in none of {len(examples)} examples begins a response within --length {length}")
    return found


def blocks(examples, tokenizer, end, length):
    """Texts for pretraining, one behind the other with the end token between them, in blocks of `length`."""
    ids = []
    for _, parts in examples:
        ids += [i for text, _ in parts for i in tokenizer.encode(text)] + [end]
    ids = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if length < 2 or not len(ids):
        raise ValueError(f"--length {length}: at least 2, and at most the text's length")
    return Tokens(list(ids), list(torch.ones_like(ids, dtype=torch.bool)))


def batches(lengths, batch, steps, seed, pool=50):
    """step -> indices [batch] of examples of similar lengths, each as often as in prt.shuffled's order."""
    lengths = torch.tensor(lengths)
    pool = max(1, min(pool, len(lengths) // batch))  # so that few batches hold an example twice

    @functools.lru_cache(maxsize=1)
    def pooled(start):
        own = range(start, min(start + pool, steps))
        found = torch.cat([prt.shuffled(step, len(lengths), batch, seed) for step in own])
        found = found[lengths[found].argsort(stable=True)].view(-1, batch)
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed + start))]

    return lambda step: pooled(step // pool * pool)[step % pool]


def collate(data, i, device="cpu"):
    """((ids [B, T], where [N]), targets [N]): padded at the right; where: places whose next token counts."""
    rows = [(data.ids[k], data.counts[k]) for k in i.tolist()]
    T = max(len(ids) for ids, _ in rows) - 1
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    where, targets = [], []
    for row, (tokens, counts) in enumerate(rows):
        ids[row, :len(tokens) - 1] = tokens[:-1]
        where.append(row * T + counts[1:].nonzero().flatten())
        targets.append(tokens[1:][counts[1:]])
    ids, where, targets = (x.to(device, non_blocking=True)
                           for x in (ids, torch.cat(where), torch.cat(targets)))
    return (ids, where), targets


def padding(data, parts):
    """The share of padding in the micro-batches `parts` (tensors of indices)."""
    lengths = [torch.tensor([len(data.ids[k]) for k in part.tolist()]) for part in parts]
    return 1 - sum(int(n.sum()) for n in lengths) / sum(int(n.max()) * len(n) for n in lengths)


# The embedded data set: word problems of one step. The old base's text holds half of the facts, the new one's
# all; the tuning problems need facts that the old one knows, the test problems facts that it does not know.
NAMES = "Tom Ann Ben Eva Sam Mia Leo Ida Max Zoe".split()
ITEMS = "apples books coins eggs shells stamps cards pens stones cakes".split()
STORIES = {"+": ["{n} has {a} {i} and buys {b} more.", "{n} has {a} {i} and finds {b} more.",
                 "{n} picks {a} {i} and then {b} more."],
           "-": ["{n} has {a} {i} and sells {b}.", "{n} has {a} {i} and loses {b}.",
                 "{n} had {a} {i} and gave {b} away."],
           "x": ["{n} has {a} bags of {b} {i} each.", "{n} fills {a} boxes with {b} {i} each.",
                 "{n} buys {a} packs of {b} {i}."]}
ENDS = {"+": "Now it is {c} in all.", "-": "Now {c} are left.", "x": "That makes {c} in all."}
COUNTS = dict(old=40_000, new=40_000, train=4_000, test=1_000)


def facts():
    """[(a, sign, b, result)] of all facts; 7 + 3 and 3 + 7 are one behind the other."""
    sums = [(a, "+", b, a + b) for a in range(1, 21) for b in range(a, 21)]
    products = [(a, "x", b, a * b) for a in range(2, 13) for b in range(a, 13)]
    return sums + products + [(a, "-", b, a - b) for a in range(2, 21) for b in range(1, a)]


def arithmetic(split):
    """Segments of a split's examples: pages of `old` and `new`, problems of `train` and `test`."""
    known = {fact: random.Random(f"{fact}").random() < 0.5 for fact in facts()}
    pool = [fact for fact, old in known.items() if split == "new" or old == (split != "test")]
    rng = random.Random(f"arithmetic {split}")
    problems = split in ("train", "test")

    def item():
        a, sign, b, c = rng.choice(pool)
        a, b = (b, a) if sign != "-" and rng.random() < 0.5 else (a, b)
        values = dict(n=rng.choice(NAMES), i=rng.choice(ITEMS), a=a, b=b, c=c)
        story, equation = " " + rng.choice(STORIES[sign]).format(**values), f" {a} {sign} {b} = {c}"
        if problems:
            return [(story + " How many?", False), (f"{equation} #### {c}", True)]
        heading, question = f" #### {values['i']}" * (rng.random() < 0.2), " How many?" * (rng.random() < 0.5)
        end = " " + ENDS[sign].format(**values)
        return heading + rng.choice([equation, story + question + end, story + question + equation])

    for _ in range(COUNTS[split]):
        yield item() if problems else [("".join(item() for _ in range(rng.randint(1, 4))), True)]
