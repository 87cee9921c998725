"""CLIP's, byte-level, and SentencePiece's BPE: the reference's ids, what is refused, the hash."""
import copy
import gzip
import json
import random
import re
import time

import pytest
from conftest import FIXTURES

import data.tokenizer
from data.bpe import LETTERS
from data.clip_tokenizer import clip_tokens
from data.tokenizer import Tokenizer
from models import gpt

TEXTS = {name: (FIXTURES / name / "tokenizer.json").read_text("utf-8")
         for name in ("llama3_tokenizer", "qwen2_tokenizer", "smollm2_tokenizer", "llama2_tokenizer",
                      "stories260k")}
LLAMA3, LLAMA2, SMOLLM2 = (json.loads(TEXTS[f"{name}_tokenizer"])
                           for name in ("llama3", "llama2", "smollm2"))
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
METASPACE = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)


def small(merges=MERGES, more=(), special="<|end|>", **parts):
    """Returns a tokenizer.json's dict: 256 bytes, merges, more words without a merge, and a special token."""
    words = [*LETTERS, *("".join(m) for m in merges), *more]
    vocab = {w: i for i, w in enumerate(words)}
    added = [dict(id=vocab.get(special, len(words)), content=special, special=True)]
    model = dict(type="BPE", vocab=vocab, merges=[list(m) for m in merges])
    return dict(added_tokens=added, normalizer=None, post_processor=None, model=model,
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=True)) | parts


def llama2(merges=LLAMA2["model"]["merges"], more=(), **parts):
    """Returns the dict of Llama 2's tokenizer.json with more tokens, other merges, or other parts."""
    vocab = LLAMA2["model"]["vocab"]
    vocab = vocab | {token: len(vocab) + i for i, token in enumerate(more)}
    return LLAMA2 | dict(model=LLAMA2["model"] | dict(vocab=vocab, merges=merges)) | parts


def make(d):
    return Tokenizer(json.dumps(d), "org/here")


def changed(d, /, *path, **values):
    """Returns a copy in which the dict at a path of keys is updated with these values."""
    whole = part = copy.deepcopy(d)
    for key in path:
        part = part[key]
    part.update(values)
    return whole


def cases(name):
    """Returns the texts of a fixture with the reference's ids, as {"text", "ids"}."""
    return json.loads((FIXTURES / name).read_text())


# The reference's ids

def test_the_tokens_of_clip_are_those_of_openclip():
    """Catches: Cleaning, merges, or words differ; one other id moves the whole text feature."""
    texts = cases("clip_tokens.json")
    for case, ids in zip(texts, clip_tokens([case["text"] for case in texts]).tolist()):
        assert ids == case["ids"], case["text"]
    for one, other in (("cat &lt;", "cat &amp;lt;"), ("a ½", "a½")):  # which the fixture lacks
        assert clip_tokens([one]).equal(clip_tokens([other]))


def test_a_long_text_of_clip_keeps_its_end_token():
    """Catches: The end token is cut off, and the text feature is read at an arbitrary word."""
    word = clip_tokens(["word"])[0, 1].item()
    for context, number in ((5, 25), (5, 3), (5, 2), (77, 97), (77, 75), (77, 74)):
        ids, = clip_tokens(["word " * number], context).tolist()
        kept = min(number, context - 2)
        assert ids == [49406, *[word] * kept, 49407, *[0] * (context - 2 - kept)]


@pytest.mark.parametrize("name", ["llama3_tokenizer", "qwen2_tokenizer", "smollm2_tokenizer", "gpt2"])
def test_the_ids_are_those_of_the_reference(tmp_path, name):
    """Catches: Words or merges differ, "# #" is taken for a comment, or Qwen2 is split as GPT-2."""
    if name == "gpt2":
        merges = gzip.decompress((FIXTURES / "gpt2_merges.txt.gz").read_bytes()).decode()
        words = [*LETTERS, *(line.replace(" ", "") for line in merges.splitlines()), "<|endoftext|>"]
        (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        with pytest.raises(ValueError, match="qwen2 without tokenizer.json.*save a fast tokenizer"):
            gpt.tokenizer_text(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        tokenizer = Tokenizer(gpt.tokenizer_text(str(tmp_path)), name)
        assert tokenizer.size == 50257 and tokenizer.begin == []
        assert tokenizer.decode([50256]) == "<|endoftext|>"
        assert "# #" in json.loads(tokenizer.text)["model"]["merges"]
    else:
        tokenizer = Tokenizer(TEXTS[name], name)
    for case in cases("gpt2_tokens.json" if name == "gpt2" else f"{name}/expected.json"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", ["qwen2_tokenizer", "llama3_tokenizer", "llama2_tokenizer"])
def test_the_ids_of_200_strings_are_those_of_the_tokenizers_library(name):
    """Catches: Digits of other scripts, odd spaces, or joined emojis are split in another way."""
    texts = [x["text"] for x in cases("smollm2_tokenizer/expected.json") if "<|" not in x["text"]]
    tokenizer, ids = Tokenizer(TEXTS[name], name), cases("smollm2_tokenizer/others.json")[name]
    assert len(texts) >= 200 and [tokenizer.encode(text) for text in texts] == ids


def test_half_of_the_two_files_is_no_tokenizer_and_tokenizer_json_is_preferred(tmp_path):
    for name, expected in {"vocab.json": "", "tokenizer.json": "é", "merges.txt": "é"}.items():
        (tmp_path / name).write_text("é", "utf-8")
        assert gpt.tokenizer_text(str(tmp_path)) == expected


@pytest.mark.parametrize("metaspace", [False, True], ids=["normalizer", "Metaspace"])
def test_the_ids_of_sentencepiece_are_those_of_transformers(metaspace):
    """Catches: Spaces, merges, or bytes differ in one of the two forms in which transformers writes them."""
    tokenizer = make(llama2(normalizer=None, pre_tokenizer=METASPACE) if metaspace else LLAMA2)
    assert tokenizer.size == 800 and tokenizer.begin == [1]
    for case in cases("llama2_tokenizer/expected.json"):
        case |= case.get("metaspace", {}) if metaspace else {}
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        if part := None if metaspace else case.get("part"):
            assert tokenizer.decode(case["ids"][part["start"]:part["stop"]]) == part["decoded"]


def test_the_story_of_llama2c_has_the_ids_of_its_model():
    """Catches: The tokenizer made of llama2.c's 512 pieces is not that of the model beside it."""
    story = cases("stories260k/expected.json")
    tokenizer = Tokenizer(TEXTS["stories260k"], "stories260k")
    assert tokenizer.size == 512
    assert tokenizer.begin + tokenizer.encode(story["text"].removeprefix(" ")) == story["greedy"]
    assert tokenizer.decode(story["greedy"][1:], first=False) == story["text"]


def test_a_space_is_added_to_a_text_and_not_to_its_continuation_and_half_a_character_is_replaced():
    """Catches: An answer has a space that its text lacks, or what a model samples is an error."""
    tokenizer = make(LLAMA2)
    for text in ("people", " people", "\npeople"):
        assert tokenizer.encode(text, first=False) == tokenizer.encode(f"\n{text}")[2:]
        assert tokenizer.decode(tokenizer.encode(text, first=False), first=False) == text
        assert tokenizer.decode(tokenizer.encode(text), first=False) == f" {text}"
    assert tokenizer.encode("") == tokenizer.encode("", first=False) == []
    *half, _ = tokenizer.encode("a🦜")
    assert tokenizer.decode([*half, *tokenizer.encode("\nb", first=False)]) == "a\ufffd\nb"
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffd\ufffd\ufffdb"  # of a JSON file
    byte_level = make(small())
    assert byte_level.encode("hello", first=False) == byte_level.encode("hello")
    assert byte_level.decode(byte_level.encode(" hello")) == " hello"


STOP = small([("s", "t"), ("o", "p"), ("st", "op")], special="stop")
END_MERGES = [["</", "s"], ["<", "/"], ["</s", ">"], *LLAMA2["model"]["merges"]]


@pytest.mark.parametrize("d", [small(), STOP, changed(STOP, "model", ignore_merges=True),
                               llama2(END_MERGES, ["<", ">", "</", "</s"])])
def test_a_special_token_in_a_text_is_plain_text_and_bytes_are_those_of_the_text(d):
    """Catches: A text that spells the end token ends a response, or half a character is lost in colors."""
    tokenizer, special = make(d), {token["id"]: token["content"] for token in d["added_tokens"]}
    text = f"stop {' '.join(special.values())}a</s>b  people 🙂é\n猫 12"
    ids = tokenizer.encode(text)
    assert not special.keys() & {*ids}
    assert tokenizer.decode([*ids, *special]) == text + "".join(special.values())
    assert b"".join(tokenizer.bytes[i] for i in tokenizer.encode(text, first=False)) == text.encode()
    assert set(tokenizer.bytes) == set(range(tokenizer.size))


@pytest.mark.parametrize("pattern", [".+", "▁*[ab]+"], ids=["across words", "within words"])
@pytest.mark.parametrize("seed", range(8))
def test_merges_are_those_of_the_definition(seed, pattern):
    """Catches: A new pair waits its turn, merges begin on the right, or a token that joins words is lost."""
    rng = random.Random(seed)  # of the tokens, of the order of all merges among them, and of the texts
    tokens = {"".join(rng.choices("ab▁", k=rng.randint(2, 4))) for _ in range(25)}
    tokens = [*"ab▁", *sorted(token for token in tokens if re.fullmatch(pattern, token))]
    pairs = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= {*tokens}]
    rng.shuffle(pairs)
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    d = llama2(pairs, tokens)
    tokenizer, vocab = make(d), d["model"]["vocab"]
    for _ in range(60):
        parts = text = rng.choices("ab▁", k=rng.randrange(40))
        while found := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]:
            _, i = min(found)
            parts = [*parts[:i], "".join(parts[i:i + 2]), *parts[i + 2:]]
        assert tokenizer.encode("".join(text), first=False) == [vocab[part] for part in parts], text


def test_a_long_text_without_spaces_takes_seconds():
    """Catches: Each merge searches the whole text; one in Chinese takes hours."""
    start = time.perf_counter()
    assert len(make(LLAMA2).encode("nothing" * 30_000)) > 30_000
    assert time.perf_counter() - start < 30


# Parts of a tokenizer.json

START, END = (dict(SpecialToken=dict(id=text, type_id=0)) for text in ("<s>", "<|end|>"))
TEXT, TEMPLATE = dict(Sequence=dict(id="A", type_id=0)), dict(type="TemplateProcessing")
BEGINS = TEMPLATE | dict(single=[END, TEXT])


@pytest.mark.parametrize("post, begins", [
    (None, False), (dict(type="ByteLevel"), False), (TEMPLATE | dict(single=[TEXT]), False), (BEGINS, True),
    (dict(type="Sequence", processors=[dict(type="ByteLevel"), BEGINS]), True)])
def test_the_template_may_begin_every_text_with_a_token(post, begins):
    """Catches: Llama's begin token is forgotten, is there twice, or a token that ends texts begins them."""
    tokenizer = make(small(post_processor=post))
    assert tokenizer.begin == [tokenizer.size - 1] * begins
    assert tokenizer.size - 1 not in tokenizer.encode("hello")


BARE = small(merges=MERGES[:4], more=["Ġhello"])  # no merge makes its last word
SPLIT, LEVEL = (("pre_tokenizer", "pretokenizers", i) for i in (0, 1))


@pytest.mark.parametrize("d, text, tokens", [
    (BARE, " hello", "Ġ hello"), (changed(BARE, "model", ignore_merges=True), " hello", "Ġhello"),
    (small(), "e\u0301", "e Ì ģ"), (small(normalizer=dict(type="NFC")), "e\u0301", "Ã ©"),
    (changed(small(), "model", "vocab", **LETTERS), "a\0é hello\n", "a Ā Ã © Ġhello Ċ"),
    (changed(LLAMA3, *SPLIT, pattern=dict(Regex=r"\p{N}{1,3}")), "12 eggs", "12 Ġeggs"),
    (changed(LLAMA3, *SPLIT, behavior="Removed", invert=True), "12 eggs", "12 Ġeggs")],
    ids=["merges", "ignore_merges", "Llama", "NFC", "order of bytes", "split", "split of tiktoken"])
def test_the_file_decides_which_tokens_a_text_has(d, text, tokens):
    """Catches: Letters are composed for Llama, ids of bytes are GPT-2's, or text between words is lost."""
    tokenizer, vocab = make(d), d["model"]["vocab"]
    assert tokenizer.encode(text) == [vocab[token] for token in tokens.split()]
    assert tokenizer.decode(tokenizer.encode(text)) == ("é" if tokens == "Ã ©" else text)


# What is refused

SPLITS = LLAMA3["pre_tokenizer"]["pretokenizers"]
REFUSED = {  # the changed dict, or its JSON, and words of the message
    "no file": ("", "tokenizer.json", "vocab.json", "merges.txt"),
    "deep": ("[" * 100_000, "tokenizer.json"),
    "normalizer": (changed(LLAMA3, normalizer=dict(type="Prepend", prepend="▁")), "Prepend", "SentencePiece"),
    "no pre-tokenizer": (changed(LLAMA3, pre_tokenizer=None), "pre_tokenizer"),
    "Unigram": (changed(LLAMA3, "model", type="Unigram"), "Unigram"),
    "word parts": (changed(LLAMA3, "model", continuing_subword_prefix="##"),
                   "continuing_subword_prefix '##'"),
    "word ends": (changed(LLAMA3, "model", end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    "dropout": (changed(LLAMA2, "model", dropout=0.1), "dropout 0.1"),
    "ids not in merge order": (changed(small(), "model", "vocab", he=257, ll=256), "merge l l has a smaller"),
    "two splits": (changed(LLAMA3, "pre_tokenizer", pretokenizers=[SPLITS[0], *SPLITS]), "not one isolated"),
    "split and GPT-2's own pattern": (changed(LLAMA3, *LEVEL, use_regex=True), "not one isolated Split"),
    "split that removes": (changed(LLAMA3, *SPLIT, behavior="Removed"), "not one isolated Split"),
    "inverted split": (changed(LLAMA3, *SPLIT, invert=True), "not one isolated Split"),
    "no split": (changed(small(), "pre_tokenizer", use_regex=False), "not one isolated Split"),
    "removes nothing": (changed(LLAMA3, *SPLIT, behavior="Removed", invert=True, pattern=dict(Regex="(")),
                        "tokenizer.json"),
    "groups of digits": (changed(SMOLLM2, *SPLIT, individual_digits=False), "not one isolated Split"),
    "digits without words": (changed(SMOLLM2, *LEVEL, use_regex=False), "not one isolated Split"),
    "prefix space": (changed(LLAMA3, *LEVEL, add_prefix_space=True), "prefix space"),
    "no regular expression": (changed(LLAMA3, *SPLIT, pattern=dict(Regex="(")), "tokenizer.json"),
    "unknown begin": (changed(LLAMA3, post_processor=TEMPLATE | dict(single=[START, TEXT])), "<s>"),
    "end token": (small(post_processor=TEMPLATE | dict(single=[TEXT, END])), "behind a text"),
    "another id of the template": (small(post_processor=BEGINS | dict(special_tokens={"<|end|>": dict(
        ids=[7])})), "<|end|> the ids [7]"),
    "other post_processor": (small(post_processor=dict(type="RobertaProcessing")), "RobertaProcessing"),
    "no bytes": (changed(LLAMA3, "model", vocab={}, merges=[], added_tokens=[]), "added token"),
    "ids that are not next": (small(added_tokens=[dict(id=400, content="<|user|>")]), "not 261"),
    "an added token twice": (small(added_tokens=[dict(id=261 + i, content="x y") for i in (0, 1)]), "x y"),
    "a token that takes spaces": (small(added_tokens=[dict(id=261, content="x y", lstrip=True)]), "x y"),
    "a pattern that matches nothing": (changed(LLAMA3, *SPLIT, pattern=dict(Regex=r"\\p{L}*|\\s")),
                                       "nothing"),
    "a pattern that may match nothing": (changed(LLAMA3, *SPLIT, pattern=dict(Regex="(?<=qq)")), "nothing"),
    "an unknown key": (changed(LLAMA3, "model", max_input_chars=3), "max_input_chars 3"),
    "a key twice": (json.dumps(small())[:-1] + ', "normalizer": {"type": "NFC"}}', "twice"),
    "another decoder": (small(decoder=dict(type="WordPiece")), "WordPiece"),
    "merge of no token": (changed(LLAMA3, "model", merges=[["zz", "zz"]]), "zzzz"),
    "merge of three": (changed(LLAMA3, "model", merges=["a b c"]), ""),
    "an id twice": (changed(small(), "model", "vocab", A=5), "same id"),
    "negative id": (changed(small(), "model", "vocab", A=-1), "negative"),
    "large id": (changed(small(), "model", "vocab", A=1 << 24), "16,777,215"),
    "whole texts": (changed(LLAMA2, "model", ignore_merges=True), "byte_fallback"),
    "another prefix": (changed(LLAMA2, "normalizer", "normalizers", 0, prepend="_"), '"prepend": "_"'),
    "both forms": (changed(LLAMA2, pre_tokenizer=METASPACE), "Metaspace"),
    "Metaspace that splits": (llama2(normalizer=None, pre_tokenizer=METASPACE | dict(split=True)), "split"),
    "no space": (llama2(normalizer=None, pre_tokenizer=METASPACE | dict(prepend_scheme="never")), "never"),
    "strips two spaces": (changed(LLAMA2, "decoder", "decoders", 3, start=2), "byte_fallback"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(case):
    """Catches: A text gets other tokens than in the model's training, or the error names no file."""
    d, *words = REFUSED[case]
    with pytest.raises(ValueError, match="org/here") as caught:
        Tokenizer(d if isinstance(d, str) else json.dumps(d), "org/here")
    assert all(word in str(caught.value) for word in words)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


PIECES, RULES, DECODER = LLAMA2["model"]["vocab"], LLAMA2["model"]["merges"], LLAMA2["decoder"]
ALWAYS = METASPACE | dict(prepend_scheme="always")


@pytest.mark.parametrize("same, variants", [
    (True, [small(), small(more=["<|end|>"]),
            changed(small(), "model", merges=[" ".join(merge) for merge in MERGES])]),
    (True, [LLAMA2, llama2(normalizer=None, pre_tokenizer=METASPACE),
            llama2(normalizer=None, pre_tokenizer=ALWAYS),
            llama2(decoder=DECODER | dict(decoders=DECODER["decoders"][:3]))]),
    (False, [small(), small(MERGES[:4]), small([*MERGES, ("a", "b")]), small(normalizer=dict(type="NFC")),
             small(pre_tokenizer=LLAMA3["pre_tokenizer"]), changed(small(), "model", "vocab", A=33, B=32),
             small(post_processor=BEGINS), small(special="<|stop|>"),
             *(small(added_tokens=[dict(id=261, content="<|end|>", **flags)])
               for flags in ({}, dict(normalized=True)))]),
    (False, [LLAMA2, llama2(added_tokens=[*LLAMA2["added_tokens"], dict(id=800, content="<pad>")]),
             llama2(post_processor=None), llama2(RULES[:-1]), llama2([RULES[1], RULES[0], *RULES[2:]]),
             llama2(more=["qqq"]),
             changed(LLAMA2, "model", "vocab", e=PIECES["a"], a=PIECES["e"])])],
    ids=["same byte-level", "same SentencePiece", "other byte-level", "other SentencePiece"])
def test_the_hash_changes_if_and_only_if_a_token_of_a_text_can_change(same, variants):
    """Catches: A reward is refused for a chat model, or is put on a model whose ids mean other words."""
    assert len({make(d).hash for d in variants}) == (1 if same else len(variants))


# Added tokens that are not special, with the ids of the tokenizers library (0.23.3)

def added(d, *contents, **flags):
    """Returns a tokenizer.json's dict with more tokens that are matched in text, and the file's own."""
    vocab, tokens = d["model"]["vocab"], [*d["added_tokens"]]
    first = max([len(vocab) - 1, *(t["id"] for t in tokens)]) + 1
    for content in contents:
        tokens.append(dict(id=vocab.get(content, first), content=content, special=False) | flags)
        first += content not in vocab
    return d | dict(added_tokens=tokens)


QWEN2 = json.loads(TEXTS["qwen2_tokenizer"]) | dict(normalizer=dict(type="NFC"))
ALL = METASPACE | dict(prepend_scheme="always")


@pytest.mark.parametrize("d, text, ids", [
    (added(QWEN2, "ab", "abc", "bcd"), "xabcd", [87, 1503, 67]),
    (added(QWEN2, "ab", "abc", "bcd"), "xabbcd", [87, 535, 1504]),
    (added(QWEN2, "café"), "cafe\u0301", [66, 1032, 127, 102]),
    (added(QWEN2, "cafe\u0301", normalized=True), "café", [1503]),
    (added(QWEN2, "<x>"), "e<x>\u0301", [68, 1503, 136, 223]),
    *((added(llama2(**parts), "<|x|>"), text, ids) for parts, every in (
        ({}, [("a<|x|>b", [261, 800, 272]), ("a <|x|> b", [261, 699, 800, 699, 272]),
              (" <|x|>", [287, 800])]),
        (dict(normalizer=None, pre_tokenizer=METASPACE),
         [("a<|x|>b", [261, 800, 720]), ("a <|x|> b", [261, 699, 800, 272]), (" <|x|>", [699, 800])]),
        (dict(normalizer=None, pre_tokenizer=ALL), [("a<|x|>b", [261, 800, 272])])) for text, ids in every)])
def test_added_tokens_are_matched_as_in_the_tokenizers_library(d, text, ids):
    """Catches: <tool_call> is spelled out, the shorter of two tokens wins, or Llama's space is lost."""
    tokenizer = make(d)
    assert tokenizer.encode(text) == ids
    assert tokenizer.special == {t["content"] for t in d["added_tokens"] if t.get("special")}


def test_ids_without_a_token_are_left_out():
    """Catches: A sampled id of a gap is a KeyError."""
    d = changed(small(), "model", "vocab", gap=300)
    assert make(d | dict(added_tokens=[])).decode([32, 290,
                                                   32]) == make(d | dict(added_tokens=[])).decode([32, 32])


@pytest.mark.parametrize("file, content", [
    ("tokenizer_config.json", dict(add_prefix_space=True)),
    ("tokenizer_config.json", dict(add_bos_token=True)),
    ("added_tokens.json", {"<new>": 300}), ("tokenizer_config.json", dict(added_tokens_decoder={"300": dict(
        content="<new>")}))])
def test_files_beside_those_of_gpt2_that_change_ids_are_refused(tmp_path, file, content):
    """Catches: A file that transformers applies is not looked at, and every text gets other ids."""
    d = small(special="<|endoftext|>")["model"]
    for name, text in {"config.json": '{"model_type": "gpt2"}', "vocab.json": json.dumps(d["vocab"]),
                       "merges.txt": "\n".join(map(" ".join, d["merges"])),
                       file: json.dumps(content)}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="changes the ids"):
        gpt.tokenizer_text(str(tmp_path))


def test_a_text_on_which_tiktoken_panics_is_a_value_error(monkeypatch):
    """Catches: pyo3's PanicException, which no handler of errors catches, ends the program."""
    monkeypatch.setattr(data.tokenizer, "LONGEST_RUN", 10**9)
    with pytest.raises(ValueError, match="tiktoken cannot split 'a  "):
        make(LLAMA3).encode("a" + " " * 10**6 + "b")
