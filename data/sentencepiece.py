"""Llama 2's form of SentencePiece: BPE over characters, with a token for each byte of the others."""
import functools
import heapq
import json
import re

from data.tokenizer import vocabulary

BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]  # for characters without a token
DECODERS = [dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"),
            dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)]


def read(d, added):
    """Returns (text -> ids, id -> bytes, special tokens, rules), as tokenizer.byte_level does."""
    merges, plain, special = vocabulary(d["model"], added, BYTE_TOKENS)
    tokens = {i: t.replace("▁", " ").encode() for t, i in (plain | special).items()}
    tokens |= {plain[t]: bytes([b]) for b, t in enumerate(BYTE_TOKENS)}
    rules = [*merges], sorted(plain.items())  # not `spaced_texts`, which transformers 5 changes
    return encoder(merges, plain), tokens, special, rules


def spaced_texts(d):
    """Returns a regular expression that matches texts to which SentencePiece adds a space.

    And whether it adds one to each piece between added tokens as well, not only to the first. d: the parsed
    tokenizer.json. Raises ValueError if its steps are not those of Llama 2.
    """
    steps = [d.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]
    if (steps[2] or {}).get("decoders") in (DECODERS, DECODERS[:3]) and not d["model"].get("ignore_merges"):
        match steps:
            case {"normalizers": [{"prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}]}, None, _:
                if any(t.get("normalized") and not t.get("special") for t in d.get("added_tokens") or ()):
                    raise ValueError("added tokens that are matched in normalized text: not supported")
                return "(?s:.)", True
            case None, {"replacement": "▁", "prepend_scheme": "first" | "always" as when, "split": False}, _:
                return "[^ ▁]", when == "always"
    raise ValueError(f"byte_fallback, but not Llama 2's steps: {json.dumps(steps):.300}")


def encoder(merges, ids):
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
