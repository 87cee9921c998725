"""What a run of a script needs besides the method: interruption, device, processes, and batches."""
import contextlib
import functools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# Whether prt.fit is running and has made a step, whether `stopping` said so, the signal that came (0: none),
# and when.
STOP = SimpleNamespace(training=False, stopping=False, signal=0, time=0.0)


def main(script, remedy="take a smaller model"):
    """Calls a script's main(); user errors print one line and exit with code 2, without a traceback.

    remedy: what to do if a GPU's memory does not suffice.
    """
    STOP.training, STOP.stopping, STOP.signal, streams = False, False, 0, (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, keep="\r")  # of progress bars
    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        script()
    except (ValueError, OSError, ArithmeticError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"{reason.partition(' is free. ')[0]} is free: {remedy}"
        sys.stderr.write(f"error: {reason}\n")
        sys.exit(2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if STOP.signal else handler)  # lets the exit finish
        if dist.is_initialized():
            dist.destroy_process_group()
        lost, (sys.stdout, sys.stderr) = getattr(sys.stdout, "lost", None), streams
    if lost:
        sys.exit(f"error: what was printed is lost: {lost}")


class Output:
    """A stream on which no text from outside can control a terminal, and that may break: training goes on."""

    # Control characters and marks of direction, but not the colors of models/answers.py.
    CONTROL = re.compile("(?!\x1b\\[(?:48;5;2\\d\\dm\x1b\\[30m|0m)|(?<=m)\x1b\\[30m)"
                         "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

    def __init__(self, stream, keep=""):
        # None: it was closed when the program started.
        self.stream, self.keep, self.lost = stream or open(os.devnull, "w"), keep, None  # noqa: SIM115
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # for a terminal without UTF-8

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes text with its control characters, except for those in `keep`, as escapes such as \\x1b."""
        self.unless_broken(self.stream.write, self.CONTROL.sub(
            lambda c: c[0] if c[0] in self.keep else c[0].encode("unicode_escape").decode(), text))

    def flush(self):
        self.unless_broken(self.stream.flush)

    def unless_broken(self, action, *args):
        """Calls an action of the stream; if that is broken, sends all that follows nowhere."""
        try:
            action(*args)
        except OSError as error:
            # Of a pipe that nobody reads any more, as after `| head`, nothing is missed.
            self.lost = None if isinstance(error, BrokenPipeError) else error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# Interruption

def interrupt(number, frame):
    """Handles Ctrl-C (SIGINT) and SIGTERM.

    During training the first one asks prt.fit to finish its step and save; another one ends at once (under
    torchrun, only after 3 seconds). Outside training the first one ends at once.
    """
    # torchrun forwards signals, so that a single Ctrl-C arrives twice, the second time within 3 seconds.
    again = STOP.signal and time.monotonic() - STOP.time > (3 if dist.is_initialized() else 0)
    if again or not STOP.training:
        STOP.signal = number
        sys.stderr.write(f"\nended by {signal.Signals(number).name}\n")
        sys.exit(128 + number)
    if not STOP.signal:
        STOP.signal, STOP.time = number, time.monotonic()
        # os.write, since print raises an error if the signal came in the middle of a print. An error if, in
        # `python ... | tee log`, Ctrl-C ended tee.
        with contextlib.suppress(OSError):
            os.write(1, b"\nstopping after this step; Ctrl-C again ends at once\n")


def stopping():
    """Returns whether any process got a signal. All of them call this after the same step, and agree.

    From the first call on, a signal is deferred until the next call.
    """
    STOP.training = True
    number = torch.tensor(STOP.signal)  # on the CPU, so that a GPU is not synchronized
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if number > STOP.signal:
        STOP.signal, STOP.time = number.item(), time.monotonic()
    STOP.stopping = bool(number)
    return STOP.stopping


def after_training(out, step, steps):
    """Lets a signal end the program at once again; ends it if one stopped training after `step` steps."""
    STOP.training = False
    if step < steps:
        tqdm.write(f"{out} has {step} of {steps} steps; continue with the same command and --resume")
        sys.exit(128 + STOP.signal)


# Device and processes

def setup(device=None):
    """Returns the device, enables TF32, and joins torchrun's process group, of which rank 0 prints."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = ["cuda", *cuda, "cpu"] if cuda else ["cpu"]
    if device and device not in available:
        raise ValueError(f"--device {device}: unavailable; there are the CPU and {len(cuda)} CUDA devices")
    device = torch.device(device or available[0])
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention builds a plan for every new length
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)  # for all that names no device: synchronization, memory statistics
    if "RANK" in os.environ:
        from models import processes
        processes.join(device)
    return device


def world_size():
    """Returns the number of processes that torchrun started, or 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def blocks(model):
    """Returns the parts of a model that repeat, such as a transformer's blocks; [] if none do."""
    # Of exactly this type: the parts of a ticket's ParametrizationList, a subclass, are no blocks.
    lists = [module for module in model.modules() if type(module) is torch.nn.ModuleList]
    return [block for blocks in lists for block in blocks]


def place(model, device, dtype=torch.float32, vectors=torch.float32, compile=False):
    """Moves a model to the device, in place, with the weights that are trained in float32.

    With several processes, each keeps its share of the weights (FSDP2). A block is cast and moved right
    before that, so that no process ever holds more than its share and one block, or what is in no block, such
    as the embedding and the output matrix. Weights that are trained are copied, so that they may be those of
    another model, or of a file that is mapped into memory.

    dtype, vectors: those of frozen matrices, and of frozen norms and biases.
    compile: whether to compile each block, or the whole of a model without blocks. Blocks of a kind share one
    graph, and remain compiled where they are sharded and computed again for backward: a graph of the whole
    model would break there.
    """
    need = sum(p.numel() * (16 if p.requires_grad else dtype.itemsize) for p in model.parameters())
    check_memory(need / world_size(), device,  # 16: the weight, its gradient, and Adam's averages
                 "take a smaller model, --lora, or more GPUs (torchrun)")
    parts, shard = [model], None
    if world_size() > 1:
        from models import processes
        parts, shard = [*blocks(model), model], processes.sharding(device)
    for part in parts:
        for p in part.parameters():
            if not isinstance(p, DTensor):  # of a block that was sharded before
                kind = torch.float32 if p.requires_grad else dtype if p.ndim > 1 else vectors
                p.data = p.data.to(device, kind, copy=p.requires_grad)
        if shard:
            shard(part)
    model.to(device)  # the rest: buffers
    if compile:
        torch._dynamo.config.recompile_limit = 64  # instead of 8: for each dtype, shape, and mode of a block
        for part in blocks(model) or [model]:
            part.forward = torch.compile(part.forward)


def name_of(device):
    """Returns what computes: how many processes, and the GPU or the number of threads of each."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU ({torch.get_num_threads()} threads)"
    return f"{world_size()} x {name}" if world_size() > 1 else name


def origin():
    """Returns the commit of this code, if it is a clone, and the versions of Python and torch."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return dict(commit=commit, python=platform.python_version(), torch=torch.__version__)


def check_memory(need, device, remedy):
    """Raises ValueError if a GPU has fewer free bytes than are needed."""
    free = math.inf if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise ValueError(f"{device} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} are needed: {remedy}")


def frozen_dtype(device):
    """Returns the dtype of frozen weights: bfloat16 on CUDA, float32 on a CPU, as for all else there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def to_device(x, device):
    """Returns a tensor, or a tuple of them, on the device.

    Copies to CUDA are made from pinned memory, so that they are asynchronous.
    """
    if isinstance(x, tuple):
        return tuple(to_device(y, device) for y in x)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def move_if_it_fits(tensor, device):
    """Returns the tensor, moved to the device if it needs less than half of the free memory there."""
    fits = device.type == "cpu" or tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return tensor.to(device) if fits else tensor


def take(tensor, i, device):
    """Returns tensor[i] on the device, without synchronizing it."""
    return to_device(tensor[to_device(i, tensor.device)], device)


# Batches

def batches(n, share, batch, seed):
    """Returns the function `indices` of prt.fit: shuffled batches of the n examples that are not held out.

    share: of the examples that are. Raises ValueError if it is above 0, but too small to hold out an example.
    """
    used, held_out = hold_out(n, share)
    if share and not len(held_out):
        raise ValueError(f"--hold-out {share:g} of {n} training examples is less than one: raise it")
    return lambda step: used[shuffled(step, len(used), batch, seed)]


def hold_out(n, share):
    """Returns which of n training examples to train on, and which to hold out: two LongTensors of indices.

    They depend on n and share only, so that eval.py finds the held-out examples again.
    """
    random_order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held_out = int(share * n)
    return random_order[held_out:].sort().values, random_order[:held_out].sort().values


def shuffled(step, n, batch, seed):
    """Returns the indices [batch] of a training step; every epoch is a new permutation of the n examples.

    It depends on its arguments only, so that a resumed run gets the same batches as an uninterrupted one.
    """
    positions = torch.arange(step * batch, (step + 1) * batch)
    epochs = positions // n
    return torch.cat([permutation(n, seed, e)[positions[epochs == e] % n] for e in epochs.unique().tolist()])


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
