"""From models to numbers: logits, accuracy, and likelihoods of text."""
import torch
import torch.nn.functional as F
from tqdm import tqdm

import prt
from models import runs


@torch.no_grad()
def predict(model, inputs, batch=256):
    """Returns a frozen model's logits, float32 [N, L] on its device, for inputs [N, ...]."""
    device = next(model.parameters()).device
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([model(runs.to_device(x, device)).float()
                          for x in tqdm(inputs.split(batch), desc="predict", disable=None, leave=False)])


def accuracy(scores, labels):
    """Returns the top-1 accuracy in [0, 1] of scores [N, L] for labels [N]."""
    return (scores.argmax(-1).cpu() == labels.cpu()).float().mean().item()


def classification(log_probs, labels):
    """Returns a dict of accuracy in [0, 1] and mean nll in nats, for log_probs [N, L] and labels [N]."""
    return dict(accuracy=accuracy(log_probs, labels), nll=F.nll_loss(log_probs.cpu(), labels.cpu()).item())


def score_texts(base, rewards, batches, chunk=512, kl_base=None):
    """Returns a dict of means over all targets: nll and kl in nats, and accuracy in [0, 1].

    base, rewards: as in prt.combine. batches: list of (inputs, targets [N]), as for prt.fit with a head.
    kl_base: the model that the KL is measured from (default: base).
    """
    means = score_targets(base, rewards, batches, chunk, kl_base).double().mean(0)
    return dict(zip(("nll", "accuracy", "kl"), means.tolist()))


@torch.no_grad()
def score_targets(base, rewards, batches, chunk=512, kl_base=None):
    """Returns negative log-likelihood, whether it is the most likely token, and KL of each target, [N, 3]."""
    scores, device = [], next(base.parameters()).device
    kl_base = kl_base or base
    models = dict.fromkeys([base, *(model for _, model in rewards), kl_base])  # the same order everywhere
    for batch in tqdm(batches, desc="score", disable=None, leave=False):
        inputs, targets = runs.to_device(batch, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=targets.is_cuda):
            features = {model: model(*inputs).split(chunk) for model in models}
            for k, y in enumerate(targets.split(chunk)):
                logits = {model: model.head(parts[k]) for model, parts in features.items()}
                log_probs = prt.combine(base, rewards, logits.get)
                nll, kl = F.nll_loss(log_probs, y, reduction="none"), prt.kl(log_probs, logits[kl_base])
                scores.append(torch.stack([nll, log_probs.argmax(-1) == y, kl], -1))
    return torch.cat(scores)
