"""The tokenizers of language models: byte-level BPE, on tiktoken. data/sentencepiece.py has Llama 2's."""
import hashlib
import json
import re
import unicodedata

import tiktoken

from data import files
from data.bpe import LETTERS

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """The BPE of a tokenizer.json, byte-level or SentencePiece's; `begin` holds the ids that begin a text.

    `bytes` maps each id to its token. text: the file's content. name: its name in error messages. Raises
    ValueError if its ids cannot be reproduced: Unigram, several split patterns, byte_fallback with steps
    other than Llama 2's, or byte-level ids that do not increase in merge order.
    """

    def __init__(self, text, name):
        if not text:
            raise ValueError(f"{name}: no tokenizer.json (or vocab.json and merges.txt) beside its weights")
        with files.explain(f"{name}: cannot reproduce its tokenizer.json", *files.DAMAGE):
            d = json.loads(text)
            added = {t["content"]: t["id"] for t in d.get("added_tokens") or ()}
            self.nfc, self.spaced = False, None
            if d["model"].get("byte_fallback"):
                from data import sentencepiece  # an optional file
                self.to_ids, self.bytes, special, rules = sentencepiece.read(d, added)
                self.spaced = sentencepiece.spaced_texts(d)
            else:
                self.to_ids, self.bytes, special, rules = byte_level(d, added, name)
                self.nfc = d.get("normalizer") is not None
            post = d.get("post_processor") or {}
            first = [p["single"][0] for p in post.get("processors", [post]) if "single" in p]
            self.begin = [special[part["SpecialToken"]["id"]] for part in first if "SpecialToken" in part]
        self.text, self.size = text, max(self.bytes) + 1
        self.hash = hashlib.sha256(repr(rules).encode()).hexdigest()

    def encode(self, text, first=True):
        """Returns the ids of a text without `begin`; special tokens in it are encoded as plain text.

        first: False for a later segment of a text, to which SentencePiece adds no space. The ids of the
        segments are those of the text, unless one of its tokens is in two segments.
        """
        space = " " if first and self.spaced and re.match(self.spaced, text) else ""
        return self.to_ids(space + (unicodedata.normalize("NFC", text) if self.nfc else text))

    def decode(self, ids, first=True):
        """Returns the text of ids. first: as in `encode`, whose space is removed.

        Bytes that are not UTF-8, such as those of half a character, become U+FFFD.
        """
        text = b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if first and self.spaced else text


def byte_level(d, added, name):
    """Returns (text -> ids, id -> bytes, special tokens, rules) of a byte-level tokenizer.json.

    d: its parsed content. added: its added tokens, text -> id. rules: what decides the ids of ordinary text.
    """
    _, plain, special = vocabulary(d["model"], added, LETTERS)
    pattern, ranks = split_pattern(d), {bytes(LETTERS[c] for c in t): i for t, i in plain.items()}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokens = {i: t for t, i in ranks.items()} | {i: t.encode() for t, i in special.items()}
    rules = pattern, d.get("normalizer") is not None, sorted(ranks.items())
    return encoding.encode_ordinary, tokens, special, rules


def split_pattern(d):
    """Returns the regular expression that splits text into words; d: the parsed tokenizer.json."""
    if (d.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise ValueError(f"normalizer {d['normalizer']['type']} instead of NFC, as in SentencePiece")
    pre = d.get("pre_tokenizer") or {}
    *splits, byte_level = pre.get("pretokenizers", [pre])
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer is not ByteLevel or adds a prefix space: {json.dumps(byte_level)}")
    match splits, byte_level.get("use_regex", True):
        case [], True:
            return GPT2_PATTERN
        case [{"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}], False:
            return f"{pattern}|(?:(?!{pattern})(?s:.))+"  # also matches the rest, which tiktoken would drop
    raise ValueError(f"not one isolated Split before ByteLevel: {json.dumps(splits)}")


def vocabulary(model, added, alphabet):
    """Returns the merges (pair -> rank), the ordinary tokens, and the special tokens (text -> id).

    model: that of the tokenizer.json. added: its added tokens, text -> id. alphabet: the tokens of the bytes.
    """
    options = {k: model.get(k) for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    if model.get("type", "BPE") != "BPE" or any(options.values()):
        raise ValueError(f"its model is not plain BPE: {json.dumps(dict(type=model.get('type'), **options))}")
    vocab = model["vocab"]
    merges = [(a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    merged = [vocab[a + b] for a, b in merges]
    late = [merge for merge, i, j in zip(merges[1:], merged, merged[1:]) if j < i]
    if late and alphabet is LETTERS:  # tiktoken merges in the order of the ids
        raise ValueError(f"the merge {' '.join(late[0])} has a smaller id than the one before it")
    if missing := [c for c in alphabet if c not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are not tokens")
    reachable = {*merged, *(vocab[c] for c in alphabet)}
    # With ignore_merges (Llama 3), a word in the vocabulary is one token, even if no merges produce it.
    every = model.get("byte_fallback") or model.get("ignore_merges")
    plain = {t: i for t, i in vocab.items() if t not in added and (every or i in reachable)}
    special = added | {t: i for t, i in vocab.items() if t not in plain}
    ids = [*plain.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(0 <= i < 1 << 24 for i in ids):
        raise ValueError("two tokens have the same id, or an id is negative or above 16,777,215")
    return {(a, b): rank for rank, (a, b) in enumerate(merges) if a + b in plain}, plain, special
