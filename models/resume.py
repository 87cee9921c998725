"""How an unfinished run goes on (--resume), on a CPU bit for bit. models/weights.py writes its checkpoint."""
from torch.distributed.checkpoint.state_dict import set_state_dict

from data import files
from models.weights import FULL_STATE


def checkpoint(path, settings):
    """Returns the checkpoint of an unfinished run.

    Raises ValueError or FileNotFoundError if it is none, or was started with other settings.
    """
    if not path.exists():
        raise FileNotFoundError(f"--resume: there is no {path}")
    state = files.read(path, lazy=True)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is not an unfinished run (its last step: {state.get('step')})")
    before = state.get("args", {})
    for k, v in settings.items():
        if before.get(k) != v:
            flag = k.replace("_", "-")
            raise ValueError(f"--resume: {path} was started with --{flag} {before.get(k)}, not {v}")
    return state


def restore(model, optimizer, state):
    """Puts a checkpoint's weights and optimizer state in place; returns its number of finished steps."""
    rates = [group["lr"] for group in optimizer.param_groups]
    set_state_dict(model, optimizer, options=FULL_STATE, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    for group, rate in zip(optimizer.param_groups, rates):  # prt.fit begins with the peaks
        group["lr"] = rate
    return state["step"]
