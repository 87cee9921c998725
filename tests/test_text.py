"""Text data: the readers, which tokens the loss counts, the batches, the embedded arithmetic."""
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

import prt
from data import text
from models.tokenizer import Tokenizer

SMALL = (ROOT / "data/tokenizer.json").read_text()
TOKENIZER = Tokenizer(SMALL, "small")
END = TOKENIZER.size - 1
GOOD = json.dumps(dict(prompt="a", response="b"))


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path, split="train"):
    """The template and the examples' segments, without their places."""
    template, examples = text.load(str(path), split)
    return template, [parts for _, parts in examples]


def answers(ids, counts):
    """The texts of the stretches that the loss counts; they are made of decoded tokens."""
    runs = [[]]
    for i, counted in zip(ids.tolist(), counts.tolist()):
        runs = [*runs[:-1], [*runs[-1], i]] if counted else [*runs, []] if runs[-1] else runs
    return [TOKENIZER.decode(run) for run in runs if run]


def beginning(content="<|endoftext|>"):
    """The small tokenizer, with a token that opens every text, as Llama 3's has one."""
    opens = dict(type="TemplateProcessing", single=[
        dict(SpecialToken=dict(id=content, type_id=0)), dict(Sequence=dict(id="A", type_id=0))])
    return Tokenizer(json.dumps(json.loads(SMALL) | dict(post_processor=opens)), "beginning")


def example(prompt, response):
    return "here", [(prompt, False), (response, True)]


# Readers

def test_messages_count_every_answer_and_nothing_else(tmp_path):
    """A prompt, a role mark or the line break behind an answer in the loss; a second answer that is not; an
    answer without its end token; another template than Tulu v2's."""
    talk = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Two\nlines?"),
            ("assistant", " Yes.\n")]
    path = write(tmp_path / "x.jsonl", dict(messages=[dict(role=r, content=c) for r, c in talk]))
    template, (parts,) = read(path)
    assert template.replace("{}", "Hi") == "<|user|>\nHi\n<|assistant|>\n"
    data = text.encode([("here", parts)], TOKENIZER, END, 1000)
    assert TOKENIZER.decode(data.ids[0].tolist()) == (
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!<|endoftext|>\n"
        "<|user|>\nTwo\nlines?\n<|assistant|>\n Yes.\n<|endoftext|>")
    assert answers(data.ids[0], data.counts[0]) == ["Hello!<|endoftext|>", " Yes.\n<|endoftext|>"]


def test_messages_that_end_with_a_question(tmp_path):
    """A last turn of the user's must neither count nor take the answer's place: it is left out."""
    talk = [("user", "Hi"), ("assistant", "Hello!"), ("user", "\n")]
    path = write(tmp_path / "x.jsonl", dict(messages=[dict(role=r, content=c) for r, c in talk]))
    data = text.encode([("here", read(path)[1][0])], TOKENIZER, END, 1000)
    assert answers(data.ids[0], data.counts[0]) == ["Hello!<|endoftext|>"]
    assert TOKENIZER.decode(data.ids[0].tolist()).endswith("<|assistant|>\nHello!<|endoftext|>")


def test_a_prompt_is_cut_into_the_same_tokens_in_training_and_use(tmp_path):
    """The template around a prompt, tokenized as one text, against the segments of training."""
    path = write(tmp_path / "x.jsonl", dict(messages=[dict(role="user", content="What is 3 + 4?\n"),
                                                      dict(role="assistant", content="7")]))
    for source, prompt in ((path, "What is 3 + 4?\n"), ("gsm8k", None), ("arithmetic", None)):
        template, examples = text.load(str(source), "train")
        parts = examples[0][1]
        prompt = prompt or "".join(t for t, _ in parts[:-1])[template.index("{}"):].split("\n\nAnswer:")[0]
        assert TOKENIZER.encode(template.replace("{}", prompt)) == text.token_ids(
            parts[:-1], TOKENIZER, END)[0]


def test_prompt_and_response(tmp_path):
    """A space or line break of the file's own that is lost or added between prompt and response."""
    path = write(tmp_path / "x.jsonl", "\n", dict(prompt="Q: ü?", response=" A\n"), "  \n",
                 dict(prompt="", response="{}", note=3))
    assert read(path) == ("{}", [[("Q: ü?", False), (" A\n", True)], [("", False), ("{}", True)]])
    assert [place for place, _ in text.load(str(path), "train")[1]] == [f"{path} line 2", f"{path} line 4"]


@pytest.mark.parametrize("split, number", [("train", 7473), ("test", 1319)])
def test_gsm8k(split, number):
    """A lost or doubled problem, calculator marks in the answer, an answer that is not asked for in its
    form."""
    template, examples = read("gsm8k", split)
    assert template == "Question: {}\n\nAnswer:" and len(examples) == number
    assert len({parts[0][0] for parts in examples}) == number
    for (prompt, asked), (answer, counted) in examples:
        assert not asked and counted and re.fullmatch(r"Question: .+\n\nAnswer:", prompt, re.S)
        assert "<<" not in answer and ">>" not in answer
        assert re.fullmatch(r" \S.*\n#### -?[\d,]*\.?\d+", answer, re.S), answer
    if split == "train":
        assert examples[0][1][0] == (" Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips "
                                     "altogether in April and May.\n#### 72")


def test_parquet(tmp_path):
    """Rows of a parquet file are those of the same JSON lines; a damaged file and a bad row are named."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for rows in ([dict(prompt="a", response="b"), dict(prompt="c", response="d")],
                 [dict(messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Ho")])]):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == read(write(tmp_path / "x.jsonl", *rows))
    rows = [dict(prompt="a", response="b"), dict(prompt="c", response=None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"{tmp_path}/x.parquet row 2: None"):
        read(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for damaged in (b"", whole[:-9], whole[100:]):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{tmp_path}/x.parquet"):
            read(tmp_path / "x.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """An ImportError's traceback instead of what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=f"{tmp_path}/x.parquet.*pip install pyarrow"):
        read(write(tmp_path / "x.parquet", "PAR1"))


def test_text_file(tmp_path):
    """A book read as lines, or without its line breaks."""
    assert read(write(tmp_path / "x.txt", "Once\n\nupon ü")) == ("{}", [[("Once\n\nupon ü", True)]])


def test_folder(tmp_path):
    """train.* read for test, or one of two train files picked in silence."""
    write(tmp_path / "train.jsonl", dict(prompt="a", response="b"))
    write(tmp_path / "test.jsonl", dict(prompt="c", response="d"))
    assert [read(tmp_path, split)[1][0][0][0] for split in ("train", "test")] == ["a", "c"]
    write(tmp_path / "train.txt", "more")
    with pytest.raises(ValueError, match=f"{tmp_path}.* 2 files named train"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["arithmetic-old", "{}/x.jsonl", "{}/folder"])
def test_no_test_split(tmp_path, source):
    """Training ends with an error where there is only nothing to score on: it looks for FileNotFoundError."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "x.jsonl", tmp_path / "folder/train.jsonl"):
        write(path, GOOD)
    with pytest.raises(FileNotFoundError, match=re.escape(source.format(tmp_path))):
        read(source.format(tmp_path), "test")


BAD = {
    "no JSON": "prompt: a",
    "cut off": GOOD[:-3],
    "deep": "[" * 100_000,
    "other keys": '{"input": "a", "output": "b"}',
    "no response": '{"prompt": "a"}',
    "no answer": '{"question": "a"}',
    "list": '["a", "b"]',
    "number": "5",
    "null": "null",
    "string": '"prompt response messages"',
    "prompt is a number": '{"prompt": 5, "response": "b"}',
    "response is null": '{"prompt": "a", "response": null}',
    "response is a list": '{"prompt": "a", "response": ["b"]}',
    "question is a number": '{"question": 5, "answer": "b"}',
    "answer is a number": '{"question": "a", "answer": 5}',
    "empty response": '{"prompt": "a", "response": ""}',
    "blank response": '{"prompt": "a", "response": " \\n"}',
    "empty answer": '{"question": "a", "answer": "<<1+1=2>>"}',
    "no messages": '{"messages": []}',
    "messages are null": '{"messages": null}',
    "messages are a string": '{"messages": "hello"}',
    "messages are a dict": '{"messages": {"role": "user", "content": "a"}}',
    "messages without answer": '{"messages": [{"role": "user", "content": "a"}]}',
    "message without role": '{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}',
    "message without content": '{"messages": [{"role": "assistant"}]}',
    "asked a number": '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "b"}]}',
    "answered a number": '{"messages": [{"role": "assistant", "content": 5}]}',
    "answered parts": '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}',
    "one empty answer": '{"messages": [{"role": "assistant", "content": "b"},'
                        ' {"role": "assistant", "content": ""}]}',
    "not UTF-8": b'{"prompt": "\xff", "response": "b"}',
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_line(tmp_path, case):
    """Whatever a line holds, the error is a ValueError of one line that names the file and the line."""
    line = BAD[case] if isinstance(BAD[case], bytes) else BAD[case].encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(ValueError, match=f"{tmp_path}/x.jsonl: holds no example"):
        read(write(tmp_path / "x.jsonl", content))


def test_damaged_gz(tmp_path):
    """Every damage of a compressed file, not only a wrong length, is a ValueError that names it."""
    path, whole = tmp_path / "x.jsonl.gz", gzip.compress(f"{GOOD}\n".encode() * 50, mtime=0)
    path.write_bytes(whole)
    assert len(read(path)[1]) == 50
    for i in range(10, len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read(path)


def test_unknown_data(tmp_path):
    with pytest.raises(ValueError, match="--data gsm9k: unknown.*arithmetic, gsm8k"):
        read("gsm9k")
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}.* 0 files named train"):
        read(tmp_path)


# Tokens

@pytest.mark.parametrize("tokenizer", [TOKENIZER, beginning()])
def test_mask(tokenizer):
    """The loss counts the response and its end token: no token of the prompt, and not what opens a text."""
    data = text.encode([example("Tom has 3 apples", " 3 + 4 = 7")], tokenizer, END, 100)
    prompt, response = (TOKENIZER.encode(t) for t in ("Tom has 3 apples", " 3 + 4 = 7"))
    opened = tokenizer.begin + prompt
    assert data.ids[0].tolist() == [*opened, *response, END]
    assert data.counts[0].tolist() == [False] * len(opened) + [True] * (len(response) + 1)
    assert data.ids[0].dtype == torch.long and data.counts[0].dtype == torch.bool
    assert len(tokenizer.begin) == (tokenizer is not TOKENIZER)


def test_begin_is_not_counted_without_a_prompt():
    """The first place has no token before it that could predict it; what opens the text is not learnt."""
    data = text.encode([example("", " 7")], beginning(), END, 100)
    assert data.counts[0].tolist() == [False, True, True]


def test_what_looks_like_the_end_token_is_text():
    """A response that spells the end token must not end there."""
    data = text.encode([example("a", "<|endoftext|>b")], TOKENIZER, END, 100)
    assert data.ids[0].tolist().count(END) == 1 and data.ids[0][-1] == END


@pytest.mark.parametrize("drop", [False, True])
def test_too_long_is_cut_or_dropped(capsys, drop):
    """Cut examples that keep nothing to learn, dropped ones that would have fitted, a wrong number in the
    message."""
    examples = [example("Tom has 3", " 4"), example("Tom has 3 apples and", " 3 + 4 = 7"),
                example("Tom", " 3 + 4 = 7 #### 7")]
    whole = text.encode(examples, TOKENIZER, END, 1000)
    assert capsys.readouterr().out == ""
    for length in range(2, 1 + max(map(len, whole.ids))):
        long = [len(ids) > length for ids in whole.ids]
        kept = [k for k in range(3) if (not long[k] if drop else whole.counts[k][:length].any())]
        if not kept:
            with pytest.raises(ValueError, match=f"--length {length}"):
                text.encode(examples, TOKENIZER, END, length, drop)
            continue
        data = text.encode(examples, TOKENIZER, END, length, drop)
        assert [ids.tolist() for ids in data.ids] == [whole.ids[k][:length].tolist() for k in kept]
        assert [c.tolist() for c in data.counts] == [whole.counts[k][:length].tolist() for k in kept]
        line = f"{sum(long)} of 3 examples exceed {length} tokens: {3 - len(kept)} dropped, the others cut"
        assert capsys.readouterr().out.splitlines()[-1:] == [line] * any(long)


def test_all_lost(capsys):
    """A training set without a single response."""
    for length, drop in ((1, False), (3, False), (3, True)):
        with pytest.raises(ValueError, match=f"none of 2 examples .* --length {length}"):
            text.encode([example("Tom has 3 apples", " 7")] * 2, TOKENIZER, END, length, drop)
        assert f"2 of 2 examples exceed {length} tokens: 2 dropped" in capsys.readouterr().out


def test_blocks():
    """Tokens lost between two blocks, texts without the end token between them, a padded last block."""
    texts = [" 3 + 4 = 7", " Tom has 3 apples.", " 1", " 2 x 2 = 4 and so on"]
    data = text.blocks([("here", [(t, True)]) for t in texts], TOKENIZER, END, 5)
    expected = [i for t in texts for i in [*TOKENIZER.encode(t), END]]
    assert torch.cat(data.ids).tolist() == expected[:len(expected) // 5 * 5] and len(expected) % 5
    assert all(len(ids) == 5 and ids.dtype == torch.long for ids in data.ids)
    assert all(c.dtype == torch.bool and c.all() for c in data.counts) and len(data.counts) == len(data.ids)


def test_blocks_of_prompts_and_responses():
    """An end token between a prompt and its response teaches the model to stop before it answers."""
    data = text.blocks([example("Tom has 3", " 4"), example("Ann has 1", " 2")], TOKENIZER, END, 5)
    whole = TOKENIZER.decode([i for ids in data.ids for i in ids.tolist()])  # the last block may be missing
    assert "Tom has 3 4<|endoftext|>Ann has 1 2<|endoftext|>".startswith(whole) and "Ann" in whole


def test_blocks_of_too_short_a_text():
    with pytest.raises(ValueError, match="--length 9"):
        text.blocks([("here", [(" 3 + 4", True)])], TOKENIZER, END, 9)


# Batches

LENGTHS = [random.Random(i).randint(2, 300) for i in range(37)]


@pytest.mark.parametrize("steps, n", [(1, 37), (4, 37), (73, 37), (150, 37), (50, 800), (173, 800)])
def test_batches_hold_what_shuffled_gives(steps, n):
    """Examples lost or doubled by the sorting, at the end of an epoch or in a last short pool."""
    lengths = [random.Random(i).randint(2, 300) for i in range(n)]
    indices = text.batches(lengths, 8, steps, seed=3)
    found = [indices(step) for step in range(steps)]
    assert all(i.shape == (8,) and i.dtype == torch.long for i in found)
    counts = Counter(torch.cat(found).tolist())
    assert counts == Counter(torch.cat([prt.shuffled(step, n, 8, 3) for step in range(steps)]).tolist())
    assert max(counts.values()) - min(counts[i] for i in range(n)) <= 1


def test_batches_are_a_pure_function_of_the_step():
    """A resumed run starts in the middle of a pool, and must see what it would have seen."""
    indices = text.batches(LENGTHS, 8, 120, seed=3)
    found = [indices(step) for step in range(120)]
    for step in (119, 3, 57, 100, 58, 4):
        assert torch.equal(text.batches(LENGTHS, 8, 120, seed=3)(step), found[step])
        assert torch.equal(indices(step), found[step])
    assert any(not torch.equal(text.batches(LENGTHS, 8, 120, seed=4)(step), found[step]) for step in range(9))


def test_batches_are_of_similar_lengths_in_no_order():
    """Padding like that of shuffled batches, or lengths that grow along the pool, and with them the
    gradients."""
    lengths = [random.Random(i).randint(2, 300) for i in range(800)]
    data = text.Tokens([torch.zeros(n, dtype=torch.long) for n in lengths], None)
    indices = text.batches(lengths, 8, 100, seed=0)
    found = [indices(step) for step in range(100)]
    wasted = text.padding(data, found)
    assert wasted < 0.05 < 0.3 < text.padding(data, [prt.shuffled(step, 800, 8, 0) for step in range(100)])
    longest = [max(lengths[k] for k in i.tolist()) for i in found[:50]]
    rises = sum(b > a for a, b in zip(longest, longest[1:]))
    assert 15 <= rises <= 35


def test_batch_larger_than_the_data():
    """A file of three examples and a batch of eight."""
    indices = text.batches([5, 2, 9], 8, 6, 0)
    assert Counter(torch.cat([indices(step) for step in range(6)]).tolist()) == {0: 16, 1: 16, 2: 16}


def test_batches_of_different_examples():
    """Sorting over several epochs of a small data set brings the copies of an example into one batch."""
    indices = text.batches(LENGTHS, 8, 100, seed=0)
    different = [len(set(indices(step).tolist())) for step in range(100)]
    assert sum(different) / 100 > 6


def tokens(seed=0, n=6):
    rng = random.Random(seed)
    ids = [torch.tensor([rng.randrange(1, 500) for _ in range(rng.randint(2, 12))]) for _ in range(n)]
    return text.Tokens(ids, [torch.tensor([rng.random() < 0.5 for _ in x]) for x in ids])


def test_collate_against_a_double_loop():
    """Targets shifted by one, places of another row, padding that is predicted."""
    data = tokens()
    for chosen in ([0, 1, 2, 3, 4, 5], [4, 4, 1], [2]):
        (ids, where), targets = text.collate(data, torch.tensor(chosen))
        T = max(len(data.ids[k]) for k in chosen) - 1
        places, expected = [], []
        for row, k in enumerate(chosen):
            for t in range(1, len(data.ids[k])):
                if data.counts[k][t]:
                    places.append(row * T + t - 1)
                    expected.append(data.ids[k][t].item())
        assert where.tolist() == places and targets.tolist() == expected
        assert ids.shape == (len(chosen), T) and ids.dtype == where.dtype == targets.dtype == torch.long
        for row, k in zip(ids, chosen):
            n = len(data.ids[k]) - 1
            assert torch.equal(row[:n], data.ids[k][:-1]) and not row[n:].any()


def test_padding_share():
    """5 + 3 and 2 + 2 tokens in 2 x 5 and 2 x 2 places: 2 of 14 are padding."""
    data = text.Tokens([torch.zeros(n) for n in (5, 3, 2)], None)
    assert text.padding(data, [torch.tensor([0, 1]), torch.tensor([2, 2])]) == pytest.approx(2 / 14)


# Arithmetic

def scanner():
    """Patterns of a story, what it ends in, and an equation, made from the templates."""
    def pattern(template):
        escaped = re.escape(template).replace(r"\{n\}", f"(?:{'|'.join(text.NAMES)})")
        return escaped.replace(r"\{i\}", f"(?:{'|'.join(text.ITEMS)})").replace(
            r"\{a\}", r"(\d+)").replace(r"\{b\}", r"(\d+)").replace(r"\{c\}", r"(\d+)")

    stories = [(sign, re.compile(rf" {pattern(s)}(?: How many\?)?"))
               for sign, some in text.STORIES.items() for s in some]
    ends = {sign: re.compile(" " + pattern(end)) for sign, end in text.ENDS.items()}
    return stories, ends, re.compile(r" (\d+) ([+x-]) (\d+) = (\d+)")


SCANNER = scanner()


def facts_in(page):
    """[(a, sign, b, result)] of a page: every story with what it ends in, every equation. Nothing is left but
    headings (#### and a word)."""
    stories, ends, equation = SCANNER
    at, found = 0, []
    while at < len(page):
        if heading := re.compile(r" #### [a-z]+").match(page, at):
            at = heading.end()
            continue
        story = next(((sign, m) for sign, p in stories if (m := p.match(page, at))), None)
        if story:
            sign, m = story
            at, a, b = m.end(), *map(int, m.groups())
            if end := ends[sign].match(page, at):
                at = end.end()
                found.append((a, sign, b, int(end[1])))
                continue
        m = equation.match(page, at)
        assert m, page[at:]
        found.append((int(m[1]), m[2], int(m[3]), int(m[4])))
        assert not story or (a, sign, b) == found[-1][:3], page
        at = m.end()
    return found


def ordered(fact):
    """7 + 3 and 3 + 7 are one fact."""
    a, sign, b, c = fact
    return (a, sign, b, c) if sign == "-" else (min(a, b), sign, max(a, b), c)


@pytest.fixture(scope="module")
def arithmetic():
    """split -> the facts of each example, after every text was parsed."""
    found = {}
    for split in text.COUNTS:
        pages = list(text.arithmetic(split))
        assert len(pages) == text.COUNTS[split]
        if split in ("old", "new"):
            assert all(len(parts) == 1 and parts[0][1] for parts in pages)
            found[split] = [facts_in(parts[0][0]) for parts in pages[:12_000]]
            continue
        found[split] = []
        for (problem, asked), (answer, counted) in pages:
            assert not asked and counted and problem.endswith(" How many?")
            equation, mark, number = answer.partition(" #### ")
            fact, = facts_in(problem.removesuffix(" How many?") + equation)
            assert mark and number == str(fact[3])
            found[split].append([fact])
    return found


def test_arithmetic_is_right(arithmetic):
    """A wrong result, or a story whose numbers are not those of its equation (checked while parsing)."""
    results = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    for pages in arithmetic.values():
        assert all(results[sign](a, b) == c for page in pages for a, sign, b, c in page)
    assert {len(page) for page in arithmetic["new"]} == {1, 2, 3, 4}


def test_the_old_base_knows_what_is_tuned_and_not_what_is_tested(arithmetic):
    """Facts that leak: a test problem that the old base, and so the reward, has seen, also the other way
    round."""
    seen = {split: {ordered(fact) for page in pages for fact in page} for split, pages in arithmetic.items()}
    every = {ordered(fact) for fact in text.facts()}
    assert seen["train"] <= seen["old"] and not seen["test"] & seen["old"] and seen["test"] <= seen["new"]
    assert seen["new"] == every and seen["old"] == seen["train"]
    assert len(seen["test"]) > 0.9 * len(every - seen["old"])
    assert 0.4 < len(seen["old"]) / len(every) < 0.6 and len(every) == len(text.facts())
    for split in arithmetic:
        assert {sign for _, sign, _, _ in seen[split]} == {"+", "-", "x"}


def test_the_old_text_spells_no_fact_of_the_test(arithmetic):
    """The same for all 40,000 pages, as strings of numbers, without the parser."""
    pages = "\n".join(parts[0][0] for parts in text.arithmetic("old"))
    spelt = set(re.findall(r" \d+ [+x-] \d+ = \d+", pages))
    for fact in {fact for page in arithmetic["test"] for fact in page}:
        a, sign, b, c = fact
        assert f" {a} {sign} {b} = {c}" not in spelt
        assert sign == "-" or f" {b} {sign} {a} = {c}" not in spelt


def digest(split):
    return hashlib.sha256(repr(list(text.arithmetic(split))).encode()).hexdigest()


def test_arithmetic_is_deterministic():
    """Texts that depend on the process: on its hash seed, or on random's own state."""
    random.seed(1)
    one = digest("train"), digest("test")
    random.seed(2)
    code = ("import sys; sys.path[:0] = sys.argv[1:]; import test_text; "
            "print(test_text.digest('train'), test_text.digest('test'))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")], text=True, check=True,
                          env=os.environ | dict(PYTHONHASHSEED="7"), capture_output=True)
    assert one == (digest("train"), digest("test")) == tuple(done.stdout.split())
    assert one[0] != one[1]


def test_arithmetic_sizes():
    assert {split: len(read("arithmetic", split)[1]) for split in ("train", "test")} == dict(
        train=4000, test=1000)
    assert text.COUNTS == dict(old=40_000, new=40_000, train=4000, test=1000)
    assert read("arithmetic", "test")[0] == " {}" and len(read("arithmetic-old")[1]) == 40_000


def test_arithmetic_words_are_tokens():
    """A tokenizer that is not the data's: every word and number has a token of its own, but for a few."""
    problems = "".join(t for parts in text.arithmetic("train") for t, _ in parts)
    words = Counter(re.findall(r" \w+| #+| ?[^\w\s]", problems))
    single = sum(n for word, n in words.items() if len(TOKENIZER.encode(word)) == 1)
    assert single / words.total() > 0.99
    assert all(len(TOKENIZER.encode(f" {word}")) == 1 for word in [*text.NAMES, *text.ITEMS])
