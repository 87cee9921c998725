"""Rewards on bases whose tokenizers have other special or added tokens, as the next generation's often have.

Ids that are the same token in both tokenizers carry the reward. Every other id keeps the probability that the
base gives it: a reward of 0 would not do, since only differences between rewards count, and so

    r(y) / beta = log E[exp(r / beta)], the expectation over the shared ids under the base,

which makes Z this expectation. Among the shared tokens the base is tilted as usual; their total probability
stays what the base gives it.
"""
import functools

import torch

ABSENT = -1e4  # logit of a token that a model does not have: probability 0; differences of -inf would be nan


def adapt(model, own, base, tokenizer, name):
    """Makes a GPT read and write the ids of a base's tokenizer, in place; arguments as in `translate`.

    base: the GPT of that tokenizer, which gets an attribute `keep` for prt.combine: the function below, for
    the unshared ids of all models that are adapted to it.
    """
    unshared = translate(model, own, tokenizer, name)
    if hasattr(base, "keep"):
        unshared = torch.cat([unshared, base.keep.keywords["ids"]]).unique()
    base.keep = functools.partial(keep, ids=unshared)


def translate(model, own, tokenizer, name):
    """Makes a GPT read and write another tokenizer's ids, in place; returns those that are not shared, [U].

    own: the Tokenizer of the GPT. In place of an unshared id the GPT reads its end token, or if that is not
    shared either, the first id that is. name: the GPT's. Prints the unshared tokens. Raises ValueError if the
    tokenizers differ in ordinary tokens.
    """
    if own.ordinary != tokenizer.ordinary:
        raise ValueError(f"{name} has {own.size} tokens ({own.hash[:8]}), the base {tokenizer.size} "
                         f"({tokenizer.hash[:8]}), and not only special and added ones differ: a reward and "
                         "its base must have the same ordinary tokens")
    shared = {i for i, token in tokenizer.bytes.items() if own.bytes.get(i) == token and i < model.size}
    unshared = [i for i in range(tokenizer.size) if i not in shared]
    names = [tokenizer.decode([i]) for i in unshared if i in tokenizer.bytes]
    if names:
        print(f"{name}: no reward for {len(names)} of the base's {len(tokenizer.bytes)} tokens, which keep "
              f"their probability: {', '.join(names):.200}")
    device, end = model.embed_tokens.weight.device, model.arch["end"]
    model.reads, model.size = torch.arange(tokenizer.size, device=device), tokenizer.size
    model.reads[unshared] = end if end in shared else min(shared)
    return torch.tensor(unshared, dtype=torch.long, device=device)


def translated(logits, reads):
    """Returns logits [..., V] for the ids of another tokenizer; logits: [..., rows]. reads [V]: own ids."""
    return logits[..., reads].masked_fill(reads != torch.arange(len(reads), device=reads.device), ABSENT)


def keep(base_logits, tilted, ids):
    """Returns `tilted` with new values at ids [U], which under softmax have their probability under the base.

    base_logits, tilted: [..., V], float32; tilted is their sum with r / beta, and its values at ids are not
    used. If all other ids have probability 0, the base's logits are returned.
    """
    totals = [x.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) for x in (tilted, base_logits)]
    change = (totals[0] - totals[1]).nan_to_num(0.0)  # log E[exp(r / beta)]
    return tilted.index_copy(-1, ids, base_logits.index_select(-1, ids) + change)
