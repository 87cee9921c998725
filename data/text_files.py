"""Text files of one's own: .jsonl, .parquet, and .txt, alone or as the splits of a folder."""
import codecs
import gzip
import io
import re
import zlib
from pathlib import Path

from data import files, schema
from data.text import GSM8K, gsm8k_segments

KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
# Keys of rows and messages that change what an answer means.
REFUSED = {"audio", "context", "documents", "function_call", "functions", "image", "images", "input",
           "reasoning_content", "refusal", "system", "system_prompt", "thinking", "tool_call_id",
           "tool_calls", "tools"}
TULU = "<|user|>\n{}\n<|assistant|>\n"  # Tulu v2's chat template


def load(source, split, as_messages=False):
    """Returns what text.load does, for a file, or a folder with files train.* and test.*.

    Rows of .jsonl and .parquet files have "prompt" and "response", "question" and "answer", or "messages":
    [{"role", "content"}, ...]. A .txt file is one example, for pretraining. as_messages: whether "messages"
    become (role, content, counts) each, instead of segments (text, counts) in the form of Tulu v2.
    """
    path = find(source, split)
    if path.suffix == ".txt":
        return "{}", [(str(path), [(re.sub("\r\n?", "\n", files.read_text(path)), True)])]
    rows, unread = parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path), set()
    examples = [(name, *segments(name, row, unread, as_messages)) for name, row in rows]
    if not examples:
        raise ValueError(f"{path}: holds no example")
    if unread:
        print(f"{path}: keys that are not read: {', '.join(sorted(unread)):.300}")
    return examples[0][1], [(name, parts) for name, _, parts in examples]


def find(source, split):
    """Returns the path of a split: a file itself for "train", or the one named SPLIT.* in a folder.

    Raises ValueError, and FileNotFoundError if there is no such split.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(x for x in path.glob(f"{split}.*") if x.name.endswith(KINDS))
        if len(paths) != 1:
            kind = ValueError if paths else FileNotFoundError
            raise kind(f"--data {source}: holds {len(paths)} files {split}.*, not one ({', '.join(KINDS)})")
        return paths[0]
    if not path.exists():
        raise ValueError(f"--data {source}: unknown. Use arithmetic, gsm8k, a .jsonl, .parquet, or .txt file,"
                         " or a folder with train.* and test.*")
    if not path.name.endswith(KINDS):
        raise ValueError(f"--data {source}: its name must end in {', '.join(KINDS)}. A row has prompt and "
                         "response, question and answer, or messages; a .txt file is a text to go on with")
    if split == "test":
        raise FileNotFoundError(f"--data {source}: no test split; use a folder with train.* and "
                                f"test.*, or, to score on this file itself, eval.py --data {source}")
    return path


def jsonl_rows(path):
    """Yields (name for errors, dict) for every line of a .jsonl or .jsonl.gz file."""
    data = files.read_bytes(path)
    if path.suffix == ".gz":
        with files.explain(path, ValueError, EOFError, zlib.error, gzip.BadGzipFile):
            data = files.gunzip(data, ratio=32)
    for i, line in enumerate(io.BytesIO(data.removeprefix(codecs.BOM_UTF8))):
        if not line.strip():
            continue
        with files.explain(f"{path} line {i + 1}", ValueError, RecursionError):
            row = files.parse_json(line)
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {i + 1}: {line!r:.60} is not a JSON object")
        yield f"{path} line {i + 1}", row


def parquet_rows(path):
    """Yields (name for errors, dict) for every row of a .parquet file. Needs pyarrow."""
    with files.explain(f"{path}: parquet needs pyarrow (pip install pyarrow)", ImportError):
        import pyarrow.parquet
    with files.explain(path, pyarrow.ArrowException, OSError):
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(files.read_bytes(path))).to_pylist()
    yield from ((f"{path} row {i + 1}", row) for i, row in enumerate(table))


def plain(message):
    """Returns a message with a text as its content, of which OpenAI's form makes a list of parts."""
    parts = message.get("content") if isinstance(message, dict) else None
    if parts and isinstance(parts, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts):
        return message | dict(content="".join(part["text"] for part in parts))
    return message


def segments(name, row, unread, as_messages):
    """Returns the prompt template and the segments of a row, and adds the keys that are not read to `unread`.

    as_messages: as in `load`. Raises ValueError that begins with name.
    """
    with files.explain(f"{name}: not messages, prompt/response, or question/answer", LookupError, TypeError,
                       AttributeError):
        if "messages" in row:
            template, parts = TULU, []
            for message in map(plain, row["messages"]):
                used = {"role", "content", "weight", "train"}
                unread |= other_keys(name, message, used, REFUSED | {"name"})
                parts += turn(name, message, as_messages)
            while parts and not parts[-1][-1]:  # nothing counts after the last answer
                parts.pop()
            used = {"messages"}
        elif "question" in row:
            template, used, parts = GSM8K, {"question", "answer"}, gsm8k_segments(row)
        else:
            template, used = "{}", {"prompt", "response"}
            parts = [(row["prompt"], False), (row["response"], True)]
    unread |= other_keys(name, row, used | {"weight", "train"}, REFUSED)
    if row.get("weight") not in (None, 1) or row.get("train") not in (None, True):
        raise ValueError(f"{name}: weight or train of a row; leave out what is not to be trained on")
    if invalid := [text for *_, text, _ in parts if not isinstance(text, str)]:
        raise ValueError(f"{name}: {invalid[0]!r:.100} is not text")
    answers = [text for *_, text, counts in parts if counts]
    if not answers or not all(map(str.strip, answers)):
        raise ValueError(f"{name}: its response is empty")
    return template, parts


def turn(name, message, as_messages):
    """Returns the parts of a message; as_messages: as in `load`. Raises ValueError that begins with name."""
    role, content = message["role"], message["content"]
    schema.check(message, name, "message")
    wanted = [message[k] for k in ("weight", "train") if message.get(k) is not None]
    counts = role == "assistant" and (True if all(wanted) else None)
    if role != "assistant" and any(wanted):
        raise ValueError(f"{name}: role {role} has weight or train, but only the assistant's answers count")
    if as_messages:
        return [(role, content, counts)]
    if role == "assistant":
        return [("<|assistant|>\n", False), (content, counts), ("\n", False)]
    return [(f"<|{role}|>\n{content}\n", False)]


def other_keys(name, row, used, refused):
    """Returns the keys of a row that are not read. Raises ValueError if one of them is refused."""
    others = {k for k, x in row.items() if k not in used and not schema.is_empty(x)}
    if refused := sorted(others & refused):
        raise ValueError(f"{name}: {refused[0]} {row[refused[0]]!r:.50} is not supported")
    return others
