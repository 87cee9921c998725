"""eval.py on images and text: tables, pictures, answers, --run, and bad input."""
import json
import math
import shutil
import sys
from bisect import bisect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    COLORS,
    EVAL,
    EVAL_LM,
    NEW,
    OLD,
    REWARD,
    TUNE_LM,
    TUNED_BASE,
    TUNED_SOURCE,
    assert_refused,
    call,
    contents,
    eval_script,
    jsonl,
    one_line,
    output,
    png,
    read,
)
from PIL import Image

import prt
from data import arithmetic, files, images, text
from data.tokenizer import Tokenizer
from eval import BETAS
from models import runs, scores, weights
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

TABLES = dict(shapes=("beta top-1 NLL KL ms/image", "{top1:.2%} {nll:.3f} {kl:.3f} {ms:.3f}"),
              texts=("beta parsed exact std. err. NLL token acc KL tokens/s",
                     "{form:.1%} {exact:.1%} {error:.1%} {nll:.3f} {accuracy:.1%} {kl:.3f} {speed:.0f}"))


@pytest.fixture(scope="module")
def reports(shapes, texts, tmp_path_factory):
    """The tables of both runs with two betas, by processes of their own: what is in --json, and printed."""
    results = {}
    for kind, run in dict(shapes=shapes, texts=texts).items():
        file, few = tmp_path_factory.mktemp("table") / "table.json", FEW if kind == "texts" else ()
        printed = output("eval.py", "--run", RUNS[kind], "--beta", 0.5, 1, *few, "--json", file, "--device",
                         "cpu", cwd=run.folder, cache=getattr(run, "cache", None))
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


def logits_and_labels(kind):
    """Returns name -> logits [N, L] of the models of a run for the data of `reports`, and the labels [N]."""
    names = ("old", "new", "reward", "tuned", "oracle")
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
    eft = z["tuned"].log_softmax(-1) - z["old"].log_softmax(-1)
    rows = [(z["new"], "new"), (z["new"] + z["reward"] / 0.5, "new"), (z["new"] + z["reward"], "new"),
            (z["old"], "old"), (z["old"] + z["reward"], "old"), (z["tuned"], "old"),
            (z["new"] + eft / 0.5, "new"), (z["new"] + eft, "new"), (z["oracle"], "new")]
    accuracy = "top1" if kind == "shapes" else "accuracy"
    for row, (logits, base) in zip(about["rows"], rows, strict=True):
        log_probs, kl = logits.log_softmax(-1), prt.kl(logits.log_softmax(-1), z[base]).mean().item()
        assert row["nll"] == pytest.approx(F.nll_loss(log_probs, labels).item(), rel=1e-5)
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row[accuracy] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    expected = prt.kl(z["old"].log_softmax(-1), z["new"]).mean().item()
    assert about["kl_of_bases"] == pytest.approx(expected, rel=1e-4)
    assert f"KL(source base || base): {expected:.4f} nats" in printed


@pytest.mark.parametrize("rows", [
    {}, dict(base=640, reward=600), dict(base=640, reward=640, ref=640)], ids=str)
def test_several_rewards_add_up_however_output_matrices_are_padded(in_texts, tmp_path, table, rows):
    """Catches: A row without a token is chosen (small Qwen2.5 have such rows), or a model is not cut."""
    paths = dict(base=NEW, reward=REWARD, ref=OLD)
    for name, n in rows.items():
        checkpoint = read(paths[name])
        for key in ("embed_tokens.weight", "lm_head.weight"):
            x = checkpoint["model"][key]
            extra = torch.randn(n - len(x), x.shape[1], generator=torch.Generator().manual_seed(0))
            checkpoint["model"][key] = torch.cat([x, 5 * extra])
        checkpoint["arch"]["vocab"], paths[name] = n, tmp_path / f"{name}.pt"
        torch.save(checkpoint, paths[name])
    alone, one, half, *source = table(*EVAL_LM, "--limit", 4, "--beta", 1, 0.5)
    both = table(*EVAL_LM, "--limit", 4, "--base", paths["base"], "--reward", *[paths["reward"]] * 2, "--source",
                 paths["ref"])
    assert [row["method"] for row in both[1:4]] == [
        *[f"base + {paths['reward']} (PRT)"] * 2, "base + sum of rewards"]
    for a, b in zip(both, [alone, one, one, half, *source], strict=True):
        assert [a[key] for key in ("nll", "kl")] == pytest.approx([b[key] for key in ("nll", "kl")], abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_table_says_how_much_memory_cuda_takes(in_texts, table, capsys):
    rows = table(*EVAL_LM, "--device", "cuda", "--limit", 8)
    assert all(row["mib"] > 0 for row in rows)
    assert "MiB" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["", "--speculative", "--compile", "--compile --speculative"])
def test_the_time_of_the_compiler_is_not_measured(in_texts, monkeypatch, table, options):
    """Catches: What is timed includes a compilation, or every text is generated twice without a need."""
    now, calls, generate = [0.0], [], prt.generate
    times = 2 if "--compile" in options else 1  # of all answers of a row, which are two batches

    def answer(base, rewards, ids, *, length, end, pad, **rest):
        calls.append((base, tuple(rewards), ids.shape))
        now[0] += 1 if (len(calls) - 1) // 2 % times == times - 1 else 50  # seconds
        return generate(base, rewards, ids, length=length, end=end, pad=pad)

    for module, name in ((prt, "generate"), (decode, "compiled"), (decode, "speculative")):
        monkeypatch.setattr(module, name, answer)
    monkeypatch.setattr(eval_script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = table(*EVAL_LM, "--limit", 5, "--batch", 3, *options.split())
    parts = [calls[i:i + 2 * times] for i in range(0, len(calls), 2 * times)]
    assert len(parts) == len({part[0] for part in parts}) == len(rows)
    assert all(part == part[:2] * times for part in parts)
    assert all(5 <= 2 * row["speed"] == round(2 * row["speed"]) <= 5 * 9 for row in rows)


# Beta chosen on held-out data

@pytest.fixture(scope="module")
def held_out(tiny, tmp_path_factory):
    """Paths of a data set, and of a reward and a fine-tuned model of beta 2 that left out a part of it.

    One label of that part is wrong, and two of the test split: each part asks for a beta of its own.
    """
    root, names = tmp_path_factory.mktemp("held-out"), sorted(COLORS)
    wrong = dict(train=runs.split(12, 0.4)[1][:1], test=[0, 1])
    for split, n in dict(train=12, test=3).items():
        for i in range(n):
            path = root / "data" / split / names[3 * i // n] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(COLORS[names[(3 * i // n + (i in wrong[split])) % 3]]))
    train = ["train_vision.py", "--data", root / "data", "--source", tiny.old, "--steps", 8, "--batch", 4,
             "--lr", 1e-2, "--warmup", 0, "--hold-out", 0.4, "--beta", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CACHE", root / "cache")
        for method in ("prt", "ft"):
            assert call(*train, "--method", method, "--out", root / f"{method}.pt") == 0
    return SimpleNamespace(data=root / "data", reward=root / "prt.pt", tuned=root / "ft.pt")


@torch.no_grad()
def test_beta_auto_is_the_best_on_held_out_images(tiny, held_out, tmp_path, report):
    """Catches: beta is chosen on test images, on those that were trained on, or those of --data."""
    for split in ("train", "test"):
        shutil.copytree(held_out.data / "test", tmp_path / "data" / split)
    about = report("eval.py", "--reward", held_out.reward, "--base", tiny.new, "--tuned-source", held_out.tuned,
                   "--beta", "auto", "--data", tmp_path / "data")
    assert about["beta chosen by"] == "top-1 of the 40% of training data held out"
    train, test = (images.load(str(held_out.data), split, 32) for split in ("train", "test"))
    x, y = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    prompts, (used, held) = images.prompts(train.classes, train.templates), runs.split(12, 0.4)
    base, ref = (classifier(weights.load(path), prompts)(x) for path in (tiny.new, tiny.old))
    reward, tuned = (weights.load(path)(x) for path in (held_out.reward, held_out.tuned))
    for method, r in {METHODS[1]: prt.reward(reward, beta=2),
                      METHODS[5]: prt.reward(tuned, ref, beta=2)}.items():
        best = []
        for i in (held, used, torch.arange(12, 15)):
            scores = {beta: prt.tilt(base, r, beta)[i] for beta in BETAS}
            best.append(max(BETAS, key=lambda beta, z=scores, y=y[i]: (
                (z[beta].argmax(-1) == y).float().mean(), -F.nll_loss(z[beta], y))))
        assert best[0] not in best[1:]
        assert [row["beta"] for row in about["rows"] if row["method"] == f"{method}, beta chosen"] == best[:1]


def test_beta_auto_is_the_best_on_held_out_problems(tokenizer, tmp_path, table):
    """Catches: The problems are not cut and dropped as in training, so that others have their numbers."""
    path, file, (used, held) = tmp_path / "x.pt", tmp_path / "x.jsonl", runs.split(12, 0.25)
    answers = [" 30 #### 30" if i in held else " 7 #### 7" for i in range(12)]
    problems = [dict(prompt=f" {i} + 2 =", response=answer) for i, answer in enumerate(answers)]
    file.write_text(jsonl([dict(prompt=" 1 + 1" * 6, response=" 7")] * 3 + problems))  # three are too long
    assert call(*TUNE_LM, "--data", file, "--hold-out", 0.25, "--steps", 10, "--lr", 3e-2, "--warmup", 0,
                "--length", 13, "--drop", "--out", path) == 0
    rows = table(*EVAL_LM, "--reward", path, "--beta", "auto", "--data", file)
    end, examples = read(OLD)["arch"]["end"], text.load(str(file), "train")[1]
    data, whole = (text.encode(examples, tokenizer, end, *cut) for cut in ((13, True), (256,)))
    base, reward, best = weights.load(NEW), weights.load(path), []
    for part, i in ((data, held), (data, used), (whole, runs.split(15, 0.25)[1]), (whole, range(15))):
        batch = [text.collate(part, torch.as_tensor(i))]
        nll = {beta: scores.score_texts(base, [(1 / beta, reward)], batch)["nll"] for beta in BETAS}
        best.append(min(nll, key=nll.get))
    assert best[0] not in best[1:]
    assert [row["beta"] for row in rows if row["method"] == f"{METHODS[1]}, beta chosen"] == best[:1]


def test_without_a_beta_a_row_has_that_of_its_training(tiny, held_out, table):
    command = ("eval.py", "--reward", held_out.reward, "--base", tiny.new, "--tuned-source", held_out.tuned)
    plain, two = ([(row["method"], row["beta"], row["nll"]) for row in table(*command, *options)]
                  for options in ((), ("--beta", 2)))
    assert plain == two


def test_beta_auto_is_refused_where_training_left_nothing_out(tiny, held_out, tmp_path, capfd):
    """Catches: beta is chosen on examples that the reward has learned by heart."""
    reward, tuned = (read(path) for path in (held_out.reward, held_out.tuned))
    older, none = {k: v for k, v in reward.items() if k != "args"}, dict(args=dict(hold_out=0.0))
    for name, x in dict(none=reward | none, older=older, other=reward | dict(data="other"),
                        tuned=tuned | none).items():
        files.save(tmp_path / f"{name}.pt", x)
    for options in (["none"], ["older"], [held_out.reward, "none"], [held_out.reward, "other"],
                    [held_out.reward, "--tuned-source", "tuned"]):
        options[-1] = tmp_path / f"{options[-1]}.pt"
        capfd.readouterr()
        code = call("eval.py", "--base", tiny.new, "--beta", "auto", "--reward", *options)
        one_line(code, capfd.readouterr().err, "--beta auto", options[-1], "same data", "--hold-out")


# --run

def test_the_printed_command_prints_the_table_of_the_long_one(kind, request, tmp_path, reports, monkeypatch,
                                                             table):
    """Catches: Text models have too few positions for the default length, or files appear in the folder."""
    fixture, run, picture = request.getfixturevalue(kind), RUNS[kind], tmp_path / "x.png"
    monkeypatch.setitem(arithmetic.COUNTS, "test", 4)
    before, tables = contents(fixture.folder), []
    for command in (fixture.printed.splitlines()[-1].split()[1:],
                    ["eval.py", "--reward", f"{run}/reward.pt", "--base", f"{run}/new.pt", "--tuned-source",
                     f"{run}/tuned.pt", "--source", f"{run}/old.pt", "--tuned-base", f"{run}/oracle.pt"]):
        tables.append(table(*command, *(["--picture", picture] if kind == "shapes" else [])))
        tables[-1] = [{k: x for k, x in row.items() if k not in ("ms", "speed")} for row in tables[-1]]
    assert tables[0] == tables[1] and [row["method"] for row in tables[0]] == METHODS
    assert contents(fixture.folder) == before
    assert kind == "texts" or Image.open(picture).size == (960, 600)


def test_flags_win_over_run(in_texts, report, capsys):
    command = ("eval.py", "--run", RUNS["texts"], *FEW)
    plain = report(*command)
    assert "note: " not in capsys.readouterr().out
    swapped = report(*command, "--source", NEW, "--tuned-source", TUNED_BASE, "--tuned-base", TUNED_SOURCE, "--source", OLD, "--reward",
                     REWARD, REWARD)
    assert f"note: {TUNED_SOURCE} was tuned from {OLD}" not in capsys.readouterr().out
    assert swapped["rewards"] == [REWARD, REWARD]
    nll, other = ({row["method"]: row["nll"] for row in x["rows"]} for x in (plain, swapped))
    for kind in ("alone", "fine-tuned"):
        assert other[f"source {kind}"] == pytest.approx(nll[f"base {kind}"], abs=1e-5)
        assert other[f"base {kind}"] == pytest.approx(nll[f"source {kind}"], abs=1e-5)
    report(*command, "--tuned-source", TUNED_BASE)
    assert f"note: {TUNED_BASE} was tuned from {NEW}, but the table uses it with {OLD}" in capsys.readouterr().out


@pytest.mark.parametrize("names, methods, is_source_there", [
    ("reward new", METHODS[:2], False), ("reward new oracle", [*METHODS[:2], METHODS[6]], False),
    ("reward new old", METHODS[:4], False), ("reward new old tuned", METHODS[:6], False),
    ("reward new", METHODS[:4], True)])
def test_files_that_run_does_not_find_leave_rows_out(texts, tmp_path, monkeypatch, table, names, methods,
                                                     is_source_there):
    """The source base is looked for where the reward says, too."""
    for name in names.split():
        shutil.copy(texts.folder / f"{RUNS['texts']}/{name}.pt", tmp_path)
    monkeypatch.chdir(texts.folder if is_source_there else tmp_path)
    assert [row["method"] for row in table("eval.py", "--run", tmp_path, *FEW)] == methods


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
        new = [[*reply(row), end] for row in rows]
        new = [row + [end] * (max(map(len, new)) - len(row)) for row in new]
        return torch.cat([ids, torch.tensor(new)], 1)

    monkeypatch.setattr(prt, "generate", generate)
    return prompts


@torch.no_grad()
@pytest.mark.parametrize("beta", [8, 2, 1.2, 0.7, 0.4, 0.1])
def test_a_token_on_a_terminal_has_the_color_of_its_kl(tokenizer, monkeypatch, capsys, beta):
    """The bytes of a character have one color. Elsewhere, or with NO_COLOR, there are no escape codes."""
    ids, question = tokenizer.encode(" 3 + ü = 7"), "What do 3 apples cost?"
    prompts, printed = answer_with(monkeypatch, lambda prompt: ids), []
    for is_terminal, environment in ((True, {}), (True, {"NO_COLOR": "1"}), (False, {})):
        monkeypatch.setattr(eval_script.os, "environ", environment)
        monkeypatch.setattr(sys.stdout, "isatty", lambda x=is_terminal: x)
        assert call(*EVAL_LM, "--beta", beta, "--prompt", question) == 0
        printed.append(capsys.readouterr().out)
    base, reward = (weights.load(path)(torch.tensor([prompts[0] + ids]))[0, len(prompts[0]) - 1:-1]
                    for path in (NEW, REWARD))
    kls = prt.kl(prt.tilt(base, reward, beta), base).tolist()
    kls[3:5] = [max(kls[3:5])]
    shades = [("", 230, 223, 216, 209, 203)[bisect((0.1, 0.5, 1, 2, 4), kl)] for kl in kls]
    colored = "".join(f"\033[48;5;{shade}m\033[30m{piece}\033[0m" if shade else piece
                      for shade, piece in zip(shades, (" 3", " +", " ", "ü", " =", " 7"), strict=True))
    assert printed[0] == f"base alone:{colored}\n\nbase + reward (PRT):{colored}\n\n"
    assert printed[1] == printed[2] == "base alone: 3 + ü = 7\n\nbase + reward (PRT): 3 + ü = 7\n\n"


def test_a_prompt_is_asked_in_the_form_of_training(tokenizer, tmp_path, monkeypatch, capsys):
    """The template of the reward's data is around it, and its answer ends at the end token."""
    end = read(OLD)["arch"]["end"]
    answer = tokenizer.encode(" ü = 7") + [end] + tokenizer.encode(" unseen")
    prompts = answer_with(monkeypatch, lambda prompt: answer)
    assert call(*TUNE_LM, "--data", "talk.jsonl", "--steps", 1, "--out", tmp_path / "talk.pt") == 0
    capsys.readouterr()
    assert call(*EVAL_LM, "--reward", tmp_path / "talk.pt", "--prompt", "A {} b?") == 0
    assert [*map(tokenizer.decode, prompts)] == ["<|user|>\nA {} b?\n<|assistant|>\n"] * 2
    assert capsys.readouterr().out == "base alone: ü = 7\n\nbase + reward (PRT): ü = 7\n\n"


def test_answers_are_scored_by_their_first_number_in_form(tokenizer, tmp_path, monkeypatch, table):
    """Catches: Answers in the order of lengths are compared with problems in the order of the file.

    Numbers may differ in their form alone; right numbers after the first one, or without the form, are wrong.
    """
    wanted = {"a": "1,000", "bb b b b": "-7", "c c": "12", "d": "5", "e e e": "0.50"}
    given = {"a": "#### 1000", "bb b b b": "so 3 ####-7.", "c c": "#### 13 #### 12", "d": "5",
             "e e e": "#### .5"}
    rows = [dict(prompt=prompt, response=f"{prompt} #### {answer}") for prompt, answer in wanted.items()]
    (tmp_path / "x.jsonl").write_text(jsonl(rows))
    answer_with(monkeypatch, lambda prompt: tokenizer.encode(" " + given[tokenizer.decode(prompt)]))
    row = table(*EVAL_LM, "--data", tmp_path / "x.jsonl", "--batch", 3)[0]
    assert row["exact"] == 3 / 5 and row["form"] == 4 / 5
    assert row["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


@pytest.fixture
def answers(in_texts, monkeypatch, table):
    """Runs eval.py on five problems; returns the answers in all rows of the table."""
    decoded, original = [], Tokenizer.decode

    def run(*options):
        decoded.clear()
        table(*EVAL_LM, "--limit", 5, *options)
        return [*decoded]

    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, *args, **options: decoded.append(
        original(self, ids, *args, **options)) or decoded[-1])
    return run


@pytest.mark.parametrize("options", [
    "--batch 5", "--speculative", "--seed 1", "--temperature 1 --top-p 1e-9"])
def test_greedy_answers_do_not_depend_on(answers, options):
    """Catches: Padding is attended to, or answers return in the order of lengths."""
    one = answers("--batch", 1)
    assert len(one) == 20 and len({*one}) > 3 and answers(*options.split()) == one


def test_samples_are_reproducible(answers):
    hot = ("--temperature", 1, "--top-p", 0.9, "--seed")
    assert answers() != answers(*hot, 1) == answers(*hot, 1) != answers(*hot, 2)


@pytest.mark.parametrize("files, options, expected", [
    ("reward new old tuned", "--beta 0.5 1", [
        ("new", [(2, "reward")], ("old", [(2, "reward")])),
        ("new", [(1, "reward")], ("old", [(1, "reward")])), ("old", [(1, "reward")], None),
        ("new", [(2, "tuned"), (-2, "old")], None), ("new", [(1, "tuned"), (-1, "old")], None)]),
    ("reward new old", "--reward reward.pt reward.pt", [
        *[("new", [(1, "reward")], ("old", [(1, "reward")]))] * 2,
        ("new", [(1, "reward")] * 2, ("old", [(1, "reward")] * 2)), ("old", [(1, "reward")], None)]),
    ("reward new", "", [("new", [(1, "reward")], None)])], ids=["EFT", "two rewards", "no source"])
def test_the_reward_drafts_with_its_source_for_the_base_that_it_is_added_to(
        texts, tmp_path, monkeypatch, table, files, options, expected):
    """Catches: The source drafts for itself or for EFT, or with a reward of another weight."""
    for name in files.split():
        shutil.copy(texts.folder / f"{RUNS['texts']}/{name}.pt", tmp_path)
    names, load, decoded = {}, weights.load, []

    def named(path, *args, **options):
        model = load(path, *args, **options)
        names[model] = path.removesuffix(".pt")
        return model

    def row(base, rewards):
        return names[base], [(weight, names[model]) for weight, model in rewards]

    def speculative(base, rewards, ids, *, drafter, temperature, top_p, generator, compile, **rest):
        decoded.append((*row(base, rewards), drafter and row(*drafter)))
        return prt.generate(base, rewards, ids, **rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", named)
    monkeypatch.setattr(decode, "speculative", speculative)
    table("eval.py", "--run", ".", *FEW, "--speculative", *options.split())
    assert decoded == expected


# Bad input

USE = "eval.py --reward {reward} --base {new} --new-tokens 8 --limit 4 --device cpu --json {out}/x.json "
BAD = dict(paths={
    "no such reward": (EVAL + "--reward {none}/r.pt", "{none}/r.pt"),
    "damaged reward": (EVAL + "--reward {damaged}", "{damaged}"),
    "base as reward": (EVAL + "--reward {old}", "{old} is a base"),
    "tuned as second reward": (EVAL + "--reward {reward} {ft}", "{ft} is a fine-tuned"),
    "reward as base": (EVAL + "--base {reward}", "{reward} is a reward"),
    "reward as tuned": (EVAL + "--tuned-source {reward}", "{reward} is a reward"),
    "base as oracle": (EVAL + "--tuned-base {new}", "{new} is a base"),
    "other classes": (EVAL + "--data {other}", "{reward}", "'red' and 'cyan'"),
    "tasks of text": (EVAL + "--tasks gsm8k", "--tasks", "{reward}", "images"),
}, names={
    "no reward and base": ("eval.py --run {root}", "--run", "reward.pt", "new.pt", "{root}"),
    "no base": ("eval.py --run {root} --reward {reward}", "--run", "reward.pt", "new.pt"),
    "no reward": ("eval.py --run {root} --base {new}", "--run", "reward.pt", "new.pt"),
    "unknown data": (USE + "--data sumz", "--data sumz", "arithmetic, gsm8k"),
    "empty prompt": (USE + "--data {root}/unasked.jsonl", "{root}/unasked.jsonl"),
    "no test data": (USE + "--reward {root}/file.pt", "sums.jsonl", "test split"),
    "no tokenizer": (USE + "--base {bare}", "{bare}", "tokenizer.json"),
    "other tokenizer": (USE + "--base {root}/llama", "{root}/llama", "{reward}", "550 tokens", "400 ("),
    "image base": (USE + "--base {clip}", "{clip} is a base for images", "text"),
    "image reward": (USE + "--reward {shapes}", "{new} is a base for text", "images"),
    "reward as reference": (USE + "--source {reward}", "{reward} is a reward"),
    "long prompt": (USE + "--prompt " + "long" * 300, "256 positions", "--new-tokens"),
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
    assert_refused(BAD[fixture][case], values, capfd, values["out"], values["root"])


def test_without_lm_eval_the_error_says_how_to_install_it(names, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "models.harness", raising=False)
    monkeypatch.delattr("models.harness", raising=False)
    assert_refused((USE + "--tasks gsm8k", "--tasks", "pip install lm_eval"), names, capfd, names["out"])


@pytest.mark.parametrize("fixture, command, written", [
    ("paths", EVAL, ["x.json", "x.png"]), ("names", USE, ["x.json"]), ("names", USE + "--prompt short", [])])
def test_the_refused_command_lines_run_without_their_fault(request, capfd, fixture, command, written):
    """Catches: The command lines above fail for another reason than their own."""
    values = request.getfixturevalue(fixture)
    assert call(*command.format(**values).split()) == 0
    assert sorted(path.name for path in contents(values["out"])) == written
    assert capfd.readouterr().err == ""
