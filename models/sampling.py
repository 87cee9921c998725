"""How tokens are drawn: `sampler` and `stopping` return a `draw` for prt.generate and decode.compiled."""
import torch


def sampler(temperature, top_p=1.0, generator=None):
    """Returns a `draw` for prt.generate: the most likely token at temperature 0, otherwise a sample.

    generator: a torch.Generator on the device of the models, or None.
    """
    if not temperature:
        return lambda log_probs: log_probs.argmax(-1)
    return lambda log_probs: sample(probabilities(log_probs, temperature, top_p), generator)


def stopping(draw, until, to_text, end):
    """Returns a `draw` for one batch like `draw`, but rows draw `end` once they contain a stop string.

    until: the stop strings; empty ones are ignored. to_text: function from ids to text. Synchronizes the
    device.
    """
    width = max(len(string.encode()) for string in until)  # in bytes; no token is shorter than one
    drawn = []  # in each step, [B, 1]

    def draw_or_end(log_probs):
        new = draw(log_probs)
        texts = [to_text(ids) for ids in torch.cat([new[:, :0], *drawn[-width:]], 1).tolist()]
        ended = [[any(string in x for string in until if string)] for x in texts]  # [B, 1]
        drawn.append(new.masked_fill(torch.tensor(ended, device=new.device), end))
        return drawn[-1]
    return draw_or_end


def probabilities(log_probs, temperature, top_p):
    """Returns the distribution to sample from, [..., V]: one-hot at temperature 0.

    Otherwise softmax(log_probs / temperature), cut to the smallest set of most likely tokens that has at
    least top_p of the probability, and normalized.
    """
    if not temperature:
        return torch.zeros_like(log_probs).scatter_(-1, log_probs.argmax(-1, keepdim=True), 1.0)
    # From the largest down, so that a tiny temperature does not divide all of them to -inf.
    p = ((log_probs - log_probs.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        descending, order = p.sort(-1, descending=True)
        likely = descending * (descending.cumsum(-1) - descending < top_p)  # sum of likelier ones < top_p
        p = torch.zeros_like(p).scatter_(-1, order, likely)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(p, generator=None):
    """Returns indices [...] sampled in proportion to p [..., V], which need not sum to 1.

    If every t_i is exponential with rate p_i, then t_i is the smallest with probability p_i / sum(p). Unlike
    torch.multinomial, this does not synchronize the device.
    """
    times = torch.empty_like(p).exponential_(generator=generator)
    return (p / times.clamp(min=torch.finfo(p.dtype).tiny)).argmax(-1)
