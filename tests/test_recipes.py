"""The READMEs' commands: all of them are parsed, and those of the paper's recipes run on tiny models.

The models have the names that the commands give them, and come from a hub on this machine.
"""
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, ROOT, SCRIPTS, TALK, call, jsonl, read, write_cifar100
from helpers import load, write_safetensors

import models
import train_lm
import train_vision
from data import hub, text_files
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
"""
# What makes a command of a script quick. Of two equal flags, the later one counts.
FEW = {"train_vision.py": ["--steps", 2, "--batch", 8], "eval.py": ["--limit", 4, "--new-tokens", 4],
       "train_lm.py": ["--steps", 2, "--batch", 8, "--accum", 2]}


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


# "python -" runs what stands below it.
COMMANDS = [words for page in PAGES for block in BLOCK.findall(page) for words in commands(block)
            if words != ["-"]]
COMMANDS += commands("\n".join(re.findall(r"^(?:python|torchrun) .*?(?=  |$)", DOCSTRINGS, re.MULTILINE)))
IMAGES, TEXT = section("The paper's recipe on images"), section("The paper's recipe on text")


# Flags

@pytest.fixture
def runs_of_scripts(tmp_path, monkeypatch):
    """Makes a folder the current one that has the files which eval.py --run looks for."""
    for run in ("shapes-0", "arithmetic-0"):
        for name in ("reward", "new"):
            path = tmp_path / f"out/{run}/{name}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_flags_of_a_command_exist(words, runs_of_scripts, monkeypatch):
    """Catches: A flag was renamed, and a README or a script's docstring still has the old name."""
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


# A hub

@pytest.fixture
def hub(serve, monkeypatch, tmp_path):
    """A hub of tiny models, the site of CIFAR-100, and an empty folder, which is the current one."""
    server = serve()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.chdir(tmp_path)
    return server


def publish(hub, repo, folder):
    hub.files |= {f"/{repo}/resolve/main/{path.name}": path.read_bytes() for path in folder.iterdir()}


def write_clip(folder, seed, file):
    """Writes a tiny CLIP with random weights in OpenCLIP's layout, and returns the folder.

    Beside its configuration lies one of another library, as in the repositories of the paper's models.
    """
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = CLIP(pretrain.TINY | dict(text_width=16)).state_dict()
    config = dict(model_cfg=dict(embed_dim=64, vision_cfg=dict(head_width=32), text_cfg=dict(heads=2)),
                  preprocess_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"architecture": "vit", "model_type": "clip"}')
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        write_safetensors(folder / file, tensors)
    return folder


def write_gpt(folder, name, tokenizer, seed, rows, shards, **changes):
    """Writes a fixture with other embeddings, of `rows` rows, and a tokenizer; returns the folder.

    shards: over how many files the weights are spread. changes: to the config.json.
    """
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
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {k: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, k in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {k: x for k, x in tensors.items() if weight_map[k] == shard}
        write_safetensors(folder / shard, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    return folder


def run(words):
    assert call(*words, *FEW[words[0]], "--device", "cpu") == 0, " ".join(words)


def methods(printed):
    """Returns the rows of the tables that eval.py printed, as (method, beta)."""
    names = "base alone|base [+] .+?|source .+?|base fine-tuned"
    return re.findall(rf"^({names})  +([\d.]*)  .*\d$", printed, re.MULTILINE)


SOURCE = [("source alone", ""), ("source + reward", "1")]
WITH_EFT = [("base alone", ""), ("base + reward (PRT)", "1"), *SOURCE, ("source fine-tuned", ""),
            ("base + EFT", "1")]


# Images

CLIPS = {"timm/vit_base_patch16_clip_224.laion400m_e32": "open_clip_model.safetensors",
         "timm/vit_large_patch14_clip_224.laion400m_e32": "open_clip_model.safetensors",
         "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "open_clip_pytorch_model.bin"}


def test_the_recipe_on_images(hub, tmp_path, monkeypatch, capsys):
    """Catches: A command of the README fails, or names a model that the hub does not have."""
    for seed, (repo, file) in enumerate(CLIPS.items()):
        publish(hub, repo, write_clip(tmp_path / f"clip{seed}", seed, file))
    archive, _ = write_cifar100(tmp_path / "cifar-100-python.tar.gz")
    hub.files[f"/kriz/{archive.name}"] = archive.read_bytes()
    monkeypatch.setattr(images, "CIFAR_URL", f"{hub.url}/kriz/{archive.name}")
    monkeypatch.setattr(images, "CIFAR_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    for words in IMAGES:
        run(words)
    assert methods(capsys.readouterr().out) == [
        *WITH_EFT, ("base alone", ""), *(("base + reward (PRT)", beta) for beta in ("0.5", "1", "2")),
        *SOURCE]
    reward, tuned = (read(tmp_path / f"out/cifar100-{method}.pt") for method in ("prt", "ft"))
    assert [reward["method"], tuned["method"]] == ["prt", "ft"]
    assert reward["source"] == tuned["source"] == train_vision.PAPER["source"]
    assert json.loads((tmp_path / "table.json").read_text())["base"] == [*CLIPS][2]
    assert {path.split("/resolve/")[0][1:] for path, _ in hub.seen} == {*CLIPS, f"kriz/{archive.name}"}


# Text

@pytest.fixture
def few_problems(monkeypatch):
    """Leaves only the first rows of a file."""
    rows = text_files.jsonl_rows
    monkeypatch.setattr(text, "rows", lambda path: itertools.islice(rows(path), 16))


@pytest.fixture
def harness(monkeypatch):
    """Replaces what needs lm_eval, which test_harness.py tests, by one that scores 0."""
    def evaluate(mixtures, tasks, limit):
        return ({task: {"acc,none": 0.0} for task in tasks} for _ in mixtures)

    replaced = SimpleNamespace(Mixture=lambda *args, **options: None, evaluate=evaluate,
                               lm_eval=SimpleNamespace(__version__="0"))
    monkeypatch.setattr(models, "harness", replaced, raising=False)


def test_the_recipe_on_text(hub, tmp_path, few_problems, harness, capsys):
    """Catches: A command of the README fails, or names a model that the hub does not have."""
    qwen = dict(name="qwen2", tokenizer="qwen2", eos_token_id=1500, max_position_embeddings=2048)
    falcon = dict(name="falcon3", tokenizer="llama3", eos_token_id=1501, max_position_embeddings=8192)
    gpts = {"Qwen/Qwen2.5-0.5B": dict(qwen, rows=1520, shards=1),
            "Qwen/Qwen2.5-7B": dict(qwen, rows=1536, shards=2, tie_word_embeddings=False),
            "tiiuae/Falcon3-1B-Base": dict(falcon, rows=1503, shards=1),
            "tiiuae/Falcon3-7B-Base": dict(falcon, rows=1503, shards=2)}
    for seed, (repo, options) in enumerate(gpts.items()):
        publish(hub, repo, write_gpt(tmp_path / f"gpt{seed}", seed=seed, **options))
    (tmp_path / "tulu.jsonl").write_text(jsonl(TALK))
    for words in TEXT:
        run(words)
    printed = capsys.readouterr().out
    assert methods(printed) == [*WITH_EFT, *WITH_EFT[:4]]
    assert "\nbase alone:" in printed and "\nbase + reward (PRT):" in printed  # the answers to --prompt
    assert "are cut to the tokenizer's 1503" in printed  # the output matrices of both Qwens
    assert [read(tmp_path / f"out/{name}.pt")["source"] for name in ("gsm8k-prt", "gsm8k-ft", "falcon")] == [
        train_lm.PAPER["source"]] * 2 + ["tiiuae/Falcon3-1B-Base"]
    assert {path.split("/resolve/")[0][1:] for path, _ in hub.seen} == {*gpts}
