"""tests/stories.py: third person into first person, the files that it writes, and the count."""
import json
import sys

import pytest
import stories
from conftest import FIXTURES, call, one_line

from models import runs

LILY = ("One day, a girl named Lily saw a cat. She liked it, and Lily's mom gave her milk. "
        '"She is nice," Lily said to herself. The cat followed her to the park, and she was happy.')


def run(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stories.py", *map(str, argv)])
        try:
            runs.main(stories.main)
        except SystemExit as stop:
            return stop.code
    return 0


def test_one_person_becomes_the_narrator_outside_of_quotation_marks():
    prompt, rest = stories.first_person(LILY)
    assert prompt == "One day, a girl named Lily saw a cat."
    assert rest == ('I liked it, and my mom gave my milk. "She is nice," I said to myself. '
                    "The cat followed me to the park, and I was happy.")
    assert stories.count("I", rest) == 3 and stories.count("[Ss]he|[Hh]e", rest) == 0


@pytest.mark.parametrize("story", [LILY + " He ran.", LILY.replace("named", "called"), "A boy named Tim."])
def test_a_story_of_no_or_several_persons_stays_as_it_is(story):
    assert stories.first_person(story) is None


def test_every_fourth_story_is_for_the_test_and_others_are_in_the_book(tmp_path, capsys):
    source = tmp_path / "stories.json"
    source.write_text(json.dumps([*(LILY.replace("cat", f"cat {i}") for i in range(8)), "The end."]))
    assert run("write", source, tmp_path / "out") == 0
    assert (tmp_path / "out/book.txt").read_text() == "The end."
    train, test = ([json.loads(line) for line in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
                   for name in ("train", "test"))
    assert len(train) == 6 and ["cat 0" in test[0]["prompt"], "cat 4" in test[1]["prompt"]] == [True, True]
    assert all(row["response"].startswith(" I liked it") for row in train + test)
    assert "8 stories in the first person, 1 others" in capsys.readouterr().out


def test_the_count_has_a_line_for_each_way_to_use_the_models(tmp_path, capsys):
    """Catches: stories260K's folder cannot be tuned, as before its tokenizer was read."""
    source = tmp_path / "stories.json"
    source.write_text(json.dumps([LILY.replace("cat", f"cat {i}") for i in range(8)]))
    assert run("write", source, tmp_path / "out") == 0
    train = ["train_lm.py", "--data", tmp_path / "out", "--base", FIXTURES / "stories260k", "--length", 512,
             "--steps", 1, "--batch", 2, "--accum", 1, "--warmup", 0, "--device", "cpu"]
    for method in ("prt", "ft"):
        assert call(*train, "--method", method, "--out", tmp_path / f"{method}.pt") == 0
    capsys.readouterr()
    assert run("count", tmp_path / "out", "--reward", tmp_path / "prt.pt", "--tuned", tmp_path / "ft.pt",
               "--base", FIXTURES / "stories260k") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].rstrip() for line in lines] == [
        "source alone", "source fine-tuned", "new alone", "new + reward (PRT)", "new + EFT"]


def test_bad_input_is_refused_in_one_line(tmp_path, capfd):
    one_line(run("write", tmp_path / "none.json", tmp_path / "out"), capfd.readouterr().err, "none.json")
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": 1}')
    one_line(run("write", bad, tmp_path / "out"), capfd.readouterr().err, bad, "list")
