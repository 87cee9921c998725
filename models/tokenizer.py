"""CLIP's tokenizer, on tiktoken."""
import functools
import gzip
import html
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch

MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # from OpenAI's CLIP release, MIT
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
CLEAN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi",
                       "ﬄ": "ffl", "\x00": " "})


def byte_alphabet():
    """The byte that each character of a byte-level BPE file stands for, in GPT-2's order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


@functools.cache
def clip_encoding():
    """49,406 entries: 256 bytes, 256 bytes at a word's end, 48,894 merges. A word's end is written as byte
    0."""
    letters = byte_alphabet()
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:48895]

    def token(text):
        return bytes(letters[c] for c in text.removesuffix("</w>")) + b"\0" * text.endswith("</w>")

    tokens = [bytes([b]) for b in letters.values()] + [bytes([b, 0]) for b in letters.values()]
    tokens += [b"".join(token(part) for part in line.split()) for line in merges]
    return tiktoken.Encoding("clip", pat_str=r"[^\x00]+\x00", special_tokens={},
                             mergeable_ranks={t: rank for rank, t in enumerate(tokens)})


def clip_tokens(texts, context=77):
    """Strings -> ids [N, context], int64: start, text, end, zeros. Too long a text is cut, its end token
    kept.

    As in CLIP's reference, HTML entities, curly quotes and ligatures are resolved and letters lower-cased.
    """
    encoding = clip_encoding()
    start, end = encoding.n_vocab, encoding.n_vocab + 1
    ids = torch.zeros(len(texts), context, dtype=torch.long)
    for row, text in zip(ids, texts):
        text = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).translate(CLEAN).lower()
        # Every number is a word of its own; ½ and ² too, which re's \d does not know.
        text = "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in text)
        words = encoding.encode_ordinary("".join(word + "\0" for word in WORD.findall(text)))
        row[: len(words) + 2] = torch.tensor([start, *words[: context - 2], end])
    return ids
