"""Generated answers to text: decoding in batches, the numbers in answers, and their colors."""
import codecs
import functools
import itertools
import math
import os
import re
import statistics
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm

import prt
from data import text

# GSM8K's form of an answer, also with a currency before or a unit behind the number. A fraction, a time, a
# power, and digits in groups other than 1,000 are no numbers; what follows after a space does not count.
NUMBER = re.compile(r"#### *([-−+]?) *[$€£¥]? *([-−]?)(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)"
                    r"(?!\d|[.,'’/:^eE]\d)")
SHADES = ((4, 203), (2, 209), (1, 216), (0.5, 223), (0.1, 230))  # KL in nats -> terminal color


class Decoding(NamedTuple):
    """How answers are generated; the names are those of eval.py's flags."""

    batch: int = 128
    new_tokens: int | None = None  # None: 256, or fewer if the models have no room for them
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    speculative: bool = False
    compile: bool = False

    @property
    def scored(self):
        """The tokens that are scored at once: 256 for each answer in a batch, and 8,192 at least."""
        return 256 * max(self.batch, 32)


def new_tokens(prompts, how, room):
    """Returns how many tokens an answer has at most. Raises ValueError if there is no room for them."""
    longest = max(map(len, prompts))
    length = how.new_tokens or max(1, min(256, room - longest))
    if longest + length > room:
        raise ValueError(f"a prompt of {longest} and {length} tokens (--new-tokens) exceed {room} positions")
    return length


def generate(row, prompts, how, end, room, until=(), to_text=None):
    """Returns the answers (ids) to prompts (ids), in batches of similar lengths.

    row: has a base, rewards as in prt.combine, and a drafter for decode.speculative. how: a Decoding; with
    how.compile the last batch is filled up with copies of a prompt, since every size needs a graph. end: list
    of the ids that end an answer. room: the models' positions. until, to_text: as in sampling.stopping;
    answers may go on after a stop string. Raises ValueError if there is no room for the answers.
    """
    device = next(row.base.parameters()).device
    length = new_tokens(prompts, how, room)
    generator = torch.Generator(device).manual_seed(how.seed)
    answers, size = [None] * len(prompts), min(how.batch, len(prompts)) if how.compile else 0
    for batch in tqdm(text.by_length(prompts, how.batch), desc="generate", disable=None, leave=False):
        T, rows = len(prompts[batch[0]]), batch + batch[-1:] * (size - len(batch))
        pad = [T - len(prompts[i]) for i in rows]
        ids = torch.tensor([end[:1] * n + prompts[i] for n, i in zip(pad, rows)], device=device)  # [B, T]
        # With compile also where nothing is padded, since no padding would need another graph.
        pad = torch.tensor(pad, device=device) if any(pad) or size > 1 else None
        decode = decoder(row, how, generator, end, until, to_text)
        new = decode(row.base, row.rewards, ids, length=length, end=end, pad=pad)[:, T:].tolist()
        for i, ids in zip(batch, new):
            answers[i] = [*itertools.takewhile(lambda token: token not in end, ids)]
    return answers


def decoder(row, how, generator, end, until, to_text):
    """Returns a function with the arguments of prt.generate that decodes one batch; arguments as above.

    Speculation does without the stop strings `until`, and a base alone has nothing to draft with.
    """
    if how == Decoding(how.batch, how.new_tokens, seed=how.seed) and not any(until):
        return prt.generate
    from models import decode, sampling  # optional files
    if how.speculative and row.rewards:
        return functools.partial(decode.speculative, temperature=how.temperature, top_p=how.top_p,
                                 generator=generator, drafter=row.drafter, compile=how.compile)
    draw = sampling.sampler(how.temperature, how.top_p, generator)
    if any(until):
        draw = sampling.stopping(draw, until, to_text, end[0])
    return functools.partial(decode.compiled if how.compile else prt.generate, draw=draw)


def final_number(answer):
    """Returns the number in an answer of GSM8K's form, such as "#### 1,234" or "#### -$5.00", or None."""
    match = NUMBER.search(answer)
    if not match:
        return None
    sign = -1 if {match[1], match[2]} & {"-", "−"} else 1
    return sign * float(match[3].replace(",", ""))


def exact_match(truth, written, tokenizer):
    """Returns the shares of answers with a number (form) and the right one (exact), and its standard error.

    truth: the right numbers; of those that are None the answers do not count, and without any, neither do the
    shares: all are None. written: the answers (ids).
    """
    pairs = [(final_number(tokenizer.decode(answer, first=False)), right)
             for answer, right in zip(written, truth) if right is not None]
    if not pairs:
        return dict(form=None, exact=None, error=None)
    exact = statistics.mean(number == right for number, right in pairs)
    return dict(form=statistics.mean(number is not None for number, _ in pairs), exact=exact,
                error=math.sqrt(exact * (1 - exact) / len(pairs)))


@torch.no_grad()
def colored(row, prompt, answer, tokenizer):
    """Returns the answer's text; the farther the row's rewards move a token (KL), the redder it is."""
    ids = torch.tensor([prompt + answer], device=next(row.base.parameters()).device)
    logits = {model: model.head(model.features(ids)[0, len(prompt) - 1:-1])  # [N, V]
              for _, model in [(1.0, row.base), *row.rewards]}
    kls = prt.kl(prt.combine(row.base, row.rewards, logits.get), logits[row.base]).tolist()
    plain = "NO_COLOR" in os.environ or not sys.stdout.isatty()
    output, largest, utf8 = "", 0.0, codecs.getincrementaldecoder("utf-8")("replace")
    for token, kl in zip(answer, kls):
        piece, largest = utf8.decode(tokenizer.bytes.get(token, b"")), max(largest, kl)
        if piece:  # a character may need several tokens
            color = next((color for limit, color in SHADES if largest >= limit), None)
            output += piece if plain or color is None else f"\033[48;5;{color}m\033[30m{piece}\033[0m"
            largest = 0.0
    return output + utf8.decode(b"", final=True)
