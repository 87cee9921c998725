"""models/runs.py: devices, errors, batches, checkpoints, stages, and scores; the scripts as processes."""
import argparse
import resource
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    EVAL,
    EVAL_LM,
    FIXTURES,
    TRAIN,
    TUNE_LM,
    call,
    contents,
    interrupt,
    one_line,
    read,
    spawn,
    write_webdataset,
)

import prt
from data import files, images
from models import runs, weights

# Device and processes

@pytest.mark.parametrize("device", ["gpu", "meta", "mps"])
def test_setup_names_a_device_that_no_script_can_use(device):
    with pytest.raises(ValueError, match=f"--device {device}: "):
        runs.setup(device)


def test_setup_takes_a_cpu_and_without_cuda_it_is_the_default():
    assert runs.setup("cpu") == torch.device("cpu")
    assert runs.setup().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runs.processes() == 1 and not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_cuda_is_refused_where_there_is_none(paths, capfd, command):
    code = call(*command.format(**paths).split(), "--device", "cuda")
    one_line(code, capfd.readouterr().err, "cuda", "--device cpu")
    assert not contents(paths["out"])


def test_setup_joins_the_processes_of_torchrun_and_main_leaves_them(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    seen = []
    runs.main(lambda: seen.append((runs.setup("cpu"), dist.is_initialized(), runs.processes())))
    assert seen == [(torch.device("cpu"), True, 1)] and not dist.is_initialized()


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


# Checkpoints

def arguments(path, **changes):
    values = dict(method="prt", lr=0.1, weight_decay=0.0, accum=1, seed=0, out=str(path), resume=False,
                  device=None, compile=False, warmup=None, beta=1.0, alpha=0.0)
    return argparse.Namespace(**values | changes)


def save(args, step, last):
    """Saves a small network after a step of training; returns its weights."""
    torch.manual_seed(step)
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    policy(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    runs.save(args, dict(kind="linear"), policy, optimizer, step, last)
    return policy.state_dict()


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_has_the_optimizer_unless_it_is_the_last(tmp_path, last):
    args = arguments(tmp_path / "x.pt")
    model = save(args, 7, last)
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
    save(args, 1, last=False)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"x\.pt exists: continue it with --resume, or .* --out"):
        runs.begin(args)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("changes", [dict(), dict(accum=2), dict(device="cpu", compile=True)], ids=str)
def test_an_unfinished_run_is_continued_with_its_arguments(tmp_path, changes):
    model = save(arguments(tmp_path / "x.pt"), 3, last=False)
    state = runs.begin(arguments(tmp_path / "x.pt", resume=True, **changes))
    assert state["step"] == 3 and torch.equal(state["model"]["weight"], model["weight"])


@pytest.mark.parametrize("method, changes, message", [
    ("prt", dict(lr=0.2), r"--lr 0\.1, not 0\.2"), ("prt", dict(method="ft"), "--method prt, not ft"),
    ("prt", dict(weight_decay=1.0), r"--weight-decay 0\.0, not 1\.0"),
    ("pretrain", dict(accum=2), "--accum 1, not 2")])
def test_a_run_does_not_resume_with_other_arguments(tmp_path, method, changes, message):
    save(arguments(tmp_path / "x.pt", method=method), 3, last=False)
    with pytest.raises(ValueError, match=rf"--resume: .*x\.pt was .* with {message}"):
        runs.begin(arguments(tmp_path / "x.pt", resume=True, **dict(method=method) | changes))


def test_only_an_unfinished_run_resumes(tmp_path):
    args = arguments(tmp_path / "x.pt", resume=True)
    with pytest.raises(FileNotFoundError, match=r"--resume: there is no .*x\.pt"):
        runs.begin(args)
    save(args, 4, last=True)
    with pytest.raises(ValueError, match=r"--resume: .*x\.pt is not an unfinished run .*step: 4"):
        runs.begin(args)


# Stages

STAGES = dict(old=dict(method="pretrain", size="tiny", lr=0.5), new=dict(method="pretrain", lr=0.4),
              reward=dict(method="prt", base="old", lr=0.3))


@pytest.fixture
def launch(tmp_path):
    """Launches the stages, each of which only writes its file; returns the arguments of each run.

    unfinished: the stages whose files are those of an unfinished run.
    """
    def launch_stages(unfinished=(), **given):
        trained = []

        def train(args):
            trained.append(args)
            optimizer = dict(optimizer={}) if Path(args.out).stem in unfinished else {}
            files.save(args.out, dict(args=runs.settings(args)) | optimizer)

        values = dict(data="shapes", method=None, base=None, lr=None, size=None, seed=0, resume=False,
                      out=str(tmp_path / "out")) | given
        recipe = dict(method="prt", base="hub", lr=0.1)
        runs.launch(argparse.Namespace(**values), "shapes", recipe, STAGES, train)
        return trained
    return launch_stages


def test_each_stage_is_a_run_on_the_models_of_earlier_ones(launch, tmp_path, capsys):
    trained = launch()
    assert [args.out for args in trained] == [f"{tmp_path}/out/{name}.pt" for name in STAGES]
    assert [args.base for args in trained] == [None, None, f"{tmp_path}/out/old.pt"]
    assert [(args.method, args.size, args.lr, args.resume) for args in trained] == [
        ("pretrain", "tiny", 0.5, False), ("pretrain", None, 0.4, False), ("prt", None, 0.3, False)]
    assert capsys.readouterr().out == f"\npython eval.py --run {tmp_path}/out\n"


def test_a_finished_stage_is_kept_and_an_unfinished_one_resumed(launch, tmp_path, capsys):
    launch(unfinished=["new"])
    trained = launch()
    assert [(args.out, args.resume) for args in trained] == [(f"{tmp_path}/out/new.pt", True)]
    printed = capsys.readouterr().out
    assert all(f"{tmp_path}/out/{name}.pt is finished" in printed for name in ("old", "reward"))


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
