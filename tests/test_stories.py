"""tests/stories.py: which stories are put into the first person, what is counted, and bad input."""
import json

import conftest
import pytest
import stories
from conftest import FIXTURES, call_main, one_line

from data import text

TOM = 'Once there was a boy named Tom. Tom had his hat. "He is Tom," said a bird. He saw him. He ran.'


def call(*argv):
    return call_main(stories.main, "stories.py", *argv)


def test_a_story_with_one_person_is_put_into_the_first_person():
    """Catches: What is said in quotation marks, or the prompt, is changed."""
    assert stories.first_person(TOM) == (
        "Once there was a boy named Tom.", 'I had my hat. "He is Tom," said a bird. I saw me. I ran.')


@pytest.mark.parametrize("story", [TOM.replace("saw", "and she saw"), TOM.replace("named Tom", "there"),
                                   "A boy named Tom ran. He fell."], ids=["two", "no name", "few"])
def test_a_story_with_several_persons_or_without_one_stays(story):
    assert stories.first_person(story) is None


def test_pronouns_are_counted_outside_of_quotation_marks_only():
    assert stories.count("I", 'I ran. "I fell," I said. In it, Iris.') == 2


def test_every_fourth_story_is_for_the_test_and_the_others_are_a_book(tmp_path):
    """Catches: A test story is trained on, or the bases read stories in the first person."""
    told = [TOM.replace("hat", f"hat {i}") for i in range(8)]
    (tmp_path / "in.json").write_text(json.dumps([*told, "A cat sat."]))
    assert call("write", tmp_path / "in.json", tmp_path / "out") == 0
    train, test = (["".join(part for part, _ in parts) for _, parts in text.load(f"{tmp_path}/out", name)[1]]
                   for name in ("train", "test"))
    assert len(train) == 6 and len(test) == 2 and not set(train) & set(test)
    assert all("named Tom. I had my hat" in story for story in train + test)
    assert (tmp_path / "out" / "book.txt").read_text() == "A cat sat."


@pytest.mark.parametrize("content", [
    "{", '{"a": 1}', "[1, 2]", "[]", '["A cat sat."]', json.dumps([TOM, TOM])])
def test_what_is_no_list_of_stories_is_refused_in_one_line(tmp_path, capfd, content):
    """Catches: Empty files are written, and training fails on them later."""
    (tmp_path / "in.json").write_text(content)
    one_line(call("write", tmp_path / "in.json", tmp_path / "out"), capfd.readouterr().err, "in.json")
    assert not (tmp_path / "out").exists()


def test_the_count_has_a_line_for_each_way_to_use_the_models(tmp_path, capsys):
    """Catches: stories260K's folder cannot be tuned, as before its tokenizer was read."""
    told = [TOM.replace("hat", f"hat {i}") for i in range(8)]
    (tmp_path / "in.json").write_text(json.dumps([*told, "A cat sat."]))
    assert call("write", tmp_path / "in.json", tmp_path / "out") == 0
    train = ["train_lm.py", "--data", tmp_path / "out", "--base", FIXTURES / "stories260k", "--length", 512,
             "--steps", 1, "--batch", 2, "--accum", 1, "--warmup", 0, "--device", "cpu"]
    for method in ("prt", "ft"):
        assert conftest.call(*train, "--method", method, "--out", tmp_path / f"{method}.pt") == 0
    capsys.readouterr()
    assert call("count", tmp_path / "out", "--reward", tmp_path / "prt.pt", "--tuned", tmp_path / "ft.pt",
                "--base", FIXTURES / "stories260k") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].rstrip() for line in lines] == [
        "source alone", "source fine-tuned", "new alone", "new + reward (PRT)", "new + EFT"]
