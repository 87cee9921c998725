"""models/runs.py: devices, errors, batches, checkpoints, stages, signals, scores; scripts as processes."""
import argparse
import contextlib
import copy
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
import torch.distributed as dist
from conftest import (
    EVAL,
    EVAL_LM,
    FIXTURES,
    ROOT,
    TRAIN,
    TUNE_LM,
    call,
    contents,
    interrupt,
    one_line,
    read,
    same,
    spawn,
    write_webdataset,
)

import prt
from data import files, images
from models import runs, weights
from models.clip import classifier

# Device and processes

@pytest.mark.parametrize("device", ["gpu", "meta", "mps"])
def test_setup_names_a_device_that_no_script_can_use(device):
    with pytest.raises(ValueError, match=f"--device {device}: "):
        runs.setup(device)


def test_setup_takes_a_cpu_and_without_cuda_it_is_the_default():
    assert runs.setup("cpu") == torch.device("cpu")
    assert runs.setup().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_cuda_is_refused_where_there_is_none(paths, capfd, command):
    code = call(*command.format(**paths).split(), "--device", "cuda")
    one_line(code, capfd.readouterr().err, "--device cuda: unavailable", "the CPU and 0 CUDA devices")
    assert not contents(paths["out"])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_setup_joins_the_processes_of_torchrun_and_main_leaves_them(monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    seen = []
    runs.main(lambda: seen.append((runs.setup("cpu"), dist.is_initialized(), dist.get_world_size())))
    assert seen == [(torch.device("cpu"), True, 1)] and not dist.is_initialized()


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretends that there are two GPUs; a list of the devices that are made the current one."""
    current = []
    for name, value in dict(is_available=lambda: True, device_count=lambda: 2,
                            set_device=current.append).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return current


@pytest.mark.parametrize("device, index", [(None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_setup_makes_the_gpu_that_it_returns_the_current_one(two_gpus, device, index):
    """Catches: Synchronization and memory statistics, which name no device, are those of another GPU."""
    assert runs.setup(device) == torch.device("cuda", index)
    assert two_gpus == [torch.device("cuda", index)]


@pytest.mark.parametrize("device", ["cuda:2", "cuda:7"])
def test_setup_refuses_a_gpu_that_does_not_exist(two_gpus, device):
    with pytest.raises(ValueError, match=f"^--device {device}: unavailable; .* 2 CUDA devices$"):
        runs.setup(device)
    assert two_gpus == []


def test_setup_makes_no_gpu_current_for_a_run_on_the_cpu(two_gpus):
    assert runs.setup("cpu") == torch.device("cpu") and two_gpus == []


@pytest.mark.parametrize("device, backend", [(None, "cpu:gloo,cuda:nccl"), ("cuda:0", "cpu:gloo,cuda:nccl"),
                                             ("cpu", "gloo")])
def test_each_process_of_torchrun_has_its_own_gpu(two_gpus, monkeypatch, device, backend):
    """Catches: All processes share one GPU, or tensors on the CPU cannot be sent beside those on GPUs."""
    begun = []
    monkeypatch.setattr(dist, "init_process_group", begun.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for name, value in dict(RANK="3", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    want = torch.device("cpu") if device == "cpu" else torch.device("cuda", 1)
    assert runs.setup(device) == want and begun == [backend]
    assert two_gpus == [] if device == "cpu" else [want]


# Weights and batches on a device

CUDA = torch.device("cuda", 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["openclip_vit", "openclip_vit_quickgelu", "openclip_rn"])
def test_a_frozen_classifier_has_the_logits_of_the_trained_one_bit_for_bit(name):
    """Catches: A vector, a statistic, or the head is rounded, which autocast leaves in float32."""
    model = classifier(helpers.load(name), helpers.expected(name)["tokens"][:, None])
    size = model.arch["image_size"]
    x = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))
    frozen = runs.freeze(copy.deepcopy(model), CUDA)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), model(x))
    assert not torch.equal(model(x), model(x.flip(0)))
    for (name, p), q in zip(frozen.named_parameters(), model.parameters(), strict=True):
        assert p.dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32), name
        assert not p.requires_grad and q.requires_grad and q.dtype == torch.float32
    for b, c in zip(frozen.buffers(), model.buffers(), strict=True):
        assert b.dtype == c.dtype and torch.equal(b, c)


def test_on_a_cpu_frozen_weights_stay_as_they_are():
    model = helpers.load("openclip_vit")
    frozen = runs.freeze(copy.deepcopy(model), torch.device("cpu"))
    assert all(torch.equal(p, q) and p.dtype == torch.float32
               for p, q in zip(frozen.parameters(), model.parameters(), strict=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_chunk_size_is_that_of_the_docstring(monkeypatch):
    """Free memory does not matter, so that a run does not depend on its neighbors."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    assert runs.chunk_size(151_936, CUDA) == 2056 and "2,056 targets" in runs.chunk_size.__doc__
    assert runs.chunk_size(151_936, torch.device("cpu")) == 512


class FakeTensor:
    """A tensor on a device that there may not be; it keeps the calls of its methods."""

    def __init__(self, device):
        self.device, self.calls = torch.device(device), []

    def pin_memory(self):
        self.calls.append("pin_memory")
        return self

    def to(self, device, non_blocking):
        self.calls.append((device, non_blocking))
        return self


@pytest.mark.parametrize("start, end, pinned", [("cpu", "cuda:0", True), ("cpu", "cpu", False),
                                                ("cuda:0", "cuda:0", False), ("cuda:0", "cpu", False)])
def test_only_a_copy_from_the_cpu_to_a_gpu_is_pinned(start, end, pinned):
    """Catches: Without pinned memory, a copy blocks; a tensor on a GPU cannot be pinned.

    A copy to the CPU that does not block is read before it is there.
    """
    x, end = FakeTensor(start), torch.device(end)
    assert runs.to_device(x, end) is x
    assert x.calls == ["pin_memory"] * pinned + [(end, end.type == "cuda")]


def test_tuples_of_tensors_go_to_a_device_as_they_are_nested():
    x, y, z = (torch.arange(n) for n in (1, 2, 3))
    (a, b), c = runs.to_device(((x, y), z), torch.device("meta"))
    assert [t.shape for t in (a, b, c)] == [(1,), (2,), (3,)]
    assert {t.device.type for t in (a, b, c)} == {"meta"}


# Errors

@pytest.mark.parametrize("error", [ValueError("a value"), OSError("a file"), FileNotFoundError("no file"),
                                   FloatingPointError("nan"), ZeroDivisionError("zero")], ids=repr)
def test_main_turns_a_mistake_of_the_user_into_one_line(error, capfd):
    def script():
        raise error

    with pytest.raises(SystemExit) as stop:
        runs.main(script)
    assert stop.value.code == 2 and capfd.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt])
def test_main_hides_no_other_error(error):
    def script():
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        runs.main(script)


# Batches

def test_every_epoch_has_every_example_once():
    seen = torch.cat([runs.shuffled(step, 40, 16, seed=3) for step in range(5)])  # 80 = two epochs
    first, second = seen[:40], seen[40:]
    assert torch.equal(first.sort().values, torch.arange(40))
    assert torch.equal(second.sort().values, torch.arange(40))
    assert not torch.equal(first, second)


def test_a_batch_may_be_larger_than_the_data():
    assert len(runs.shuffled(0, 5, 16, 0)) == 16


@pytest.mark.parametrize("share, n", [(0.0, 0), (0.2, 8), (0.99, 39)])
def test_held_out_examples_are_never_trained_on(share, n):
    """Catches: beta is chosen on examples that the reward was trained on, or some examples are lost."""
    used, held_out = runs.hold_out(40, share)
    assert len(held_out) == n and torch.equal(torch.cat([used, held_out]).sort().values, torch.arange(40))
    indices = runs.order(argparse.Namespace(hold_out=share, batch=8, seed=3), 40)
    seen = torch.cat([indices(step) for step in range(10)])
    assert set(seen.tolist()) == set(used.tolist())


def test_a_share_that_holds_out_no_example_is_refused():
    """Catches: eval.py chooses beta on nothing, after the training."""
    with pytest.raises(ValueError, match="^--hold-out 0.02 of 40 "):
        runs.order(argparse.Namespace(hold_out=0.02, batch=8, seed=3), 40)


def test_the_same_examples_are_held_out_for_every_seed():
    (_, first), (_, again) = runs.hold_out(40, 0.5), runs.hold_out(40, 0.5)
    assert torch.equal(first, again) and not torch.equal(first, torch.arange(20))


def test_without_hold_out_the_batches_are_those_of_all_examples():
    """Catches: Runs of older commits cannot be repeated."""
    indices = runs.order(argparse.Namespace(hold_out=0.0, batch=16, seed=3), 40)
    assert all(torch.equal(indices(step), runs.shuffled(step, 40, 16, 3)) for step in range(5))


# Checkpoints

def arguments(path, **changes):
    values = dict(method="prt", lr=0.1, weight_decay=0.0, accum=1, seed=0, out=str(path), resume=False,
                  device=None, compile=False, warmup=None, beta=1.0, alpha=0.0)
    return argparse.Namespace(**values | changes)


def save(args, step, steps):
    """Saves a small network after a step of training; returns its weights."""
    torch.manual_seed(step)
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    policy(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    runs.save(args, dict(kind="linear"), policy, optimizer, step, steps)
    return policy.state_dict()


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_has_the_optimizer_unless_it_is_the_last(tmp_path, last):
    args = arguments(tmp_path / "x.pt")
    model = save(args, 7, 7 if last else 8)
    checkpoint = read(args.out)
    assert checkpoint.keys() == {"kind", "args", "model", "step"} | (set() if last else {"optimizer"})
    assert checkpoint["kind"] == "linear" and checkpoint["step"] == 7
    assert checkpoint["args"] == runs.settings(args)
    assert all(torch.equal(x, checkpoint["model"][name]) for name, x in model.items())


def test_a_checkpoint_keeps_the_arguments_that_its_result_depends_on(tmp_path):
    free = dict(out="y.pt", resume=True, device="cpu", compile=True)
    args = arguments(tmp_path / "x.pt")
    assert runs.settings(args) == runs.settings(arguments(tmp_path / "x.pt", **free))
    assert runs.settings(args) == dict(method="prt", lr=0.1, weight_decay=0.0, seed=0, warmup=None, beta=1.0,
                                       alpha=0.0)


def test_accum_counts_in_pretraining_which_contrasts_a_micro_batch(tmp_path):
    for method, counts in dict(prt=False, ft=False, pretrain=True).items():
        one, two = (runs.settings(arguments(tmp_path / "x.pt", method=method, accum=n)) for n in (1, 2))
        assert (one != two) == counts


def test_a_new_run_makes_its_folder_and_overwrites_nothing(tmp_path):
    args = arguments(tmp_path / "a/b/x.pt")
    assert runs.begin(args) is None and (tmp_path / "a/b").is_dir()
    save(args, 1, 2)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"x\.pt exists: continue it with --resume, or .* --out"):
        runs.begin(args)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changes", [dict(), dict(accum=2), dict(device="cpu", compile=True)], ids=str)
def test_an_unfinished_run_is_continued_with_its_arguments(tmp_path, changes):
    model = save(arguments(tmp_path / "x.pt"), 3, 4)
    state = runs.begin(arguments(tmp_path / "x.pt", resume=True, **changes))
    assert state["step"] == 3 and torch.equal(state["model"]["weight"], model["weight"])


@pytest.mark.parametrize("method, changes, message", [
    ("prt", dict(lr=0.2), r"--lr 0\.1, not 0\.2"), ("prt", dict(method="ft"), "--method prt, not ft"),
    ("prt", dict(weight_decay=1.0), r"--weight-decay 0\.0, not 1\.0"),
    ("pretrain", dict(accum=2), "--accum 1, not 2")])
def test_a_run_does_not_resume_with_other_arguments(tmp_path, method, changes, message):
    save(arguments(tmp_path / "x.pt", method=method), 3, 4)
    with pytest.raises(ValueError, match=rf"--resume: .*x\.pt was .* with {message}"):
        runs.begin(arguments(tmp_path / "x.pt", resume=True, **dict(method=method) | changes))


def test_only_an_unfinished_run_resumes(tmp_path):
    args = arguments(tmp_path / "x.pt", resume=True)
    with pytest.raises(FileNotFoundError, match=r"--resume: there is no .*x\.pt"):
        runs.begin(args)
    save(args, 4, 4)
    with pytest.raises(ValueError, match=r"--resume: .*x\.pt is not an unfinished run .*step: 4"):
        runs.begin(args)


class Terminal(io.StringIO):
    """A terminal for standard output and standard error."""

    def isatty(self):
        return True


@pytest.mark.parametrize("is_stopped, message", [(False, ": .* bytes"), (True, " has 1 of 2 steps; .*")])
def test_what_is_printed_during_training_is_not_behind_the_bar(paths, monkeypatch, is_stopped, message):
    """Catches: On a terminal, the size of the file continues the line of the progress bar."""
    terminal = Terminal()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    monkeypatch.setattr(runs, "stopping", lambda: is_stopped)
    assert call(*TRAIN.format(**paths).split()) == (128 if is_stopped else 0)
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]  # what stays
    assert [line for line in lines if re.fullmatch(f"{paths['out']}/x.pt{message}", line)]
    assert any("2/2" in line for line in lines) != is_stopped


# Stages

STAGES = dict(old=dict(method="pretrain", size="tiny", lr=0.5), new=dict(method="pretrain", lr=0.4),
              reward=dict(method="prt", base="old", lr=0.3))


@pytest.fixture
def launch(tmp_path):
    """Launches the stages, each of which only writes its file; returns the arguments of each run.

    unfinished: the stages whose files are those of an unfinished run. signaled: the stage in which SIGINT
    comes before its file is written.
    """
    def launch_stages(unfinished=(), signaled=None, **given):
        trained = []

        def train(args, device, state):
            assert device == runs.setup(None) and bool(state) == args.resume
            assert torch.initial_seed() == args.seed
            if Path(args.out).stem == signaled:
                os.kill(os.getpid(), signal.SIGINT)
            trained.append(args)
            optimizer = dict(optimizer={}) if Path(args.out).stem in unfinished else {}
            files.save(args.out, dict(args=runs.settings(args)) | optimizer)

        values = dict(data="shapes", method=None, base=None, lr=None, size=None, seed=5, resume=False,
                      ticket=None, keep=None, freeze=None, reward_init=None, device=None,
                      out=str(tmp_path / "out")) | given
        tuning, pretraining = dict(method="prt", base="hub", lr=0.1), dict(lr=0.2)
        runs.launch(argparse.Namespace(**values), "shapes", tuning, pretraining, STAGES, train)
        return trained
    return launch_stages


def test_each_stage_is_a_run_on_the_models_of_earlier_ones(launch, tmp_path, capsys):
    trained = launch()
    assert [args.out for args in trained] == [f"{tmp_path}/out/{name}.pt" for name in STAGES]
    assert [args.base for args in trained] == [None, None, f"{tmp_path}/out/old.pt"]
    assert [(args.method, args.size, args.lr, args.resume) for args in trained] == [
        ("pretrain", "tiny", 0.5, False), ("pretrain", None, 0.4, False), ("prt", None, 0.3, False)]
    assert capsys.readouterr().out == f"\npython eval.py --run {tmp_path}/out\n"


def test_only_the_reward_starts_from_random_weights(launch):
    """Catches: With --reward-init, the fine-tuned models of a run without arguments start from elsewhere."""
    assert [args.reward_init for args in launch(reward_init="random")] == [None, None, "random"]


@pytest.mark.parametrize("method, lr", [("prt", 0.1), ("ft", 0.1), ("pretrain", 0.2)])
def test_a_run_alone_has_the_recipe_of_its_method(launch, tmp_path, method, lr):
    args, = launch(method=method, out=str(tmp_path / "x.pt"))
    assert args.lr == lr


def test_a_finished_stage_is_kept_and_an_unfinished_one_resumed(launch, tmp_path, capsys):
    launch(unfinished=["new"])
    trained = launch()
    assert [(args.out, args.resume) for args in trained] == [(f"{tmp_path}/out/new.pt", True)]
    printed = capsys.readouterr().out
    assert all(f"{tmp_path}/out/{name}.pt is finished" in printed for name in ("old", "reward"))


def test_a_stage_from_before_a_flag_existed_is_kept(launch, tmp_path):
    """Catches: Each new flag makes all finished runs useless."""
    launch()
    for path in (tmp_path / "out").iterdir():
        checkpoint = read(path)
        del checkpoint["args"]["ticket"]
        files.save(path, checkpoint)
    assert launch() == []


def test_a_stage_of_other_arguments_is_refused(launch, tmp_path):
    launch()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out/old\.pt was made with other arguments; .* --out"):
        launch(lr=0.9)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("given, out", [
    (dict(method="ft"), "out/shapes-ft.pt"), (dict(base="x.pt"), "out/shapes-prt.pt"),
    (dict(data="some/where"), "out/where-prt.pt"), (dict(method="ft", out="y.pt"), "y.pt")], ids=str)
def test_a_flag_that_says_what_to_train_makes_it_one_run(launch, tmp_path, monkeypatch, given, out):
    monkeypatch.chdir(tmp_path)
    args, = launch(**dict(out=None) | given)
    assert args.out == out and args.lr == 0.1 and args.base == given.get("base", "hub")


# Signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]
MESSAGE = "\nstopping after this step; Ctrl-C again ends at once\n"
# Runs a script that reports every call of `fetch`, and waits in it.
SLOW = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import prt
seconds, fit, rank = float(sys.argv[1]), prt.fit, os.environ.get("RANK", "0")
del sys.argv[:2]

def slow_fit(policy, indices, fetch, **options):
    def slow_fetch(*args):
        os.write(2, f"step of process {{rank}}\\n".encode())
        time.sleep(seconds)
        return fetch(*args)
    return fit(policy, indices, slow_fetch, **options)

prt.fit = slow_fit
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def stop(monkeypatch):
    """A state of no signal; what a test leaves there is gone after it."""
    monkeypatch.setattr(runs, "STOP", copy.deepcopy(runs.STOP))
    vars(runs.STOP).update(training=False, signal=0, time=0.0)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield runs.STOP
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)


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
    """Reads a process's lines up to one with these words; returns them."""
    lines = []
    for line in stream:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"no {words!r} in {lines}")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_training_saves_and_the_run_resumes_bit_for_bit(paths, texts, monkeypatch, number):
    """Catches: A traceback, a lost or repeated step, or a checkpoint that no run continues from.

    SIGINT comes to a run on text, and SIGTERM to one on images.
    """
    monkeypatch.chdir(texts.folder)
    command = [TUNE_LM, TRAIN.format(**paths).split()][number == signal.SIGTERM]
    command = (*command, "--steps", "24", "--batch", "16", "--accum", "2", "--warmup", "5", "--out")
    half, whole = paths["out"] / "half.pt", paths["out"] / "whole.pt"
    with process(ROOT / command[0], *command[1:], half, cwd=texts.folder) as run:
        until(run.stdout, "half 6/24: ")
        run.send_signal(number)
        printed, err = run.communicate(timeout=60)
    step = read(half)["step"]
    assert (run.returncode, err) == (128 + number, "") and MESSAGE in printed and 6 <= step < 24
    assert printed.splitlines()[-1] == (
        f"{half} has {step} of 24 steps; continue with the same command and --resume")
    assert [*contents(paths["out"])] == [half]
    for out in (whole, half):
        assert call(*command, out, *(["--resume"] if out == half else [])) == 0
    assert same(whole, half) and "optimizer" not in read(half)


def test_a_second_signal_ends_at_once(texts, tmp_path):
    """Catches: A step that takes minutes cannot be left."""
    with process("-c", SLOW, 60, ROOT / TUNE_LM[0], *TUNE_LM[1:], "--steps", 4, "--out", tmp_path / "x.pt",
                 cwd=texts.folder) as run:
        until(run.stderr, "step of process 0")
        run.send_signal(signal.SIGINT)
        until(run.stdout, MESSAGE.strip())
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=20)[1] == "\nended by SIGINT\n" and run.returncode == 130
    assert not contents(tmp_path)


def test_a_signal_before_training_ends_at_once(texts, tmp_path):
    """It comes while the data set is read from a pipe, in which nothing arrives."""
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    with process(ROOT / TUNE_LM[0], *TUNE_LM[1:], "--data", pipe, "--out", tmp_path / "x.pt",
                 cwd=texts.folder) as run:
        for _ in range(600):
            with contextlib.suppress(OSError):  # no process reads yet
                file = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=20) == ("", "\nended by SIGINT\n") and run.returncode == 130
        os.close(file)
    assert not (tmp_path / "x.pt").exists()


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(texts, tmp_path, monkeypatch):
    """SIGINT comes to one of them; in the resumed run, SIGTERM to torchrun. One process ends the run.

    Catches: The other process waits forever, a checkpoint of one process's shards, or none.
    """
    monkeypatch.chdir(texts.folder)
    (tmp_path / "slow.py").write_text(SLOW)
    half, whole = tmp_path / "half.pt", tmp_path / "whole.pt"
    command = (*TUNE_LM, "--steps", "24", "--warmup", "5", "--out")
    slow = (tmp_path / "slow.py", 0.02, ROOT / command[0], *command[1:], half)

    def assert_stopped(printed, err, start):
        """Asserts that both processes have done the same steps from `start` on; returns the last one."""
        step = read(half)["step"]
        assert start < step < 24 and "optimizer" in read(half)
        assert [err.count(f"step of process {rank}\n") for rank in "01"] == [step - start] * 2
        assert printed.count(f"{half} has {step} of 24 steps; continue") == 1
        assert "ended by" not in err and "runs.py" not in err  # torchrun prints a traceback of its own
        assert sorted(tmp_path.iterdir()) == [half, tmp_path / "slow.py"]
        return step

    joint = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=2)
    with (process(*slow, cwd=texts.folder, **joint, RANK=0, LOCAL_RANK=0) as first,
          process(*slow, cwd=texts.folder, **joint, RANK=1, LOCAL_RANK=1) as second):
        until(first.stdout, "half 6/24: ")
        second.send_signal(signal.SIGINT)
        printed, err = first.communicate(timeout=60)
        other_printed, other_err = second.communicate(timeout=60)
    step = assert_stopped(printed, err + other_err, 0)
    assert (first.returncode, second.returncode) == (130, 130)
    assert MESSAGE in other_printed and MESSAGE not in printed

    with process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *slow, "--resume",
                 cwd=texts.folder) as run:
        until(run.stdout, f"half {step // 6 * 6 + 6}/24: ")
        run.terminate()
        printed, err = run.communicate(timeout=60)
    assert_stopped(printed, err, step)
    assert run.returncode and printed.count(MESSAGE.strip()) == 2

    assert call(*command, half, "--accum", 2, "--resume") == call(*command, whole, "--accum", 2) == 0
    assert same(whole, half, atol=1e-5) and read(half)["step"] == 24


def test_a_signal_saves_even_if_the_reader_of_the_output_is_gone(texts, tmp_path):
    """Catches: In `python ... | tee log`, Ctrl-C ends tee, and the next line that is printed ends the run."""
    with process(ROOT / TUNE_LM[0], *TUNE_LM[1:], "--steps", "2000", "--out", tmp_path / "x.pt",
                 cwd=texts.folder) as run:
        until(run.stdout, "x 50/2000: ")
        run.stdout.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
    assert 50 <= read(tmp_path / "x.pt")["step"] < 2000


def test_a_signal_between_stages_keeps_what_is_finished(launch, tmp_path, capfd, stop):
    with pytest.raises(SystemExit) as ended:
        runs.main(lambda: launch(signaled="new"))
    assert ended.value.code == 130 and capfd.readouterr().err == "\nended by SIGINT\n"
    before = contents(tmp_path)
    assert [*before] == [tmp_path / "out/old.pt"]
    assert [Path(args.out).stem for args in launch()] == ["new", "reward"]
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_after_training_ends_at_once(paths, monkeypatch, capfd, stop, number):
    """Catches: A signal waits for a step that will never come."""
    def accuracy(*scores):
        os.kill(os.getpid(), number)
        raise AssertionError("not ended")

    monkeypatch.setattr(runs, "accuracy", accuracy)
    assert call(*TRAIN.format(**paths).split()) == 128 + number
    assert capfd.readouterr().err == f"\nended by {number.name}\n"
    assert "optimizer" not in read(paths["out"] / "x.pt") and not stop.training


def test_main_puts_the_handlers_of_signals_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []
    runs.main(lambda: seen.extend(signal.getsignal(number) for number in SIGNALS))
    assert seen == [runs.interrupt] * 2 and [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_signal_no_run_is_stopping(stop):
    stop.training = True
    assert not runs.stopping()
    runs.interrupt(signal.SIGTERM, None)
    assert runs.stopping() and runs.stopping()


@pytest.fixture
def two_ranks(monkeypatch, stop):
    """Pretends to be one of two processes in training; a list of what the other one is asked.

    Entries to append: functions that return the other's value, called in turn while this process waits.
    """
    asked, answers = [], []

    def all_reduce(number, operation):
        asked.append(number.item())
        assert operation == dist.ReduceOp.MAX
        number.clamp_(min=answers.pop(0)() or 0 if answers else 0)

    for name, value in dict(is_initialized=lambda: True, all_reduce=all_reduce, get_rank=lambda: 0,
                            get_world_size=lambda: 2, barrier=lambda: None).items():
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(runs, "get_state_dict", lambda policy, optimizer, options: (
        policy.state_dict(), optimizer.state_dict()))
    stop.training = True
    return SimpleNamespace(asked=asked, answers=answers)


def test_a_signal_to_another_process_stops_this_one_too(two_ranks):
    two_ranks.answers.append(lambda: int(signal.SIGINT))
    assert runs.stopping()


def test_a_signal_while_the_processes_wait_for_each_other_is_not_lost(two_ranks):
    """Catches: It is overwritten by what the processes agreed on before, and the run goes on."""
    two_ranks.answers.append(lambda: runs.interrupt(signal.SIGTERM, None))
    assert not runs.stopping()
    assert runs.stopping()


def test_a_signal_in_a_save_ends_no_process_before_the_others_know(two_ranks, tmp_path):
    """Catches: One process leaves after a save, and the others wait for it in their next step."""
    assert not runs.stopping()
    runs.interrupt(signal.SIGINT, None)
    before = len(two_ranks.asked)
    with contextlib.suppress(SystemExit):
        save(arguments(tmp_path / "x.pt"), 1, 4)
        assert runs.stopping()
    assert two_ranks.asked[before:] == [signal.SIGINT]


def test_a_signal_that_torchrun_passes_on_is_no_second_one(two_ranks, stop):
    """Catches: One Ctrl-C, which the terminal and torchrun send to every process, saves nothing."""
    for _ in range(2):
        runs.interrupt(signal.SIGINT, None)
    assert runs.stopping()
    stop.time -= 60
    with pytest.raises(SystemExit) as ended:
        runs.interrupt(signal.SIGINT, None)
    assert ended.value.code == 130


def test_the_first_signal_to_a_process_that_stops_with_another_is_no_second_one(two_ranks):
    """Catches: torchrun signals its processes in turn, and the last one ends before its part is saved."""
    two_ranks.answers.append(lambda: int(signal.SIGTERM))
    assert runs.stopping()
    runs.interrupt(signal.SIGTERM, None)


def test_a_signal_in_the_last_step_promises_no_resume(tmp_path, capsys, stop):
    """Catches: The last line asks for --resume, which refuses a finished run."""
    stop.training = True
    runs.interrupt(signal.SIGINT, None)
    with contextlib.suppress(SystemExit):
        save(arguments(tmp_path / "x.pt"), 4, 4)
    assert "optimizer" not in read(tmp_path / "x.pt") and "--resume" not in capsys.readouterr().out


def test_a_signal_in_the_middle_of_a_write_keeps_its_exit_code(tmp_path, monkeypatch, capfd, stop):
    """Catches: A full disk is reported, since torch hides the error that ends its writer."""
    class File(io.BufferedRandom):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode: File(io.FileIO(path, mode)), raising=False)
    with pytest.raises(SystemExit) as ended:
        runs.main(lambda: files.save(tmp_path / "x.pt", dict(x=torch.zeros(1000))))
    assert ended.value.code == 130 and "disk" not in capfd.readouterr().err
    assert not contents(tmp_path)


# Runs that end early

def test_a_diverged_run_keeps_the_last_good_checkpoint(paths, monkeypatch, capfd):
    """Catches: NaNs are written over the checkpoint that the run could be continued from."""
    fit = prt.fit
    monkeypatch.setattr(prt, "fit", lambda *args, **options: fit(*args, **options | dict(save_every=1)))
    code = call(*TRAIN.format(**paths).split(), "--lr", "1e30", "--steps", "3")
    one_line(code, capfd.readouterr().err, "step 2", "nan", "--lr")
    assert list(contents(paths["out"])) == [paths["out"] / "x.pt"]
    assert files.read(paths["out"] / "x.pt")["step"] == 1 and weights.load(paths["out"] / "x.pt", "prt")


def test_a_run_does_not_resume_with_other_classes(paths, monkeypatch, capfd):
    """Catches: Class names changed in between: the head keeps the old ones, the checkpoint names the new."""
    data = write_webdataset(paths["out"] / "data")
    command = [*TRAIN.format(**paths).split(), "--data", data]
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            call(*command)
    (data / "classnames.txt").write_text("cyan\npink\nwhite\n")
    before = contents(paths["out"])
    capfd.readouterr()
    one_line(call(*command, "--resume"), capfd.readouterr().err, paths["out"] / "x.pt")
    assert contents(paths["out"]) == before


# The scripts as processes

PROCESSES = {
    "unknown data": (TRAIN + "--data shapez", "--data shapez"),
    "truncated reward": (EVAL + "--reward {cut}", "{cut}"),
    "diverged": (TRAIN + "--lr 1e30 --steps 8", "loss nan", "--lr"),
    "cifar100 out of reach": (TRAIN + "--data cifar100", images.CIFAR_URL, "cache/cifar-100-python.tar.gz"),
    "no tokenizer": (" ".join(TUNE_LM) + " --base {bare} --out {out}/x.pt", "{bare}", "tokenizer.json"),
    "malformed line of text": (" ".join(EVAL_LM) + " --data {bad}", "{bad} line 2"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_process_ends_with_one_line_and_exit_code_2(paths, texts, malformed, case):
    """Catches: Warnings of libraries beside the one line, or another exit code once the interpreter ends."""
    names = paths | dict(bare=malformed["bare"], bad=malformed["root"] / "bad.jsonl")
    command, *words = (text.format(**names) for text in PROCESSES[case])
    before = contents(paths["out"], paths["root"])
    done = spawn(*command.split(), cwd=texts.folder, cache=paths["out"] / "cache")
    one_line(done.returncode, done.stderr, *words)
    assert contents(paths["out"], paths["root"]) == before


def test_a_full_disk_leaves_the_checkpoint_before(paths):
    """Catches: The disk fills up while the last checkpoint is written, and the one before it is lost."""
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    half = paths["out"] / "x.pt"
    half.write_bytes(paths["half"].read_bytes())
    before = contents(paths["out"])
    done = spawn(*TRAIN.format(**paths).split(), "--resume", cwd=paths["out"], preexec_fn=small_files)
    one_line(done.returncode, done.stderr, half)
    assert contents(paths["out"]) == before


# Scores

def test_predict_in_pieces_equals_one_pass():
    torch.manual_seed(1)
    network, inputs = torch.nn.Linear(6, 3), torch.randn(40, 6)
    assert torch.allclose(runs.predict(network, inputs, 7), network(inputs), atol=1e-6)


def test_accuracy_is_the_share_of_most_likely_labels_that_are_right():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert runs.accuracy(scores, torch.tensor([1, 0, 0, 0])) == 0.75


def text_batch(i):
    """Returns (ids, index), targets for some of 8 random texts: more targets in the later ones."""
    texts = torch.randint(3, 512, (8, 11), generator=torch.Generator().manual_seed(5))
    ids, index = texts[i], torch.cat([10 * row + torch.arange(2 + row, 10) for row in range(len(i))])
    return (ids[:, :-1], index), ids[:, 1:].flatten()[index]


@torch.no_grad()
def test_score_texts_weighs_all_targets_equally():
    """Catches: Batches weigh equally whatever their targets, or figures of another distribution."""
    base, tuned, old = (weights.load(FIXTURES / name) for name in ("llama3", "falcon3", "qwen2"))
    batches = [text_batch(torch.tensor(i)) for i in ([0, 1, 2], [3], [4, 5])]
    rewards = [(0.7, tuned), (-0.3, old)]
    nll, correct, kl = [], [], []
    for (ids, index), targets in batches:
        base_log_probs = base(ids).flatten(0, 1)[index].log_softmax(-1)
        r = sum(weight * model(ids).flatten(0, 1)[index] for weight, model in rewards)
        log_probs = (base_log_probs + r).log_softmax(-1)
        nll += (-log_probs[torch.arange(len(targets)), targets]).tolist()
        correct += (log_probs.argmax(-1) == targets).tolist()
        kl += (log_probs.exp() * (log_probs - base_log_probs)).sum(-1).tolist()
    want = dict(nll=sum(nll) / len(nll), accuracy=sum(correct) / len(nll), kl=sum(kl) / len(nll))
    assert want["kl"] > 0.01
    for chunk in (512, 5, 1):
        assert runs.score_texts(base, rewards, batches, chunk) == pytest.approx(want, rel=1e-4)
    alone = runs.score_texts(base, [], batches)
    assert abs(alone["kl"]) < 1e-6 and alone["nll"] != pytest.approx(want["nll"], rel=1e-3)
