"""Text data sets: the readers, which tokens the loss counts, the batches, and the embedded arithmetic."""
import codecs
import functools
import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import FIXTURES

from data import arithmetic, prompts, text
from data.tokenizer import Tokenizer
from models import pretrain, runs

SMALL = pretrain.TOKENIZER.read_text()
TOKENIZER = Tokenizer(SMALL, "small")
LLAMA2 = Tokenizer((FIXTURES / "llama2_tokenizer" / "tokenizer.json").read_text("utf-8"), "llama2")
BEGIN = dict(type="TemplateProcessing", single=[
    dict(SpecialToken=dict(id="<|endoftext|>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))])
BEGINNING = Tokenizer(json.dumps(json.loads(SMALL) | dict(post_processor=BEGIN)), "beginning")  # as Llama 3's
END = TOKENIZER.size - 1
GOOD = json.dumps(dict(prompt="a", response="b"))
PAIR = [("a", False), ("b", True)]


def write(path, *rows):
    """Writes a file of lines, each of them a string or the dict of a JSON line; returns its path."""
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read(path, split="train"):
    """Returns the template and the examples' segments, without their names."""
    template, examples = text.load(str(path), split)
    return template, [parts for _, parts in examples]


def example(prompt, response):
    return "here", [(prompt, False), (response, True)]


TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Two\nlines?"),
        ("assistant", " Yes.\n"), ("user", "\n")]


@pytest.mark.parametrize("turns", [TALK[:5], TALK], ids=["answered", "unanswered"])
def test_every_answer_of_a_dialog_in_the_form_of_tulu_v2_counts_and_nothing_else(tmp_path, turns):
    """Catches: The loss counts a prompt, a role, or a line break, or leaves out the second answer."""
    row = dict(messages=[dict(role=role, content=content) for role, content in turns])
    template, (parts,) = read(write(tmp_path / "x.jsonl", row))
    assert template == "<|user|>\n{}\n<|assistant|>\n"
    ids, counts = text.token_ids(parts, TOKENIZER, END)
    assert TOKENIZER.decode(ids) == (
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!<|endoftext|>\n"
        "<|user|>\nTwo\nlines?\n<|assistant|>\n Yes.\n<|endoftext|>")
    counted = [i for i, count in zip(ids, counts) if count]
    assert TOKENIZER.decode(counted) == "Hello!<|endoftext|> Yes.\n<|endoftext|>"


def test_parts_of_text_are_joined_and_others_refused(tmp_path):
    """Catches: Messages in OpenAI's form with parts lose all but the first, or an image is dropped."""
    parts = [dict(type="text", text="Two"), dict(type="text", text="\nlines?")]
    row = dict(messages=[dict(role="user", content=parts), dict(role="assistant", content=parts[:1])])
    _, (found,) = read(write(tmp_path / "x.jsonl", row))
    assert found[0] == ("<|user|>\nTwo\nlines?\n", False) and ("Two", True) in found
    for more in (dict(type="image_url", image_url={}), "text", dict(type="text")):
        row["messages"][0]["content"] = [*parts, more]
        with pytest.raises(ValueError, match="line 1: content is .*it must be a text"):
            read(write(tmp_path / "x.jsonl", row))


def test_a_conversation_to_answer_has_the_ids_of_training(tmp_path):
    """Catches: An earlier answer has no end, or the last one is part of the prompt."""
    messages = [dict(role=role, content=content) for role, content in TALK[:5]]
    template, (parts,) = read(write(tmp_path / "x.jsonl", dict(messages=messages)))
    (_, asked, reference), = prompts.read(tmp_path / "x.jsonl")
    assert reference == " Yes.\n" and asked == messages[:-1]
    found = text.token_ids(prompts.begun(asked, template), TOKENIZER, END)[0]
    assert found == text.token_ids(parts[:-1], TOKENIZER, END)[0] and END in found
    with pytest.raises(ValueError, match="trained on prompts, not messages"):
        prompts.begun(asked, "{}")
    write(tmp_path / "y.jsonl", dict(prompt="a", response="b"), dict(prompt="c"))
    assert [row[2] for row in prompts.read(tmp_path / "y.jsonl")] == ["b", None]
    with pytest.raises(ValueError, match="must end in .txt or .jsonl"):
        prompts.read("x.csv")


@pytest.mark.parametrize("source", ["x.jsonl", "gsm8k", "arithmetic"])
def test_a_prompt_has_the_same_tokens_in_training_and_in_use(tmp_path, monkeypatch, source):
    """Catches: The prompt in its template, as one text, has other tokens than the segments in training."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", dict(messages=[dict(role="user", content="What is 3 + 4?\n"),
                                               dict(role="assistant", content="7")]))
    template, examples = read(source)
    parts = examples[0][:-1]
    before, after = template.split("{}")
    whole = "".join(part for part, _ in parts)
    prompt = whole[len(before):len(whole) - len(after)]
    assert template.replace("{}", prompt) == whole
    assert TOKENIZER.encode(whole) == text.token_ids(parts, TOKENIZER, END)[0]
    assert LLAMA2.begin + LLAMA2.encode(whole) == text.token_ids(parts, LLAMA2, 2)[0]


def test_only_the_first_segment_begins_with_the_space_of_sentencepiece():
    """Catches: Every segment begins with a space, or an empty one takes the space of the first."""
    parts = [("", False), ("Hi\n", False), ("people", True), ("\nno", False), (" people", True)]
    ids, _ = text.token_ids(parts, LLAMA2, 2)
    assert b"".join(LLAMA2.bytes[i] for i in ids) == b"<s> Hi\npeople</s>\nno people</s>"
    ids = torch.cat(pretrain.blocks([("a", parts), ("b", parts[2:3])], LLAMA2, 2, 2).ids).tolist()
    assert b"".join(LLAMA2.bytes[i] for i in ids).startswith(b" Hi\npeople\nno people</s> people")


@pytest.mark.parametrize("split, number, first", [("train", 7473, " Natalia sold 48/2 = 24 clips in May.\n"),
                                                  ("test", 1319, " Janet sells 16 - 3 - 4 = 9 duck eggs")])
def test_gsm8k_has_all_of_its_problems_once_in_its_form(split, number, first):
    """Catches: An answer contains the calculator's marks, or is not asked for in its form."""
    template, examples = read("gsm8k", split)
    assert template == "Question: {}\n\nAnswer:"
    assert len(examples) == len({parts[0][0] for parts in examples}) == number
    assert examples[0][1][0].startswith(first)
    for (prompt, asked), (answer, counted) in examples:
        assert (asked, counted) == (False, True)
        assert re.fullmatch(r"Question: .+\n\nAnswer:", prompt, re.S)
        assert not re.search("<<|>>", answer)
        assert re.fullmatch(r" \S.*\n#### -?[\d,]*\.?\d+", answer, re.S), answer


def test_the_rows_of_a_parquet_file_are_those_of_the_same_json_lines(tmp_path):
    table = pytest.importorskip("pyarrow").Table.from_pylist
    from pyarrow.parquet import write_table
    path, talk = tmp_path / "x.parquet", dict(messages=[dict(role="assistant", content="Ho")])
    for rows in ([dict(prompt="a", response="b"), dict(prompt="c", response="d")], [talk]):
        write_table(table(rows), path)
        assert read(path) == read(write(tmp_path / "x.jsonl", *rows))
    write_table(table([dict(prompt="a", response="b"), dict(prompt="c", response=None)]), path)
    with pytest.raises(ValueError, match=f"{path} row 2: None"):
        read(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], whole[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            read(path)


@pytest.mark.parametrize("name, content, examples", [
    ("x.txt", "Once\n\nupon ü", [("", [("Once\n\nupon ü", True)])]), ("x.jsonl", GOOD, [(" line 1", PAIR)]),
    ("x.jsonl", f"{GOOD}\r\n  \r\n\r\n{GOOD}\r\n", [(" line 1", PAIR), (" line 4", PAIR)]),
    ("x.jsonl", '{"prompt": "Q: ü?", "response": " A\\n"}\n{"prompt": "", "response": "{}", "note": 3}',
     [(" line 1", [("Q: ü?", False), (" A\n", True)]), (" line 2", [("", False), ("{}", True)])])])
def test_a_book_is_one_example_and_a_line_of_jsonl_another(tmp_path, name, content, examples):
    """Catches: A book is read line by line, a byte-order mark is a token, or a space is lost or added."""
    path = tmp_path / name
    for start in (b"", codecs.BOM_UTF8):  # of Linux and of Windows
        path.write_bytes(start + content.encode())
        named = [(f"{path}{line}", parts) for line, parts in examples]
        assert text.load(str(path), "train") == ("{}", named)


def test_a_folder_has_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "test.jsonl", dict(prompt="c", response="d"))
    assert read(tmp_path, "train")[1] == [PAIR]
    assert read(tmp_path, "test")[1] == [[("c", False), ("d", True)]]


MISSING = {
    "gsm9k": ("train", ValueError, "--data gsm9k: unknown.*arithmetic, gsm8k"),
    "arithmetic-old": ("test", FileNotFoundError, "arithmetic-old.*no test split"),
    "x.jsonl": ("test", FileNotFoundError, "x.jsonl.*no test split"),
    "folder": ("test", FileNotFoundError, r"folder.* 0 files test\."),
    "two": ("train", ValueError, r"two.* 2 files train\."),
    "blank.jsonl": ("train", ValueError, "blank.jsonl: holds no example"),
    "x.parquet": ("train", ValueError, "x.parquet.*pip install pyarrow"),
}


@pytest.mark.parametrize("source", MISSING)
def test_what_is_missing_is_named(tmp_path, monkeypatch, source):
    """Catches: Training ends with an error as there is no test split, or one of two files is picked."""
    split, error, words = MISSING[source]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "two"):
        (tmp_path / folder).mkdir()
    for file in ("x.jsonl", "x.parquet", "folder/train.jsonl", "two/train.jsonl", "two/train.txt"):
        write(tmp_path / file, GOOD)
    write(tmp_path / "blank.jsonl", "\n \n")
    with pytest.raises(error, match=words):
        read(source, split)


ASKED, ANSWERED = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
BAD = {
    "cut off": GOOD[:-3],
    "deep": "[" * 100_000,
    "not UTF-8": b'{"prompt": "\xff", "response": "b"}',
    "list": '["a", "b"]',
    "no response": '{"prompt": "a"}',
    "no answer": '{"question": "a"}',
    "question is a number": '{"question": 5, "answer": "b"}',
    "blank response": '{"prompt": "a", "response": " \\n"}',
    "empty answer": '{"question": "a", "answer": "<<1+1=2>>"}',
    "messages are null": '{"messages": null}',
    "messages without answer": f'{{"messages": [{ASKED}]}}',
    "message without role": f'{{"messages": [{{"content": "a"}}, {ANSWERED}]}}',
    "asked a number": f'{{"messages": [{{"role": "user", "content": 1}}, {ANSWERED}]}}',
    "answered parts": '{"messages": [{"role": "assistant", "content": [{"type": "image", "text": "b"}]}]}',
    "one empty answer": f'{{"messages": [{ANSWERED}, {{"role": "assistant", "content": ""}}]}}',
}


@pytest.mark.parametrize("case", BAD)
def test_whatever_a_line_holds_the_error_names_the_file_and_the_line(tmp_path, case):
    """Catches: The error is not a ValueError, has several lines, or repeats the whole file."""
    line = BAD[case] if isinstance(BAD[case], bytes) else BAD[case].encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    with pytest.raises(ValueError) as caught:
        read(path)
    words = str(caught.value)
    assert words.startswith(f"{path} line 3: ") and len(words.splitlines()) == 1 and len(words) < 400


def test_a_gz_file_is_decompressed_and_any_damage_is_a_value_error_that_names_it(tmp_path):
    """Catches: Damage other than a wrong length raises an error of another kind."""
    path, whole = tmp_path / "x.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 50, mtime=0)
    path.write_bytes(whole)
    assert read(path)[1] == [PAIR] * 50
    for i in range(10, len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read(path)


# Tokens

@pytest.mark.parametrize("prompt", ["Tom has 3 apples", ""])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, BEGINNING], ids=["small", "beginning"])
def test_the_loss_counts_the_response_and_its_end_token(tokenizer, prompt):
    """Catches: The loss counts a token of the prompt, or the one that every text begins with."""
    data = text.encode([example(prompt, " 3 + 4 = 7")], tokenizer, END, 100)
    before, response = tokenizer.begin + TOKENIZER.encode(prompt), TOKENIZER.encode(" 3 + 4 = 7")
    assert tokenizer.begin == [END] * (tokenizer is BEGINNING)
    assert data.ids[0].tolist() == [*before, *response, END]
    assert data.counts[0].tolist() == [False] * len(before) + [True] * (len(response) + 1)
    assert (data.ids[0].dtype, data.counts[0].dtype) == (torch.long, torch.bool)


EXAMPLES = [example("Tom has 3", " 4"), example("Tom has 3 apples and", " 3 + 4 = 7"),
            example("Tom", " 3 + 4 = 7 #### 7"), example("", " 7")]
WHOLE = text.encode(EXAMPLES, TOKENIZER, END, 1000)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("length", range(1, 1 + max(len(ids) for ids in WHOLE.ids)))
def test_longer_examples_are_truncated_or_dropped(capsys, length, drop):
    """Catches: An example is kept for its first token, which nothing predicts, or one that fits is lost."""
    long = [len(ids) > length for ids in WHOLE.ids]
    kept = [k for k in range(4) if WHOLE.counts[k][1:length].any() and not (drop and long[k])]
    if kept:
        data = text.encode(EXAMPLES, TOKENIZER, END, length, drop)
        assert [ids.tolist() for ids in data.ids] == [WHOLE.ids[k][:length].tolist() for k in kept]
        assert [x.tolist() for x in data.counts] == [WHOLE.counts[k][:length].tolist() for k in kept]
    else:
        with pytest.raises(ValueError, match=f"none of 4 examples .* --length {length}"):
            text.encode(EXAMPLES, TOKENIZER, END, length, drop)
    line = f"{sum(long)} of 4 examples exceed {length} tokens; {4 - len(kept)} are dropped"
    assert capsys.readouterr().out.splitlines() == [line] * (len(kept) < 4 or any(long))


def test_blocks_are_the_texts_with_the_end_token_after_each_response():
    """Catches: Tokens are lost between two blocks, the last one is padded, or a prompt ends a text."""
    examples = [example("Tom has 3", " 4"), example("", " Tom has 3 apples."), example("Ann has", " 12 x 2")]
    data = pretrain.blocks(examples, TOKENIZER, END, 5)
    expected = [i for _, ((prompt, _), (response, _)) in examples
                for i in [*TOKENIZER.encode(prompt), *TOKENIZER.encode(response), END]]
    assert len(expected) % 5
    assert torch.stack(data.ids).flatten().tolist() == expected[:len(expected) // 5 * 5]
    assert torch.stack(data.counts).all() and len(data.counts) == len(expected) // 5
    assert (data.ids[0].dtype, data.counts[0].dtype) == (torch.long, torch.bool)
    for length in (1, 1 + len(expected)):
        with pytest.raises(ValueError, match=f"--length {length}"):
            pretrain.blocks(examples, TOKENIZER, END, length)


# Batches

def grouped(n, steps, seed=3):
    """Returns the lengths of n examples, their shuffled batches, and the same regrouped by length."""
    lengths = [random.Random(i).randint(2, 300) for i in range(n)]
    shuffled = functools.partial(runs.shuffled, n=n, batch=8, seed=3)
    indices = text.group_by_length(shuffled, lengths, 8, steps, seed)
    return torch.tensor(lengths), [shuffled(step) for step in range(steps)], indices


@pytest.mark.parametrize("steps, n", [(6, 3), (1, 37), (4, 37), (150, 37), (50, 800), (173, 800)])
def test_grouped_batches_hold_the_examples_of_the_shuffled_ones_in_any_order_of_calls(steps, n):
    """Catches: The last pool loses examples, copies share a batch, or a resumed run sees other batches."""
    _, shuffled, indices = grouped(n, steps)
    batches = [indices(step) for step in range(steps)]
    assert all(i.shape == (8,) and i.dtype == torch.long for i in batches)
    uses = Counter(torch.cat(batches).tolist())
    assert uses == Counter(torch.cat(shuffled).tolist())
    assert max(uses.values()) - min(uses[i] for i in range(n)) <= 1
    assert sum(len(set(i.tolist())) for i in batches) / steps > 0.75 * min(n, 8)
    *_, again = grouped(n, steps)
    assert all(torch.equal(again(step), batches[step]) for step in reversed(range(steps)))


def test_the_two_batches_with_the_longest_examples_come_first():
    """Catches: A run exceeds the memory after hours, or equal lengths no longer keep their order."""
    lengths, shuffled, indices = grouped(800, 173)
    longest = [int(lengths[indices(step)].max()) for step in range(173)]
    assert longest[:2] == sorted(longest, reverse=True)[:2] and longest[0] > longest[5]
    a, b = (text.group_by_length(lambda step: torch.arange(8) + step, [n] * 20, 8, 5, 0) for n in (9, 65))
    assert all(torch.equal(a(step), b(step)) for step in range(5))


def test_texts_are_batched_from_the_longest_down():
    """Catches: A batch has more tokens than are allowed, padding included, or a long text is in none."""
    texts = [torch.arange(n) for n in (3, 9, 1, 40, 4, 4, 2)]
    assert text.by_length(texts, count=3) == [[3, 1, 4], [5, 0, 6], [2]]
    assert text.by_length(texts, tokens=12) == [[3], [1], [4, 5, 0], [6, 2]]
    assert text.by_length(texts, count=2, tokens=12) == [[3], [1], [4, 5], [0, 6], [2]]
    assert text.by_length([], count=1) == []
    data = text.Tokens(texts, [torch.ones(len(x), dtype=torch.bool) for x in texts])
    found = text.batches(data, torch.tensor([6, 3, 1, 4]), 20)
    assert [list(x.shape) for (x, _), _ in found] == [[1, 39], [2, 8], [1, 1]]
    assert [y.tolist() for _, y in found] == [[*range(1, 40)], [*range(1, 9), 1, 2, 3], [1]]


def test_grouped_batches_have_little_padding_in_an_order_that_the_seed_shuffles():
    """Catches: Lengths, and with them gradients, grow within a pool, or in the same order for all seeds."""
    (lengths, shuffled, one), (*_, other) = grouped(800, 100), grouped(800, 100, seed=4)
    batches = [one(step) for step in range(100)]
    longest, unsorted = ([int(lengths[i].max()) for i in some] for some in (batches, shuffled))
    examples = sum(int(lengths[i].sum()) for i in batches) / 8
    assert examples > 0.95 * sum(longest) and examples < 0.7 * sum(unsorted)  # less than 5% of padding
    assert 15 <= sum(after > before for before, after in zip(longest[:50], longest[1:50])) <= 35
    assert any(not torch.equal(i, other(step)) for step, i in enumerate(batches))


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [4, 4, 1], [2]])
def test_a_batch_has_the_index_and_targets_of_a_double_loop(chosen):
    """Catches: Targets are shifted by one, positions are those of another row, or padding is predicted."""
    rng = random.Random(0)
    rows = [torch.tensor([rng.randrange(1, 500) for _ in range(rng.randint(2, 12))]) for _ in range(6)]
    data = text.Tokens(rows, [torch.tensor([rng.random() < 0.5 for _ in row]) for row in rows])
    (ids, index), targets = text.collate(data, torch.tensor(chosen))
    T = max(len(rows[k]) for k in chosen) - 1
    expected, inputs = [], torch.zeros(len(chosen), T, dtype=torch.long)
    for row, k in enumerate(chosen):
        for t in range(1, len(rows[k])):
            inputs[row, t - 1] = rows[k][t - 1]
            if data.counts[k][t]:
                expected.append((row * T + t - 1, rows[k][t].item()))
    assert torch.equal(ids, inputs)
    assert [*zip(index.tolist(), targets.tolist(), strict=True)] == expected
    assert ids.dtype == index.dtype == targets.dtype == torch.long


# The embedded arithmetic

def scanner(sign):
    """Returns the pattern of a fact on a page: a story with its end or an equation, or an equation."""
    fill = functools.partial(str.format, n=r"\w+", i=r"\w+", a=r"\d+", b=r"\d+", c=r"\d+")
    story = f" (?:{'|'.join(fill(s) for s in arithmetic.STORIES[sign])})"
    equation = rf" \d+ [{sign}] \d+ = \d+"
    end = f" {fill(arithmetic.ENDS[sign])}|{equation}"
    return re.compile(rf"(?: #### [a-z]+)?(?:{story}(?: How many\?)?(?:{end})|{equation})")


SCANNERS = {sign: scanner(sign) for sign in arithmetic.STORIES}


def facts_in(page):
    """Returns the facts (a, sign, b, result) of a page, with a <= b for sums and products."""
    at, facts = 0, []
    while at < len(page):  # there is nothing else on it
        sign, found = next((s, m) for s, pattern in SCANNERS.items() if (m := pattern.match(page, at)))
        *numbers, result = map(int, re.findall(r"\d+", found[0]))
        a, b = numbers[:2] if sign == "-" else sorted(numbers[:2])
        assert numbers[:2] == numbers[-2:], page  # of the story and of its equation
        assert result == {"+": a + b, "-": a - b, "x": a * b}[sign], page
        facts.append((a, sign, b, result))
        at = found.end()
    return facts


@pytest.fixture(scope="module")
def pages():
    """The examples of each split: pages of text (old and new) and problems (train and test)."""
    sources = dict(old="arithmetic-old", new="arithmetic-new", train="arithmetic", test="arithmetic")
    loaded = {name: read(source, "test" if name == "test" else "train") for name, source in sources.items()}
    assert {template for template, _ in loaded.values()} == {" {}"}
    return {name: examples for name, (_, examples) in loaded.items()}


def test_the_facts_are_right_and_the_old_text_has_half_of_them_and_none_of_the_test(pages):
    """Catches: The old base has seen the fact of a test problem, perhaps with its numbers swapped.

    Or the problems depend on the state of random, or on the order of a set, which each process changes.
    """
    facts = {name: [] for name in pages}
    for name in ("old", "new"):
        for (page, counted), in pages[name]:
            facts[name].append(facts_in(page))
            assert counted
        assert len(facts[name]) == 40_000 and {len(some) for some in facts[name]} == {1, 2, 3, 4}
    for name, number in dict(train=4_000, test=1_000).items():
        for (problem, asked), (answer, counted) in pages[name]:
            assert problem.endswith(" How many?") and (asked, counted) == (False, True)
            (*_, result), = found = facts_in(problem + answer.partition(" #### ")[0])
            assert answer.endswith(f" = {result} #### {result}")
            facts[name].append(found)
        assert len(facts[name]) == number
    old, new, train, test = ({fact for some in facts[name] for fact in some} for name in facts)
    assert new == set(arithmetic.facts()) and len(new) == len(arithmetic.facts()) == 466
    assert old == train and not test & old and test <= new
    assert 0.4 < len(old) / 466 < 0.6 and len(test) > 0.9 * len(new - old)
    assert all({sign for _, sign, _, _ in some} == {"+", "-", "x"} for some in (old, new, test))
    whole = repr([pages[split] for split in ("train", "test")])
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == "c2a81748a347e054"


def test_the_embedded_tokenizer_is_made_for_the_problems(pages):
    """Catches: Numbers, names, and items have several tokens, so that the small GPTs learn no sums."""
    ids = [TOKENIZER.encode(f" {word}") for word in (*range(145), *arithmetic.NAMES, *arithmetic.ITEMS)]
    assert {len(i) for i in ids} == {1} and len({i for i, in ids}) == 165
    problems = "".join(part for parts in pages["train"] for part, _ in parts)
    words = Counter(re.findall(r" \w+| #+| ?[^\w\s]", problems))
    assert sum(n for word, n in words.items() if len(TOKENIZER.encode(word)) == 1) / words.total() > 0.99


# What a row says is read, refused, or counted

def turns(**change):
    return dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b"),
                          dict(role="user", content="c"), dict(role="assistant", content="d")]) | change


def test_answers_of_weight_0_are_not_learned_but_end(tmp_path, capsys):
    """Catches: OpenAI's weight is not looked at, or the unlearned answer lacks its end token."""
    for key, value in dict(weight=0, train=False).items():
        row = turns(id=7, source=["x"])
        row["messages"][1] |= {key: value, "date": "today"}
        write(tmp_path / "x.jsonl", row)
        (_, parts), = text.load(str(tmp_path / "x.jsonl"), "train")[1]
        ids, counts = text.token_ids(parts, TOKENIZER, END)
        assert TOKENIZER.decode(ids).count("<|endoftext|>") == 2
        assert TOKENIZER.decode([i for i, count in zip(ids, counts) if count]) == "d<|endoftext|>"
        assert "x.jsonl: keys that are not read: date, id, source\n" in capsys.readouterr().out


@pytest.mark.parametrize("row, words", [
    *((turns(**{key: ["x"]}), f"{key} ['x'] is not supported") for key in ("tools", "system", "images")),
    *((turns(messages=[dict(role="user", content="a"), dict(role="assistant", content="b") | change]), words)
      for change, words in [(dict(weight=0.5), "weight is 0.5"), (dict(tool_calls=[1]), "tool_calls [1]"),
                            (dict(train="no"), "train is 'no'"),
                            (dict(role="user\n<|assistant|>"), "role is")]),
    (turns(messages=[dict(role="user", content="a", weight=1), dict(role="assistant", content="b")]),
     "role user"),
    (dict(prompt="a", response="b", system="c"), "system 'c'"),
    *((dict(prompt="a", response="b") | change, "weight or train") for change in (dict(weight=0),
                                                                                  dict(train=False))),
    (dict(prompt="a", response=" " * 250_000 + "b"),
                                                                "200,000 spaces in a row")])
def test_what_would_change_the_meaning_of_a_row_is_refused(tmp_path, row, words):
    """Catches: Tools or a system prompt are ignored, a role imitates a turn, or tiktoken ends the program."""
    write(tmp_path / "x.jsonl", row)
    with pytest.raises(ValueError, match=r"x.jsonl line 1: .*" + re.escape(words)):
        text.encode(text.load(str(tmp_path / "x.jsonl"), "train")[1], TOKENIZER, END, 100)


def test_special_tokens_in_texts_are_told_of(tmp_path, capsys):
    write(tmp_path / "x.jsonl", dict(prompt="a", response="<|endoftext|>"), dict(prompt="a", response="b"))
    text.encode(text.load(str(tmp_path / "x.jsonl"), "train")[1], TOKENIZER, END, 100)
    assert "1 of 2 texts hold <|endoftext|>; special tokens" in capsys.readouterr().out


def test_files_of_other_kinds_and_bombs_are_refused(tmp_path):
    """Catches: A .csv gives an error about JSON, or 1 MB of gzip fills the memory."""
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(bytes(10**8)))
    for name, words in {"x.csv": "must end in .jsonl", "x.jsonl.gz": "expands to more than"}.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            text.load(str(tmp_path / name), "train")
