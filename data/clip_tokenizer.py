"""CLIP's tokenizer, on tiktoken."""
import functools
import gzip
import html
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch

from data.bpe import LETTERS

MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # from OpenAI's CLIP release, MIT
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
CLEAN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi",
                       "ﬄ": "ffl", "\x00": " "})


@functools.cache
def clip_encoding():
    """Returns CLIP's tiktoken encoding: 256 bytes, 256 bytes that end a word, and 48,894 merges.

    A zero byte marks the end of a word.
    """
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:48895]

    def token(text):
        word_end = b"\0" if text.endswith("</w>") else b""
        return bytes(LETTERS[c] for c in text.removesuffix("</w>")) + word_end

    tokens = [bytes([b]) for b in LETTERS.values()] + [bytes([b, 0]) for b in LETTERS.values()]
    tokens += [b"".join(token(part) for part in line.split()) for line in merges]
    return tiktoken.Encoding("clip", pat_str=r"[^\x00]+\x00", special_tokens={},
                             mergeable_ranks={t: rank for rank, t in enumerate(tokens)})


def clip_tokens(texts, context=77):
    """Returns token ids [N, context] of N strings: start, text, end, zeros. Long texts are truncated.

    As in CLIP's reference code, HTML entities, curly quotes, and ligatures are replaced, and letters are
    lowercased. A truncated text keeps its end token.
    """
    encoding = clip_encoding()
    start, end = encoding.n_vocab, encoding.n_vocab + 1
    ids = torch.zeros(len(texts), context, dtype=torch.long)
    for row, text in zip(ids, texts):
        text = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).translate(CLEAN).lower()
        # Every digit is a word; so are ½ and ², which \d does not match.
        text = "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in text)
        words = encoding.encode_ordinary("".join(word + "\0" for word in WORD.findall(text)))
        row[: len(words) + 2] = torch.tensor([start, *words[: context - 2], end])
    return ids
