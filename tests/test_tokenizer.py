"""Byte-level BPE: ids of the reference for every form of file, special tokens, what is refused, the hash."""
import copy
import gzip
import json

import pytest
from conftest import FIXTURES, ROOT

from models import weights
from models.tokenizer import Tokenizer, byte_alphabet

LETTERS = list(byte_alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
LLAMA3 = json.loads((FIXTURES / "llama3_tokenizer" / "tokenizer.json").read_text())


def small(merges=MERGES, more=(), **parts):
    """A tokenizer.json's dict: 256 bytes, merges, more words without a merge, and the special <|end|>."""
    words = [*LETTERS, *("".join(m) for m in merges), *more]
    added = [dict(id=len(words), content="<|end|>", special=True)]
    model = dict(type="BPE", vocab={w: i for i, w in enumerate(words)}, merges=[list(m) for m in merges])
    return dict(added_tokens=added, normalizer=None, post_processor=None, model=model,
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=True)) | parts


def make(d):
    return Tokenizer(json.dumps(d), "org/here")


def fetch_from(folder):
    """What weights.load gives to tokenizer_text."""
    def fetch(*names):
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(names)
    return fetch


def cases(path):
    found = json.loads(path.read_text())
    assert len(found) > 10
    return found


# The reference's ids

@pytest.mark.parametrize("name", ["llama3_tokenizer", "qwen2_tokenizer"])
def test_ids_are_those_of_the_reference(name):
    """Another cut into words or another order of merges: the model reads a text that it never saw."""
    tokenizer = Tokenizer((FIXTURES / name / "tokenizer.json").read_text(), name)
    for case in cases(FIXTURES / name / "expected.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_gpt2_from_vocab_and_merges(tmp_path):
    """GPT-2's older form of two files; merges such as "# #" must not be taken for a comment."""
    merges = gzip.decompress((FIXTURES / "gpt2_merges.txt.gz").read_bytes()).decode()
    assert not merges.startswith("#version") and "\n# #\n" in merges
    words = [*LETTERS, *(line.replace(" ", "") for line in merges.splitlines()), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    for header in ("", "#version: 0.2\n"):
        (tmp_path / "merges.txt").write_text(header + merges, "utf-8")
        tokenizer = Tokenizer(weights.tokenizer_text(fetch_from(tmp_path)), "gpt2")
    assert tokenizer.size == 50257 and tokenizer.begin == []
    for case in cases(FIXTURES / "gpt2_tokens.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_tokenizer_text_prefers_tokenizer_json_and_needs_both_older_files(tmp_path):
    """Half of the two files taken for a tokenizer, or the older form read where both are there."""
    assert weights.tokenizer_text(fetch_from(tmp_path)) == ""
    (tmp_path / "vocab.json").write_text("{}")
    assert weights.tokenizer_text(fetch_from(tmp_path)) == ""
    (tmp_path / "merges.txt").write_text("")
    assert json.loads(weights.tokenizer_text(fetch_from(tmp_path)))["model"] == dict(vocab={}, merges=[])
    (tmp_path / "tokenizer.json").write_text("é", "utf-8")
    assert weights.tokenizer_text(fetch_from(tmp_path)) == "é"


def test_the_tokenizer_of_the_embedded_texts():
    """Numbers in several tokens: the small GPTs of the first example could then not learn their sums."""
    tokenizer = Tokenizer((ROOT / "data" / "tokenizer.json").read_text(), "data/tokenizer.json")
    ids = [tokenizer.encode(f" {number}") for number in range(145)]
    assert all(len(i) == 1 for i in ids) and len({i for i, in ids}) == 145
    assert tokenizer.decode([tokenizer.size - 1]) == "<|endoftext|>"  # train_lm.py takes it as the end token
    text = " Tom has 7 bags of 12 eggs each. How many? 7 x 12 = 84 #### 84"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Parts of a tokenizer.json

def test_special_tokens_in_a_text_are_text():
    """A text that spells the end token would end a response, or open another role's turn."""
    tokenizer, text = make(small()), "hello<|end|> hello"
    end = tokenizer.size - 1
    assert end not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("hello"), end]) == "hello<|end|>"


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_special_token_that_is_in_the_vocabulary_too(ignore_merges):
    """GPT-2 and Falcon3 list special tokens among the words: they must not become mergeable."""
    d = small()
    d["model"]["vocab"]["<|end|>"] = 256 + len(MERGES)
    d["model"]["ignore_merges"] = ignore_merges
    tokenizer = make(d)
    assert tokenizer.size == 256 + len(MERGES) + 1 and tokenizer.size - 1 not in tokenizer.encode("<|end|>")
    assert tokenizer.hash == make(small()).hash


@pytest.mark.parametrize("nested", [False, True])
def test_what_opens_every_text(nested):
    """Llama's begin token forgotten: the model was never trained on a text without it."""
    template = dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<|end|>", type_id=0)),
                                                       dict(Sequence=dict(id="A", type_id=0))])
    if nested:  # Llama 3's form
        template = dict(type="Sequence", processors=[dict(type="ByteLevel"), template])
    tokenizer = make(small(post_processor=template))
    assert tokenizer.begin == [tokenizer.size - 1]
    assert tokenizer.begin[0] not in tokenizer.encode("hello")  # data/text.py puts it there, once a text


@pytest.mark.parametrize("post", [
    None, dict(type="ByteLevel"), dict(type="Sequence", processors=[dict(type="ByteLevel")]),
    dict(type="TemplateProcessing", single=[dict(Sequence=dict(id="A", type_id=0)),
                                            dict(SpecialToken=dict(id="<|end|>", type_id=0))])])
def test_nothing_opens_a_text(post):
    """A token that closes a text taken for one that opens it."""
    assert make(small(post_processor=post)).begin == []


def test_nfc():
    """Two spellings of one letter as two words (Qwen2 composes them, Llama does not)."""
    plain, nfc = make(small()), make(small(normalizer=dict(type="NFC")))
    one, two = "caf\u00e9", "cafe\u0301"
    assert nfc.encode(two) == nfc.encode(one) == plain.encode(one) != plain.encode(two)
    assert nfc.decode(nfc.encode(two)) == one and plain.decode(plain.encode(two)) == two


def test_words_without_merges():
    """Llama 3 has words that no merge makes: found where the vocabulary is asked first, and only there."""
    d = small(merges=MERGES[:4], more=["Ġhello"])
    word = d["model"]["vocab"]["Ġhello"]
    space, hello = d["model"]["vocab"]["Ġ"], d["model"]["vocab"]["hello"]
    assert make(d).encode(" hello hello") == [space, hello] * 2
    d["model"]["ignore_merges"] = True
    assert make(d).encode(" hello hello") == [word] * 2 and make(d).decode([word]) == " hello"


def test_merges_as_strings_or_pairs():
    """Files before 2024 write a merge as "a b"."""
    pairs, strings = small(), small()
    strings["model"]["merges"] = [" ".join(m) for m in strings["model"]["merges"]]
    assert make(strings).encode(" hello") == make(pairs).encode(" hello") == [256 + 4]
    assert make(strings).hash == make(pairs).hash


def test_bytes_in_another_order():
    """tiktoken's own files have the bytes in numerical order; a byte is then not its letter's place."""
    d = small()
    d["model"]["vocab"] |= {letter: byte for letter, byte in byte_alphabet().items()}
    text, ids = "a\x00é hello\n", [97, 0, 0xc3, 0xa9, 260, 10]
    assert make(d).encode(text) == ids and make(d).decode(ids) == text


# What is refused

def sentencepiece(d):
    """Llama 2's form, as transformers writes it."""
    d["normalizer"] = dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="▁"),
                                                         dict(type="Replace", content="▁")])
    d["pre_tokenizer"] = None
    d["model"]["byte_fallback"] = True


def two_splits(d):
    d["pre_tokenizer"]["pretokenizers"].insert(0, copy.deepcopy(d["pre_tokenizer"]["pretokenizers"][0]))


def swap_ids(d):
    """Two ids against the merges' order: tiktoken merges by id, the reference by the list."""
    v, (one, other) = d["model"]["vocab"], ["".join(m) for m in d["model"]["merges"][5:7]]
    v[one], v[other] = v[other], v[one]


def change(*path, **values):
    def apply(d):
        for key in path:
            d = d[key]
        d.update(values)
    return apply


SPLIT, LEVEL = (("pre_tokenizer", "pretokenizers", i) for i in (0, 1))
REFUSED = {
    "SentencePiece": (sentencepiece, "SentencePiece"),
    "a prepended space": (change(normalizer=dict(type="Prepend", prepend="▁")), "Prepend", "SentencePiece"),
    "byte_fallback": (change("model", byte_fallback=True), "byte_fallback"),
    "Metaspace": (change(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    "lower case": (change(normalizer=dict(type="Lowercase")), "Lowercase"),
    "no pre-tokenizer": (change(pre_tokenizer=None), "pre_tokenizer"),
    "Unigram": (change("model", type="Unigram"), "Unigram"),
    "WordPiece": (change("model", type="WordPiece", continuing_subword_prefix="##"), "WordPiece"),
    "word ends": (change("model", end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "ids out of merge order": (swap_ids, "merge", "smaller id"),
    "a byte is missing": (lambda d: d["model"]["vocab"].pop("A"), "1 of the 256 bytes"),
    "two splits": (two_splits, "not one isolated Split"),
    "split and GPT-2's own pattern": (change(*LEVEL, use_regex=True), "not one isolated Split"),
    "split that removes": (change(*SPLIT, behavior="Removed"), "not one isolated Split"),
    "no split": (change(pre_tokenizer=dict(type="ByteLevel", use_regex=False)), "not one isolated Split"),
    "inverted split": (change(*SPLIT, invert=True), "not one isolated Split"),
    "a prefix space": (change(*LEVEL, add_prefix_space=True), "prefix space"),
    "no regular expression": (change(*SPLIT, pattern=dict(Regex="(")), "tiktoken"),
    "unknown begin token": (change(post_processor=dict(single=[dict(SpecialToken=dict(id="<s>"))])), "<s>"),
    "merge of no token": (lambda d: d["model"]["merges"].append(["zz", "zz"]), "zzzz"),
    "merge of three": (lambda d: d["model"]["merges"].append("a b c"), ""),
    "fractional id": (change("model", "vocab", A=1.5), ""),
    "no model": (lambda d: d.pop("model"), "model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """Other tokens than the model was trained on, in silence, or an error that does not say whose file."""
    apply, *words = REFUSED[case]
    d = copy.deepcopy(LLAMA3)
    make(d)
    apply(d)
    with pytest.raises(ValueError, match="org/here") as caught:
        make(d)
    assert all(word in str(caught.value) for word in words) and len(str(caught.value)) < 500


@pytest.mark.parametrize("ids", [dict(A=5), dict(A=-1), dict(A=1 << 40)])
def test_ids_that_cannot_be(ids):
    """Two tokens of one id panic inside tiktoken, which no `except Exception` holds; others overflow."""
    d = small()
    d["model"]["vocab"] |= ids
    with pytest.raises(ValueError, match="org/here"):
        make(d)


def test_split_that_leaves_text_out():
    """tiktoken drops what the pattern does not match, the reference keeps it as a word of its own."""
    d = copy.deepcopy(LLAMA3)
    d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    try:
        tokenizer = make(d)
    except ValueError as error:
        assert "org/here" in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("12 eggs")) == "12 eggs"


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '"a"', "[" * 100_000, '{"model": null}'])
def test_damaged_text(text):
    with pytest.raises(ValueError, match="org/here.*tokenizer.json"):
        Tokenizer(text, "org/here")


def test_no_tokenizer():
    """A folder of weights alone: the message must say which files it lacks, and where."""
    with pytest.raises(ValueError, match="org/here") as caught:
        Tokenizer("", "org/here")
    assert all(name in str(caught.value) for name in ("tokenizer.json", "vocab.json", "merges.txt"))


# The hash

def test_hash():
    """Rewards carried to a model whose ids mean other words, or refused for a chat model's extra tokens."""
    first = make(small()).hash
    special = small()
    special["added_tokens"] += [dict(id=400, content="<|user|>"), dict(id=401, content="<|other|>")]
    renamed = small()
    renamed["added_tokens"][0]["content"] = "<|stop|>"
    template = dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<|end|>"))])
    for same in (special, renamed, small(post_processor=template)):
        assert make(same).hash == first
    ranks = small()
    v = ranks["model"]["vocab"]
    v["A"], v["B"] = v["B"], v["A"]
    split = dict(type="Split", pattern=dict(Regex=r"\s+|\S+"), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, use_regex=False)
    pattern = dict(type="Sequence", pretokenizers=[split, level])
    others = [ranks, small(MERGES[:4]), small([*MERGES, ("a", "b")]), small(pre_tokenizer=pattern),
              small(normalizer=dict(type="NFC"))]
    assert len({first, *(make(other).hash for other in others)}) == 1 + len(others)
