"""How an unfinished run goes on (--resume), on a CPU bit for bit. models/weights.py writes its checkpoint."""
import torch
from torch.distributed.checkpoint.state_dict import set_state_dict

from data import files, schema
from models import weights


def checkpoint(path, settings):
    """Returns the checkpoint of an unfinished run.

    Raises ValueError or FileNotFoundError if it is none, or was started with other settings.
    """
    if not path.exists():
        raise FileNotFoundError(f"--resume: there is no {path}")
    state = files.read(path)
    with files.explain(f"--resume: {path}", *files.DAMAGE):
        weights.check_checkpoint(state)
    if "optimizer" not in state:
        raise ValueError(f"--resume: {path} is finished, with step {state.get('step')}; a new run can start "
                         f"from it: --reward-init {path}")
    for k, v in settings.items():
        if (before := state["args"].get(k)) != v:
            raise ValueError(f"--resume: {path} was started with --{k.replace('_', '-')} {before}, not {v}")
    return state


def restore(path, model, optimizer, state, steps):
    """Puts a checkpoint's weights and optimizer state in place; returns its number of finished steps."""
    if state["step"] >= steps:
        raise ValueError(f"--resume: {path} has {state['step']} steps, but the run only {steps}")
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with files.explain(f"--resume: {path} does not fit", *files.DAMAGE):
        frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        shapes, saved = ({name: (x.shape, x.dtype) for name, x in tensors.items() if name not in frozen}
                         for tensors in (model.state_dict(), state["model"]))
        if different := [name for name in shapes | saved if shapes.get(name) != saved.get(name)]:
            raise ValueError(f"weights are missing, too many, or others: {different[0]}")
        check_optimizer(model, state["optimizer"])
        set_state_dict(model, optimizer, options=weights.FULL_STATE, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
    for group, settings in zip(optimizer.param_groups, groups):  # prt.fit begins with the peaks
        group.update(settings)
    return state["step"]


def check_optimizer(model, state):
    """Raises ValueError unless an optimizer's state has AdamW's two averages of every trained weight."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    averages = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "a tensor")
    schema.check(state, "optimizer", dict(state=dict.fromkeys(shapes, averages), param_groups="a list"))
    for name, shape in shapes.items():
        step, *both = (state["state"][name][k] for k in ("step", "exp_avg", "exp_avg_sq"))
        if step.numel() != 1 or any((x.shape, x.dtype) != (shape, torch.float32) for x in both):
            raise ValueError(f"the optimizer's averages of {name} have another shape or dtype than it")
