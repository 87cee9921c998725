"""Chat templates (data/chat.py): transformers' ids, what counts, training, --prompt, bad templates."""
import json
import shutil
import sys

import pytest
import torch
from conftest import FIXTURES, TALK, call, interrupted, jsonl, one_line, read
from helpers import edited, load, write_safetensors

import eval as eval_script
from data import chat, text
from data.tokenizer import Tokenizer
from models import answers, weights

CASES = json.loads((FIXTURES / "chats/expected.json").read_text())
TALKS = CASES["conversations"]


def write(folder, name, **changes):
    """Writes the files of a chat template of the fixture, with changes to its tokenizer_config.json."""
    case = CASES["families"][name]
    d = json.loads((FIXTURES / case["tokenizer"] / "tokenizer.json").read_text())
    known, free = {t["content"] for t in d["added_tokens"]}, max(d["model"]["vocab"].values()) + 1
    free = max([free, *(t["id"] + 1 for t in d["added_tokens"])])
    for token in case["special"]:
        if token not in known:
            vocab = d["model"]["vocab"]
            d["added_tokens"].append(dict(id=vocab.get(token, free), content=token, special=True))
            free += token not in vocab
    for token in d["added_tokens"]:
        token["normalized"] = False
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(d))
    config = case["names"] | dict(chat_template=case["template"]) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def messages(talk):
    return [(m["role"], m["content"], m["role"] == "assistant") for m in talk]


@pytest.mark.parametrize("name", CASES["families"])
def test_the_ids_are_those_of_transformers(tmp_path, name):
    """Catches: A space is lost, a special token is plain text, or a text begins with two <s>."""
    folder, case = write(tmp_path / name, name), CASES["families"][name]
    form = chat.read(str(folder))
    tokenizer = chat.with_special(Tokenizer((folder / "tokenizer.json").read_text(), name))
    end, = tokenizer.encode(form["end"])
    assert len(TALKS) == 20
    for talk, expected in zip(TALKS, case["ids"], strict=True):
        assert tokenizer.encode(chat.render(form, talk)) == expected["whole"]
        assert tokenizer.encode(chat.asked(form, talk[:-1])) == expected["prompt"]
        ids, counts = text.token_ids(chat.segments(form, messages(talk)), tokenizer, end)
        assert ids == expected["whole"][:len(ids)]  # up to the last end token
        assert tokenizer.decode(expected["whole"][len(ids):]).strip() == ""
        spoken = [m["content"] for m in talk if m["role"] == "assistant"]
        counted = tokenizer.decode([i for i, c in zip(ids, counts) if c]).split(form["end"])
        assert [x.strip() for x in counted] == [x.strip() for x in spoken] + [""]


def test_a_template_may_treat_the_last_answer_in_another_way():
    """Catches: With Qwen3, whose last answer has an empty block of thoughts, it is asked in another form."""
    template = ("{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}"
                "<think></think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
    form = dict(template=template, tokens={}, date="2026-01-01", end="<|im_end|>")
    talk = [("user", "a", False), ("assistant", "b", True), ("user", "c", False), ("assistant", "d", True)]
    assert [x for x, _ in chat.segments(form, talk)] == [
        "<user>a<|im_end|><assistant>", "b", "<user>c<|im_end|><assistant><think></think>", "d"]
    asked = [dict(role="user", content="c")]
    assert chat.asked(form, asked) == "<user>c<|im_end|><assistant><think></think>"


def test_an_answer_that_is_not_trained_on_does_not_count():
    template = CASES["families"]["chatml"]["template"]
    form = dict(template=template, tokens={}, date="2026-01-01", end="<|im_end|>")
    parts = chat.segments(form, [("user", "a", False), ("assistant", "b", None), ("user", "c", False),
                                 ("assistant", "d", True)])
    assert [counts for _, counts in parts] == [False, None, False, True]
    assert parts[1][0] == "b" and parts[2][0].startswith("\n<|im_start|>user\nc<|im_end|>")


@pytest.mark.parametrize("template, words", [
    (None, "no chat_template.jinja"), ("{{ nothing.at.all }}", "nothing"), ("{% if %}", "the chat template"),
    ("{{ messages[0].content }}", "leaves out or changes a message"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% for m in messages %}{{ m.content }}. {% endfor %}", "no special token"),
    ("{{ raise_exception('only tools') }}", "only tools")])
def test_a_bad_template_is_refused(tmp_path, template, words):
    """Catches: A template reaches out of the sandbox, or it is unknown where an answer ends."""
    folder = write(tmp_path / "x", "chatml", chat_template=template)
    with pytest.raises(ValueError, match=f"--chat-template: {folder}.*{words}"):
        chat.read(str(folder))


@pytest.mark.parametrize("change, words", [
    ("{{ m.content | upper }}", "changes a message"), ("{{ m.content + m.content }}", "repeats"),
    ("{{ m.content.split('</think>')[-1] }}", "changes a message")])
def test_an_answer_that_the_template_changes_is_refused(change, words):
    """Catches: The tokens of another text than the template's are trained on."""
    template = f"{{% for m in messages %}}{change}<|im_end|>{{% endfor %}}"
    form = dict(template=template, tokens={}, date="2026-01-01", end="<|im_end|>")
    with pytest.raises(ValueError, match=words):
        chat.segments(form, [("user", "a", False), ("assistant", "so </think> b", True)])


def test_an_answer_counts_as_the_template_writes_it():
    """Catches: A template that cuts off the spaces around an answer, as Llama 3's, is refused."""
    template = CASES["families"]["headers"]["template"]
    form = dict(template=template, tokens=dict(bos_token=""), date="2026-01-01", end="<|eot_id|>")
    *_, last = chat.segments(form, [("user", " a ", False), ("assistant", " b c\n", True)])
    assert last == ("b c", True)
    strips = ("{% for m in messages %}{{ m.content.lstrip('\\n') if loop.last else m.content }}<|im_end|>"
              "{% endfor %}")
    talk = [("user", "a", False), ("assistant", "one\n", True), ("user", "b", False),
            ("assistant", "\ntwo\n", True)]
    parts = chat.segments(dict(form, template=strips, end="<|im_end|>"), talk)
    assert [x for x, counts in parts if counts] == ["one\n", "two\n"]


def test_a_message_that_the_template_leaves_out_is_refused():
    """Catches: The system message is lost where an answer follows, as in a template of Mistral's."""
    template = ("{% for m in messages %}{% if m.role != 'system' or messages[-1].role == 'user' %}"
                "{{ m.content }}<|im_end|>{% endif %}{% endfor %}")
    form = dict(template=template, tokens={}, date="2026-01-01", end="<|im_end|>")
    with pytest.raises(ValueError, match="role system: 'be brief'"):
        chat.segments(form, [("system", "be brief", False), ("user", "a", False), ("assistant", "b", True)])


def test_a_template_may_be_one_of_several_or_a_file_of_its_own(tmp_path):
    several = [dict(name="tool_use", template="x"),
               dict(name="default", template=CASES["families"]["chatml"]["template"])]
    folder = write(tmp_path / "x", "chatml", chat_template=several)
    want = chat.read(str(folder))
    assert want["end"] == "<|im_end|>" and want["tokens"] == dict(eos_token="<|im_end|>")
    write(folder, "chatml", chat_template=None)
    (folder / "chat_template.jinja").write_text(CASES["families"]["chatml"]["template"])
    assert chat.read(str(folder)) == want


def test_special_tokens_that_take_spaces_are_refused():
    d = json.loads((FIXTURES / "qwen2_tokenizer/tokenizer.json").read_text())
    d["added_tokens"][-1]["rstrip"] = True
    with pytest.raises(ValueError, match="takes spaces"):
        chat.with_special(Tokenizer(json.dumps(d), "x"))


@pytest.fixture
def instructed(tmp_path, monkeypatch):
    """A folder with a small instruction-tuned model, beside data sets; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tokenizer", "chatml")
    rows = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["added_tokens"][-1]["id"] + 1
    torch.manual_seed(0)
    folder = edited(tmp_path, "qwen2", vocab_size=rows, eos_token_id=rows - 3)
    tensors = {f"model.{k}": x for k, x in load("qwen2").state_dict().items()}
    tensors["model.embed_tokens.weight"] = 0.1 * torch.randn(rows, 64)
    write_safetensors(folder / "model.safetensors", tensors)
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, folder)
    (tmp_path / "talk.jsonl").write_text(jsonl(TALK))
    sums = [dict(prompt=f"{i} + 1", response=f"{i + 1}") for i in range(8)]
    (tmp_path / "sums.jsonl").write_text(jsonl(sums))
    return folder


TRAIN = ("train_lm.py", "--source", "qwen2", "--batch", 8, "--accum", 1, "--steps", 2, "--device", "cpu")


@pytest.mark.parametrize("data", ["talk.jsonl", "sums.jsonl", "gsm8k"])
def test_a_reward_remembers_its_template_and_is_asked_with_it(instructed, monkeypatch, capsys, table, data):
    """Catches: eval.py asks in another form than that of the training, or an answer never ends."""
    assert call(*TRAIN, "--data", data, "--length", 200, "--drop", "--chat-template", "--out", "r.pt") == 0
    content, prompts = read("r.pt"), []
    form = content["chat"]
    assert form == chat.read("qwen2") and content["tokenizer"] == (instructed / "tokenizer.json").read_text()
    tokenizer = chat.with_special(Tokenizer(content["tokenizer"], "x"))
    assert [content["arch"]["end"]] == tokenizer.encode("<|im_end|>")
    assert "special tokens in text" not in capsys.readouterr().out
    generate = answers.generate
    monkeypatch.setattr(answers, "generate", lambda row, ids, how, end, *rest, **more: prompts.append(
        (ids, end)) or generate(row, ids, how, end, *rest, **more))
    ask = ("eval.py", "--reward", "r.pt", "--base", "qwen2", "--device", "cpu", "--new-tokens", 3)
    assert call(*ask, "--prompt", "2 + 1") == 0
    want = chat.asked(form, [dict(role="user", content="2 + 1")])
    assert prompts[0][0] == [tokenizer.encode(want)]
    assert prompts[0][1] == [*tokenizer.encode("<|im_end|>"), *tokenizer.encode("<|endoftext|>")]
    table(*ask, "--data", "talk.jsonl" if data != "sums.jsonl" else data, "--limit", 4)
    asked = tokenizer.decode(prompts[-1][0][0])
    assert asked.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_low_rank_reward_ends_as_in_its_training(instructed, capfd):
    """Catches: The end of the source's own texts comes back with its weights, and no answer ends."""
    assert call(*TRAIN, "--data", "sums.jsonl", "--lora", 2, "--chat-template", "--out", "r.pt") == 0
    end = read("r.pt")["arch"]["end"]
    assert weights.load("r.pt").arch["end"] == end != weights.load("qwen2").arch["end"]
    config = instructed / "tokenizer.json"  # of a base that does not have the token
    config.write_text(config.read_text().replace("<|im_end|>", "<|other|>"))
    capfd.readouterr()
    code = call("eval.py", "--reward", "r.pt", "--base", "qwen2", "--device", "cpu", "--prompt", "2 + 1")
    one_line(code, capfd.readouterr().err, "same tokenizer")


def test_reference_answers_end_with_the_bases_own_id_of_the_end(instructed, table, monkeypatch):
    """Catches: If the end has another id in the base, another token is scored after each answer."""
    assert call(*TRAIN, "--data", "sums.jsonl", "--chat-template", "--out", "r.pt") == 0
    shutil.copytree(instructed, "other")
    text = (instructed / "tokenizer.json").read_text().replace("<|im_end|>", "<|x|>")
    text = text.replace("<|im_start|>", "<|im_end|>").replace("<|x|>", "<|im_start|>")
    (instructed.parent / "other/tokenizer.json").write_text(text)
    end, = chat.with_special(Tokenizer(text, "x")).encode("<|im_end|>")
    assert end != read("r.pt")["arch"]["end"]
    found, encode = [], eval_script.conversation
    monkeypatch.setattr(eval_script, "conversation", lambda *args: found.append(encode(*args)) or found[-1])
    table("eval.py", "--reward", "r.pt", "--base", "other", "--data", "sums.jsonl", "--limit", 2,
          "--new-tokens", 2, "--device", "cpu")
    assert found[0][2][0] == end and found[0][2].count(end) == 1


def test_a_base_without_the_end_of_the_template_is_refused(instructed, capfd):
    assert call(*TRAIN, "--data", "sums.jsonl", "--chat-template", "--out", "r.pt") == 0
    shutil.copytree(instructed, "other")
    text = (instructed / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>")
    (instructed.parent / "other/tokenizer.json").write_text(text)
    capfd.readouterr()
    code = call("eval.py", "--reward", "r.pt", "--base", "other", "--device", "cpu", "--prompt", "2 + 1")
    one_line(code, capfd.readouterr().err, "<|im_end|>", "is no token of other")


def test_a_reward_without_a_template_takes_that_of_the_base_if_asked(instructed, monkeypatch, capfd):
    assert call(*TRAIN, "--data", "sums.jsonl", "--out", "r.pt") == 0
    assert "chat" not in read("r.pt")
    ask, prompts = ("eval.py", "--reward", "r.pt", "--base", "qwen2", "--device", "cpu"), []
    monkeypatch.setattr(answers, "generate", lambda row, ids, *_: prompts.append(ids) or [[1]])
    for flags in [], ["--chat-template"]:
        assert call(*ask, "--prompt", "2 + 1", *flags) == 0
    tokenizer = Tokenizer(read("r.pt")["tokenizer"], "x")
    want = chat.asked(chat.read("qwen2"), [dict(role="user", content="2 + 1")])
    assert prompts[0] == [tokenizer.encode("2 + 1")]
    assert prompts[-1] == [chat.with_special(tokenizer).encode(want)]
    capfd.readouterr()
    one_line(call(*ask, "--chat-template"), capfd.readouterr().err, "--chat-template has no effect")


def test_a_resumed_run_keeps_the_date_of_its_template(instructed, monkeypatch):
    """Catches: On the next day a template prints another date, and --resume is refused."""
    template = "Today: {{ strftime_now('%d %m') }}" + CASES["families"]["chatml"]["template"]
    write(instructed, "chatml", chat_template=template)
    interrupted(*TRAIN, "--data", "talk.jsonl", "--chat-template", "--out", "r.pt")
    before = read("r.pt")["chat"]
    monkeypatch.setattr(chat, "read", lambda name: dict(before, date="1999-01-01"))
    assert call(*TRAIN, "--data", "talk.jsonl", "--chat-template", "--out", "r.pt", "--resume") == 0
    assert read("r.pt")["chat"] == before


def test_without_jinja2_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    folder = write(tmp_path / "x", "chatml")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat.compiled.cache_clear()
    with pytest.raises(ValueError, match="pip install -U jinja2"):
        chat.read(str(folder))
