"""models/task_vectors.py: eval.py's row of the base plus what tuning changed in the source's weights."""
from types import SimpleNamespace

import pytest
import torch
from conftest import EVAL_LM, OLD, REWARD, TRAIN, TUNED_SOURCE, call, read

import eval as eval_script
from models import runs

ROW = "base + (tuned source - source) weights"


def write(path, template, change):
    """Writes a checkpoint like that at `template`, with change(name, weight) for every weight."""
    content = read(template)
    torch.save(content | dict(model={k: change(k, x) for k, x in content["model"].items()}), path)
    return path


@pytest.fixture(params=["images", "text"])
def case(request, tmp_path):
    """Files of a base, its source, the tuned source, and a reward, and the start of a command line."""
    if request.param == "images":
        tiny = request.getfixturevalue("tiny")
        return SimpleNamespace(base=tiny.new, source=tiny.old, tuned=tiny.ft, reward=tiny.reward,
                               command=("eval.py", "--reward", tiny.reward))
    request.getfixturevalue("in_texts")
    torch.manual_seed(0)
    base = write(tmp_path / "base.pt", OLD, lambda _, x: x + 0.05 * torch.randn_like(x))
    return SimpleNamespace(base=base, source=OLD, tuned=TUNED_SOURCE, reward=REWARD,
                           command=(*EVAL_LM, "--limit", 8, "--speculative"))


def test_the_row_has_the_weights_that_are_added_by_hand(case, tmp_path, table):
    """Catches: The signs are wrong, a weight is left out, or the head or a buffer is not the base's."""
    source, tuned = read(case.source)["model"], read(case.tuned)["model"]
    hand = write(tmp_path / "hand.pt", case.base,
                 lambda k, x: x + (tuned[k] - source[k]) if k in tuned else x)
    rows = table(*case.command, "--base", case.base, "--tuned-source", case.tuned, "--tuned-base", case.tuned)
    alone, *_ = table(*case.command, "--base", hand)
    assert [row["method"] for row in rows][-3:] == ["base + EFT", ROW, "base fine-tuned"]
    assert rows[-2]["nll"] == alone["nll"] != rows[0]["nll"]
    assert rows[-2]["beta"] is None and rows[-2]["kl"] > 0


def test_nothing_is_added_if_nothing_was_tuned_and_all_if_the_base_is_the_source(case, tmp_path, table):
    """Catches: The source is added, or the KL is measured from it."""
    source = read(case.source)["model"]
    same = write(tmp_path / "same.pt", case.tuned, lambda k, x: source.get(k, x))
    base, *_, row = table(*case.command, "--base", case.base, "--tuned-source", same)
    assert (row["method"], row["nll"], row["kl"]) == (ROW, base["nll"], 0)
    *_, tuned, _, row = table(*case.command, "--base", case.source, "--tuned-source", case.tuned)
    assert [row[k] for k in ("nll", "kl")] == pytest.approx([tuned[k] for k in ("nll", "kl")], rel=1e-4)


@pytest.mark.parametrize("case", ["text"], indirect=True)
@pytest.mark.parametrize("tied", [False, True], ids=["padded", "tied"])
def test_there_is_no_row_for_weights_of_other_shapes_or_names(case, tmp_path, table, capsys, tied):
    """Catches: Weights are added that belong to other tokens, or eval.py fails where it did not before."""
    content = read(case.base)
    if tied:
        del content["model"]["lm_head.weight"]
        content["arch"]["tied"] = True
    else:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            content["model"][name] = torch.cat([content["model"][name], torch.zeros(5, 64)])
        content["arch"]["vocab"] += 5
    torch.save(content, tmp_path / "other.pt")
    rows = table(*case.command, "--base", tmp_path / "other.pt", "--tuned-source", case.tuned)
    assert rows[-1]["method"] == "base + EFT"


@pytest.mark.parametrize("case", ["text"], indirect=True)
def test_a_change_that_bfloat16_would_round_away_is_added(case, tmp_path, monkeypatch):
    """Catches: The difference is computed in the dtype of CUDA's tables, where 1.001 - 1 is 0."""
    paths = [write(tmp_path / f"{value}.pt", like, lambda k, x, value=value: torch.full_like(x, value))
             for value, like in {0.0: OLD, 1.0: OLD, 1.001: TUNED_SOURCE}.items()]
    monkeypatch.setattr(runs, "frozen_dtype", lambda device: torch.bfloat16)
    words = zip(("--base", "--source", "--tuned-source"), map(str, paths))
    args = eval_script.parse(["--reward", REWARD, *sum(words, ())])
    edited = eval_script.load_models(args, torch.device("cpu")).edited
    for p in edited.parameters():
        assert p.dtype == torch.bfloat16 and p.float().sub(1e-3).abs().max() < 1e-5


def test_the_bytes_of_the_row_are_those_of_the_tuned_source(paths, table):
    """Catches: Beside a ticket, the row has no bytes, although one file has to be sent for it."""
    ticket = paths["out"] / "x.pt"
    assert call(*TRAIN.format(**paths).split(), "--ticket", "random") == 0
    *_, row = table("eval.py", "--reward", ticket, "--base", paths["new"], "--tuned-source", paths["ft"])
    assert (row["method"], row["bytes"]) == (ROW, paths["ft"].stat().st_size)
