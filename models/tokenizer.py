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


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """The tokenizer in a tokenizer.json: `encode` text, `decode` ids; begin: ids that open every text.

    text: the file's content; name: what errors call it. Refuses, with a ValueError, what tiktoken would cut
    into other tokens: SentencePiece, other splits than one pattern, ids that do not grow in merge order.
    """

    def __init__(self, text, name):
        if not text:
            raise ValueError(f"{name}: no tokenizer.json (or vocab.json and merges.txt) beside its weights")
        try:
            d = json.loads(text)
            model, added = d["model"], {t["content"]: t["id"] for t in d.get("added_tokens") or ()}
            pattern, self.nfc = split_pattern(d), d.get("normalizer") is not None
            ranks, special = mergeable(model, added)
            self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                              special_tokens=special)
            post = d.get("post_processor") or {}
            first = [p["single"][0] for p in post.get("processors", [post]) if "single" in p]
            self.begin = [special[part["SpecialToken"]["id"]] for part in first if "SpecialToken" in part]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error!s:.300}"
            raise ValueError(f"{name}: its tokenizer.json is none that tiktoken can express: {why}") from None
        self.text, self.size = text, self.encoding.n_vocab
        self.hash = hashlib.sha256(repr((pattern, self.nfc, sorted(ranks.items()))).encode()).hexdigest()

    def encode(self, text):
        """Text -> ids; what looks like a special token is text like any other."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def decode(self, ids):
        return self.encoding.decode(ids)


def split_pattern(d):
    """The regular expression that cuts a text into words, of a tokenizer.json's dict."""
    if (d.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise ValueError(f"normalizer {d['normalizer']['type']}; SentencePiece has such")
    pre = d.get("pre_tokenizer") or {}
    *splits, level = pre.get("pretokenizers", [pre])
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer {json.dumps(level)}, no ByteLevel without a prefix space")
    if not splits and level.get("use_regex", True):
        return GPT2_PATTERN
    split, = splits if len(splits) == 1 else [{}]
    if level.get("use_regex", True) or split.get("behavior") != "Isolated" or split.get("invert"):
        raise ValueError(f"not one isolated Split before ByteLevel: {json.dumps(splits)}")
    pattern = split["pattern"]["Regex"]
    return f"{pattern}|(?:(?!{pattern})(?s:.))+"  # what it leaves out, tiktoken would drop: a word too


def mergeable(model, added):
    """(bytes -> rank, special token -> id) of a tokenizer.json's model and added tokens."""
    odd = [k for k in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if model.get("type", "BPE") != "BPE" or odd:
        raise ValueError(f"model {model.get('type')} with {', '.join(odd) or 'no merges'}; no byte-level BPE")
    letters, vocab = byte_alphabet(), model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [vocab[a + b] for a, b in merges]
    if late := [m for m, one, other in zip(merges[1:], made, made[1:]) if other < one]:
        raise ValueError(f"the merge {' '.join(late[0])} has a smaller id than the one before it")
    if missing := [c for c in letters if c not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are no token")
    made = {*made, *(vocab[c] for c in letters)}
    # A word that no merge makes is only found where the vocabulary is asked before the merges (Llama 3).
    kept = {t: i for t, i in vocab.items() if t not in added and (i in made or model.get("ignore_merges"))}
    special = added | {t: i for t, i in vocab.items() if t not in kept}
    ids = [*kept.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(0 <= i < 1 << 24 for i in ids):
        raise ValueError("two tokens have one id, or an id is negative or beyond 16,777,215")
    return {bytes(letters[c] for c in t): i for t, i in kept.items()}, special
