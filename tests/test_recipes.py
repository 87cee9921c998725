"""The pages' commands: all of them are parsed, and those of the paper's recipes run on tiny models.

The models have the names that the commands give them, and come from a hub on this machine. The recipes also
run in a copy of the project without its outer rooms, where what they load is counted.
"""
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import FIXTURES, ROOT, SCRIPTS, TALK, call, call_main, jsonl, output, read, write_cifar100
from helpers import load, write_safetensors

import models
import train_lm
import train_vision
from data import images, text
from models import export, pretrain, weights
from models.clip import CLIP

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [(ROOT / f"{name}.md").read_text()
         for name in ("README", "data/README", "models/README", "tests/README", "tests/RESULTS")]
DOCSTRINGS = "".join(script.__doc__ for script in SCRIPTS.values())
# Bash functions that print each command line as words between zero bytes, instead of running it.
PRINT = """
python() { printf '%s\\0' "$@"; echo; }
torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }
pip() { :; }
pytest() { :; }
vllm() { :; }
curl() { :; }
"""
# What makes a command of a script quick. Of two equal flags, the later one counts.
FEW = {"train_vision.py": ["--steps", 2, "--batch", 8],
       "train_lm.py": ["--steps", 2, "--batch", 8, "--accum", 2]}


def few(words):
    """Returns flags that make a command quick."""
    if words[0] != "eval.py":
        return FEW[words[0]]
    is_text = any(name in str(word) for word in words for name in ("gsm8k", "falcon", "qwen3"))
    limit, new_tokens = "--prompt" not in words, "--tasks" not in words
    return is_text * (["--limit", 4] * limit + ["--new-tokens", 4] * new_tokens)


def commands(shell):
    """Returns the calls of python or torchrun in lines of bash, which expands them, as lists of words."""
    result = subprocess.run([shutil.which("bash"), "-euc", PRINT + shell], env=dict(PATH=""), text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    return [line.split("\0")[:-1] for line in result.stdout.splitlines()]


def section(title):
    """Returns the commands of the section of the README whose title begins so."""
    body, = (part for part in PAGES[0].split("\n## ") if part.startswith(title))
    return commands("".join(BLOCK.findall(body)))


# "python -" runs what stands below it, and "python -m" a module.
CALLS = [words for page in PAGES for block in BLOCK.findall(page) for words in commands(block)]
COMMANDS = [words for words in CALLS if words[0] not in ("-", "-m")]
SHARE, = [words[2:] for words in CALLS if words[:2] == ["-m", "models.export"]]
COMMANDS += commands("\n".join(re.findall(r"^(?:python|torchrun) .*?(?=  |$)", DOCSTRINGS, re.MULTILINE)))
IMAGES, TEXT = section("The paper's recipe on images"), section("The paper's recipe on text")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_flags_of_a_command_exist(words, tmp_path, monkeypatch):
    """Catches: A flag was renamed, and a README or a script's docstring still has the old name."""
    for run in ("shapes-0", "arithmetic-0"):  # where eval.py --run looks for files
        (tmp_path / "out" / run).mkdir(parents=True)
        for file in ("reward.pt", "new.pt"):
            (tmp_path / "out" / run / file).touch()
    monkeypatch.chdir(tmp_path)
    name = words[0]
    if name in SCRIPTS:
        monkeypatch.setattr(sys, "argv", words)
        SCRIPTS[name].parse()
    else:
        assert name.startswith("tests/") and (ROOT / name).is_file()


def test_no_command_is_missed():
    """Catches: The tests in this file pass since they see no commands."""
    shell = "".join(block for page in PAGES for block in BLOCK.findall(page)) + DOCSTRINGS
    assert len(COMMANDS) == len(re.findall(r"\b(?:python|torchrun) .*?\.py", shell)) > 40
    assert [words[0] for words in IMAGES] == ["train_vision.py"] * 2 + ["eval.py"] * 2
    assert {words[0] for words in TEXT} == {"train_lm.py", "eval.py"}


@pytest.fixture
def hub(serve, monkeypatch, tmp_path):
    """A hub of tiny models, the site of CIFAR-100, and an empty folder, which is the current one."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.chdir(tmp_path)
    return server


def publish(hub, repo, folder):
    hub.files |= {f"/{repo}/resolve/main/{path.name}": path.read_bytes() for path in folder.iterdir()}


def write_clip(folder, seed):
    """Writes a tiny CLIP with random weights in OpenCLIP's layout, and returns the folder."""
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = CLIP(pretrain.TINY | dict(text_width=16)).state_dict()
    config = dict(model_cfg=dict(embed_dim=64, vision_cfg=dict(head_width=32), text_cfg=dict(heads=2)),
                  preprocess_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"architecture": "vit", "model_type": "clip"}')  # of another library
    write_safetensors(folder / "open_clip_model.safetensors", tensors)
    return folder


def write_gpt(folder, name, tokenizer, seed, rows, **changes):
    """Writes a fixture with `rows` other embeddings, a tokenizer, and changes to its config.json."""
    folder.mkdir()
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes | dict(vocab_size=rows)
    tensors, generator = load(name).state_dict(), torch.Generator().manual_seed(seed)
    tensors = {f"model.{k}".replace("model.lm_head", "lm_head"): x for k, x in tensors.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(rows, config["hidden_size"], generator=generator)
    tensors.pop("lm_head.weight", None)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(rows, config["hidden_size"], generator=generator)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / f"{tokenizer}_tokenizer/tokenizer.json", folder)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def run(words):
    assert call(*words, *few(words), "--device", "cpu") == 0, " ".join(words)


def methods(printed):
    """Returns the rows of the tables that eval.py printed, as (method, beta)."""
    names = "base alone|base [+] .+?|source .+?|base fine-tuned"
    return re.findall(rf"^({names})  +([\d.]*)  .*\d$", printed, re.MULTILINE)


SOURCE = [("source alone", ""), ("source + reward", "1")]
WITH_EFT = [("base alone", ""), ("base + reward (PRT)", "1"), *SOURCE, ("source fine-tuned", ""),
            ("base + EFT", "1")]
# The published CLIPs of these tests have the same shapes, the GPTs have not.
TASK_VECTOR = ("base + (tuned source - source) weights", "")


CLIPS = ["timm/vit_base_patch16_clip_224.laion400m_e32", "timm/vit_large_patch14_clip_224.laion400m_e32",
         "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"]


@pytest.fixture
def archive(hub, tmp_path):
    """CIFAR-100's archive with six images, published; returns its address and sha256."""
    path, _ = write_cifar100(tmp_path / "cifar-100-python.tar.gz")
    for seed, repo in enumerate(CLIPS):
        publish(hub, repo, write_clip(tmp_path / f"clip{seed}", seed))
    hub.files[f"/kriz/{path.name}"] = path.read_bytes()
    return SimpleNamespace(name=path.name, url=f"{hub.url}/kriz/{path.name}",
                           sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_recipe_on_images(hub, archive, tmp_path, monkeypatch, capsys):
    """Catches: A command of the README fails, or names a model that the hub does not have."""
    monkeypatch.setattr(images, "CIFAR_URL", archive.url)
    monkeypatch.setattr(images, "CIFAR_SHA256", archive.sha256)
    for words in IMAGES:
        run(words)
    assert methods(capsys.readouterr().out) == [
        *WITH_EFT, TASK_VECTOR, ("base alone", ""),
        *(("base + reward (PRT)", beta) for beta in ("0.5", "1", "2")), *SOURCE]
    reward, tuned = (read(tmp_path / f"out/cifar100-{method}.pt") for method in ("prt", "ft"))
    assert [reward["method"], tuned["method"]] == ["prt", "ft"]
    assert reward["source"] == tuned["source"] == train_vision.PAPER["source"]
    assert json.loads((tmp_path / "table.json").read_text())["base"] == CLIPS[2]
    assert {path.split("/resolve/")[0][1:] for path, _ in hub.seen} == {*CLIPS, f"kriz/{archive.name}"}


@pytest.fixture
def few_problems(monkeypatch):
    """Leaves only the first examples of a split, and of the harness, which needs lm_eval, scores of 0."""
    load = text.load
    monkeypatch.setattr(text, "load", lambda *args: (load(*args)[0], load(*args)[1][:16]))
    replaced = Mock(evaluate=lambda rows, tasks, limit: (dict.fromkeys(tasks, {"acc,none": 0}) for _ in rows))
    replaced.lm_eval.__version__ = "0"
    monkeypatch.setattr(models, "harness", replaced, raising=False)


@pytest.fixture
def gpts(hub, tmp_path):
    """The names of the published GPTs of the paper."""
    qwen = dict(name="qwen2", tokenizer="qwen2", eos_token_id=1500, max_position_embeddings=2048)
    falcon = dict(name="falcon3", tokenizer="llama3", eos_token_id=1501, max_position_embeddings=8192)
    options = {"Qwen/Qwen2.5-0.5B": dict(qwen, rows=1520),
               "Qwen/Qwen2.5-7B": dict(qwen, rows=1536, tie_word_embeddings=False),
               "tiiuae/Falcon3-1B-Base": dict(falcon, rows=1503),
               "tiiuae/Falcon3-7B-Base": dict(falcon, rows=1503)}
    for seed, repo in enumerate(options):
        publish(hub, repo, write_gpt(tmp_path / f"gpt{seed}", seed=seed, **options[repo]))
    return {*options}


def test_the_recipe_on_text(hub, gpts, tmp_path, few_problems, capsys):
    """Catches: A command of the README fails, or names a model that the hub does not have."""
    (tmp_path / "tulu.jsonl").write_text(jsonl(TALK))
    for words in TEXT:
        run(words)
    assert call_main(export.main, "export", *SHARE) == 0
    assert weights.load(SHARE[1], "prt").info["source"] == train_lm.PAPER["source"]
    printed = capsys.readouterr().out
    assert methods(printed) == [*WITH_EFT, *WITH_EFT[:4]]
    assert "\nbase alone:" in printed and "\nbase + reward (PRT):" in printed  # the answers to --prompt
    assert "are cut to the tokenizer's 1503" in printed  # the output matrices of both Qwens
    assert [read(tmp_path / f"out/{name}.pt")["source"] for name in ("gsm8k-prt", "gsm8k-ft", "falcon")] == [
        train_lm.PAPER["source"]] * 2 + ["tiiuae/Falcon3-1B-Base"]
    assert {path.split("/resolve/")[0][1:] for path, _ in hub.seen} == gpts


QWEN3 = [words for words in COMMANDS if any("Qwen3" in word for word in words)]


def test_the_recipe_of_another_generation(hub, gpts, tmp_path, few_problems, capsys):
    """Catches: A command of models/README.md fails: a chat template, or Qwen2.5's reward on Qwen3."""
    names = [word for words in QWEN3 for word in words if word.startswith("Qwen/")]
    assert names == [f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "8B")]
    template = ("{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    for seed, repo in enumerate({*names}):
        folder = write_gpt(tmp_path / f"qwen3-{seed}", "qwen3", "qwen2", seed, 1536, eos_token_id=1502,
                           max_position_embeddings=2048)
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
        d = json.loads((folder / "tokenizer.json").read_text())
        d["added_tokens"] += [dict(id=1503 + i, content=token, special=False) for i, token in enumerate(
            ("<tool_response>", "</tool_response>", "<think>", "</think>"))]
        (folder / "tokenizer.json").write_text(json.dumps(d))
        publish(hub, repo, folder)
    run(TEXT[0])
    for words in QWEN3:
        capsys.readouterr()
        run(words)
        printed = capsys.readouterr().out
        assert ("no reward for 4 of the base's 1507 tokens" in printed) == ("out/gsm8k-prt.pt" in words)
    assert read(tmp_path / "out/qwen3.pt")["chat"]["end"] == "<|im_end|>"


# The two rings

spec = importlib.util.spec_from_file_location("sizes", ROOT / ".ci/sizes.py")
sizes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sizes)
# Runs a script as its command line would, and then prints which modules of the project are loaded.
COUNT = """
import os, runpy, sys
root, url, sha256, *sys.argv = sys.argv[1:]
sys.path.insert(0, root)
if url:
    from data import images
    images.CIFAR_URL, images.CIFAR_SHA256 = url, sha256
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    loaded = {getattr(m, "__file__", None) or "" for m in [*sys.modules.values()]} | {sys.argv[0]}
    print("\\nLOADED", *sorted(os.path.relpath(f, root) for f in loaded if f.startswith(root + os.sep)))
"""


def assert_counted(name, root, words, archive=None):
    """Runs a command of the README on few examples.

    Asserts that it loads nothing but the files of its core, and no more lines than allowed.
    """
    url, sha256 = (archive.url, archive.sha256) if archive else ("", "")
    words = [root / words[0], *words[1:], *few(words), "--device", "cpu"]
    printed = output("-c", COUNT, root, url, sha256, *words, cwd=root.parent, cache=root / "cache")
    names = re.search(r"^LOADED (.*)$", printed, re.MULTILINE)[1].split()
    found = {name for name in names if not name.endswith("__init__.py")}
    files, limit = sizes.CORES[name]
    assert found <= {*files}
    assert sum(len(sizes.code_lines((ROOT / file).read_text())) for file in found) <= limit


@pytest.fixture
def core(tmp_path):
    """A copy of the project without its outer rooms, and with few problems."""
    root = tmp_path / "core"
    names = {name for files, _ in sizes.CORES.values() for name in files}
    for name in {*names, "data/__init__.py", "models/__init__.py", "data/bpe_simple_vocab_16e6.txt.gz",
                 "data/schemas.toml"}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for split in ("train", "test"):
        lines = gzip.decompress((ROOT / f"data/gsm8k-{split}.jsonl.gz").read_bytes()).splitlines(True)
        (root / f"data/gsm8k-{split}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:16])))
    return root


def test_the_recipe_on_images_runs_without_the_outer_rooms(core, archive):
    """Catches: The core needs a room that is said to be deletable, or has grown beyond its limit."""
    assert_counted("train_vision.py", core, IMAGES[0], archive)
    assert_counted("eval.py, images", core, IMAGES[3], archive)


def test_the_recipe_on_text_runs_without_the_outer_rooms(core, gpts):
    assert_counted("train_lm.py", core, TEXT[0])
    assert_counted("eval.py, text", core, [*TEXT[2][:5], "--batch", "64"])


def test_lines_of_code_are_counted_without_blank_lines_comments_and_docstrings():
    source = '''"""Doc."""

def f():  # a comment
    """Doc.

    More."""
    # a comment
    return """1
2"""
'''
    assert sizes.code_lines(source) == {3, 8, 9}
    assert sizes.body_lines(source, "f") == 2
