"""Text files of one's own: .jsonl, .parquet, and .txt, alone or as the splits of a folder."""
import gzip
import json
import zlib
from pathlib import Path

from data import files
from data.text import GSM8K, gsm8k_segments

TULU = "<|user|>\n{}\n<|assistant|>\n"  # Tulu v2's chat template


def load(source, split):
    """Returns what text.load does, for a file, or a folder with files train.* and test.*.

    Rows of .jsonl and .parquet files have "prompt" and "response", "question" and "answer", or "messages":
    [{"role", "content"}, ...]. A .txt file is one example, for pretraining.
    """
    path = find(source, split)
    if path.suffix == ".txt":
        with files.explain(path, UnicodeDecodeError):
            return "{}", [(str(path), [(path.read_text("utf-8-sig"), True)])]
    rows = parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)
    examples = [(name, *segments(name, row)) for name, row in rows]
    if not examples:
        raise ValueError(f"{path}: holds no example")
    return examples[0][1], [(name, parts) for name, _, parts in examples]


def find(source, split):
    """Returns the path of a split: a file itself for "train", or the one named SPLIT.* in a folder.

    Raises ValueError, and FileNotFoundError if there is no such split.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(path.glob(f"{split}.*"))
        if len(paths) != 1:
            kind = ValueError if paths else FileNotFoundError
            raise kind(f"--data {source}: holds {len(paths)} files named {split}.*, not one")
        return paths[0]
    if not path.exists():
        raise ValueError(f"--data {source}: unknown. Use arithmetic, gsm8k, a .jsonl, .parquet, or .txt file,"
                         " or a folder with train.* and test.*")
    if split == "test":
        raise FileNotFoundError(f"--data {source}: no test split; use a folder with train.* and "
                                f"test.*, or, to score on this file itself, eval.py --data {source}")
    return path


def jsonl_rows(path):
    """Yields (name for errors, dict) for every line of a .jsonl or .jsonl.gz file."""
    with files.explain(path, EOFError, zlib.error, gzip.BadGzipFile):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    for i, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        with files.explain(f"{path} line {i + 1}", ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {i + 1}: {line!r:.60} is not a JSON object")
        yield f"{path} line {i + 1}", row


def parquet_rows(path):
    """Yields (name for errors, dict) for every row of a .parquet file. Needs pyarrow."""
    with files.explain(f"{path}: parquet needs pyarrow (pip install pyarrow)", ImportError):
        import pyarrow.parquet
    with files.explain(path, pyarrow.ArrowException, OSError):
        table = pyarrow.parquet.read_table(path).to_pylist()
    yield from ((f"{path} row {i + 1}", row) for i, row in enumerate(table))


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
        elif "question" in row:
            template, parts = GSM8K, gsm8k_segments(row)
        else:
            template, parts = "{}", [(row["prompt"], False), (row["response"], True)]
    if invalid := [text for text, _ in parts if not isinstance(text, str)]:
        raise ValueError(f"{name}: {invalid[0]!r:.100} is not text")
    if not any(counts for _, counts in parts) or not all(text.strip() for text, counts in parts if counts):
        raise ValueError(f"{name}: its response is empty")
    return template, parts
