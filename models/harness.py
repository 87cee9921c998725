"""Tilted bases as models of lm-evaluation-harness. Needs lm_eval: only eval.py --tasks imports this."""
import lm_eval.tasks
import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from data import files, text
from models import answers, scores


def evaluate(models, names, limit):
    """Yields the scores of each model and their standard errors: task -> "METRIC,FILTER" -> float.

    names: tasks, groups, tags, or .yaml files of lm_eval. Raises ValueError for whatever loading them raises.
    """
    manager = lm_eval.tasks.TaskManager()
    with files.explain("--tasks: cannot be loaded (lm_eval ls tasks lists the known ones)", Exception):
        manager.load(names)
    for model in models:
        report = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager, log_samples=False,
                                 apply_chat_template=bool(model.chat), fewshot_as_multiturn=False)
        yield {name: {k: x for k, x in task.items() if isinstance(x, float)}
               for name, task in report["results"].items()}


class TiltedModel(TemplateLM):
    """A model for text that splits, truncates, and stops as lm_eval's own class for transformers.

    row: of eval.py's table. chat: as in data/chat.py, or a template with {}, or None. end: the end tokens'
    ids. room: the most positions; longer texts are truncated on the left. how: answers.Decoding, but for what
    a task sets.
    """

    eot_token_id = prefix_token_id = tokenizer_name = None  # in the parent class, abstract properties

    def __init__(self, row, tokenizer, chat, end, room, how):
        super().__init__()
        self.row, self.tokenizer, self.chat, self.room, self.how = row, tokenizer, chat, room, how
        self.end, self.eot_token_id, self.prefix_token_id = end, end[0], [*tokenizer.begin, *end][0]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Returns the prompt for a task's description and question, and the answer if it is begun."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        if isinstance(self.chat, dict):
            from data import chat as chats  # an optional file
            return chats.asked(self.chat, asked) + begun
        return self.chat.replace("{}", "".join(part["content"] for part in asked)) + begun

    def tok_encode(self, string, add_special_tokens=True, **_):
        return (self.tokenizer.begin if add_special_tokens else []) + self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **_):
        """Returns (log-likelihood, whether it is greedy) for each (_, context ids, continuation ids)."""
        if (longest := max(len(answer) for _, _, answer in requests)) > self.room:
            raise ValueError(f"--tasks: an answer of {longest} tokens exceeds {self.room} positions")
        ids = [torch.tensor((context + answer)[-self.room - 1:]) for _, context, answer in requests]
        counts = [torch.arange(-len(x), 0) >= -len(answer) for x, (_, _, answer) in zip(ids, requests)]
        each = score_examples(self.row.base, self.row.rewards, text.Tokens(ids, counts), self.how)
        return [(-x[:, 0].sum().item(), bool(x[:, 1].all())) for x in each]

    def loglikelihood_rolling(self, requests, **_):
        """Returns the log-likelihood of each whole string, in windows of `room` tokens."""
        windows = [[(None, *utils.make_disjoint_window(window)) for window in utils.get_rolling_token_windows(
            self.tok_encode(*request.args), self.prefix_token_id, self.room, 1)] for request in requests]
        scores = iter(self._loglikelihood_tokens([window for part in windows for window in part]))
        return [sum(next(scores)[0] for _ in part) for part in windows]

    def generate_until(self, requests, **_):
        """Returns the continuation of each string, generated with the settings of its task."""
        texts = {}
        for settings in {repr(request.args[1]): request.args[1] for request in requests}.values():
            prompts = {i: x.args[0] for i, x in enumerate(requests) if x.args[1] == settings}
            texts |= zip(prompts, self.continuations(prompts.values(), **normalize_gen_kwargs(settings)))
        return [texts[i] for i in range(len(requests))]

    def continuations(self, prompts, *, until, max_gen_toks, do_sample, temperature=0.0, top_p=1.0, **others):
        """Returns the texts that follow prompts, each up to the first of the stop strings `until`."""
        if others:
            raise ValueError(f"--tasks: a task generates with {others}, which is not supported")
        ids = [(self.tok_encode(x) or [self.prefix_token_id])[-(self.room - max_gen_toks):] for x in prompts]
        how = self.how._replace(new_tokens=max_gen_toks, temperature=temperature, top_p=top_p)
        written = answers.generate(self.row, ids, how, self.end, self.room, until, self.tokenizer.decode)
        return [postprocess_generated_text(self.tokenizer.decode(x), until, None) for x in written]


def score_examples(base, rewards, data, how):
    """Returns what scores.score_targets does for each of N text.Tokens: a list of [targets, 3] on the CPU."""
    parts = text.by_length(data.ids, tokens=how.scored)
    found = scores.score_targets(base, rewards, [text.collate(data, torch.tensor(part)) for part in parts])
    order = [i for part in parts for i in part]
    found = dict(zip(order, found.cpu().split([int(data.counts[i][1:].sum()) for i in order])))
    return [found[i] for i in range(len(order))]
