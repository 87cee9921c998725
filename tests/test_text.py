"""Text data sets: the readers, which tokens the loss counts, the batches, and the embedded arithmetic."""
import codecs
import functools
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from bench import padding
from conftest import FIXTURES, ROOT

from data import text
from models import runs
from models.tokenizer import Tokenizer

SMALL = (ROOT / "data/tokenizer.json").read_text()
TOKENIZER = Tokenizer(SMALL, "small")
LLAMA2 = Tokenizer((FIXTURES / "llama2_tokenizer" / "tokenizer.json").read_text("utf-8"), "llama2")
END = TOKENIZER.size - 1
GOOD = json.dumps(dict(prompt="a", response="b"))


def write(path, *lines):
    """Writes a file of lines, each of them a string or the dict of a JSON line; returns its path."""
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(path, split="train"):
    """Returns the template and the examples' segments, without their names."""
    template, examples = text.load(str(path), split)
    return template, [parts for _, parts in examples]


def dialog(path, *turns):
    """Writes a .jsonl file of one dialog, from (role, content) pairs; returns its path."""
    return write(path, dict(messages=[dict(role=role, content=content) for role, content in turns]))


def answers(ids, counts):
    """Returns the decoded stretches of tokens that the loss counts."""
    stretches = [[]]
    for i, counted in zip(ids.tolist(), counts.tolist()):
        if counted:
            stretches[-1].append(i)
        elif stretches[-1]:
            stretches.append([])
    return [TOKENIZER.decode(stretch) for stretch in stretches if stretch]


def beginning():
    """Returns the small tokenizer with a token that every text begins with, as Llama 3's has one."""
    template = dict(type="TemplateProcessing", single=[
        dict(SpecialToken=dict(id="<|endoftext|>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))])
    return Tokenizer(json.dumps(json.loads(SMALL) | dict(post_processor=template)), "beginning")


def example(prompt, response):
    return "here", [(prompt, False), (response, True)]


# Dialogs

TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Two\nlines?"),
        ("assistant", " Yes.\n")]


def test_the_template_of_dialogs_is_that_of_tulu_v2(tmp_path):
    template, _ = read(dialog(tmp_path / "x.jsonl", *TALK))
    assert template.replace("{}", "Hi") == "<|user|>\nHi\n<|assistant|>\n"


def test_a_dialog_is_written_in_the_form_of_tulu_v2(tmp_path):
    """Catches: An answer lacks its end token, or the template is not Tulu v2's."""
    _, (parts,) = read(dialog(tmp_path / "x.jsonl", *TALK))
    data = text.encode([("here", parts)], TOKENIZER, END, 1000)
    assert TOKENIZER.decode(data.ids[0].tolist()) == (
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!<|endoftext|>\n"
        "<|user|>\nTwo\nlines?\n<|assistant|>\n Yes.\n<|endoftext|>")


def test_every_answer_of_a_dialog_counts_and_nothing_else(tmp_path):
    """Catches: The loss counts a prompt, a role, or a line break, or leaves out the second answer."""
    _, (parts,) = read(dialog(tmp_path / "x.jsonl", *TALK))
    data = text.encode([("here", parts)], TOKENIZER, END, 1000)
    assert answers(data.ids[0], data.counts[0]) == ["Hello!<|endoftext|>", " Yes.\n<|endoftext|>"]


def test_a_question_at_the_end_of_a_dialog_is_left_out(tmp_path):
    """Catches: A last turn of the user's counts, or is taken for the answer."""
    talk = [("user", "Hi"), ("assistant", "Hello!"), ("user", "\n")]
    _, (parts,) = read(dialog(tmp_path / "x.jsonl", *talk))
    data = text.encode([("here", parts)], TOKENIZER, END, 1000)
    assert answers(data.ids[0], data.counts[0]) == ["Hello!<|endoftext|>"]
    assert TOKENIZER.decode(data.ids[0].tolist()).endswith("<|assistant|>\nHello!<|endoftext|>")


@pytest.mark.parametrize("source", ["dialog", "gsm8k", "arithmetic"])
def test_a_prompt_has_the_same_tokens_in_training_and_in_use(tmp_path, source):
    """Catches: The prompt in its template, as one text, has other tokens than the segments in training."""
    if source == "dialog":
        source = dialog(tmp_path / "x.jsonl", ("user", "What is 3 + 4?\n"), ("assistant", "7"))
    template, examples = text.load(str(source), "train")
    parts = examples[0][1][:-1]
    before, after = template.split("{}")
    whole = "".join(part for part, _ in parts)
    prompt = whole[len(before):len(whole) - len(after)]
    assert template.replace("{}", prompt) == whole
    assert TOKENIZER.encode(whole) == text.token_ids(parts, TOKENIZER, END)[0]
    assert LLAMA2.begin + LLAMA2.encode(whole) == text.token_ids(parts, LLAMA2, 2)[0]


def test_only_the_first_segment_begins_with_the_space_of_sentencepiece():
    """Catches: Every segment begins with a space, which the text of a model's training has only at its start.

    A segment without text is not the first.
    """
    parts = [("", False), ("Hi\n", False), ("people", True), ("\nno", False), (" people", True)]
    ids, _ = text.token_ids(parts, LLAMA2, 2)
    assert b"".join(LLAMA2.bytes[i] for i in ids) == b"<s> Hi\npeople</s>\nno people</s>"
    ids = torch.cat(text.blocks([("a", parts), ("b", parts[2:3])], LLAMA2, 2, 2).ids).tolist()
    assert b"".join(LLAMA2.bytes[i] for i in ids).startswith(b" Hi\npeople\nno people</s> people")


# Other readers

@pytest.fixture
def two_lines(tmp_path):
    return write(tmp_path / "x.jsonl", "\n", dict(prompt="Q: ü?", response=" A\n"), "  \n",
                 dict(prompt="", response="{}", note=3))


def test_prompt_and_response_are_taken_as_they_are(two_lines):
    """Catches: A space or line break is lost or added between a prompt and its response."""
    assert read(two_lines) == ("{}", [[("Q: ü?", False), (" A\n", True)], [("", False), ("{}", True)]])


def test_the_name_of_an_example_is_its_file_and_line(two_lines):
    assert [name for name, _ in text.load(str(two_lines), "train")[1]] == [
        f"{two_lines} line 2", f"{two_lines} line 4"]


@functools.cache
def gsm8k(split):
    return read("gsm8k", split)


@pytest.mark.parametrize("split, number", [("train", 7473), ("test", 1319)])
def test_gsm8k_has_all_of_its_problems_once(split, number):
    template, examples = gsm8k(split)
    assert template == "Question: {}\n\nAnswer:"
    assert len(examples) == number
    assert len({parts[0][0] for parts in examples}) == number


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_asks_a_question_and_counts_an_answer_that_ends_in_a_number(split):
    """Catches: An answer contains the calculator's marks, or is not asked for in its form."""
    for (prompt, asked), (answer, counted) in gsm8k(split)[1]:
        assert not asked
        assert counted
        assert re.fullmatch(r"Question: .+\n\nAnswer:", prompt, re.S)
        assert "<<" not in answer
        assert ">>" not in answer
        assert re.fullmatch(r" \S.*\n#### -?[\d,]*\.?\d+", answer, re.S), answer


def test_gsm8k_begins_with_the_clips_that_natalia_sold():
    assert gsm8k("train")[1][0][1][0] == (
        " Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n"
        "#### 72")


@pytest.fixture
def parquet(tmp_path):
    """A function that writes dicts to a .parquet file and returns its path."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write_rows(*rows):
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), tmp_path / "x.parquet")
        return tmp_path / "x.parquet"
    return write_rows


@pytest.mark.parametrize("rows", [
    [dict(prompt="a", response="b"), dict(prompt="c", response="d")],
    [dict(messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Ho")])]])
def test_the_rows_of_a_parquet_file_are_those_of_the_same_json_lines(tmp_path, parquet, rows):
    assert read(parquet(*rows)) == read(write(tmp_path / "x.jsonl", *rows))


def test_a_malformed_parquet_row_is_named(parquet):
    path = parquet(dict(prompt="a", response="b"), dict(prompt="c", response=None))
    with pytest.raises(ValueError, match=f"{path} row 2: None"):
        read(path)


@pytest.mark.parametrize("part", [slice(0), slice(-9), slice(100, None)])
def test_a_damaged_parquet_file_is_named(parquet, part):
    path = parquet(dict(prompt="a", response="b"), dict(prompt="c", response=None))
    path.write_bytes(path.read_bytes()[part])
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    """Catches: An ImportError and its traceback do not say what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=f"{tmp_path}/x.parquet.*pip install pyarrow"):
        read(write(tmp_path / "x.parquet", "PAR1"))


def test_a_text_file_is_one_example(tmp_path):
    """Catches: A book is read line by line, or without its line breaks."""
    assert read(write(tmp_path / "x.txt", "Once\n\nupon ü")) == ("{}", [[("Once\n\nupon ü", True)]])


@pytest.mark.parametrize("name, content, expected", [
    ("x.txt", "Once ü", ("{}", [[("Once ü", True)]])),
    ("x.jsonl", GOOD + "\r\n" + GOOD + "\r\n", ("{}", [[("a", False), ("b", True)]] * 2))])
def test_files_may_come_from_windows(tmp_path, name, content, expected):
    """Catches: A byte-order mark becomes a token, or a line end makes a line invalid."""
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + content.encode())
    assert read(path) == expected


@pytest.mark.parametrize("split, prompt", [("train", "a"), ("test", "c")])
def test_a_folder_has_a_file_for_each_split(tmp_path, split, prompt):
    write(tmp_path / "train.jsonl", dict(prompt="a", response="b"))
    write(tmp_path / "test.jsonl", dict(prompt="c", response="d"))
    assert read(tmp_path, split)[1][0][0][0] == prompt


def test_two_files_for_one_split_are_an_error(tmp_path):
    """Catches: One of two files is picked silently."""
    write(tmp_path / "train.jsonl", dict(prompt="a", response="b"))
    write(tmp_path / "test.jsonl", dict(prompt="c", response="d"))
    write(tmp_path / "train.txt", "more")
    with pytest.raises(ValueError, match=f"{tmp_path}.* 2 files named train"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["arithmetic-old", "{}/x.jsonl", "{}/folder"])
def test_a_missing_test_split_is_a_file_not_found(tmp_path, source):
    """Catches: Training ends with an error because there is no test split to score."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "x.jsonl", tmp_path / "folder/train.jsonl"):
        write(path, GOOD)
    with pytest.raises(FileNotFoundError, match=re.escape(source.format(tmp_path))):
        read(source.format(tmp_path), "test")


# Bad files

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
def test_whatever_a_line_holds_the_error_names_the_file_and_the_line(tmp_path, case):
    """Catches: The error is not a ValueError, has several lines, or repeats the whole file."""
    line = BAD[case] if isinstance(BAD[case], bytes) else BAD[case].encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_examples_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=f"{tmp_path}/x.jsonl: holds no example"):
        read(write(tmp_path / "x.jsonl", content))


@pytest.fixture
def compressed(tmp_path):
    """A .jsonl.gz file of 50 examples."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(f"{GOOD}\n".encode() * 50, mtime=0))
    return path


def test_a_gz_file_is_decompressed(compressed):
    assert len(read(compressed)[1]) == 50


def test_any_damage_of_a_gz_file_is_a_value_error_that_names_it(compressed):
    """Catches: Damage other than a wrong length raises an error of another kind."""
    whole = compressed.read_bytes()
    for i in range(10, len(whole)):
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:]):
            compressed.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(compressed))):
                read(compressed)


def test_the_error_for_an_unknown_source_lists_what_there_is():
    with pytest.raises(ValueError, match="--data gsm9k: unknown.*arithmetic, gsm8k"):
        read("gsm9k")


def test_a_folder_without_a_train_file_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}.* 0 files named train"):
        read(tmp_path)


# Tokens

@pytest.mark.parametrize("tokenizer", [TOKENIZER, beginning()], ids=["small", "beginning"])
def test_the_loss_counts_the_response_and_its_end_token(tokenizer):
    """Catches: The loss counts a token of the prompt, or the one that every text begins with."""
    data = text.encode([example("Tom has 3 apples", " 3 + 4 = 7")], tokenizer, END, 100)
    before = tokenizer.begin + TOKENIZER.encode("Tom has 3 apples")
    response = TOKENIZER.encode(" 3 + 4 = 7")
    assert len(tokenizer.begin) == (tokenizer is not TOKENIZER)
    assert data.ids[0].tolist() == [*before, *response, END]
    assert data.counts[0].tolist() == [False] * len(before) + [True] * (len(response) + 1)
    assert data.ids[0].dtype == torch.long
    assert data.counts[0].dtype == torch.bool


def test_the_first_token_of_a_text_does_not_count_even_without_a_prompt():
    """Catches: The first token counts, although no token before it could predict it."""
    data = text.encode([example("", " 7")], beginning(), END, 100)
    assert data.counts[0].tolist() == [False, True, True]


def test_what_looks_like_the_end_token_in_a_response_does_not_end_it():
    data = text.encode([example("a", "<|endoftext|>b")], TOKENIZER, END, 100)
    assert data.ids[0].tolist().count(END) == 1
    assert data.ids[0][-1] == END


EXAMPLES = [example("Tom has 3", " 4"), example("Tom has 3 apples and", " 3 + 4 = 7"),
            example("Tom", " 3 + 4 = 7 #### 7")]
WHOLE = text.encode(EXAMPLES, TOKENIZER, END, 1000)
LENGTHS = range(2, 1 + max(len(ids) for ids in WHOLE.ids))


def too_long(length):
    return [len(ids) > length for ids in WHOLE.ids]


def test_examples_that_fit_are_neither_changed_nor_mentioned(capsys):
    data = text.encode(EXAMPLES, TOKENIZER, END, LENGTHS[-1])
    assert [ids.tolist() for ids in data.ids] == [
        TOKENIZER.encode(prompt) + TOKENIZER.encode(response) + [END]
        for _, ((prompt, _), (response, _)) in EXAMPLES]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_longer_examples_are_truncated_or_dropped(capsys, length, drop):
    """Catches: A truncated example keeps nothing to learn, one that fits is dropped, or a number is wrong."""
    long = too_long(length)
    kept = [k for k in range(3) if (not long[k] if drop else WHOLE.counts[k][:length].any())]
    if not kept:
        with pytest.raises(ValueError, match=f"--length {length}"):
            text.encode(EXAMPLES, TOKENIZER, END, length, drop)
        return
    data = text.encode(EXAMPLES, TOKENIZER, END, length, drop)
    assert [ids.tolist() for ids in data.ids] == [WHOLE.ids[k][:length].tolist() for k in kept]
    assert [counts.tolist() for counts in data.counts] == [WHOLE.counts[k][:length].tolist() for k in kept]
    line = f"{sum(long)} of 3 examples exceed {length} tokens; {3 - len(kept)} are dropped"
    assert capsys.readouterr().out.splitlines()[-1:] == [line] * any(long)


@pytest.mark.parametrize("length, drop", [(1, False), (3, False), (3, True)])
def test_a_training_set_without_a_single_response_is_an_error(capsys, length, drop):
    with pytest.raises(ValueError, match=f"none of 2 examples .* --length {length}"):
        text.encode([example("Tom has 3 apples", " 7")] * 2, TOKENIZER, END, length, drop)
    assert f"2 of 2 examples exceed {length} tokens; 2 are dropped" in capsys.readouterr().out


def test_a_response_that_is_truncated_to_the_first_token_teaches_nothing():
    """Catches: An example is kept whose only counted token is the first, which nothing predicts."""
    with pytest.raises(ValueError, match="none of 1 examples .* --length 1"):
        text.encode([example("", " 7")], TOKENIZER, END, 1)


def test_blocks_are_the_texts_with_the_end_token_after_each():
    """Catches: Tokens are lost between two blocks, or texts have no end token between them."""
    texts = [" 3 + 4 = 7", " Tom has 3 apples.", " 1", " 2 x 2 = 4 and so on"]
    data = text.blocks([("here", [(t, True)]) for t in texts], TOKENIZER, END, 5)
    expected = [i for t in texts for i in [*TOKENIZER.encode(t), END]]
    assert len(expected) % 5
    assert torch.cat(data.ids).tolist() == expected[:len(expected) // 5 * 5]


def test_every_token_of_a_full_block_counts():
    """Catches: The last block is padded."""
    data = text.blocks([("here", [(" Tom has 3 apples.", True)])] * 3, TOKENIZER, END, 5)
    assert all(len(ids) == 5 and ids.dtype == torch.long for ids in data.ids)
    assert all(counts.dtype == torch.bool and counts.all() for counts in data.counts)
    assert [len(counts) for counts in data.counts] == [5] * len(data.ids)


def test_in_blocks_the_end_token_follows_the_response_and_not_the_prompt():
    """Catches: An end token after a prompt teaches the model to stop before it answers."""
    data = text.blocks([example("Tom has 3", " 4"), example("Ann has 1", " 2")], TOKENIZER, END, 5)
    whole = TOKENIZER.decode([i for ids in data.ids for i in ids.tolist()])  # less what fills no block
    assert "Tom has 3 4<|endoftext|>Ann has 1 2<|endoftext|>".startswith(whole)
    assert "Ann" in whole


def test_a_text_that_is_shorter_than_a_block_is_an_error():
    with pytest.raises(ValueError, match="--length 9"):
        text.blocks([("here", [(" 3 + 4", True)])], TOKENIZER, END, 9)


# Batches

def grouped(lengths, batch, steps, seed):
    """Returns the shuffled batches, and the same regrouped by length: functions from a step to indices."""
    shuffled = functools.partial(runs.shuffled, n=len(lengths), batch=batch, seed=seed)
    return shuffled, text.group_by_length(shuffled, lengths, batch, steps, seed)


def random_lengths(n):
    return [random.Random(i).randint(2, 300) for i in range(n)]


@pytest.mark.parametrize("steps, n", [(1, 37), (4, 37), (73, 37), (150, 37), (50, 800), (173, 800)])
def test_grouped_batches_hold_the_examples_of_the_shuffled_ones(steps, n):
    """Catches: Examples are lost or doubled at the end of an epoch, or in a last short pool."""
    shuffled, indices = grouped(random_lengths(n), 8, steps, seed=3)
    batches = [indices(step) for step in range(steps)]
    assert all(i.shape == (8,) and i.dtype == torch.long for i in batches)
    uses = Counter(torch.cat(batches).tolist())
    assert uses == Counter(torch.cat([shuffled(step) for step in range(steps)]).tolist())
    assert max(uses.values()) - min(uses[i] for i in range(n)) <= 1


@pytest.mark.parametrize("step", [119, 3, 57, 100, 58, 4])
def test_a_grouped_batch_does_not_depend_on_the_batches_before_it(step):
    """Catches: A resumed run, which starts in the middle of a pool, sees other batches."""
    _, indices = grouped(random_lengths(37), 8, 120, seed=3)
    batches = [indices(s) for s in range(120)]
    assert torch.equal(grouped(random_lengths(37), 8, 120, seed=3)[1](step), batches[step])
    assert torch.equal(indices(step), batches[step])


def test_another_seed_gives_other_batches():
    (_, one), (_, other) = (grouped(random_lengths(37), 8, 120, seed=seed) for seed in (3, 4))
    assert any(not torch.equal(one(step), other(step)) for step in range(9))


def test_the_seed_also_shuffles_the_order_of_grouped_batches():
    """Catches: All seeds have the same order of lengths."""
    lengths = random_lengths(800)
    shuffled = functools.partial(runs.shuffled, n=800, batch=8, seed=3)
    one, other = (text.group_by_length(shuffled, lengths, 8, 100, seed) for seed in (3, 4))
    assert any(not torch.equal(one(step), other(step)) for step in range(9))


def test_a_grouped_batch_has_little_padding():
    lengths = random_lengths(800)
    data = text.Tokens([torch.zeros(n, dtype=torch.long) for n in lengths], None)
    shuffled, indices = grouped(lengths, 8, 100, seed=0)
    waste = padding(data, [indices(step) for step in range(100)])
    assert waste < 0.05 < 0.3 < padding(data, [shuffled(step) for step in range(100)])


def test_grouped_batches_are_not_in_the_order_of_their_lengths():
    """Catches: Lengths, and with them gradients, grow within a pool."""
    lengths = random_lengths(800)
    _, indices = grouped(lengths, 8, 100, seed=0)
    longest = [max(lengths[k] for k in indices(step).tolist()) for step in range(50)]
    rises = sum(after > before for before, after in zip(longest, longest[1:]))
    assert 15 <= rises <= 35


def test_a_batch_may_be_larger_than_the_data():
    _, indices = grouped([5, 2, 9], 8, 6, seed=0)
    assert Counter(torch.cat([indices(step) for step in range(6)]).tolist()) == {0: 16, 1: 16, 2: 16}


def test_a_grouped_batch_has_mostly_different_examples():
    """Catches: A pool of several epochs sorts the copies of an example into one batch."""
    _, indices = grouped(random_lengths(37), 8, 100, seed=0)
    different = [len(set(indices(step).tolist())) for step in range(100)]
    assert sum(different) / 100 > 6


def random_tokens(seed=0, n=6):
    rng = random.Random(seed)
    ids = [torch.tensor([rng.randrange(1, 500) for _ in range(rng.randint(2, 12))]) for _ in range(n)]
    return text.Tokens(ids, [torch.tensor([rng.random() < 0.5 for _ in x]) for x in ids])


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [4, 4, 1], [2]])
def test_a_batch_has_the_index_and_targets_of_a_double_loop(chosen):
    """Catches: Targets are shifted by one, positions are those of another row, or padding is predicted."""
    data = random_tokens()
    (ids, index), targets = text.collate(data, torch.tensor(chosen))
    T = max(len(data.ids[k]) for k in chosen) - 1
    positions, expected = [], []
    for row, k in enumerate(chosen):
        for t in range(1, len(data.ids[k])):
            if data.counts[k][t]:
                positions.append(row * T + t - 1)
                expected.append(data.ids[k][t].item())
    assert index.tolist() == positions
    assert targets.tolist() == expected
    assert index.dtype == targets.dtype == torch.long


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [4, 4, 1], [2]])
def test_a_batch_is_padded_on_the_right_and_lacks_the_last_tokens(chosen):
    data = random_tokens()
    (ids, _), _ = text.collate(data, torch.tensor(chosen))
    assert ids.shape == (len(chosen), max(len(data.ids[k]) for k in chosen) - 1)
    assert ids.dtype == torch.long
    for row, k in zip(ids, chosen):
        n = len(data.ids[k]) - 1
        assert torch.equal(row[:n], data.ids[k][:-1])
        assert not row[n:].any()


def test_the_share_of_padding():
    """Of 2 x 5 and 2 x 2 positions, the texts of 5 and 3, and twice 2 tokens leave 2 empty."""
    data = text.Tokens([torch.zeros(n) for n in (5, 3, 2)], None)
    assert padding(data, [torch.tensor([0, 1]), torch.tensor([2, 2])]) == pytest.approx(2 / 14)


# The embedded arithmetic

def scanner():
    """Returns the patterns of stories, of their last sentences, and of equations, from the templates."""
    def pattern(template):
        escaped = re.escape(template).replace(r"\{n\}", f"(?:{'|'.join(text.NAMES)})")
        return escaped.replace(r"\{i\}", f"(?:{'|'.join(text.ITEMS)})").replace(
            r"\{a\}", r"(\d+)").replace(r"\{b\}", r"(\d+)").replace(r"\{c\}", r"(\d+)")

    stories = [(sign, re.compile(rf" {pattern(story)}(?: How many\?)?"))
               for sign, templates in text.STORIES.items() for story in templates]
    ends = {sign: re.compile(" " + pattern(end)) for sign, end in text.ENDS.items()}
    return stories, ends, re.compile(r" (\d+) ([+x-]) (\d+) = (\d+)")


SCANNER = scanner()


def facts_in(page):
    """Returns the facts (a, sign, b, result) of a page: every story with its end, and every equation.

    Fails if anything else is left but headings (#### and a word).
    """
    stories, ends, equation = SCANNER
    at, facts = 0, []
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
                facts.append((a, sign, b, int(end[1])))
                continue
        m = equation.match(page, at)
        assert m, page[at:]
        facts.append((int(m[1]), m[2], int(m[3]), int(m[4])))
        assert not story or (a, sign, b) == facts[-1][:3], page
        at = m.end()
    return facts


def ordered(fact):
    """Returns the fact with its smaller number first: 7 + 3 and 3 + 7 are one fact."""
    a, sign, b, c = fact
    return (a, sign, b, c) if sign == "-" else (min(a, b), sign, max(a, b), c)


@functools.cache
def pages(split):
    return list(text.arithmetic(split))


@pytest.fixture(scope="module")
def arithmetic():
    """The facts of each example, by split; of the two long texts those of the first 12,000 pages."""
    facts = {split: [facts_in(parts[0][0]) for parts in pages(split)[:12_000]] for split in ("old", "new")}
    for split in ("train", "test"):
        facts[split] = [facts_in(problem.removesuffix(" How many?") + answer.partition(" #### ")[0])
                        for (problem, _), (answer, _) in pages(split)]
    return facts


@pytest.mark.parametrize("split", ["old", "new"])
def test_every_page_of_the_pretraining_text_counts(split):
    assert len(pages(split)) == text.COUNTS[split]
    assert all(len(parts) == 1 and parts[0][1] for parts in pages(split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_problem_asks_how_many_and_its_answer_is_one_equation_and_its_result(arithmetic, split):
    assert len(pages(split)) == text.COUNTS[split]
    for ((problem, asked), (answer, counted)), facts in zip(pages(split), arithmetic[split], strict=True):
        assert not asked
        assert counted
        assert problem.endswith(" How many?")
        (*_, result), = facts
        assert answer.partition(" #### ")[1:] == (" #### ", str(result))


def test_every_result_is_right(arithmetic):
    """Catches: A result is wrong; the parser has compared the numbers of stories and equations."""
    results = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    for examples in arithmetic.values():
        assert all(results[sign](a, b) == c for facts in examples for a, sign, b, c in facts)


def test_a_page_has_one_to_four_facts(arithmetic):
    assert {len(facts) for facts in arithmetic["new"]} == {1, 2, 3, 4}


@pytest.fixture(scope="module")
def facts_of(arithmetic):
    """The set of facts, by split."""
    return {split: {ordered(fact) for facts in examples for fact in facts}
            for split, examples in arithmetic.items()}


def test_the_old_text_has_the_facts_to_tune_on_and_none_of_the_test(facts_of):
    """Catches: The old base has seen the fact of a test problem, perhaps with its numbers swapped."""
    assert facts_of["old"] == facts_of["train"]
    assert not facts_of["test"] & facts_of["old"]


def test_the_new_text_has_all_facts(facts_of):
    every = {ordered(fact) for fact in text.facts()}
    assert len(every) == len(text.facts())
    assert facts_of["new"] == every
    assert facts_of["test"] <= facts_of["new"]


def test_the_old_text_has_about_half_of_the_facts_and_the_test_most_of_the_others(facts_of):
    every = {ordered(fact) for fact in text.facts()}
    assert 0.4 < len(facts_of["old"]) / len(every) < 0.6
    assert len(facts_of["test"]) > 0.9 * len(every - facts_of["old"])


@pytest.mark.parametrize("split", text.COUNTS)
def test_every_split_has_sums_differences_and_products(facts_of, split):
    assert {sign for _, sign, _, _ in facts_of[split]} == {"+", "-", "x"}


def test_the_old_text_spells_no_fact_of_the_test(facts_of):
    """Catches: The parser hides a fact: these are all 40,000 pages, as strings."""
    spelled = set(re.findall(r" \d+ [+x-] \d+ = \d+", "\n".join(parts[0][0] for parts in pages("old"))))
    for a, sign, b, c in facts_of["test"]:
        assert f" {a} {sign} {b} = {c}" not in spelled
        assert sign == "-" or f" {b} {sign} {a} = {c}" not in spelled


def test_the_problems_do_not_depend_on_the_state_of_random():
    random.seed(1)
    first = [list(text.arithmetic(split)) for split in ("train", "test")]
    random.seed(2)
    assert first == [list(text.arithmetic(split)) for split in ("train", "test")]


def test_the_problems_do_not_depend_on_the_process():
    """Catches: The texts are in the order of a set, which changes with the hash seed of the process."""
    code = "from data import text; print([list(text.arithmetic(split)) for split in ('train', 'test')])"
    printed = subprocess.run([sys.executable, "-c", code], text=True, check=True, capture_output=True,
                             cwd=ROOT, env=os.environ | dict(PYTHONHASHSEED="7")).stdout
    assert printed.strip() == str([pages(split) for split in ("train", "test")])


def test_the_test_problems_are_not_those_to_tune_on():
    assert pages("train") != pages("test")


@pytest.mark.parametrize("source, split, number", [
    ("arithmetic", "train", 4_000), ("arithmetic", "test", 1_000), ("arithmetic-old", "train", 40_000),
    ("arithmetic-new", "train", 40_000)])
def test_the_sizes_of_the_arithmetic_data_sets(monkeypatch, source, split, number):
    monkeypatch.setattr(text, "arithmetic", pages)  # the same pages, made only once
    template, examples = read(source, split)
    assert template == " {}"
    assert len(examples) == text.COUNTS[source.partition("-")[2] or split] == number


def test_almost_every_word_of_the_problems_is_one_token():
    """Catches: The tokenizer is not the one made for these texts."""
    problems = "".join(part for parts in pages("train") for part, _ in parts)
    words = Counter(re.findall(r" \w+| #+| ?[^\w\s]", problems))
    single = sum(n for word, n in words.items() if len(TOKENIZER.encode(word)) == 1)
    assert single / words.total() > 0.99


@pytest.mark.parametrize("word", [*text.NAMES, *text.ITEMS])
def test_every_name_and_item_is_one_token(word):
    assert len(TOKENIZER.encode(f" {word}")) == 1
