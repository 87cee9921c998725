"""CLIP's tokenizer and the byte-level BPE of language models, on tiktoken."""
import functools
import gzip
import hashlib
import html
import json
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch

from data import files

MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")  # from OpenAI's CLIP release, MIT
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
CLEAN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi",
                       "ﬄ": "ffl", "\x00": " "})


def byte_alphabet():
    """Returns character -> byte for the characters that encode bytes in BPE files, in GPT-2's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


@functools.cache
def clip_encoding():
    """Returns CLIP's tiktoken encoding: 256 bytes, 256 bytes that end a word, and 48,894 merges.

    A zero byte marks the end of a word.
    """
    letters = byte_alphabet()
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:48895]

    def token(text):
        word_end = b"\0" if text.endswith("</w>") else b""
        return bytes(letters[c] for c in text.removesuffix("</w>")) + word_end

    tokens = [bytes([b]) for b in letters.values()] + [bytes([b, 0]) for b in letters.values()]
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


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """The byte-level BPE of a tokenizer.json; `begin` holds the ids that every text begins with.

    text: the file's content. name: its name in error messages. Raises ValueError if tiktoken cannot reproduce
    its tokens: SentencePiece, several split patterns, or ids that do not increase in merge order.
    """

    def __init__(self, text, name):
        if not text:
            raise ValueError(f"{name}: no tokenizer.json (or vocab.json and merges.txt) beside its weights")
        with files.explain(f"{name}: tiktoken cannot reproduce its tokenizer.json", *files.DAMAGE):
            d = json.loads(text)
            model, added = d["model"], {t["content"]: t["id"] for t in d.get("added_tokens") or ()}
            pattern, self.nfc = split_pattern(d), d.get("normalizer") is not None
            ranks, special = mergeable(model, added)
            self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                              special_tokens=special)
            post = d.get("post_processor") or {}
            first = [p["single"][0] for p in post.get("processors", [post]) if "single" in p]
            self.begin = [special[part["SpecialToken"]["id"]] for part in first if "SpecialToken" in part]
        self.text, self.size = text, self.encoding.n_vocab
        self.hash = hashlib.sha256(repr((pattern, self.nfc, sorted(ranks.items()))).encode()).hexdigest()

    def encode(self, text):
        """Returns the ids of a text without `begin`; special tokens in it are encoded as plain text."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode(self, ids):
        return self.encoding.decode(ids)


def split_pattern(d):
    """Returns the regular expression that splits text into words; d: the parsed tokenizer.json."""
    if (d.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise ValueError(f"normalizer {d['normalizer']['type']} instead of NFC, as in SentencePiece")
    pre = d.get("pre_tokenizer") or {}
    *splits, byte_level = pre.get("pretokenizers", [pre])
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer is not ByteLevel or adds a prefix space: {json.dumps(byte_level)}")
    if not splits and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    split = splits[0] if len(splits) == 1 else {}
    if byte_level.get("use_regex", True) or split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError(f"not one isolated Split before ByteLevel: {json.dumps(splits)}")
    pattern = split["pattern"]["Regex"]
    return f"{pattern}|(?:(?!{pattern})(?s:.))+"  # also matches the rest, which tiktoken would drop


def mergeable(model, added):
    """Returns bytes -> id of the ordinary tokens and text -> id of the special tokens; added: text -> id."""
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or any(map(model.get, options)):
        values = {k: model.get(k) for k in ("type", *options)}
        raise ValueError(f"its model is not byte-level BPE: {json.dumps(values)}")
    letters, vocab = byte_alphabet(), model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merged = [vocab[a + b] for a, b in merges]
    if late := [m for m, before, after in zip(merges[1:], merged, merged[1:]) if after < before]:
        raise ValueError(f"the merge {' '.join(late[0])} has a smaller id than the one before it")
    if missing := [c for c in letters if c not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are not tokens")
    reachable = {*merged, *(vocab[c] for c in letters)}
    # With ignore_merges (Llama 3), a word in the vocabulary is one token, even if no merges produce it.
    every = model.get("ignore_merges")
    plain = {t: i for t, i in vocab.items() if t not in added and (every or i in reachable)}
    special = added | {t: i for t, i in vocab.items() if t not in plain}
    ids = [*plain.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(0 <= i < 1 << 24 for i in ids):
        raise ValueError("two tokens have the same id, or an id is negative or above 16,777,215")
    return {bytes(letters[c] for c in t): i for t, i in plain.items()}, special
