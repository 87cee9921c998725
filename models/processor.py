"""A reward inside of transformers' generate."""
import torch
import torch.nn.functional as F

import prt
from data.tokenizer import Tokenizer
from models import vocabulary
from models.gpt import GPT


class RewardProcessor:
    """Maps input_ids [R, T] and scores [R, V] of transformers' generate to tilted log-probabilities [R, V].

    model: the reward. beta: as in `tilt` (default: that of its training). attention_mask [B, T]: the
    tokenizer's, of prompts that are padded on the left (default: no padding). With padding, a processor is
    for the B prompts of its first call only, each in R / B rows, as in beam search. size: number of tokens in
    the tokenizer, if the output matrices have more rows. tokenizer: the base's, of transformers, if it has
    other special or added tokens than the reward's; then its size is the one that counts. A reward is for
    the tokenizer of its newest processor.
    """

    def __init__(self, model, beta=None, attention_mask=None, size=None, tokenizer=None):
        own = dict(method="prt", kind="gpt" if isinstance(model, GPT) else "other")
        info = getattr(model, "info", own)  # your own model has none, and prt.fit adds none
        if (method := info.get("method", "base")) != "prt":
            raise ValueError(f"a model of method {method}, not a reward: load one made with --method prt")
        if info.get("kind", "gpt") != "gpt":
            raise ValueError(f"a {type(model).__name__}, not a reward for text: load one with models.weights")
        self.trained_beta = info.get("beta", 1.0)
        self.model, self.mask, self.size = model, attention_mask, size
        self.beta = self.trained_beta if beta is None else beta
        if self.mask is not None and not (self.mask.equal(self.mask.sort(-1)[0]) and self.mask[:, -1].all()):
            raise ValueError('a row of the attention mask is not zeros, then ones: set padding_side="left"')
        self.prompts, self.seen, self.cache, self.unshared = None, None, None, None
        if tokenizer is not None:
            self.size, self.unshared = adapt(model, tokenizer.backend_tokenizer.to_str())

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        R, T = input_ids.shape
        if T == 0:
            raise ValueError("no input_ids, as with inputs_embeds alone, but a reward reads them: pass both")
        pad = None if self.mask is None or self.mask.all() else self.row_padding(input_ids)
        start = self.shared_prefix(input_ids)
        if start == 0 or self.cache.length < T:
            start, self.cache = 0, self.model.cache(R, min(2 * T + 64, self.model.arch["positions"]), pad)
        self.cache.at, self.seen = start, None  # set again below, unless the model raises an error
        features = self.model.features(input_ids[:, start:], self.cache)[:, -1]
        r = prt.reward(self.model.head(features), beta=self.trained_beta)
        self.seen = input_ids.clone()
        return tilted(scores, r, self.beta, self.size, self.unshared)

    def row_padding(self, ids):
        """Returns how many positions of each row of ids [R, T] are padding, [R].

        Raises ValueError if the rows do not begin with the prompts of the mask and of the first call.
        """
        # transformers puts the k rows of a prompt one after another.
        k, rows = max(len(ids) // len(self.mask), 1), ids[:, :self.mask.shape[1]]
        prompts = rows[::k].clone() if self.prompts is None else self.prompts
        if prompts.shape != self.mask.shape or not rows.equal(prompts.repeat_interleave(k, 0)):
            raise ValueError(f"input_ids {[*ids.shape]} do not begin with the prompts of the attention mask "
                             f"{[*self.mask.shape]}, k rows each: make a new RewardProcessor for new prompts")
        self.prompts = prompts
        return (self.mask == 0).sum(-1).repeat_interleave(k)

    def shared_prefix(self, ids):
        """Returns how many leading tokens of ids [R, T] are already in the cache, at most T - 1."""
        seen = ids[:, :0] if self.seen is None or len(self.seen) != len(ids) else self.seen
        n = min(ids.shape[1] - 1, seen.shape[1])
        return int((ids[:, :n] == seen[:, :n]).all(0).long().cumprod(0).sum())


def adapt(model, text):
    """Makes a reward read and write the ids of a base's tokenizer, in place; text: its tokenizer.json.

    Returns its number of tokens, and the ids without a reward, as of vocabulary.translate, or None. Raises
    ValueError if the tokenizers do not fit.
    """
    base, info = Tokenizer(text, "the base's tokenizer"), getattr(model, "info", {})
    own = info.get("tokenizer")
    model.reads, model.size, unshared = None, model.arch["vocab"], None  # not those of an earlier base
    if own != base.hash and info.keys() & {"ticket", "lora"}:
        raise ValueError("a reward in a small file has only a hash of its tokenizer: not the base's")
    if own != base.hash and (own := Tokenizer(own, "the reward's tokenizer")).hash != base.hash:
        unshared = vocabulary.translate(model, own, base, "the reward")
    return base.size, unshared


def tilted(scores, r, beta, size, unshared):
    """Returns `prt.tilt` of scores [R, V] by r [R, at least size], float32 [R, V], -inf beyond `size` tokens.

    beta: a number or [R, 1]. size, unshared: what `adapt` returns, or None.
    """
    base_logits = scores[:, :size].float()
    log_probs = prt.tilt(base_logits, r[:, :size], beta)
    if unshared is not None:
        log_probs = vocabulary.keep(base_logits, log_probs, unshared).log_softmax(-1)
    return F.pad(log_probs, (0, scores.shape[1] - log_probs.shape[1]), value=-torch.inf)
