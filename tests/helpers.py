"""What the tests of models and files share: the models under fixtures, and files written by hand."""
import json
import shutil

import torch
from conftest import FIXTURES

from data import files
from models import weights


def load(name, **options):
    """Returns the model of a fixture: its folder, or the bare state dict in it."""
    bare = FIXTURES / name / "weights.pt"
    return weights.load(bare if bare.exists() else FIXTURES / name, **options)


def expected(name):
    """Returns the inputs of a fixture's reference (transformers or OpenCLIP) and its outputs for them."""
    return torch.load(FIXTURES / name / "io.pt", weights_only=True)


def error(a, b):
    """Returns the largest absolute difference."""
    return (a - b).abs().max().item()


def random_ids(*shape, seed=0):
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))


def edited(tmp_path, name, drop=(), **changes):
    """Returns a copy of a GPT's fixture with another config.json."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return folder


def write_safetensors(path, tensors, **change):
    """Writes the format by hand and returns the path; change: replacements in the last header entry."""
    codes = {dtype: code for code, dtype in files.DTYPES.items()}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        data = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        offsets = [len(body), len(body) + len(data)]
        body += data
        header[name] = dict(dtype=codes[x.dtype], shape=list(x.shape), data_offsets=offsets)
    header[name] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def write_truncated(folder, keep):
    """Writes cut.pt, the first bytes of a state dict (a number, or a share below 1), and returns its path."""
    data = (FIXTURES / "openclip_bare" / "weights.pt").read_bytes()
    path = folder / "cut.pt"
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    return path


def write_trap(folder):
    """Writes trap.pt, which creates the file `trapped` if it is unpickled without care; returns its path."""
    class Trap:
        def __reduce__(self):
            return (folder / "trapped").touch, ()

    torch.save(dict(state_dict=Trap()), folder / "trap.pt")
    return folder / "trap.pt"
