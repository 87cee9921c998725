"""CLIP's, byte-level, and SentencePiece's BPE: the reference's ids, what is refused, the hash."""
import copy
import gzip
import json
import random
import time

import pytest
import torch
from conftest import FIXTURES, ROOT

from models import weights
from models.tokenizer import Tokenizer, byte_alphabet, clip_tokens, merge

LETTERS = list(byte_alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
LLAMA3 = json.loads((FIXTURES / "llama3_tokenizer" / "tokenizer.json").read_text())
LLAMA2 = json.loads((FIXTURES / "llama2_tokenizer" / "tokenizer.json").read_text("utf-8"))
METASPACE = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
END = dict(SpecialToken=dict(id="<|end|>", type_id=0))
TEXT = dict(Sequence=dict(id="A", type_id=0))


def small(merges=MERGES, more=(), **parts):
    """Returns a tokenizer.json's dict: 256 bytes, merges, more words without a merge, and <|end|>."""
    words = [*LETTERS, *("".join(m) for m in merges), *more]
    added = [dict(id=len(words), content="<|end|>", special=True)]
    model = dict(type="BPE", vocab={w: i for i, w in enumerate(words)}, merges=[list(m) for m in merges])
    return dict(added_tokens=added, normalizer=None, post_processor=None, model=model,
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=True)) | parts


def make(d):
    return Tokenizer(json.dumps(d), "org/here")


def cases(path):
    """Returns the texts of a fixture with their ids, as {"text", "ids"}."""
    tokenized = json.loads(path.read_text())
    assert len(tokenized) > 10
    return tokenized


# CLIP's tokenizer

def test_the_tokens_of_clip_are_those_of_openclip():
    """Catches: Cleaning, merges, or words differ; one other id moves the whole text feature."""
    texts = cases(FIXTURES / "clip_tokens.json")
    for case, ids in zip(texts, clip_tokens([case["text"] for case in texts]).tolist()):
        assert ids == case["ids"], case["text"]


def test_a_long_text_keeps_its_end_token():
    """Catches: The end token is cut off, and the text feature is read at an arbitrary word."""
    long, exact, short = clip_tokens(["word " * 100, "word " * 75, "word " * 74])
    assert long[0] == 49406
    assert long[76] == 49407
    assert (long != 49407).sum() == 76
    assert torch.equal(long, exact)
    assert short[75] == 49407
    assert short[76] == 0


def test_the_context_of_clip_may_be_shorter():
    ids, = clip_tokens(["word " * 9], context=5).tolist()
    word = clip_tokens(["word"])[0, 1].item()
    assert ids == [49406, word, word, word, 49407]


# The reference's ids

@pytest.mark.parametrize("name", ["llama3_tokenizer", "qwen2_tokenizer"])
def test_the_ids_are_those_of_the_reference(name):
    """Catches: Words or merges differ, and the model reads a text unlike any that it was trained on."""
    tokenizer = Tokenizer((FIXTURES / name / "tokenizer.json").read_text(), name)
    for case in cases(FIXTURES / name / "expected.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def fetch_from(folder):
    """Returns the function that weights.load gives to tokenizer_text, for the files of a folder."""
    def fetch(*names):
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(names)
    return fetch


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2's older form of two files: their folder, and the text of merges.txt without its header."""
    folder = tmp_path_factory.mktemp("gpt2")
    merges = gzip.decompress((FIXTURES / "gpt2_merges.txt.gz").read_bytes()).decode()
    words = [*LETTERS, *(line.replace(" ", "") for line in merges.splitlines()), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text(merges, "utf-8")
    return folder, merges


def test_gpt2s_two_files_give_the_reference_ids(gpt2):
    folder, _ = gpt2
    tokenizer = Tokenizer(weights.tokenizer_text(fetch_from(folder)), "gpt2")
    assert tokenizer.size == 50257
    assert tokenizer.begin == []
    for case in cases(FIXTURES / "gpt2_tokens.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_only_the_version_line_of_merges_txt_is_a_comment(gpt2, tmp_path):
    """Catches: The merge "# #" is taken for a comment, or the version for a merge."""
    folder, merges = gpt2
    assert not merges.startswith("#version")
    assert "\n# #\n" in merges
    (tmp_path / "vocab.json").write_text((folder / "vocab.json").read_text("utf-8"), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges, "utf-8")
    text = weights.tokenizer_text(fetch_from(tmp_path))
    assert json.loads(text)["model"]["merges"] == merges.splitlines()
    assert text == weights.tokenizer_text(fetch_from(folder))


def test_half_of_gpt2s_two_files_is_no_tokenizer(tmp_path):
    assert weights.tokenizer_text(fetch_from(tmp_path)) == ""
    (tmp_path / "vocab.json").write_text("{}")
    assert weights.tokenizer_text(fetch_from(tmp_path)) == ""
    (tmp_path / "merges.txt").write_text("")
    assert json.loads(weights.tokenizer_text(fetch_from(tmp_path)))["model"] == dict(vocab={}, merges=[])


def test_tokenizer_json_is_preferred_to_the_older_files(tmp_path):
    for name, content in {"vocab.json": "{}", "merges.txt": "", "tokenizer.json": "é"}.items():
        (tmp_path / name).write_text(content, "utf-8")
    assert weights.tokenizer_text(fetch_from(tmp_path)) == "é"


@pytest.fixture(scope="module")
def embedded():
    return Tokenizer((ROOT / "data" / "tokenizer.json").read_text(), "data/tokenizer.json")


def test_in_the_embedded_tokenizer_every_number_is_one_token(embedded):
    """Catches: Numbers have several tokens, so that the small GPTs of the first example learn no sums."""
    ids = [embedded.encode(f" {number}") for number in range(145)]
    assert all(len(i) == 1 for i in ids)
    assert len({i for i, in ids}) == 145


def test_the_last_token_of_the_embedded_tokenizer_is_the_end_token(embedded):
    """Catches: train_lm.py, which takes the last one, ends responses with another token."""
    assert embedded.decode([embedded.size - 1]) == "<|endoftext|>"


def test_the_embedded_tokenizer_gives_a_text_back(embedded):
    text = " Tom has 7 bags of 12 eggs each. How many? 7 x 12 = 84 #### 84"
    assert embedded.decode(embedded.encode(text)) == text


# SentencePiece's BPE

def llama2(merges=LLAMA2["model"]["merges"], more=(), **parts):
    """Returns the dict of Llama 2's tokenizer.json with more tokens, other merges, or other parts."""
    vocab = LLAMA2["model"]["vocab"]
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(more)}
    return LLAMA2 | dict(model=LLAMA2["model"] | dict(vocab=vocab, merges=merges)) | parts


@pytest.mark.parametrize("form", ["normalizer", "metaspace"])
def test_the_ids_of_sentencepiece_are_those_of_transformers(form):
    """Catches: Spaces, merges, or bytes differ in one of the two forms in which transformers writes them."""
    metaspace = form == "metaspace"
    tokenizer = make(llama2(normalizer=None, pre_tokenizer=METASPACE) if metaspace else LLAMA2)
    assert tokenizer.size == 800 and tokenizer.begin == [1]
    for case in cases(FIXTURES / "llama2_tokenizer" / "expected.json"):
        case = case | case.get("metaspace", {}) if metaspace else case
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        if part := None if metaspace else case.get("part"):
            assert tokenizer.decode(case["ids"][part["start"]:part["stop"]]) == part["decoded"]


def test_the_story_of_llama2c_has_the_ids_of_its_model():
    """Catches: The tokenizer made of llama2.c's 512 pieces is not that of the model beside it."""
    folder = FIXTURES / "stories260k"
    story = json.loads((folder / "expected.json").read_text())
    tokenizer = Tokenizer((folder / "tokenizer.json").read_text("utf-8"), "stories260k")
    assert tokenizer.begin + tokenizer.encode(story["text"].removeprefix(" ")) == story["greedy"]
    assert tokenizer.decode(story["greedy"][1:], first=False) == story["text"]
    assert tokenizer.size == 512


def test_a_space_is_added_to_a_text_and_not_to_its_continuation():
    """Catches: An answer begins with a space that its text lacks, or loses the one that it has."""
    tokenizer = make(LLAMA2)
    for text in ("people", " people", "\npeople"):
        assert tokenizer.encode(text, first=False) != tokenizer.encode(text)
        assert tokenizer.encode(text, first=False) == tokenizer.encode(f"\n{text}")[2:]
        assert tokenizer.decode(tokenizer.encode(text, first=False), first=False) == text
        assert tokenizer.decode(tokenizer.encode(text), first=False) == f" {text}"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == tokenizer.encode("", first=False) == []
    byte_level = make(small())
    assert byte_level.encode("hello", first=False) == byte_level.encode("hello")
    assert byte_level.decode(byte_level.encode(" hello")) == " hello"


@pytest.mark.parametrize("d", [small(), LLAMA2], ids=["byte-level", "SentencePiece"])
def test_the_bytes_of_the_tokens_are_those_of_the_text(d):
    """Catches: A character of several tokens, or a space, is lost where answers are printed in color."""
    tokenizer, text = make(d), "hello  people 🙂é\n猫 12"
    assert b"".join(tokenizer.bytes[i] for i in tokenizer.encode(text, first=False)) == text.encode()
    assert {b"<s>", b"<|end|>"} & set(tokenizer.bytes.values())
    assert set(tokenizer.bytes) == set(range(tokenizer.size))


def test_bytes_that_are_no_character_are_replaced():
    tokenizer = make(LLAMA2)
    ids = tokenizer.encode("a🦜")
    assert len(ids) == 5
    assert tokenizer.decode([*ids[:4], *tokenizer.encode("\nb", first=False)]) == "a\ufffd\nb"


def test_half_of_a_surrogate_pair_in_a_json_file_is_no_error():
    assert make(LLAMA2).decode(make(LLAMA2).encode(json.loads('"a\\ud83db"'))) == "a\ufffd\ufffd\ufffdb"


def test_special_tokens_are_not_merged_from_plain_text():
    """Catches: A text that spells </s> ends a response, if merges make it."""
    merges = [["</", "s"], ["<", "/"], ["</s", ">"], *LLAMA2["model"]["merges"]]
    tokenizer, text = make(llama2(merges, ["<", ">", "</", "</s"])), "a</s>b <s><unk>"
    assert not {0, 1, 2} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def naive(word, ids, ranks):
    """Returns the ids of a word by the definition: one merge at a time, after a search of the whole word."""
    tokens = list(word)
    while found := [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks]:
        _, i = min(found)
        tokens[i:i + 2] = ["".join(tokens[i:i + 2])]
    return [ids[token] for token in tokens]


@pytest.mark.parametrize("seed", range(20))
def test_merges_are_those_of_the_definition(seed):
    """Catches: A pair that a merge creates waits its turn, or two of one rank are merged from the right.

    The ranks of all merges among some random tokens are in a random order.
    """
    rng = random.Random(seed)
    tokens = [*"ab▁", *{"".join(rng.choices("ab▁", k=rng.randint(2, 4))) for _ in range(25)}]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids]
    rng.shuffle(pairs)
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    for _ in range(30):
        word = "".join(rng.choices("ab▁", k=rng.randrange(40)))
        assert merge(word, ids, ranks) == naive(word, ids, ranks), word


def test_a_long_text_without_spaces_takes_seconds():
    """Catches: Each merge searches the whole text; one in Chinese takes hours."""
    start = time.perf_counter()
    ids = make(LLAMA2).encode("nothing" * 30_000)
    assert time.perf_counter() - start < 30
    assert len(ids) > 30_000


def test_short_words_are_encoded_once(monkeypatch):
    """Catches: Texts of many words, most of which were there before, take ten times as long."""
    words, whole = [], merge
    monkeypatch.setattr("models.tokenizer.merge", lambda word, *a: words.append(word) or whole(word, *a))
    make(LLAMA2).encode("the end of the long-long-" + "long" * 9 + " end")
    assert words == ["▁the", "▁end", "▁of", "▁long-long-" + "long" * 9]


def test_a_token_may_join_two_words():
    """Catches: A text is split into words although the vocabulary has tokens that cross their boundary."""
    tokenizer = make(llama2([["e", "▁"], *LLAMA2["model"]["merges"]], ["e▁"]))
    assert [tokenizer.bytes[i] for i in tokenizer.encode("the e")] == [b" th", b"e ", b"e"]


# Parts of a tokenizer.json

def test_a_special_token_in_a_text_is_plain_text():
    """Catches: A text that spells the end token ends a response, or begins the turn of another role."""
    tokenizer, text = make(small()), "hello<|end|> hello"
    assert tokenizer.size - 1 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_id_of_a_special_token_is_decoded():
    tokenizer = make(small())
    assert tokenizer.decode([*tokenizer.encode("hello"), tokenizer.size - 1]) == "hello<|end|>"


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_special_token_in_the_vocabulary_is_not_mergeable(ignore_merges):
    """Catches: Words in a text become special tokens, which GPT-2 and Falcon3 list among the words."""
    d = small()
    d["model"]["vocab"]["<|end|>"] = 256 + len(MERGES)
    d["model"]["ignore_merges"] = ignore_merges
    tokenizer = make(d)
    assert tokenizer.size == 256 + len(MERGES) + 1
    assert tokenizer.size - 1 not in tokenizer.encode("<|end|>")
    assert tokenizer.hash == make(small()).hash


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a Sequence as in Llama 3"])
def test_the_template_may_begin_every_text_with_a_token(nested):
    """Catches: Llama's begin token is forgotten, without which the model was never trained."""
    template = dict(type="TemplateProcessing", single=[END, TEXT])
    if nested:
        template = dict(type="Sequence", processors=[dict(type="ByteLevel"), template])
    tokenizer = make(small(post_processor=template))
    assert tokenizer.begin == [tokenizer.size - 1]


def test_encode_does_not_add_the_token_that_begins_a_text():
    """Catches: The token is there twice, since data/text.py puts it before each text."""
    tokenizer = make(small(post_processor=dict(type="TemplateProcessing", single=[END, TEXT])))
    assert tokenizer.begin[0] not in tokenizer.encode("hello")


@pytest.mark.parametrize("post", [
    None, dict(type="ByteLevel"), dict(type="Sequence", processors=[dict(type="ByteLevel")]),
    dict(type="TemplateProcessing", single=[TEXT, END])], ids=["none", "ByteLevel", "Sequence", "at the end"])
def test_without_such_a_template_no_token_begins_a_text(post):
    """Catches: A token that ends every text is taken for one that begins it."""
    assert make(small(post_processor=post)).begin == []


def test_nfc_composes_letters_where_the_file_asks_for_it():
    """Catches: One letter in two spellings is two words: Qwen2 composes them, Llama does not."""
    plain, nfc = make(small()), make(small(normalizer=dict(type="NFC")))
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert nfc.encode(decomposed) == nfc.encode(composed) == plain.encode(composed)
    assert plain.encode(composed) != plain.encode(decomposed)
    assert nfc.decode(nfc.encode(decomposed)) == composed
    assert plain.decode(plain.encode(decomposed)) == decomposed


def test_a_word_that_no_merge_makes_is_one_token_only_with_ignore_merges():
    """Catches: Llama 3's words without merges are not found, or are found where merges decide."""
    d = small(merges=MERGES[:4], more=["Ġhello"])
    vocab = d["model"]["vocab"]
    assert make(d).encode(" hello hello") == [vocab["Ġ"], vocab["hello"]] * 2
    d["model"]["ignore_merges"] = True
    assert make(d).encode(" hello hello") == [vocab["Ġhello"]] * 2
    assert make(d).decode([vocab["Ġhello"]]) == " hello"


def test_merges_are_strings_or_pairs():
    """Catches: Files before 2024, which write a merge as "a b", are refused or read as other merges."""
    pairs, strings = small(), small()
    strings["model"]["merges"] = [" ".join(m) for m in strings["model"]["merges"]]
    assert make(strings).encode(" hello") == make(pairs).encode(" hello") == [256 + 4]
    assert make(strings).hash == make(pairs).hash


def test_the_bytes_may_have_another_order():
    """Catches: A byte's id is taken for its position in GPT-2's order, unlike in tiktoken's files."""
    d = small()
    d["model"]["vocab"] |= {letter: byte for letter, byte in byte_alphabet().items()}
    text, ids = "a\x00é hello\n", [97, 0, 0xc3, 0xa9, 260, 10]
    assert make(d).encode(text) == ids
    assert make(d).decode(ids) == text


def test_text_that_the_split_pattern_leaves_out_is_a_word():
    """Catches: Characters are lost: unlike the reference, tiktoken drops what the pattern does not match."""
    d = copy.deepcopy(LLAMA3)
    d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    tokenizer = make(d)
    assert tokenizer.decode(tokenizer.encode("12 eggs")) == "12 eggs"


# What is refused

def two_splits(d):
    splits = d["pre_tokenizer"]["pretokenizers"]
    splits.insert(0, copy.deepcopy(splits[0]))


def swap_ids(d):
    """Two ids against the order of the merges: tiktoken merges by id, the reference by the list."""
    vocab = d["model"]["vocab"]
    one, other = ("".join(merge) for merge in d["model"]["merges"][5:7])
    vocab[one], vocab[other] = vocab[other], vocab[one]


def change(*path, **values):
    """Returns a function that updates the dict at a path of keys."""
    def apply(d):
        for key in path:
            d = d[key]
        d.update(values)
    return apply


SPLIT, LEVEL = (("pre_tokenizer", "pretokenizers", i) for i in (0, 1))
REFUSED = {
    "a prepended space": (change(normalizer=dict(type="Prepend", prepend="▁")), "Prepend", "SentencePiece"),
    "Metaspace": (change(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    "lower case": (change(normalizer=dict(type="Lowercase")), "Lowercase"),
    "no pre-tokenizer": (change(pre_tokenizer=None), "pre_tokenizer"),
    "Unigram": (change("model", type="Unigram"), "Unigram"),
    "WordPiece": (change("model", type="WordPiece", continuing_subword_prefix="##"), "WordPiece"),
    "word ends": (change("model", end_of_word_suffix="</w>"), '"end_of_word_suffix": "</w>"'),
    "ids out of merge order": (swap_ids, "merge", "smaller id"),
    "a byte is missing": (lambda d: d["model"]["vocab"].pop("A"), "1 of the 256 bytes"),
    "two splits": (two_splits, "not one isolated Split"),
    "split and GPT-2's own pattern": (change(*LEVEL, use_regex=True), "not one isolated Split"),
    "split that removes": (change(*SPLIT, behavior="Removed"), "not one isolated Split"),
    "no split": (change(pre_tokenizer=dict(type="ByteLevel", use_regex=False)), "not one isolated Split"),
    "inverted split": (change(*SPLIT, invert=True), "not one isolated Split"),
    "a prefix space": (change(*LEVEL, add_prefix_space=True), "prefix space"),
    "no regular expression": (change(*SPLIT, pattern=dict(Regex="(")), "tokenizer.json"),
    "unknown begin token": (change(post_processor=dict(single=[dict(SpecialToken=dict(id="<s>"))])), "<s>"),
    "merge of no token": (lambda d: d["model"]["merges"].append(["zz", "zz"]), "zzzz"),
    "merge of three": (lambda d: d["model"]["merges"].append("a b c"), ""),
    "fractional id": (change("model", "vocab", A=1.5), ""),
    "no model": (lambda d: d.pop("model"), "model"),
}


# Changes of Llama 2's
PREPEND, REPLACE = (("normalizer", "normalizers", i) for i in (0, 1))
STRIP = ("decoder", "decoders", 3)
REFUSED_LLAMA2 = {
    "Unigram": (change("model", type="Unigram", vocab=[["a", -1.5]]), "Unigram"),
    "dropout": (change("model", dropout=0.1), '"dropout": 0.1'),
    "whole texts": (change("model", ignore_merges=True), "byte_fallback"),
    "a byte is missing": (lambda d: d["model"]["vocab"].pop("<0x0A>"), "1 of the 256 bytes"),
    "merge of no token": (lambda d: d["model"]["merges"].append(["zz", "zz"]), "zzzz"),
    "no normalizer": (change(normalizer=None), "byte_fallback"),
    "another prefix": (change(*PREPEND, prepend="_"), '"prepend": "_"'),
    "another space": (change(*REPLACE, content="_"), '"content": "_"'),
    "more steps": (lambda d: d["normalizer"]["normalizers"].insert(0, dict(type="NFKC")), "NFKC"),
    "normalizer and pre-tokenizer": (change(pre_tokenizer=METASPACE), "Metaspace"),
    "Metaspace that splits": (
        change(normalizer=None, pre_tokenizer=METASPACE | dict(split=True)), '"split": true'),
    "Metaspace that adds no space": (
        change(normalizer=None, pre_tokenizer=METASPACE | dict(prepend_scheme="never")), "never"),
    "bytes before": (change(pre_tokenizer=dict(type="ByteLevel")), "ByteLevel"),
    "no decoder": (change(decoder=None), "byte_fallback"),
    "another decoder": (change(decoder=dict(type="Metaspace")), "Metaspace"),
    "strips two spaces": (change(*STRIP, start=2), "byte_fallback"),
}


@pytest.mark.parametrize("base, case", [("llama3", case) for case in REFUSED]
                         + [("llama2", case) for case in REFUSED_LLAMA2])
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(base, case):
    """Catches: A text gets other tokens than in the model's training, or the error names no file."""
    apply, *words = REFUSED[case] if base == "llama3" else REFUSED_LLAMA2[case]
    d = copy.deepcopy(LLAMA3 if base == "llama3" else LLAMA2)
    apply(d)
    with pytest.raises(ValueError, match="org/here") as caught:
        make(d)
    assert all(word in str(caught.value) for word in words)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("d", [
    LLAMA3, LLAMA2, llama2(decoder=dict(type="Sequence", decoders=LLAMA2["decoder"]["decoders"][:3])),
    llama2(normalizer=None, pre_tokenizer=METASPACE | dict(prepend_scheme="always"))],
    ids=["Llama 3", "Llama 2", "no Strip", "always a space"])
def test_the_tokenizer_that_those_changes_begin_with_is_not_refused(d):
    assert make(d).size > 256


@pytest.mark.parametrize("ids", [dict(A=5), dict(A=-1), dict(A=1 << 40)], ids=["twice", "negative", "large"])
def test_ids_that_cannot_be_are_refused(ids):
    """Catches: A panic inside tiktoken, which no `except Exception` catches, or an overflow."""
    d = small()
    d["model"]["vocab"] |= ids
    with pytest.raises(ValueError, match="org/here"):
        make(d)


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '"a"', "[" * 100_000, '{"model": null}'])
def test_a_damaged_tokenizer_json_is_named(text):
    with pytest.raises(ValueError, match="org/here.*tokenizer.json"):
        Tokenizer(text, "org/here")


def test_without_a_tokenizer_the_error_says_which_files_are_missing_and_where():
    """Catches: A folder that holds only weights gives an error about JSON."""
    with pytest.raises(ValueError, match="org/here") as caught:
        Tokenizer("", "org/here")
    assert all(name in str(caught.value) for name in ("tokenizer.json", "vocab.json", "merges.txt"))


# The hash

def more_special_tokens(d):
    d["added_tokens"] += [dict(id=400, content="<|user|>"), dict(id=401, content="<|other|>")]


def renamed_end_token(d):
    d["added_tokens"][0]["content"] = "<|stop|>"


def first_token(d):
    d["post_processor"] = dict(type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<|end|>"))])


@pytest.mark.parametrize("apply", [more_special_tokens, renamed_end_token, first_token])
def test_special_tokens_do_not_change_the_hash(apply):
    """Catches: A reward is refused for a chat model, which has more special tokens than its base."""
    d = small()
    apply(d)
    assert make(d).hash == make(small()).hash


def test_any_other_token_word_or_merge_changes_the_hash():
    """Catches: A reward is put on a model whose ids mean other words."""
    swapped = small()
    vocab = swapped["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    split = dict(type="Split", pattern=dict(Regex=r"\s+|\S+"), behavior="Isolated", invert=False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, use_regex=False)
    pattern = dict(type="Sequence", pretokenizers=[split, byte_level])
    changed = [small(), swapped, small(MERGES[:4]), small([*MERGES, ("a", "b")]),
               small(pre_tokenizer=pattern), small(normalizer=dict(type="NFC"))]
    assert len({make(d).hash for d in changed}) == len(changed)


@pytest.mark.parametrize("parts", [
    dict(added_tokens=[*LLAMA2["added_tokens"], dict(id=800, content="<pad>")]), dict(post_processor=None),
    dict(normalizer=None, pre_tokenizer=METASPACE)], ids=["<pad>", "no begin", "Metaspace"])
def test_the_same_pieces_of_sentencepiece_have_the_same_hash(parts):
    """Catches: A reward is refused for a Llama 2 with a token for padding, or that transformers 5 saved."""
    assert make(llama2(**parts)).hash == make(LLAMA2).hash


def test_any_other_piece_or_merge_changes_the_hash():
    merges, vocab = LLAMA2["model"]["merges"], dict(LLAMA2["model"]["vocab"])
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]
    changed = [LLAMA2, llama2(merges[:-1]), llama2([merges[1], merges[0], *merges[2:]]), llama2(more=["qqq"]),
               llama2(model=LLAMA2["model"] | dict(vocab=vocab))]
    assert len({make(d).hash for d in changed}) == len(changed)
