"""CLIP's tokenizer, and those of language models: byte-level BPE on tiktoken, and SentencePiece's BPE."""
import functools
import gzip
import hashlib
import heapq
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


LETTERS = byte_alphabet()


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
            model, added = d["model"], {t["content"]: t["id"] for t in d.get("added_tokens") or ()}
            merges, plain, special = vocabulary(model, added)
            if model.get("byte_fallback"):
                self.nfc, self.spaced = False, spaced_texts(d)
                self.to_ids = sentencepiece(merges, plain)
                self.bytes = {i: t.replace("▁", " ").encode() for t, i in (plain | special).items()}
                self.bytes |= {plain[t]: bytes([b]) for b, t in enumerate(BYTE_TOKENS)}
                rules = [*merges], sorted(plain.items())  # not `spaced`, which transformers 5 changes
            else:
                pattern, self.nfc, self.spaced = split_pattern(d), d.get("normalizer") is not None, None
                ranks = {bytes(LETTERS[c] for c in t): i for t, i in plain.items()}
                self.to_ids = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                                special_tokens=special).encode_ordinary
                self.bytes = {i: t for t, i in ranks.items()} | {i: t.encode() for t, i in special.items()}
                rules = pattern, self.nfc, sorted(ranks.items())
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


def vocabulary(model, added):
    """Returns the merges (pair -> rank), the ordinary tokens, and the special tokens (text -> id).

    model: that of the tokenizer.json. added: its added tokens, text -> id.
    """
    options = {k: model.get(k) for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    if model.get("type", "BPE") != "BPE" or any(options.values()):
        raise ValueError(f"its model is not plain BPE: {json.dumps(dict(type=model.get('type'), **options))}")
    fallback, vocab = model.get("byte_fallback"), model["vocab"]
    alphabet = BYTE_TOKENS if fallback else LETTERS
    merges = [(a, b) for a, b in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    merged = [vocab[a + b] for a, b in merges]
    # tiktoken merges in the order of the ids.
    if not fallback and (late := [m for m, i, j in zip(merges[1:], merged, merged[1:]) if j < i]):
        raise ValueError(f"the merge {' '.join(late[0])} has a smaller id than the one before it")
    if missing := [c for c in alphabet if c not in vocab]:
        raise ValueError(f"{len(missing)} of the 256 bytes are not tokens")
    reachable = {*merged, *(vocab[c] for c in alphabet)}
    # With ignore_merges (Llama 3), a word in the vocabulary is one token, even if no merges produce it.
    every = fallback or model.get("ignore_merges")
    plain = {t: i for t, i in vocab.items() if t not in added and (every or i in reachable)}
    special = added | {t: i for t, i in vocab.items() if t not in plain}
    ids = [*plain.values(), *special.values()]
    if len(set(ids)) < len(ids) or not all(0 <= i < 1 << 24 for i in ids):
        raise ValueError("two tokens have the same id, or an id is negative or above 16,777,215")
    return {(a, b): rank for rank, (a, b) in enumerate(merges) if a + b in plain}, plain, special


BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # of SentencePiece, for characters without a token
DECODERS = [dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"),
            dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)]


def spaced_texts(d):
    """Returns a regular expression that matches if SentencePiece adds a space to a text.

    d: the parsed tokenizer.json. Raises ValueError if its steps are not those of Llama 2.
    """
    steps = [d.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]
    if (steps[2] or {}).get("decoders") in (DECODERS, DECODERS[:3]) and not d["model"].get("ignore_merges"):
        match steps:
            case {"normalizers": [{"prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}]}, None, _:
                return "(?s:.)"
            case None, {"replacement": "▁", "prepend_scheme": "first" | "always", "split": False}, _:
                return "[^ ▁]"
    raise ValueError(f"byte_fallback, but not Llama 2's steps: {json.dumps(steps):.300}")


def sentencepiece(merges, ids):
    """Returns the function from a text to its ids; merges: pair of tokens -> rank, ids: token -> id."""
    # A word is like "▁the". Unless a merge joins "▁" to a character before it, none joins two words. Each
    # word can then be encoded alone, and the ids of short words are kept for the next time.
    words = re.compile("(?s:.+)" if any(re.search("[^▁]▁", a + b) for a, b in merges) else "▁*[^▁]+|▁+")
    memoized = functools.lru_cache(1 << 17)(lambda word: merge(word, ids, merges))
    return lambda text: [i for word in words.findall(text.replace(" ", "▁"))
                         for i in (memoized(word) if len(word) <= 32 else merge(word, ids, merges))]


def merge(word, ids, ranks):
    """Returns a word's ids: merges the pair of the lowest rank, the leftmost of several, until none is left.

    ids: token -> id. ranks: pair of tokens -> rank. With a heap, n characters take O(n log n) time.
    """
    tokens = [t for c in word for t in ([c] if c in ids else
                                        [BYTE_TOKENS[b] for b in c.encode("utf-8", "surrogatepass")])]
    heap = sorted((ranks[pair], i, pair) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks)
    tokens.append(None)  # the neighbor of the last token and, as tokens[-1], of the first
    left, right = [*range(-1, len(tokens) - 1)], [*range(1, len(tokens)), 0]
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = right[i]
        if (tokens[i], tokens[j]) == pair:  # otherwise an earlier merge has taken one of them
            tokens[i], tokens[j] = "".join(pair), None
            right[i], left[right[j]] = right[j], i
            for a, b in ((left[i], i), (i, right[i])):
                if (pair := (tokens[a], tokens[b])) in ranks:
                    heapq.heappush(heap, (ranks[pair], a, pair))
    return [ids[t] for t in tokens if t]
