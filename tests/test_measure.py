"""The programs in tests/measure: that they start, and that their protocols hold."""
import json
import sys
from types import SimpleNamespace

import calibration
import generations
import pytest
import real_weights
import stories
import tickets
import torch
from conftest import FIXTURES, ROOT, call, call_main, output, read, write_webdataset
from torch import nn

from data import arithmetic, text

TOM = 'Once there was a boy named Tom. Tom had his hat. "He is Tom," said a bird. He saw him. He ran.'


@pytest.mark.parametrize("name", ["bench", "calibration", "figures", "generations", "gpu", "loading",
                                  "real_weights", "stories", "tickets"])
def test_a_program_starts(name, tmp_path):
    file = f"tests/measure/{name}.py"
    assert f"python {file}" in output(ROOT / file, "--help", cwd=tmp_path)


def network(name, pretrained=False):
    """Stands in for timm.create_model: a network with BatchNorm whose weights depend on its name."""
    torch.manual_seed(len(name))
    trunk = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(16, 1000))
    trunk.num_classes, trunk.pretrained_cfg = 1000, dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return trunk


@pytest.fixture
def splits(tmp_path, monkeypatch):
    """Images of 52 colors as the data, and small networks; the splits that are read from now on."""
    colors = {name: (5 * i % 256, 40 * i % 256, 90 * i % 256) for i, name in enumerate(real_weights.CLASSES)}
    read, photographs = [], real_weights.photographs
    monkeypatch.setattr(real_weights, "photographs", lambda args, split, size: (
        read.append(split), photographs(args, split, size))[1])
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=network))
    monkeypatch.setattr(real_weights, "DEFAULTS", real_weights.DEFAULTS | dict(
        old="a", new="bb", device="cpu", data=str(write_webdataset(tmp_path / "data", colors))))
    monkeypatch.setattr(real_weights, "SIZES", (16, 20))
    return read


def test_networks_are_tuned_on_used_images_and_beta_is_chosen_on_held_out_ones(splits, monkeypatch, capsys):
    """Catches: Held-out images are trained on, or beta is chosen on the test split (52 images)."""
    tuned, chosen_on, choose = [], [], real_weights.choose
    monkeypatch.setattr(real_weights, "tune", lambda args, seed, base, method, pixels, labels: (
        tuned.append((base.size, method, len(labels))), (base, 1.0))[1])
    monkeypatch.setattr(real_weights, "choose", lambda method, z, labels: (
        chosen_on.append(len(labels)), choose(method, z, labels))[1])
    assert call_main(real_weights.main, "real_weights.py") == 0
    assert tuned == [(16, "prt", 125), (16, "ft", 125), (20, "ft", 125)] and chosen_on == [31, 31]
    assert [line[:22].rstrip() for line in capsys.readouterr().out.splitlines()[-10:-2]] == [
        "old alone", "old tuned", "new alone", "new tuned", "new + PRT, beta 1", "new + PRT, beta chosen",
        "new + EFT, beta 1", "new + EFT, beta chosen"]


def test_beta_is_chosen_by_accuracy_and_then_by_nll():
    z = dict(new=torch.tensor([[1.0, 0.0], [0.0, 3.0]]), reward=torch.tensor([[-1.5, 0.0], [0.0, 1.0]]),
             old=torch.zeros(2, 2), tuned=torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    chosen = [real_weights.choose(method, z, torch.tensor([0, 1])) for method in ("PRT", "EFT")]
    assert chosen == [4.0, 0.5]  # at 1 and below, PRT's first image is wrong; the lowest NLL of EFT


def test_the_look_at_held_out_images_never_reads_the_test_split(splits, monkeypatch, capsys):
    """Catches: The images that choose beta are scored, too, or choices are made on the test split."""
    assert call_main(calibration.main, "calibration.py") == 0
    assert set(splits) == {"train"} and "EFT, calibrated" in capsys.readouterr().out
    right = {beta: torch.full((60,), float(beta == 2)) for beta in calibration.BETAS}
    right[1.0][:30] = 1
    assert 0.3 < calibration.with_few_images(right, {b: -x for b, x in right.items()}, 50, draws=20) < 0.7


def test_stories_are_put_into_the_first_person_and_counted(tmp_path, capsys):
    """Catches: A test story is trained on, or what is said in quotation marks is changed or counted."""
    assert stories.first_person(TOM) == (
        "Once there was a boy named Tom.", 'I had my hat. "He is Tom," said a bird. I saw me. I ran.')
    assert stories.count("I", 'I ran. "I fell," I said. In it, Iris.') == 2
    source, folder = tmp_path / "in.json", tmp_path / "out"
    source.write_text(json.dumps([*(TOM.replace("hat", f"hat {i}") for i in range(8)), "A cat sat."]))
    assert call_main(stories.main, "stories.py", "write", source, folder) == 0
    train, test = ({parts[-1][0] for _, parts in text.load(str(folder), x)[1]} for x in ("train", "test"))
    assert len(train) == 6 and len(test) == 2 and not train & test
    assert (folder / "book.txt").read_text() == "A cat sat."
    base = FIXTURES / "stories260k"
    paths = [tmp_path / f"{method}.pt" for method in ("prt", "ft")]
    for path in paths:
        assert call("train_lm.py", "--data", folder, "--source", base, "--steps", 1, "--batch", 2,
                    "--accum", 1, "--length", 512, "--method", path.stem, "--out", path) == 0
    assert call_main(stories.main, "stories.py", "count", folder, "--reward", paths[0], "--base", base,
                     "--tuned-source", paths[1]) == 0
    assert "\nnew + reward (PRT) " in capsys.readouterr().out


def test_one_reward_is_measured_on_five_bases(in_shapes, tmp_path, monkeypatch):
    """Catches: A later base gets a reward of its own, or the old text, or a rerun trains again."""
    monkeypatch.setattr(arithmetic, "COUNTS", dict(old=1000, new=1000, train=64, test=20))
    monkeypatch.setattr(tickets, "call", call)  # eval.py in this process, where there are few problems
    for _, script, *_ in generations.WORLDS.values():
        monkeypatch.setattr(script, "parse", lambda words, parse=script.parse: parse(
            [*words, "--steps", "1", "--batch", "8", "--warmup", "0"]))
    assert call_main(generations.main, "generations.py", "--out", tmp_path) == 0
    for result in json.loads((tmp_path / "table.json").read_text()):
        folder = tmp_path / f"{result['world']}-0"
        found = {path.stem: read(path) for path in folder.glob("*.pt")}
        monkeypatch.setattr(generations.WORLDS[result["world"]][1], "train", None)
        assert generations.train(result["world"], 0, folder) == result["seconds"]
        with pytest.raises(ValueError, match="other flags"):
            generations.train(result["world"], 1, folder)
        sources = {name: x["source"].rpartition("/")[2] for name, x in found.items() if "source" in x}
        assert sources == dict(reward="base1.pt", tuned_source="base1.pt") | {
            f"tuned_base{i}": f"base{i}.pt" for i in range(1, 6)}
        old, *later = (found[f"base{i}"]["data"] for i in range(1, 6))
        assert set(later) == {"arithmetic-new" if old == "arithmetic-old" else "shapes"}
        sizes = [x["thousand parameters"] for x in result["generations"]]
        assert sizes == sorted({*sizes}) and len(sizes) == 5
        assert {*generations.figures.LINES} <= {*result["generations"][4]}
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_randomly_pruned_weights_are_never_locked():
    assert tickets.randomly_pruned(1000, dict(keep=0.3, freeze=0.4)) == (0, 600, 180)


def test_the_table_for_a_gpu_has_the_rows_of_all_parts(tmp_path, monkeypatch):
    """Catches: A part fails, and nobody sees it until someone with a GPU runs the program."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    heading, _, *lines = output(ROOT / "tests/measure/gpu.py", "--tiny", cwd=tmp_path).splitlines()
    assert heading.startswith("CPU, 1 threads, float32, torch ") and ", commit " in heading
    assert lines[:2] == ["| what | value | unit or note |", "|---|---|---|"]
    rows = {what: value for what, value, _ in (line[2:-2].split(" | ") for line in lines[2:])}
    decoded = [f"{batch}, {way}" for way in ("eager", "speculative", "speculative, all drafts accepted")
               for batch in (1, 64)]
    numbers = ["fit's rate / clock's", "kthvalue", "topk", *(f"decoding, batch {which}" for which in decoded)]
    numbers += [f"{what}, --accum {accum}" for what in ("step", "host") for accum in (16, 4, 2)]
    values = torch.tensor([float(rows.pop(name)) for name in numbers])
    assert ((values > 0) & values.isfinite()).all() and 0.8 < values[0] < 1.2
    attention = [rows.pop(f"attention, {what}") for what in (
        "training", "prompt", "padded prompt", "decoding after a prompt", "decoding after a padded prompt",
        "image tower")]
    assert all(kernel.startswith("_scaled_dot_product_") for kernel in attention)
    assert rows == {"kthvalue equals topk": "yes", "attention, any by the math kernel": "no",
                    "examples": "not measured"} | {f"peak, --accum {accum}": "-" for accum in (16, 4, 2)}
