"""Chat templates: the form of conversations that an instruction-tuned model knows, as its files state it.

A template is Jinja text. jinja2 renders it in its sandbox with the values that transformers gives it, and a
chat is a dict of plain values that a checkpoint can hold: template, tokens (such as bos_token, by name), date
(of the day when it was read, which some templates print), and end (the text that follows every answer).
"""
import datetime
import functools
import json
import re
from pathlib import Path

from data import files, hub, text, text_files
from data.tokenizer import Tokenizer

ANSWER = "\ue000{}\ue001"  # in the place of an answer, to see where the template puts it


def read(name):
    """Returns the chat of a model; name: a folder or Hub id in Hugging Face's layout.

    Raises ValueError if it has no chat template, or one that writes no special token after an answer.
    """
    with files.explain(f"--chat-template: {name}", OSError, *files.DAMAGE):
        if Path(name).is_file():
            raise ValueError("a checkpoint; chat templates are read from a folder or Hub id")
        file = hub.optional(name, "chat_template.jinja", "tokenizer.json")
        config = files.read_json(hub.find(name, "tokenizer_config.json"))
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {x["name"]: x["template"] for x in template}.get("default")
        if file or template is None:
            template = files.read_text(hub.find(name, "chat_template.jinja"))
        tokens = {k: x["content"] if isinstance(x, dict) else x for k, x in config.items()
                  if k.endswith("_token") and isinstance(x, (dict, str))}
        chat = dict(template=template, tokens=tokens, date=str(datetime.date.today()))
        added = files.read_json(hub.find(name, "tokenizer.json")).get("added_tokens") or ()
        messages = [dict(role="user", content="x"), dict(role="assistant", content=ANSWER)]
        after = render(chat, messages).partition(ANSWER)[2].lstrip(" ")
        ends = [x["content"] for x in added if x.get("special") and after.startswith(x["content"])]
        if not ends:
            raise ValueError(f"its template writes {after!r:.50} after an answer, which is no special token")
        return chat | dict(end=max(ends, key=len))


def asked(chat, messages):
    """Returns the text of messages and what begins an answer, as with add_generation_prompt in transformers.

    If the template writes more before an answer that is there, that is added, as in training: with Qwen3, an
    empty block of thoughts (its enable_thinking=False).
    """
    text = render(chat, messages, add_generation_prompt=True).rstrip(" ")
    answer = dict(role="assistant", content=ANSWER)
    before = render(chat, [*messages, answer]).partition(ANSWER)[0].rstrip(" ")
    return before if before.startswith(text) else text


def render(chat, messages, add_generation_prompt=False):
    """Returns the text of messages, dicts with role and content, as transformers' apply_chat_template.

    Raises ValueError with what the template says of messages that it cannot render, or if it leaves one out.
    """
    with files.explain("the chat template", Exception):  # it is a program, which may raise anything
        text = compiled(chat["template"], chat["date"]).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
            **chat["tokens"])
        if lost := [x for x in messages if x["content"].strip() not in text]:
            raise ValueError(f"it leaves out or changes a message of role {lost[0]['role']}: "
                             f"{lost[0]['content']!r:.60}")
        return text


@functools.cache
def compiled(template, date):
    """Returns a jinja2 template, with the functions that transformers offers to it."""
    with files.explain("needs jinja2 from 3.1.6 on (pip install -U jinja2)", ImportError):
        import jinja2.ext
        import jinja2.sandbox
        if [int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]] < [3, 1, 6]:
            raise ImportError(f"its version {jinja2.__version__} has known ways out of its sandbox")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= dict(raise_exception=raise_exception,
                                strftime_now=datetime.datetime.fromisoformat(date).strftime)
    # {% generation %} marks answers for training code; here it is a block that is always rendered.
    marks = re.compile(r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})")
    template = marks.sub(lambda mark: mark[1] + ("endif" if mark[2] else "if true"), template)
    return environment.from_string(template)


def load(source, split, chat):
    """Returns what text.load does, with conversations in the form of a chat template.

    A prompt and its response are a message of the user, and the answer.
    """
    if source in ("arithmetic", "gsm8k"):
        template, examples = text.load(source, split)
    else:
        template, examples = text_files.load(source, split, as_messages=True)
    before, after = text.GSM8K.split("{}")  # the only form of a prompt beside the plain one
    for i, (name, parts) in enumerate(examples):
        with files.explain(f"{name}: --chat-template", ValueError):
            if len(parts) == 1:
                raise ValueError("a text without a prompt is no conversation")
            if len(parts[0]) == 2:  # segments
                (question, _), (response, counts) = parts
                question = question.removeprefix(before).removesuffix(after)
                parts = [("user", question, False), ("assistant", response.strip(), counts)]
            examples[i] = name, segments(chat, parts)
    return template, examples


def with_special(tokenizer):
    """Returns a copy of a Tokenizer that encodes special tokens in texts as such, and begins no text.

    Raises ValueError if one of them takes the spaces around it, or is one only after normalization.
    """
    d = files.parse_json(tokenizer.text)
    for token in d.get("added_tokens") or ():
        token["special"] = False
    other = Tokenizer(json.dumps(d), "--chat-template")
    other.text, other.hash, other.begin = tokenizer.text, tokenizer.hash, []
    return other


def segments(chat, messages):
    """Returns the segments of a conversation, as in data/text.py, up to its last answer.

    messages: (role, content, counts) each, where counts is that of a segment. The end after an answer is not
    in its segment, since text.token_ids puts it there; spaces around it are, since a tokenizer joins them
    with its words. Raises ValueError if the template leaves out, repeats, or changes an answer, but for the
    space around it.
    """
    answers = [(content, counts) for role, content, counts in messages if role == "assistant"]
    marks = iter(ANSWER.format(i) for i in range(len(answers)))
    marked = [dict(role=role, content=next(marks) if role == "assistant" else content)
              for role, content, _ in messages]
    pieces = re.split(ANSWER.format(r"\d+"), render(chat, marked))  # before, between, and after the answers
    rest = render(chat, [dict(role=role, content=content) for role, content, _ in messages])
    parts = [(pieces[0].rstrip(" "), False)]
    for before, after, (content, counts) in zip(pieces, pieces[1:], answers):
        rest = rest.removeprefix(before)
        forms = content, content.lstrip("\n"), content.lstrip(), content.rstrip(), content.strip()
        written = next((form for form in forms if rest.startswith(form + after)), None)
        if written is None or len(pieces) != len(answers) + 1:
            raise ValueError(f"the chat template leaves out, repeats, or changes an answer: {content!r:.60}")
        rest, behind = rest.removeprefix(written), after.lstrip(" ")
        if not behind.startswith(chat["end"]):
            raise ValueError(f"the chat template writes {behind!r:.50} after an answer, not {chat['end']}")
        spaces = [" " * (len(x) - len(y)) for x, y in ((before, before.rstrip(" ")), (after, behind))]
        parts += [(written.join(spaces), counts), (behind.removeprefix(chat["end"]).rstrip(" "), False)]
    return parts[:-1]

