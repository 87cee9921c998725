"""Prompts in a file, for eval.py --prompts, and the form in which a reward reads a conversation."""
from pathlib import Path

from data import files, schema, text_files


def read(path):
    """Returns (name for errors, messages, reference answer or None) of each prompt in a file.

    A .txt file has a prompt in each line; the rows of a .jsonl file have "prompt" or "messages", dicts with
    role and content. The reference is "response", or the answer that the messages end with. Raises ValueError
    that names the file and line.
    """
    path, found = Path(path), []
    if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: its name must end in .txt or .jsonl")
    if path.suffix == ".txt":
        lines = enumerate(files.read_text(path).splitlines(), 1)
        rows = [(f"{path} line {i}", dict(prompt=line)) for i, line in lines if line.strip()]
    else:
        rows = text_files.jsonl_rows(path)
    for name, row in rows:
        messages = row.get("messages", [dict(role="user", content=row.get("prompt"))])
        messages, reference = [text_files.plain(message) for message in messages or [{}]], row.get("response")
        for message in messages:
            schema.check(message, f"{name}: a prompt, or one of its messages", "message")
        if messages[-1]["role"] == "assistant" and messages[1:]:
            reference = messages.pop()["content"]
        found.append((name, messages, reference))
    if not found:
        raise ValueError(f"{path}: holds no prompt")
    return found


def begun(messages, template):
    """Returns the segments of a conversation in Tulu's form, up to where its next answer begins.

    template: that of the reward's training. Raises ValueError if it is another.
    """
    if template != text_files.TULU:
        raise ValueError("the reward was trained on prompts, not messages: --chat-template gives them the "
                         "form of --base's own conversations")
    parts = [part for message in messages for part in text_files.turn("a prompt", message, as_messages=False)]
    return [*parts, ("<|assistant|>\n", False)]
