"""The tokenizers of language models: byte-level BPE, on tiktoken. data/sentencepiece.py has Llama 2's."""
import hashlib
import json
import re
import unicodedata

import tiktoken

from data import files, schema
from data.bpe import LETTERS

LONGEST_RUN = 200_000  # of spaces; with 1,000,000, tiktoken ends the program
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same between digits, each of which is alone (SmolLM2): no other space is joined with what follows.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


class Tokenizer:
    """The BPE of a tokenizer.json, byte-level or SentencePiece's; `begin` holds the ids that begin a text.

    `bytes` maps each id to its token; `special` is the set of texts that count as plain text here. text: the
    file's content. name: its name in error messages. Raises ValueError if its ids cannot be reproduced:
    Unigram, several split patterns, byte_fallback with steps other than Llama 2's, or byte-level ids that do
    not increase in merge order.
    """

    def __init__(self, text, name):
        if not text:
            raise ValueError(f"{name}: no tokenizer.json (or vocab.json and merges.txt) beside its weights")
        with files.explain(f"{name}: cannot reproduce its tokenizer.json", *files.DAMAGE):
            d = files.parse_json(text)
            schema.check(d, "tokenizer.json", "tokenizer")
            schema.check(d["model"], "tokenizer.json: model", "bpe")
            added, matched, self.special = added_tokens(d)
            self.nfc, self.spaced, self.each_piece = False, None, False
            if d["model"].get("byte_fallback"):
                from data import sentencepiece  # an optional file
                self.to_ids, self.bytes, special, rules = sentencepiece.read(d, added)
                self.spaced, self.each_piece = sentencepiece.spaced_texts(d)
            else:
                self.to_ids, self.bytes, special, rules = byte_level(d, added, name)
                self.nfc = d.get("normalizer") is not None
            # Two passes, as in the tokenizers library: before and after normalization.
            self.passes = [alternatives(matched[False]), alternatives(map(self.normalize, matched[True]))]
            self.added = {self.normalize(t) if t in matched[True] else t: i for t, i in added.items()}
            self.begin = beginning(d.get("post_processor") or {}, special)
            # Tokens after which SentencePiece adds a space, if it does so to each piece between added tokens.
            self.breaks = {added[t] for kind in matched.values() for t in kind} if self.each_piece else ()
        self.text, self.size = text, max(self.bytes) + 1
        every = rules, sorted(special.items()), *map(sorted, matched.values()), self.begin
        # Of what decides all ids, and of what decides those of ordinary tokens.
        self.hash, self.ordinary = (hashlib.sha256(repr(x).encode()).hexdigest() for x in (every, rules))

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text, first=True):
        """Returns the ids of a text without `begin`; special tokens in it are encoded as plain text.

        first: False for a later segment of a text, to which SentencePiece adds no space. The ids of the
        segments are those of the text, unless one of its tokens is in two segments. Raises ValueError if
        tiktoken cannot split the text.
        """
        if len(text) > LONGEST_RUN and (run := re.search(r"\s{%d}" % LONGEST_RUN, text)):
            raise ValueError(f"{LONGEST_RUN:,} spaces in a row from character {run.start():,} on")
        before, after = self.passes
        pieces = before.split(text)  # every second one is an added token
        for i in range(len(pieces) - 1, -1, -2):
            pieces[i:i + 1] = after.split(self.normalize(pieces[i]))
        ids = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.added[piece])
            elif piece:
                begins = self.spaced and (self.each_piece if i else first)
                ids += self.to_ids(" " + piece if begins and re.match(self.spaced, piece) else piece)
        return ids

    def decode(self, ids, first=True):
        """Returns the text of ids. first: as in `encode`, whose space is removed.

        Bytes that are not UTF-8, such as those of half a character, become U+FFFD. Ids without a token, which
        a base's output matrix may have, are left out.
        """
        text = b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if first and self.spaced else text


def added_tokens(d):
    """Returns the added tokens of a tokenizer.json, text -> id, those to match in text, and the special ones.

    The second is a dict: whether a token is matched in normalized text -> tokens. Raises ValueError for an id
    that the tokenizers library would not give, and options that this file does not have.
    """
    added, matched, special, vocab = {}, {False: [], True: []}, set(), d["model"]["vocab"]
    following = len(vocab)
    for token in d.get("added_tokens") or ():
        schema.check(token, "tokenizer.json: added_tokens", "added_token")
        content = token["content"]
        added_id = vocab.get(content, following)
        if token["id"] != added_id or not content or content in added:
            raise ValueError(f"its added token {content!r} has the id {token['id']}, not {added_id}")
        added[content], following = added_id, max(following, added_id + 1)
        if token.get("special"):
            special.add(content)
        elif any(token.get(k) for k in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"its added token {content!r} takes spaces or whole words only: not supported")
        else:
            matched[bool(token.get("normalized"))].append(content)
    return added, matched, special


def alternatives(texts):
    """Returns a pattern whose split puts these texts, the longest first, at the odd places of the list."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or '(?!)'})")


def beginning(post, special):
    """Returns the ids that a tokenizer.json's post_processor puts before a text; special: text -> id.

    Raises ValueError if it also puts some behind it, or does what is not supported.
    """
    begin = []
    for step in post.get("processors", [post] if post else []):
        if step["type"] == "TemplateProcessing":
            *before, text = step["single"]
            if "Sequence" not in text or not all("SpecialToken" in part for part in before):
                raise ValueError(f"its post_processor puts tokens behind a text: {step['single']}")
            tokens, given = [part["SpecialToken"]["id"] for part in before], step.get("special_tokens", {})
            begin += [special[token] for token in tokens]
            if wrong := [t for t in tokens if t in given and given[t]["ids"] != [special[t]]]:
                raise ValueError(f"its post_processor gives {wrong[0]} the ids {given[wrong[0]]['ids']}")
        elif step["type"] != "ByteLevel":
            raise ValueError(f"its post_processor {step['type']} is not supported")
    return begin


def byte_level(d, added, name):
    """Returns (text -> ids, id -> bytes, special tokens, rules) of a byte-level tokenizer.json.

    d: its parsed content. added: its added tokens, text -> id. rules: what decides the ids of ordinary text.
    """
    _, plain, special = vocabulary(d["model"], added, LETTERS)
    pattern, ranks = split_pattern(d), {bytes(LETTERS[c] for c in t): i for t, i in plain.items()}
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def to_ids(text):
        try:
            return encoding.encode_ordinary(text)
        except BaseException as error:  # of Rust, which has no public class
            if type(error).__name__ == "PanicException":
                raise ValueError(f"tiktoken cannot split {text!r:.60}: {error!s:.100}") from None
            raise

    tokens = {i: t.encode() if t in added or {*t} - LETTERS.keys() else bytes(LETTERS[c] for c in t)
              for t, i in (plain | special).items()}
    rules = pattern, d.get("normalizer") is not None, sorted(ranks.items())
    return to_ids, tokens, special, rules


def split_pattern(d):
    """Returns the regular expression that splits text into words; d: the parsed tokenizer.json."""
    if d.get("normalizer") not in (None, dict(type="NFC")):
        raise ValueError(f"normalizer {json.dumps(d['normalizer']):.80} instead of NFC, as in SentencePiece")
    if (d.get("decoder") or {}).get("type", "ByteLevel") != "ByteLevel":
        raise ValueError(f"decoder {json.dumps(d['decoder']):.80} instead of ByteLevel")
    pre = d.get("pre_tokenizer") or {}
    *splits, byte_level = pre.get("pretokenizers", [pre])
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer is not ByteLevel or adds a prefix space: {json.dumps(byte_level)}")
    match splits, byte_level.get("use_regex", True):
        case [], True:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}], True:
            return DIGITS_PATTERN
        case [{"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}], False:
            check_pattern(pattern)
            return f"{pattern}|(?:(?!{pattern})(?s:.))+"  # also matches the rest, which tiktoken would drop
        case [{"pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}], False:
            check_pattern(pattern)
            return pattern  # the rest is dropped
    raise ValueError(f"not one isolated Split before ByteLevel: {json.dumps(splits)}")


def check_pattern(pattern):
    """Raises ValueError if a regular expression may match nothing, where tiktoken loses text or crashes."""
    python = re.sub(r"\\[pP](\{\^?\w+\}|\w)", "a", pattern)  # Unicode's classes, which `re` does not have
    with files.explain("its split pattern is not supported", re.error):
        shortest, _ = re._parser.parse(python).getwidth()  # `re` has no public function for it
    if not shortest:
        raise ValueError(f"its split pattern {pattern!r:.80} may match nothing")


def vocabulary(model, added, alphabet):
    """Returns the merges (pair -> rank), the ordinary tokens, and the special tokens (text -> id).

    model: that of the tokenizer.json. added: its added tokens, text -> id. alphabet: the tokens of the bytes.
    """
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
