"""Mixtures as models of lm-evaluation-harness. Needs lm_eval: only eval.py --tasks imports this."""
import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data import files, text


def evaluate(models, names, limit):
    """Yields the scores of each model and their standard errors: task -> "METRIC,FILTER" -> float.

    names: tasks, groups, tags, or .yaml files of lm_eval. Raises ValueError if they cannot be loaded.
    """
    manager = TaskManager()
    # What lm_eval, datasets, and the code of a task raise has no common class.
    with files.explain("--tasks: cannot be loaded (lm_eval ls tasks lists the known ones)", Exception):
        manager.load(names)
    options = dict(tasks=names, limit=limit, task_manager=manager, log_samples=False)
    for model in models:
        results = lm_eval.simple_evaluate(model, **options)["results"]
        yield {task: {k: x for k, x in scores.items() if isinstance(x, float)}
               for task, scores in results.items()}


class Mixture(TemplateLM):
    """A model for text that splits, truncates, and stops as lm_eval's own class for transformers.

    room: the most positions; longer texts are truncated on the left. score: as runs.score_targets, from
    batches. generate: as eval.py's generate_answers, from prompts, end, room, and flags.
    """

    eot_token_id = prefix_token_id = None  # in the parent class, abstract properties

    def __init__(self, tokenizer, end, room, batch, score, generate):
        super().__init__()
        self.tokenizer, self.eot_token_id, self.prefix_token_id = tokenizer, end, [*tokenizer.begin, end][0]
        self.room, self.batch, self.score, self.generate = room, batch, score, generate

    def tok_encode(self, string, add_special_tokens=True, **_):
        """Returns the ids of a string, from tokenizer.begin on unless add_special_tokens is False."""
        return (self.tokenizer.begin if add_special_tokens else []) + self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **_):
        """Returns (log-likelihood, whether it is greedy) for each (_, context ids, continuation ids)."""
        if (longest := max(len(answer) for _, _, answer in requests)) > self.room:
            raise ValueError(f"--tasks: an answer of {longest} tokens exceeds {self.room} positions")
        ids = [torch.tensor((context + answer)[-self.room - 1:]) for _, context, answer in requests]
        counts = [torch.arange(-len(x), 0) >= -len(answer) for x, (_, _, answer) in zip(ids, requests)]
        parts = text.by_length(ids, self.batch)
        scores = self.score([text.collate(text.Tokens(ids, counts), torch.tensor(part)) for part in parts])
        order = [i for part in parts for i in part]
        scores = dict(zip(order, scores.cpu().split([int(counts[i].sum()) for i in order])))
        return [(-scores[i][:, 0].sum().item(), bool(scores[i][:, 1].all())) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, **_):
        """Returns the log-likelihood of each whole string, in windows of `room` tokens."""
        windows = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
            self.tok_encode(*request.args), self.prefix_token_id, self.room, 1)] for request in requests]
        scores = iter(self._loglikelihood_tokens([window for part in windows for window in part]))
        return [sum(next(scores)[0] for _ in part) for part in windows]

    def generate_until(self, requests, **_):
        """Returns the continuation of each string, generated with the settings of its task."""
        answers = {}
        for settings in {repr(request.args[1]): request.args[1] for request in requests}.values():
            i = [i for i, request in enumerate(requests) if request.args[1] == settings]
            prompts = [self.tok_encode(requests[k].args[0]) for k in i]
            answers |= zip(i, self.continuations(prompts, **normalize_gen_kwargs(settings)))
        return [answers[i] for i in range(len(requests))]

    def continuations(self, prompts, *, until, max_gen_toks, do_sample, temperature=0.0, top_p=1.0, **others):
        """Returns the texts that follow prompts (ids), each up to the first of the stop strings `until`."""
        if others:
            raise ValueError(f"--tasks: a task generates with {others}, which is not supported")
        prompts = [ids[-(self.room - max_gen_toks):] or [self.prefix_token_id] for ids in prompts]
        answers = self.generate(prompts, self.eot_token_id, self.room, new_tokens=max_gen_toks,
                                temperature=temperature, top_p=top_p)
        return [postprocess_generated_text(self.tokenizer.decode(ids), until, None) for ids in answers]
