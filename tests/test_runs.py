"""models/runs.py: devices, errors, batches, signals, runs that end early, scores; scripts as processes."""
import contextlib
import copy
import io
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from unittest import mock

import conftest
import helpers
import pytest
import torch
import torch.distributed as dist
from conftest import PRETRAIN, ROOT, TRAIN, TUNE_LM, call, contents, interrupted, one_line, read, same, spawn

import prt
import train_vision
from data import files, images
from models import runs, scores, weights
from models.clip import classifier

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# Device, processes, and what is on a device

@pytest.fixture
def two_gpus(monkeypatch):
    """Pretends that there are two GPUs; a list of the devices that are made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize("device, rank, want, backend", [
    (None, None, "cuda:0", None), ("cuda", None, "cuda:0", None), ("cuda:1", None, "cuda:1", None),
    ("cpu", None, "cpu", None), (None, "1", "cuda:1", "cpu:gloo,cuda:nccl"), ("cpu", "1", "cpu", "gloo")])
def test_setup_makes_its_gpu_the_current_one(two_gpus, monkeypatch, device, rank, want, backend):
    """Catches: Synchronization and memory statistics, which name no device, are those of another GPU."""
    begun = []
    monkeypatch.setattr(dist, "init_process_group", begun.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for name in ("RANK", "LOCAL_RANK") if rank else ():
        monkeypatch.setenv(name, rank)
    assert runs.setup(device) == torch.device(want) and begun == [backend] * bool(rank)
    assert two_gpus == ([] if want == "cpu" else [torch.device(want)])


@pytest.mark.parametrize("device, count", [("cuda:2", 2), ("mps", 2), ("cuda", 0)])
def test_setup_refuses_a_device_that_does_not_exist(two_gpus, monkeypatch, device, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"^--device {device}: unavailable; .* {count} CUDA devices$"):
        runs.setup(device)
    assert two_gpus == []


@torch.no_grad()
@pytest.mark.parametrize("name, device", [("openclip_vit", CUDA), ("openclip_vit_quickgelu", CUDA),
                                          ("openclip_rn", CUDA), ("openclip_vit", CPU)])
def test_a_frozen_classifier_has_the_logits_of_the_trained_one_bit_for_bit(name, device):
    """Catches: A vector, a statistic, or the head is rounded, which autocast leaves in float32."""
    model = classifier(helpers.load(name), helpers.expected(name)["tokens"][:, None])
    size = model.arch["image_size"]
    x = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))
    frozen = copy.deepcopy(model).requires_grad_(False)
    runs.place(frozen, CPU, runs.frozen_dtype(device))
    with torch.autocast("cpu", torch.bfloat16, enabled=device == CUDA):
        assert torch.equal(frozen(x), model(x))
    assert not torch.equal(model(x), model(x.flip(0)))
    for (name, p), q in zip(frozen.named_parameters(), model.parameters(), strict=True):
        assert p.dtype == (torch.bfloat16 if p.ndim > 1 and device == CUDA else torch.float32), name
        assert not p.requires_grad and q.requires_grad and q.dtype == torch.float32
    for b, c in zip(frozen.buffers(), model.buffers(), strict=True):
        assert b.dtype == c.dtype and torch.equal(b, c)


@pytest.mark.parametrize("start, end, pinned", [(CPU, CUDA, True), (CPU, CPU, False), (CUDA, CPU, False)])
def test_only_a_copy_from_the_cpu_to_a_gpu_is_pinned(start, end, pinned):
    """Catches: A copy to the CPU that does not block is read before it is there."""
    x = mock.Mock(device=start)
    runs.to_device(x, end)
    assert x.pin_memory.called == pinned
    (x.pin_memory() if pinned else x).to.assert_called_once_with(end, non_blocking=end == CUDA)


# Errors, batches, and what is printed

@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt])
def test_main_hides_no_bug(error):
    with pytest.raises(error, match="a bug"):
        runs.main(mock.Mock(side_effect=error("a bug")))


def test_every_epoch_has_every_example_once():
    seen = torch.cat([runs.shuffled(step, 40, 16, seed=3) for step in range(5)])  # 80 = two epochs
    epochs = seen.view(2, 40)
    assert torch.equal(epochs.sort().values, torch.arange(40).expand(2, 40))
    assert not torch.equal(*epochs)
    assert len(runs.shuffled(0, 5, 16, 0)) == 16  # a batch may be larger than the data


@pytest.mark.parametrize("share, n", [(0, 0), (0.2, 1), (0.99, 8)])
def test_held_out_examples_are_never_trained_on(paths, monkeypatch, share, n):
    seen = []
    monkeypatch.setattr(prt, "fit", lambda policy, indices, *rest, **options: seen.extend(
        indices(step) for step in range(9)) or [dict(step=2)])
    used, held_out = runs.hold_out(9, share)
    assert len(held_out) == n and torch.equal(torch.cat([used, held_out]).sort().values, torch.arange(9))
    assert call(*TRAIN.format(**paths).split(), "--seed", 3, *["--hold-out", share] * bool(share)) == 0
    want = torch.stack([used[runs.shuffled(step, len(used), 8, seed=3)] for step in range(9)])
    assert torch.equal(torch.stack(seen), want) and set(want.flatten().tolist()) == set(used.tolist())
    assert not torch.equal(runs.hold_out(40, 0.5)[1], torch.arange(20))


@pytest.mark.parametrize("is_stopped, message", [(False, ": .* bytes"), (True, " has 2 of 3 steps; .*")])
def test_no_printed_line_is_behind_the_progress_bar(paths, monkeypatch, handlers, is_stopped, message):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    if is_stopped:
        monkeypatch.setattr(prt, "schedule", lambda step, *args: (
            os.kill(os.getpid(), signal.SIGINT) if step == 1 else None) or 1)
    assert call(*TRAIN.format(**paths).split(), "--steps", 3) == (130 if is_stopped else 0)
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]  # what stays
    assert [line for line in lines if re.fullmatch(f"{paths['out']}/x.pt{message}", line)]
    assert any("x: 100%" in line for line in lines) != is_stopped


# Signals, and runs that end early

SIGNALS = [signal.SIGINT, signal.SIGTERM]
# Runs a script as python would, but first a line that may make calls of functions have an effect.
AFTER = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from data import files, text
from models import runs

def after(module, name, effect):
    function = getattr(module, name)
    setattr(module, name, lambda *args, **options: (function(*args, **options), effect(*args))[0])

def interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)

exec(sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# From the second step on, when a signal waits for the end of a step.
SLOW = """after(text, 'collate', lambda *args: runs.STOP.training and (
    os.write(2, b'in a step\\n'), time.sleep({})))"""
TUNE = (ROOT / TUNE_LM[0], *TUNE_LM[1:])


@pytest.fixture
def handlers():
    """Puts the handlers of signals back after the test: a run that a signal ended ignores others."""
    before = [*map(signal.getsignal, SIGNALS)]
    yield
    [*map(signal.signal, SIGNALS, before)]


@contextlib.contextmanager
def process(*command, cwd, **variables):
    """Starts a process of python, without buffers for its output; kills it and its children at the end."""
    variables |= dict(PRT_CACHE=cwd / "cache", OMP_NUM_THREADS=1, PYTHONUNBUFFERED=1)
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    started = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def until(stream, words):
    """Reads a process's lines up to one with these words."""
    assert any(words in line for line in stream), words


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_training_saves_and_the_run_resumes_bit_for_bit(paths, texts, monkeypatch, number):
    monkeypatch.chdir(texts.folder)
    command = [TUNE_LM, TRAIN.format(**paths).split()][number == signal.SIGTERM]
    command = (*command, "--steps", "24", "--batch", "16", "--accum", "2", "--warmup", "5", "--out")
    half, whole = paths["out"] / "half.pt", paths["out"] / "whole.pt"
    with process(ROOT / command[0], *command[1:], half, cwd=texts.folder) as run:
        until(run.stdout, "half 6/24: ")
        run.send_signal(number)
        printed, err = run.communicate(timeout=60)
    step = read(half)["step"]
    assert (run.returncode, err) == (128 + number, "") and 6 <= step < 24
    assert f"{half} has {step} of 24 steps" in printed.splitlines()[-1] and "--resume" in printed
    assert [*contents(paths["out"])] == [half]
    assert call(*command, whole) == call(*command, half, "--resume") == 0
    assert same(whole, half) and "optimizer" not in read(half)


def test_a_second_signal_ends_at_once(texts, tmp_path):
    with process("-c", AFTER, SLOW.format(60), *TUNE, "--steps", 20, "--out", tmp_path / "x.pt",
                 cwd=texts.folder) as run:
        until(run.stderr, "in a step")
        run.send_signal(signal.SIGINT)
        until(run.stdout, "Ctrl-C again")
        run.send_signal(signal.SIGINT)
        assert "Traceback" not in run.communicate(timeout=20)[1] and run.returncode == 130
    assert not contents(tmp_path)


def test_a_signal_saves_even_if_the_reader_of_the_output_is_gone(texts, tmp_path):
    """Catches: In `python ... | tee log`, Ctrl-C ends tee, and the next line that is printed ends the run."""
    out = tmp_path / "x.pt"
    with process(*TUNE, "--steps", "20000", "--out", out, cwd=texts.folder) as run:
        until(run.stdout, "x 50/20000: ")
        run.stdout.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
    assert 50 <= read(out)["step"] < 5000  # when it would save without a signal


# A process gets a signal while it waits for the other one, and that one a first signal after both agreed.
IN_A_STEP = ("after(dist, 'all_reduce', lambda x, *maximum: maximum and x == 0 and interrupt())",
             "after(files, 'save', interrupt)")
IN_A_SAVE = "after(dist, 'barrier', interrupt)", ""


@pytest.mark.parametrize("lines, step", [(IN_A_STEP, 2), (IN_A_SAVE, 7)], ids=["in a step", "in a save"])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(texts, tmp_path, lines, step):
    command = (*TUNE, "--steps", 24, "--out", tmp_path / "x.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joint = dict(cwd=texts.folder, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with (process("-c", AFTER, lines[0], *command, RANK=1, LOCAL_RANK=1, **joint) as other,
          process("-c", AFTER, lines[1], *command, RANK=0, LOCAL_RANK=0, **joint) as first):
        printed, err = first.communicate(timeout=240)
        other_err = other.communicate(timeout=240)[1]
    assert (first.returncode, other.returncode) == (130, 130)
    assert "ended by" not in err + other_err and "Traceback" not in err + other_err
    assert f"x.pt has {step} of 24 steps" in printed and read(tmp_path / "x.pt")["step"] == step
    assert [*contents(tmp_path)] == [tmp_path / "x.pt"]


def test_ctrl_c_stops_the_processes_of_torchrun_once(texts, tmp_path):
    (tmp_path / "after.py").write_text(AFTER)
    out = tmp_path / "x.pt"
    with process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "after.py",
                 SLOW.format(1), *TUNE, "--batch", 2, "--steps", 8, "--out", out, cwd=texts.folder) as run:
        until(run.stdout, "x 2/8: ")
        os.killpg(run.pid, signal.SIGINT)
        printed, err = run.communicate(timeout=60)
    assert run.returncode and "ended by" not in err
    assert printed.count(f"x.pt has {read(out)['step']} of 8 steps") == 1 and "optimizer" in read(out)


@pytest.mark.parametrize("module, saved", [(images, False), (weights, True)], ids=["before", "after"])
def test_a_signal_before_or_after_training_ends_at_once(paths, monkeypatch, handlers, capfd, module, saved):
    monkeypatch.setattr(module, "load", lambda *args, **options: os.kill(os.getpid(), signal.SIGTERM))
    assert call(*PRETRAIN.format(**paths).split()) == 143
    assert "SIGTERM" in capfd.readouterr().err
    assert [*contents(paths["out"])] == [paths["out"] / "x.pt"] * saved


def test_a_signal_in_the_last_save_promises_no_resume(paths, monkeypatch, handlers, capfd):
    save, out = files.save, str(paths["out"] / "x.pt")
    monkeypatch.setattr(files, "save", lambda path, checkpoint, **options: (
        save(path, checkpoint, **options), path == out and os.kill(os.getpid(), signal.SIGINT)))
    assert call(*TRAIN.format(**paths).split(), "--steps", 1) == 0
    assert "optimizer" not in read(out) and "--resume" not in capfd.readouterr().out


def test_a_signal_in_the_middle_of_a_write_keeps_its_exit_code(tmp_path, monkeypatch, capfd, handlers):
    """Catches: A full disk is reported, since torch hides the error that ends its writer."""
    class File(io.FileIO):
        def write(self, data):
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    monkeypatch.setattr(files, "open", File, raising=False)
    with pytest.raises(SystemExit) as ended:
        runs.main(lambda: files.save(tmp_path / "x.pt", dict(x=torch.zeros(1000))))
    assert ended.value.code == 130 and "disk" not in capfd.readouterr().err
    assert not contents(tmp_path)


def test_a_diverged_run_keeps_the_last_good_checkpoint(paths, monkeypatch, capfd):
    fit = prt.fit
    monkeypatch.setattr(prt, "fit", lambda *args, **options: fit(*args, **options | dict(save_every=1)))
    code = call(*TRAIN.format(**paths).split(), "--lr", "1e30", "--steps", "3")
    one_line(code, capfd.readouterr().err, "steps 2 to 2", "nan", "learning rate")
    assert list(contents(paths["out"])) == [paths["out"] / "x.pt"]
    assert files.read(paths["out"] / "x.pt")["step"] == 1
    with pytest.raises(ValueError, match="x.pt.*an unfinished run, of 1 steps.*--resume"):
        weights.load(paths["out"] / "x.pt", "prt")


@pytest.mark.parametrize("command, options, other", [
    (TRAIN, "--augment", "--seed 1"), (PRETRAIN, "", "--accum 2"),
    (" ".join(TUNE_LM), "--method ft --recompute", "--length 99"),
    (" ".join(TUNE_LM), "--method pretrain", "--accum 2")])
def test_an_interrupted_run_resumes_bit_for_bit(in_texts, paths, monkeypatch, capfd, command, options, other):
    """--accum counts in pretraining, where CLIP's loss contrasts the examples of a micro-batch."""
    command = f"{command} {options} --steps 7 --warmup 2 --lr 1e-3 --out".format(**paths).split()
    whole, half = paths["out"] / "whole.pt", paths["out"] / "half.pt"
    assert call(*command, whole) == 0
    interrupted(*command, half)
    assert read(half)["step"] == 1 and not same(whole, half, atol=1e-4)
    capfd.readouterr()
    one_line(call(*command, half, "--resume", *other.split()), capfd.readouterr().err, half, *other.split())
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert call(*command, half, "--resume", "--compile", "--device", "cpu") == 0
    assert same(whole, half) and read(half)["step"] == 7 and "optimizer" not in read(half)


# The scripts as processes

PROCESSES = {
    "truncated reward": (conftest.EVAL + "--reward {cut}", "{cut}"),
    "cifar100 out of reach": (TRAIN + "--data cifar100", images.CIFAR_URL, "cache/cifar-100-python.tar.gz"),
    "no tokenizer": (" ".join(TUNE_LM) + " --source {bare} --out {out}/x.pt", "{bare}", "tokenizer.json"),
    "full disk": (TRAIN + "--resume --out {half}", "{half}"),  # while the last checkpoint is written
}


def small_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("case", PROCESSES)
def test_a_process_ends_with_one_line_and_exit_code_2(paths, texts, malformed, case):
    command, *words = (text.format(**malformed | paths) for text in PROCESSES[case])
    before = contents(paths["out"], paths["root"])
    done = spawn(*command.split(), cwd=texts.folder, cache=paths["out"] / "cache",
                 preexec_fn=small_files if case == "full disk" else None)
    one_line(done.returncode, done.stderr, *words)
    assert contents(paths["out"], paths["root"]) == before


STAGES = dict(old=None, new=None, reward="prt", tuned_source="ft", tuned_base="ft")


@pytest.mark.parametrize("name, folder, keys", [
    ("shapes", "out/shapes-0", {"classes", "templates"}),
    ("texts", "out/arithmetic-0", {"tokenizer", "template"})])
def test_the_run_without_flags_makes_five_models_and_their_table(request, name, folder, keys):
    run = request.getfixturevalue(name)
    trained, table = run.printed.split(f"\npython eval.py --run {folder}\n")
    begun = re.findall(r"^run (\d of 5: \S+); about [\d.]+ minutes", trained, re.M)
    assert begun == [f"{i} of 5: {folder}/{stage}.pt" for i, stage in enumerate(STAGES, 1)]
    rows = re.findall(r"^(?:base|source) \S+", table, re.M)
    assert sorted(rows) == ["base +", "base +", "base alone", "base fine-tuned", "source +", "source alone",
                            "source fine-tuned"]
    assert table.splitlines()[-1].startswith(f"{folder}/picture.png: the upper answer") == (name == "shapes")
    assert (run.folder / folder / "picture.png").exists() == (name == "shapes")
    models = {stage: read(run.folder / folder / f"{stage}.pt") for stage in STAGES}
    assert {stage: model.get("method") for stage, model in models.items()} == STAGES
    assert all(model["step"] == 3 and "optimizer" not in model for model in models.values())
    assert keys | {"kind", "arch", "data", "beta", "method", "source", "args"} <= models["reward"].keys()
    assert not any(part.startswith("transformer.") for part in models["reward"]["model"])  # CLIP's text tower


# Scores

def test_predict_in_pieces_equals_one_pass_and_accuracy_is_the_share_of_right_labels():
    network, inputs = torch.nn.Linear(6, 3), torch.randn(40, 6)
    assert torch.allclose(scores.predict(network, inputs, 7), network(inputs), atol=1e-6)
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert scores.accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


@torch.no_grad()
def test_score_texts_weighs_all_targets_equally():
    base, tuned, old = (helpers.load(name) for name in ("llama3", "falcon3", "qwen2"))
    batches = []
    for ids in helpers.random_ids(6, 11).split([3, 1, 2]):
        index = torch.cat([10 * row + torch.arange(2 + row, 10) for row in range(len(ids))])
        batches.append(((ids[:, :-1], index), ids[:, 1:].flatten()[index]))
    rewards, y = [(0.7, tuned), (-0.3, old)], torch.cat([targets for _, targets in batches])

    def log_probs(model):
        logits = [model(ids).flatten(0, 1)[index] for (ids, index), _ in batches]
        return torch.cat(logits).log_softmax(-1)

    p = log_probs(base)
    q = (p + 0.7 * log_probs(tuned) - 0.3 * log_probs(old)).log_softmax(-1)
    want = dict(nll=-q[torch.arange(len(y)), y].mean().item(), kl=(q.exp() * (q - p)).sum(-1).mean().item(),
                accuracy=(q.argmax(-1) == y).float().mean().item())
    assert want["kl"] > 0.01
    for chunk in (512, 5, 1):
        assert scores.score_texts(base, rewards, batches, chunk) == pytest.approx(want, rel=1e-4)
    assert abs(scores.score_texts(base, [], batches)["kl"]) < 1e-6


# Terminals, pipes, and locks

def test_text_from_outside_controls_no_terminal(capfd):
    """Catches: An answer or a file name clears the screen, moves the cursor, or writes over a line."""
    def script():
        print("a\x1b[2J\x07\r\u202eb\tü 日 \x1b[48;5;203m\x1b[30mred\x1b[0m \x1b[30mhidden")
        raise ValueError("x\r\n\x1b]0;title\x07y")

    with pytest.raises(SystemExit):
        runs.main(script)
    printed, err = capfd.readouterr()
    assert printed == ("a\\x1b[2J\\x07\\r\\u202eb\tü 日 \x1b[48;5;203m\x1b[30mred\x1b[0m \\x1b[30mhidden\n")
    assert err == "error: x \\x1b]0;title\\x07y\n"


@pytest.mark.parametrize("redirect", ["| head -1", "2>&-", "> /dev/full"])
def test_training_goes_on_without_a_reader(texts, tmp_path, redirect):
    """Catches: `| head -1` ends training, and what was learned since the last save is lost."""
    command = " ".join(map(str, [sys.executable, ROOT / TUNE_LM[0], *TUNE_LM[1:], "--steps", 120, "--out",
                                 "x.pt"]))
    environment = os.environ | dict(PRT_CACHE=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run(["bash", "-c", f"cp -r {texts.folder}/. . && {command} {redirect}"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert read(tmp_path / "x.pt")["step"] == 120 and "Traceback" not in done.stderr
    assert [*tmp_path.glob("x.pt.*")] == [tmp_path / "x.pt.jsonl"]


def test_two_runs_do_not_write_one_file(paths, capfd):
    """Catches: The last one wins, and both exit with 0. What a killed run left is no obstacle."""
    args, out = train_vision.parse(TRAIN.format(**paths).split()[1:]), paths["out"] / "x.pt"
    for leftover in ("lock", "part"):
        out.with_name(f"x.pt.{leftover}").write_bytes(b"killed")
    with weights.run(args):
        one_line(call(*TRAIN.format(**paths).split()), capfd.readouterr().err, f"{out}.lock",
                 "another process, or run")
    assert call(*TRAIN.format(**paths).split()) == 0 and [*contents(paths["out"])] == [out]


@pytest.mark.parametrize("command, words", [
    ("train_lm.py --warmup 400", "--warmup 400"), ("train_lm.py --reward-init nosuch.pt", "nosuch.pt"),
    ("train_vision.py --accum 3", "--accum 3"), ("train_lm.py --steps 20 --epochs 2", "--epochs"),
    (TRAIN + "--out {out}/" + "x" * 260, "File name too long"),
    (TRAIN + "--warmup 2", "--warmup 2"), (PRETRAIN + "--beta 2", "--beta"),
    (PRETRAIN + "--source {old}", "--size"),
    (TRAIN + f"--seed {10**18}", "--seed"), (TRAIN + "--weight-decay -1", "--weight-decay"),
    (TRAIN + "--alpha nan", "--alpha")])
def test_a_run_that_cannot_go_through_is_refused_before_it_begins(paths, monkeypatch, capfd, command, words):
    """Catches: The third of five stages fails after minutes, or a flag does nothing."""
    monkeypatch.chdir(paths["out"])
    monkeypatch.setattr(weights, "load", lambda *args, **options: pytest.fail("work has begun"))
    one_line(call(*command.format(**paths).split()), capfd.readouterr().err, words)
    assert not contents(paths["out"])


@pytest.mark.parametrize("change, words", [
    (dict(step=99), "has 99 steps"), (dict(step=-5), "step is -5"),
    (dict(optimizer=dict(state={})), "optimizer"),
    (dict(model={}), "weights are missing"), (dict(args=[]), "args")])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(paths, capfd, change, words):
    """Catches: Training goes on from step -5, or "finishes" untrained at step 99 of 2."""
    out = paths["out"] / "x.pt"
    interrupted(*TRAIN.format(**paths).split())
    torch.save(read(out) | change, out)
    one_line(call(*TRAIN.format(**paths).split(), "--resume"), capfd.readouterr().err, "--resume", out, words)


def test_a_run_does_not_go_on_with_another_source(paths, capfd):
    """Catches: The source was trained anew under its old name, and --resume goes on through other logits."""
    old = shutil.copy(paths["old"], paths["out"] / "old.pt")
    command = TRAIN.format(**paths | dict(old=old)).split()
    interrupted(*command)
    shutil.copy(paths["new"], old)
    one_line(call(*command, "--resume"), capfd.readouterr().err, paths["out"] / "x.pt", "source")
