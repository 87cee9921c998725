"""eval.py on images and text: tables, pictures, answers, --run, and bad input."""
import json
import math
import platform
import shutil
import sys
from bisect import bisect
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import COLORS, EVAL, EVAL_LM, NEW, OLD, REWARD, TUNE_LM, TUNED_BASE, call, contents, read
from PIL import Image

import eval as eval_script
import prt
from data import images, text
from data.tokenizer import Tokenizer
from models import answers, runs, scores, weights
from models.clip import classifier

METHODS = ["base alone", "base + reward (PRT)", "source alone", "source + reward", "source fine-tuned",
           "base + EFT", "base fine-tuned"]
RUNS = dict(shapes="out/shapes-0", texts="out/arithmetic-0")
FEW = ("--limit", 8, "--new-tokens", 8)  # of the tables of text


@pytest.fixture(params=RUNS)
def kind(request):
    """One of RUNS, in its folder."""
    request.getfixturevalue(f"in_{request.param}")
    return request.param


@pytest.fixture
def tokenizer(in_texts):
    return Tokenizer(read(OLD)["tokenizer"], "old")


# Tables

TABLES = dict(
    shapes=("beta top1 nll kl ms", "{top1:.2%} {nll:.3f} {kl:.3f} {ms:.3f}"),
    texts=("beta form exact error nll accuracy kl ms speed",
           "{form:.1%} {exact:.1%} {error:.1%} {nll:.3f} {accuracy:.1%} {kl:.3f} {ms:.3f} {speed:.0f}"))


@pytest.fixture(scope="module")
def reports(shapes, texts, tmp_path_factory):
    """The tables of both runs with two betas, by processes of their own: what is in --json, and printed."""
    results = {}
    for kind, run in dict(shapes=shapes, texts=texts).items():
        file, few = tmp_path_factory.mktemp("table") / "table.json", FEW if kind == "texts" else ()
        printed = conftest.output("eval.py", "--run", RUNS[kind], "--beta", 0.5, 1, *few, "--json", file,
                                  "--device", "cpu", cwd=run.folder, cache=getattr(run, "cache", None))
        results[kind] = json.loads(file.read_text()), printed
    return results


def test_the_table_has_a_row_for_each_way_to_use_the_models(kind, reports):
    """Catches: A column has another's title or figures, or there is one for memory without CUDA."""
    about, printed = reports[kind]
    lines, (header, cells) = [line.split() for line in printed.splitlines()], TABLES[kind]
    assert [row["method"] for row in about["rows"]] == [*METHODS[:2], *METHODS[1:6], *METHODS[5:]]
    assert [row["beta"] for row in about["rows"]] == [None, 0.5, 1, None, 1, None, 0.5, 1, None]
    assert about["base"] == f"{RUNS[kind]}/new.pt" and about["rewards"] == [f"{RUNS[kind]}/reward.pt"]
    assert about["device"].startswith("CPU") and header.split() in lines
    assert (f"\n{RUNS[kind]}/picture.png: " in printed) == (kind == "shapes")
    for row in about["rows"]:
        beta = "" if row["beta"] is None else f"{row['beta']:g}"
        assert f"{row['method']} {beta} {cells.format(**row)}".split() in lines
        assert row.get("ms", row.get("speed")) > 0


def test_every_answer_is_kept(kind, tmp_path, report, monkeypatch):
    """Catches: Answers of one row stand under another's name, or a report has no commit."""
    flags = *(FEW if kind == "texts" else ()), "--answers", tmp_path / "x.jsonl", "--device", "cpu"
    monkeypatch.setattr(answers, "generate", lambda row, prompts, *rest: [[METHODS.index(row.method)]] * len(
        prompts))  # each row gives another token
    about = report("eval.py", "--run", RUNS[kind], *flags)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert len(lines) == about["images" if kind == "shapes" else "examples"]
    for row in about["rows"]:
        label = row["method"] + ("" if row["beta"] is None else f", beta {row['beta']:g}")
        given = [(line["answers"][label], line["reference"]) for line in lines]
        if kind == "shapes":
            assert all([*p.values()] == sorted(p.values(), reverse=True) and len(p) == 5 for p, _ in given)
            right = [next(iter(p)) == name for p, name in given]
            assert sum(right) / len(right) == pytest.approx(row["top1"])
            for k in {name for _, name in given}:
                of_class = [ok for ok, (_, name) in zip(right, given) if name == k]
                assert about["accuracy_by_class"][label][k] == pytest.approx(sum(of_class) / len(of_class))
        else:
            token = Tokenizer(read(OLD)["tokenizer"], "old").decode([METHODS.index(row["method"])])
            assert {answer for answer, _ in given} == {token}
            assert lines[0]["prompt"] == text.load("arithmetic", "test")[1][0][1][0][0]
    assert about["commit"] is None or len(about["commit"]) == 40
    assert about["python"] == platform.python_version() and about["seconds"] > 0


def logits_and_labels(kind):
    """Returns name -> logits [N, L] of the models of a run for the data of `reports`, and the labels [N]."""
    names = ("old", "new", "reward", "tuned_source", "tuned_base")
    models = {name: weights.load(f"{RUNS[kind]}/{name}.pt") for name in names}
    if kind == "shapes":
        data = images.load("shapes", "test", 32)
        prompts = images.prompts(data.classes, data.templates)
        models |= {name: classifier(models[name], prompts) for name in ("old", "new")}
        return {name: model(data.images) for name, model in models.items()}, data.labels
    tokenizer, end = Tokenizer(read(OLD)["tokenizer"], "old"), read(OLD)["arch"]["end"]
    data = [*zip(*text.encode(text.load("arithmetic", "test")[1][:8], tokenizer, end, 256))]
    logits = {name: torch.cat([model(ids[None, :-1])[0][counts[1:]] for ids, counts in data])
              for name, model in models.items()}
    return logits, torch.cat([ids[counts] for ids, counts in data])


@torch.no_grad()
def test_the_figures_of_a_row_are_those_of_its_models(kind, reports):
    """Catches: beta multiplies, EFT adds the source, padding counts, KL is reversed or from another base."""
    about, printed = reports[kind]
    z, labels = logits_and_labels(kind)
    eft = z["tuned_source"].log_softmax(-1) - z["old"].log_softmax(-1)
    rows = [(z["new"], "new"), (z["new"] + z["reward"] / 0.5, "new"), (z["new"] + z["reward"], "new"),
            (z["old"], "old"), (z["old"] + z["reward"], "old"),
            (z["tuned_source"], "old"), (z["new"] + eft / 0.5, "new"), (z["new"] + eft, "new"),
            (z["tuned_base"], "new")]
    accuracy = "top1" if kind == "shapes" else "accuracy"
    for row, (logits, base) in zip(about["rows"], rows, strict=True):
        log_probs, kl = logits.log_softmax(-1), prt.kl(logits.log_softmax(-1), z[base]).mean().item()
        assert row["nll"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row[accuracy] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    expected = prt.kl(z["old"].log_softmax(-1), z["new"]).mean().item()
    assert about["kl_of_bases"] == pytest.approx(expected, rel=1e-4)
    assert f"KL(source || base): {expected:.4f} nats" in printed


@pytest.mark.parametrize("rows", [
    {}, dict(base=640, reward=600), dict(base=640, reward=640, source=640)], ids=str)
def test_several_rewards_add_up_however_output_matrices_are_padded(in_texts, tmp_path, table, rows):
    """Catches: A row without a token is chosen (small Qwen2.5 have such rows), or a model is not cut."""
    paths = dict(base=NEW, reward=REWARD, source=OLD)
    for name, n in rows.items():
        checkpoint = read(paths[name])
        for key in ("embed_tokens.weight", "lm_head.weight"):
            x = checkpoint["model"][key]
            extra = torch.randn(n - len(x), x.shape[1], generator=torch.Generator().manual_seed(0))
            checkpoint["model"][key] = torch.cat([x, 5 * extra])
        checkpoint["arch"]["vocab"], paths[name] = n, tmp_path / f"{name}.pt"
        torch.save(checkpoint, paths[name])
    alone, one, half, *source = table(*EVAL_LM, "--limit", 4, "--beta", 1, 0.5)
    both = table(*EVAL_LM, "--limit", 4, "--base", paths["base"], "--source", paths["source"],
                 "--reward", *[paths["reward"]] * 2)
    assert [row["method"] for row in both[1:4]] == [
        *[f"base + {paths['reward']} (PRT)"] * 2, "base + sum of rewards"]
    for a, b in zip(both, [alone, one, one, half, *source], strict=True):
        assert [a[key] for key in ("nll", "kl")] == pytest.approx([b[key] for key in ("nll", "kl")], abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_table_says_how_much_memory_cuda_takes(in_texts, table, capsys):
    rows = table(*EVAL_LM, "--device", "cuda", "--limit", 8)
    assert all(row["mib"] > 0 for row in rows)
    assert "MiB" in capsys.readouterr().out


@pytest.mark.parametrize("options, times", [("", 1), ("--speculative", 1), ("--compile --speculative", 2)])
def test_the_time_of_the_compiler_is_not_measured(in_texts, monkeypatch, table, options, times):
    """Catches: What is timed includes a compilation, or every text is generated twice without a need."""
    now, calls = [0.0], []

    def generate(row, prompts, *rest):
        calls.append(row.method)
        now[0] += 1 if len(calls) % times == 0 else 50  # seconds
        return [[5] * 9] * len(prompts)

    monkeypatch.setattr(answers, "generate", generate)
    monkeypatch.setattr(eval_script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = table(*EVAL_LM, "--limit", 5, "--new-tokens", 20, *options.split())
    assert calls == [row["method"] for row in rows for _ in range(times)]
    assert {row["speed"] for row in rows} == {50}  # with the end tokens
    steps = 2 * 16 if "--speculative" in options else 16  # of batches of 4, and of 5
    assert {row["ms"] for row in rows} == {1000 / steps}


@pytest.mark.parametrize("batch, printed", [(4, False), (5, True)])
def test_speculation_says_what_a_large_batch_costs(in_texts, table, capsys, batch, printed):
    table(*EVAL_LM, "--limit", 2, "--speculative", "--batch", batch)
    assert (f"--speculative --batch {batch}: all rows" in capsys.readouterr().out) == printed


class Model(str):
    """Stands in for a model: its name, which ends with its beta in training."""

    @property
    def info(self):
        return dict(beta=float(self[-1]))


@pytest.mark.parametrize("beta, rewards, others, expected", [
    ([1, "auto"], ["r2"], ["b", "s", "t4", "u4"], [
        (1, "b", [(2, "r2")], "s"), (8, "b", [(0.25, "r2")], "s"), (2, "s", [(1, "r2")], None),
        (1, "b", [(4, "t4"), (-4, "s")], None), (8, "b", [(0.5, "t4"), (-0.5, "s")], None)]),
    (None, ["r2", "r4"], ["b", "s", None, None], [
        (2, "b", [(1, "r2")], "s"), (4, "b", [(1, "r4")], "s"), (None, "b", [(1, "r2"), (1, "r4")], "s"),
        (2, "s", [(1, "r2")], None)]),
    (None, ["r2"], ["b", None, None, None], [(2, "b", [(1, "r2")], None)])], ids=["EFT", "two", "alone"])
def test_rows_have_their_weights_and_drafters(beta, rewards, others, expected):
    """Catches: Without --beta a row has another one than its training, or the source drafts for itself."""
    models = eval_script.Models([*map(Model, rewards)], *(name and Model(name) for name in others))
    rows = eval_script.plan(SimpleNamespace(beta=beta, reward=rewards), models, quality=lambda row: row.beta)
    rows = [row for row in rows if row.rewards]
    for row, (*parts, drafter) in zip(rows, expected, strict=True):
        assert [row.beta, row.base, row.rewards, row.drafter] == [*parts, drafter and (drafter, row.rewards)]
        decode = answers.decoder(row, answers.Decoding(speculative=True), None, 0, (), None)
        assert decode.keywords["drafter"] == row.drafter


# Beta chosen on held-out data

@pytest.fixture
def quality(monkeypatch):
    """What the base alone scores where beta is chosen: [] until eval.py has planned its rows."""
    scored, plan = [], eval_script.plan

    def planned(args, models, quality):
        scored.append(quality(eval_script.Row("", None, models.base, [], models.base)))
        return plan(args, models, quality)

    monkeypatch.setattr(eval_script, "plan", planned)
    return scored


def test_beta_auto_is_the_best_on_held_out_images(tiny, tmp_path, report, quality):
    """Catches: beta is chosen on test images, on those that were trained on, or those of --data."""
    for name, shift in dict(data=0, other=100).items():
        for split in ("train", "test"):
            for i in range(12):  # all of them differ
                path = tmp_path / name / split / f"{[*COLORS][i % 3]}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(conftest.png((20 * i, shift, 200 if split == "train" else 0)))
    assert call("train_vision.py", "--data", tmp_path / "data", "--source", tiny.old, "--steps", 1,
                "--batch", 4, "--hold-out", 0.4, "--out", tmp_path / "x.pt") == 0
    about = report("eval.py", "--reward", tmp_path / "x.pt", "--base", tiny.new, "--beta", "auto", "--data",
                   tmp_path / "other")
    assert about["beta chosen by"] == "top-1 of the 40% of training data held out"
    assert about["rows"][1]["method"] == f"{METHODS[1]}, beta chosen"
    data, (_, i) = images.load(str(tmp_path / "data"), "train", 32), runs.hold_out(12, 0.4)
    logits = classifier(weights.load(tiny.new), images.prompts(data.classes, data.templates))(data.images[i])
    nll = F.cross_entropy(logits, data.labels[i]).item()
    assert quality == [pytest.approx((scores.accuracy(logits, data.labels[i]), -nll))]


def test_beta_auto_is_the_best_on_held_out_problems(tokenizer, tmp_path, table, quality):
    """Catches: The problems are not cut and dropped as in training, so that others have their numbers."""
    path, file = tmp_path / "x.pt", tmp_path / "x.jsonl"
    problems = [dict(prompt=" 1 + 1" * 6, response=" 7")] * 3  # these are too long
    problems += [dict(prompt=f" {i} + 2 =", response=f" {i + 2} #### {i + 2}") for i in range(12)]
    file.write_text(conftest.jsonl(problems))
    assert call(*TUNE_LM, "--data", file, "--hold-out", 0.25, "--steps", 1, "--length", 13, "--drop",
                "--out", path) == 0
    table(*EVAL_LM, "--reward", path, "--beta", "auto", "--data", file)
    data = text.encode(text.load(str(file), "train")[1], tokenizer, read(OLD)["arch"]["end"], 13, True)
    held_out = [text.collate(data, runs.hold_out(12, 0.25)[1])]
    assert quality == [pytest.approx(-scores.score_texts(weights.load(NEW), [], held_out)["nll"])]


@pytest.mark.parametrize("rewards, tuned, name", [
    (["a 0"], None, "r0"), (["a"], None, "r0"), (["a 0.4", "a 0"], None, "r1"), (["a 0.4"], "a 0", "t"),
    (["a 0.4", "b 0.4"], None, "r1"), (["a 0.4", "a 0.2"], None, "r1")])
def test_beta_auto_is_refused_where_training_left_nothing_out(rewards, tuned, name):
    """Catches: beta is chosen on examples that a reward has learned by heart. "a": of an older checkpoint."""
    def model(text):
        data, *share = text.split()
        trained = dict(args=dict(hold_out=float(*share))) if share else {}
        return SimpleNamespace(info=dict(data=data) | trained)

    models = eval_script.Models([*map(model, rewards)], None, None, tuned and model(tuned), None)
    args = SimpleNamespace(reward=["r0", "r1"][:len(rewards)], tuned_source="t")
    with pytest.raises(ValueError, match=f"--beta auto: {name} was .* the same data, .* --hold-out"):
        eval_script.held_out_share(args, models)


# --run

def test_the_printed_command_prints_the_table(kind, request, tmp_path, table, capsys):
    """Catches: Files appear in the folder of the run, or there is a note about models that fit."""
    fixture, picture = request.getfixturevalue(kind), tmp_path / "x.png"
    assert f"python eval.py --run {RUNS[kind]}" in fixture.printed.splitlines()
    before = contents(fixture.folder)
    rows = table("eval.py", "--run", RUNS[kind], *(FEW if kind == "texts" else ("--picture", picture)))
    assert [row["method"] for row in rows] == METHODS and contents(fixture.folder) == before
    assert "note: " not in capsys.readouterr().out
    assert kind == "texts" or Image.open(picture).size == (960, 600)


def test_flags_win_over_the_files_of_run(tmp_path):
    paths = dict(reward="reward", base="new", source="old", tuned_base="tuned_base")
    paths = {flag: str(tmp_path / f"{name}.pt") for flag, name in paths.items()}
    for path in paths.values():
        Path(path).touch()
    expected = paths | dict(reward=[paths["reward"]], tuned_source=None)
    for given in (dict(), dict(base="x"), dict(source="x"), dict(reward=["x", "y"])):
        words = [[f"--{flag}", *([x] if isinstance(x, str) else x)] for flag, x in given.items()]
        args = eval_script.parse(["--run", str(tmp_path), *sum(words, [])])
        assert {flag: getattr(args, flag) for flag in expected} == expected | given


@pytest.mark.parametrize("is_there", [False, True])
def test_the_source_is_looked_for_where_the_reward_says(texts, tmp_path, monkeypatch, table, capsys,
                                                        is_there):
    """Catches: The rows of a source that is not found are no reason for a message, or for exit code 2."""
    for name in ("reward", "new"):
        shutil.copy(texts.folder / f"{RUNS['texts']}/{name}.pt", tmp_path)
    monkeypatch.chdir(texts.folder if is_there else tmp_path)
    rows = table("eval.py", "--run", tmp_path, *FEW)
    assert [row["method"] for row in rows] == METHODS[:4 if is_there else 2]
    assert ("rows of the source are left out" in capsys.readouterr().out) is not is_there


def test_a_model_that_was_tuned_from_another_base_gets_a_note(in_texts, table, capsys):
    table("eval.py", "--run", RUNS["texts"], *FEW, "--tuned-source", TUNED_BASE)
    note = f"note: {TUNED_BASE} was tuned from {NEW}; {OLD} has other weights\n"
    assert note in capsys.readouterr().out


# The picture

def test_the_upper_answer_is_of_the_base_and_the_lower_one_with_the_reward(tiny, tmp_path, capsys):
    """Catches: The answers are swapped or stand below another image, or right ones are red."""
    path, colors = tmp_path / "x.png", dict(green=(0, 128, 0), red=(255, 0, 0))
    assert call("eval.py", "--reward", tiny.reward, "--base", tiny.new, "--beta", 0.02, 8,
                "--picture", path) == 0
    assert f"{path}: the upper answer is of the base alone" in capsys.readouterr().out
    data = images.load(str(tiny.data), "test", 32)
    base = classifier(weights.load(tiny.new), images.prompts(data.classes, data.templates))
    logits, r = base(data.images), weights.load(tiny.reward)(data.images)
    alone, tilted = (z.argmax(-1) == data.labels for z in (logits, prt.tilt(logits, r, 0.02)))
    assert alone.tolist() != tilted.tolist()
    with Image.open(path) as picture:
        assert picture.size == (960, 150)
        for left in (0, 120, 240):
            i = [*COLORS.values()].index(picture.getpixel((left + 60, 60)))
            for top, right in ((119, alone[i]), (133, tilted[i])):
                seen = {color for _, color in picture.crop((left, top, left + 120, top + 12)).getcolors()}
                assert {name for name, color in colors.items() if color in seen} == {
                    "green" if right else "red"}


# Answers

def answer_with(monkeypatch, reply):
    """Makes prt.generate answer each prompt (ids) with the ids that reply returns; returns its prompts."""
    prompts = []

    def generate(base, rewards, ids, *, end, pad=None, **options):
        starts = [0] * len(ids) if pad is None else pad.tolist()
        rows = [row[start:].tolist() for row, start in zip(ids, starts)]
        prompts.extend(rows)
        new = [[*reply(row), *end[:1]] for row in rows]
        new = [row + end[:1] * (max(map(len, new)) - len(row)) for row in new]
        return torch.cat([ids, torch.tensor(new)], 1)

    monkeypatch.setattr(prt, "generate", generate)
    return prompts


@torch.no_grad()
@pytest.mark.parametrize("beta", [8, 2, 1.2, 0.7, 0.4, 0.1])
def test_an_answer_to_a_prompt_has_the_colors_of_its_kl(tokenizer, tmp_path, monkeypatch, capsys, beta):
    """The template of the reward's data is around the prompt, and the answer ends at the end token.

    The bytes of a character have one color. Not on a terminal, or with NO_COLOR, there are no escape codes.
    """
    torch.save(read(REWARD) | dict(template="<|user|>\n{}\n"), tmp_path / "x.pt")
    ids, end, printed = tokenizer.encode(" 3 + ü = 7"), read(OLD)["arch"]["end"], []
    prompts = answer_with(monkeypatch, lambda prompt: [*ids, end, *ids])
    for is_terminal, environment in ((True, {}), (True, {"NO_COLOR": "1"}), (False, {})):
        monkeypatch.setattr(eval_script.os, "environ", environment)
        monkeypatch.setattr(sys.stdout, "isatty", lambda x=is_terminal: x)
        assert call(*EVAL_LM, "--reward", tmp_path / "x.pt", "--beta", beta, "--prompt", "A {} b?") == 0
        printed.append(capsys.readouterr().out)
    assert [*map(tokenizer.decode, prompts)] == ["<|user|>\nA {} b?\n"] * 6
    base, reward = (weights.load(path)(torch.tensor([prompts[0] + ids]))[0, len(prompts[0]) - 1:-1]
                    for path in (NEW, REWARD))
    kls = prt.kl(prt.tilt(base, reward, beta), base).tolist()
    kls[3:5] = [max(kls[3:5])]
    shades = [("", 230, 223, 216, 209, 203)[bisect((0.1, 0.5, 1, 2, 4), kl)] for kl in kls]
    colored = "".join(f"\033[48;5;{shade}m\033[30m{piece}\033[0m" if shade else piece
                      for shade, piece in zip(shades, (" 3", " +", " ", "ü", " =", " 7"), strict=True))
    assert printed[0] == f"base alone:{colored}\n\nbase + reward (PRT):{colored}\n\n"
    assert printed[1] == printed[2] == "base alone: 3 + ü = 7\n\nbase + reward (PRT): 3 + ü = 7\n\n"


def test_answers_are_scored_by_their_first_number_in_form(tokenizer, tmp_path, monkeypatch, table):
    """Catches: Answers in the order of lengths are compared with problems in the order of the file.

    Numbers may differ in their form alone; right numbers after the first one, or without the form, are wrong.
    """
    wanted = {"a": "1,000", "bb b b b": "-7", "c c": "12", "d": "5", "e e e": "0.50"}
    given = {"a": "#### 1000", "bb b b b": "so 3 ####-7.", "c c": "#### 13 #### 12", "d": "5",
             "e e e": "#### .5"}
    rows = [dict(prompt=prompt, response=f"{prompt} #### {answer}") for prompt, answer in wanted.items()]
    (tmp_path / "x.jsonl").write_text(conftest.jsonl(rows))
    answer_with(monkeypatch, lambda prompt: tokenizer.encode(" " + given[tokenizer.decode(prompt)]))
    row = table(*EVAL_LM, "--data", tmp_path / "x.jsonl", "--batch", 3)[0]
    assert row["exact"] == 3 / 5 and row["form"] == 4 / 5
    assert row["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_answers_depend_on_the_seed_of_samples_alone(in_texts, monkeypatch, table):
    """Catches: Padding is attended to, or answers return in the order of lengths."""
    decoded, original = [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, *args, **options: decoded.append(
        original(self, ids, *args, **options)) or decoded[-1])

    def answer(options):
        decoded.clear()
        table(*EVAL_LM, "--limit", 5, *options.split())
        return [*decoded]

    one = answer("--batch 1")
    assert len(one) == 20 and len({*one}) > 3
    for options in ("--batch 5", "--speculative", "--seed 1", "--temperature 1 --top-p 1e-9"):
        assert answer(options) == one
    hot, again, other = (answer(f"--temperature 1 --top-p 0.9 --seed {seed}") for seed in (1, 1, 2))
    assert one != hot == again != other


# Bad input

ASK = "eval.py --reward {reward} --base {new} --new-tokens 8 --device cpu "
USE = ASK + "--limit 4 --json {out}/x.json "
BAD = dict(paths={
    "no such reward": (EVAL + "--reward {none}/r.pt", "{none}/r.pt"),
    "damaged reward": (EVAL + "--reward {damaged}", "{damaged}"),
    "base as reward": (EVAL + "--reward {old}", "{old} is a base"),
    "tuned as second reward": (EVAL + "--reward {reward} {ft}", "{ft} is a fine-tuned"),
    "reward as base": (EVAL + "--base {reward}", "{reward} is a reward"),
    "reward as tuned source": (EVAL + "--tuned-source {reward}", "{reward} is a reward"),
    "base as tuned base": (EVAL + "--tuned-base {new}", "{new} is a base"),
    "other classes": (EVAL + "--data {other}", "{reward}", "'red' and 'cyan'"),
    "tasks of text": (EVAL + "--tasks gsm8k", "--tasks", "{reward}", "images"),
}, names={
    "no base": ("eval.py --run {root} --reward {reward}", "--run", "reward.pt", "new.pt", "{root}"),
    "no reward": ("eval.py --run {root} --base {new}", "--run", "reward.pt", "new.pt", "{root}"),
    "unknown data": (USE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "empty prompt": (USE + "--data {root}/unasked.jsonl", "{root}/unasked.jsonl"),
    "no test data": (USE + "--reward {root}/file.pt", "sums.jsonl", "test split"),
    "no tokenizer": (USE + "--base {bare}", "{bare}", "tokenizer.json"),
    "other tokenizer": (USE + "--base {root}/llama", "{root}/llama has 400 tokens", "{reward} has others"),
    "image base": (USE + "--base {clip}", "{clip} is a base for images", "text"),
    "image reward": (USE + "--reward {shapes}", "{new} is a base for text", "images"),
    "reward as source": (USE + "--source {reward}", "{reward} is a reward"),
    "long prompt": (ASK + "--prompt " + "long" * 300, "256 positions", "--new-tokens"),
    "long answer": (USE + "--new-tokens 255", "255", "256 positions"),
    "temperature is no number": (USE + "--temperature nan", "--temperature"),
})


@pytest.fixture
def names(malformed, in_texts, tmp_path):
    (tmp_path / "out").mkdir()
    return malformed | dict(out=tmp_path / "out")


@pytest.mark.parametrize("fixture, case", [(fixture, case) for fixture in BAD for case in BAD[fixture]])
def test_bad_input_is_refused_in_one_line_and_touches_no_file(request, capfd, fixture, case):
    """Catches: A traceback, an error that does not name the file or flag, or files written before it."""
    values = request.getfixturevalue(fixture)
    conftest.assert_refused(BAD[fixture][case], values, capfd, values["out"], values["root"])


def test_without_lm_eval_the_error_says_how_to_install_it(names, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "models.harness", raising=False)
    monkeypatch.delattr("models.harness", raising=False)
    case = "eval.py --reward {reward} --base {new} --tasks gsm8k", "--tasks", "pip install lm_eval"
    conftest.assert_refused(case, names, capfd, names["out"])


@pytest.mark.parametrize("fixture, command, written", [
    ("paths", EVAL, ["x.json", "x.png"]), ("names", USE, ["x.json"]), ("names", ASK + "--prompt short", [])])
def test_the_refused_command_lines_run_without_their_fault(request, capfd, fixture, command, written):
    """Catches: The command lines above fail for another reason than their own."""
    values = request.getfixturevalue(fixture)
    assert call(*command.format(**values).split()) == 0
    assert sorted(path.name for path in contents(values["out"])) == written
    assert capfd.readouterr().err == ""


# A flag acts or is refused; columns are those that mean something

ACTS = {"images": (EVAL, "--limit 3", "--speculative", "--temperature 1", "--new-tokens 3", "--compile",
                   "--seed 1",
                   "--chat-template"),
        "a table of text": (ASK, "--picture {out}/x.png", "--chat-template"),
        "--prompt": (ASK + "--prompt a ", "--json {out}/x.json", "--data sums.jsonl", "--tasks gsm8k",
                     "--picture x.png"),
        "--tasks": ("eval.py --reward {reward} --base {new} --tasks gsm8k ", "--data sums.jsonl",
                    "--temperature 1",
                    "--new-tokens 3")}


@pytest.mark.parametrize("where, command, flag",
                         [(where, command, flag) for where, (command, *flags) in ACTS.items()
                                                  for flag in flags])
def test_a_flag_that_would_do_nothing_is_refused(request, capfd, where, command, flag):
    values = request.getfixturevalue("paths" if where == "images" else "names")
    where = "" if "prompt a" in command and "tasks" in flag else where  # of two of them, one is named
    conftest.assert_refused((command + flag, flag.split()[0] if where else "--", where), values, capfd,
                            values["out"])


@pytest.mark.parametrize("flags, words", [
    ("--json {reward}", ["--json", "end in .json"]),
    ("--picture {reward}", ["--picture", "end in .png"]),
    ("--top-p 0.5", ["--top-p", "--temperature"]), ("--top-p 1.5 --temperature 1", ["--top-p", "at most 1"]),
    ("--seed -1", ["--seed"]), ("--batch 99999999999", ["--batch"])])
def test_files_that_are_read_are_not_overwritten_and_numbers_are_checked(names, capfd, flags, words):
    """Catches: --json R.pt replaces the reward by a table, exit code 0."""
    conftest.assert_refused(("eval.py --reward {reward} --base {new} " + flags, *words), names, capfd,
                            names["out"])


def test_columns_of_numbers_are_of_the_answers_that_have_one(tokenizer, tmp_path, monkeypatch, table, capsys):
    """Catches: The identical answer counts as wrong, or exact is 0.0% where no answer has a number."""
    given = {"c": "### none", "d": "#### 1/2", "a": "#### $5", "b": "#### 1,234.00 apples"}
    path = tmp_path / "x.jsonl"
    for number, form, exact in ((4, 1, 1), (2, None, None)):
        path.write_text(conftest.jsonl([dict(prompt=k, response=v) for k, v in [*given.items()][:number]]))
        answer_with(monkeypatch, lambda prompt: tokenizer.encode(given[tokenizer.decode(prompt)]))
        row, printed = table(*EVAL_LM, "--data", path)[0], capsys.readouterr().out
        assert (row["form"], row["exact"]) == (form, exact) and ("exact" in printed) == (exact is not None)
        assert ("2 of 4 reference answers have a number" in printed) == (number == 4)


@pytest.mark.parametrize("text, number", [
    ("#### -$5.50", -5.5), ("#### $-5", -5), ("####€ 1,234", 1234), ("#### .5 km", 0.5), ("#### 1/2", None),
    ("#### 12:30", None), ("#### x 5", None), ("#### 10%", 10)])
def test_a_number_is_read_by_one_rule(text, number):
    assert answers.final_number(text) == number


@pytest.mark.parametrize("file", ["x.txt", "x.jsonl"])
def test_a_file_of_prompts_is_answered(names, tmp_path, capsys, file):
    """Catches: A prompt gets the answer to another one, or a file that is half read is answered."""
    prompts = [" 3 + 4 =", " Eva has 4 bags."]
    lines = prompts if file == "x.txt" else [json.dumps(dict(prompt=x)) for x in prompts]
    (tmp_path / file).write_text("\n".join(lines) + "\n")
    alone = []
    for prompt in prompts:
        assert call(*EVAL_LM, "--prompt", prompt, "--answers", tmp_path / "one.jsonl") == 0
        alone.append(json.loads((tmp_path / "one.jsonl").read_text()))
    capsys.readouterr()
    assert call(*EVAL_LM, "--prompts", tmp_path / file, "--answers", tmp_path / "all.jsonl") == 0
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [x["prompt"] for x in found] == [x["prompt"] for x in alone]
    assert [x["answers"] for x in found] == [x["answers"] for x in alone]
    printed = capsys.readouterr().out
    assert f"1. {prompts[0]}\n" in printed and f"2. {prompts[1]}\n" in printed
    found = call(*EVAL_LM, "--prompts", tmp_path / "all.jsonl", "--answers", tmp_path / "all.jsonl")
    conftest.one_line(found, capsys.readouterr().err, "all.jsonl would overwrite a part of")
    for rows, words in [([dict(messages=[dict(role="system", content="x")])], ["line 1", "--chat-template"]),
                        ([dict(prompt="a"), dict(question="b")], ["line 2", "content is missing"]),
                        ([], ["no prompt"]), ([dict(messages=[])], ["line 1", "is missing"])]:
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = call(*EVAL_LM, "--prompts", tmp_path / "x.jsonl")
        conftest.one_line(code, capsys.readouterr().err, "x.jsonl", *words)


def test_an_empty_prompt_is_answered(names, capsys):
    assert call(*ASK.format(**names).split(), "--prompt", "") == 0
    assert "base alone:" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_held_out_examples_are_those_of_the_data_in_training(request, tmp_path, capfd, kind):
    """Catches: A row is added, and --beta auto and --resume go on with rows that were trained on."""
    if kind == "images":
        paths = request.getfixturevalue("paths")
        data = shutil.copytree(paths["data"], tmp_path / "data")
        command = conftest.TRAIN.format(**paths).split()
        rest, base = ["--data", data, "--hold-out", 0.2], paths["new"]
    else:
        request.getfixturevalue("in_texts")
        data, command, base = tmp_path / "x.jsonl", conftest.TUNE_LM, NEW
        shutil.copy("sums.jsonl", data)
        rest = ["--data", data, "--hold-out", 0.2, "--steps", 2]
    out, half = tmp_path / "x.pt", tmp_path / "half.pt"
    assert call(*command, *rest, "--out", out) == 0
    conftest.interrupted(*command, *rest, "--out", half)
    use = ["eval.py", "--reward", out, "--base", base, "--beta", "auto",
           *["--data", "sums.jsonl"] * (kind == "texts"),
           *["--new-tokens", 4] * (kind == "texts")]
    assert call(*use) == 0
    if kind == "images":
        (data / "train/0.tar").write_bytes(conftest.tar_bytes(conftest.pairs([0, 1, 2, 0, 1, 2, 0]))[0])
    else:
        data.write_text(data.read_text() + data.read_text().splitlines()[0])
    capfd.readouterr()
    conftest.one_line(call(*use), capfd.readouterr().err, "--beta auto", out, data)
    conftest.one_line(call(*command, *rest, "--out", half, "--resume"), capfd.readouterr().err, half,
                      "examples")


def test_a_table_does_not_overwrite_a_part_of_a_model(names, tmp_path, capfd):
    """Catches: --json config.json in the folder of the base, exit code 0."""
    folder = shutil.copytree(names["root"] / "llama", tmp_path / "llama")
    before = contents(folder)
    command = f"eval.py --reward {names['reward']} --base {names['new']} --source {folder}"
    code = call(*command.split(), "--json", folder / "config.json")
    assert code == 2 and contents(folder) == before and capfd.readouterr().err


def test_a_prompt_is_answered_with_every_reward_and_beta(names, capsys):
    """Catches: The second of two rewards, or betas, is ignored."""
    command = ASK.format(**names).split()
    assert call(*command, "--reward", names["reward"], names["reward"], "--beta", 0.5, 1, "--prompt",
                "a") == 0
    assert capsys.readouterr().out.count(", beta ") == 6  # two rewards and their sum, at two betas


def test_what_makes_a_table_mislead_is_said(in_texts, tmp_path, capsys):
    """Catches: Scores on trained examples, or of another source than the reward's, pass for others."""
    out = tmp_path / "x.pt"
    assert call(*conftest.TUNE_LM, "--steps", 1, "--out", out) == 0
    trained, other = "was trained on these examples", "was tuned from"
    command = ("eval.py", "--reward", out, "--base", NEW, "--device", "cpu", "--new-tokens", 4, "--data")
    for data, options, words in (("sums.jsonl", (), [trained]), ("talk.jsonl", (), []),
                                 ("talk.jsonl", ("--source", NEW), [other])):
        capsys.readouterr()
        assert call(*command, data, *options) == 0
        printed = capsys.readouterr().out
        assert [word for word in (trained, other) if word in printed] == words
