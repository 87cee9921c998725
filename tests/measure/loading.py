"""Memory and seconds of loading a reward model and its source, in one process and in four (gloo, on a CPU).

python tests/measure/loading.py

Writes a GPT of 200 MB in bfloat16 to a temporary folder. Each process loads it twice, as train_lm.py does: as
the source, and as the reward model, in float32 both. Measured is the anonymous memory of the process that has
most of it: what the process itself holds, beside the file, which all of them map.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers import write_safetensors

from models import gpt, pretrain, runs, weights

CONFIG = dict(model_type="llama", vocab_size=550, hidden_size=1024, intermediate_size=2816, eos_token_id=549,
              num_hidden_layers=8, num_attention_heads=16, max_position_embeddings=1024, rms_norm_eps=1e-5,
              hidden_act="silu", tie_word_embeddings=False)


def write_model(folder):
    """Writes a random Llama in Hugging Face's layout; returns its number of weights."""
    tensors = {k: x.bfloat16() for k, x in gpt.GPT(gpt.architecture(CONFIG)).state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(pretrain.TOKENIZER.read_text())
    return sum(x.numel() for x in tensors.values())


def anonymous():
    """Returns the anonymous memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def load(folder):
    """Loads and places both models; the first process prints the largest peak (MB) and the seconds."""
    device, before = runs.setup("cpu"), anonymous()
    peaks, done = [before], threading.Event()

    def watch():
        while not done.wait(0.002):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    source = weights.load(folder, "base", text=True, dtype=None).requires_grad_(False)
    model = weights.load(folder, text=True, dtype=None)
    runs.place(source, device)
    runs.place(model, device)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    found = torch.tensor([max(peaks) - before, anonymous() - before, seconds])
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    print("peak {:.0f} MB, at the end {:.0f} MB, {:.2f} s".format(*found.tolist()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--load", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.load:
        return load(args.load)
    with tempfile.TemporaryDirectory() as name:
        n = write_model(Path(name))
        print(f"{n / 1e6:.0f} million weights: {2 * n / 1e6:.0f} MB in the file, {8 * n / 1e6:.0f} MB as two "
              f"models in float32; torch {torch.__version__}")
        for processes in (1, 4):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={processes}", __file__, "--load", name]
            # Freed tensors go back to the system at once, as on a GPU to the allocator.
            environment = os.environ | dict(OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536")
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{processes} processes: {done.stdout}", end="")


if __name__ == "__main__":
    runs.main(main)
