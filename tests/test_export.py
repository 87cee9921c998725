"""Rewards in other programs' layouts (models/export.py): the same reward again, and in those programs."""
import json

import pytest
import torch
from conftest import EVAL_LM, FIXTURES, NEW, REWARD, TUNE_LM, call, call_main, one_line, read
from helpers import error, load, random_ids
from test_recipes import write_clip

from data import files
from data.tokenizer import Tokenizer
from models import export, weights

TOKENIZER = (FIXTURES / "qwen2_tokenizer/tokenizer.json").read_text()
FAMILIES = ["llama2", "llama3", "falcon3", "qwen2", "qwen3", "olmo2", "smollm3", "mistral"]


def exported(*arguments):
    return call_main(export.main, "export", *arguments)


@pytest.fixture(params=FAMILIES)
def shared(request, tmp_path):
    """A reward of each family, and the folder that it is exported to."""
    model, file = load(request.param), tmp_path / "r.pt"
    arch = model.arch | dict(end=7)
    chat = dict(template="{{ messages[0].content }}", tokens=dict(eos_token="x"), date="2026-01-01", end="x")
    torch.save(dict(kind="gpt", method="prt", beta=0.5, source="org/old", data="gsm8k", template="Q: {}",
                    chat=chat, arch=arch, model=model.state_dict(), tokenizer=TOKENIZER), file)
    assert exported(file, tmp_path / "shared") == 0
    return weights.load(file), tmp_path / "shared"


@torch.no_grad()
def test_an_exported_reward_is_the_same_reward(shared):
    """Catches: A tensor, a property of the architecture, or beta is lost on the way."""
    reward, folder = shared
    again = weights.load(folder, "prt", text=True)
    ids = random_ids(2, 9) % reward.size
    assert torch.equal(again(ids), reward(ids)) and again.arch["end"] == 7
    for key in ("method", "beta", "source", "data", "template", "tokenizer", "chat"):
        assert again.info[key] == reward.info[key]
    card = (folder / "README.md").read_text()
    assert f'weights.load("{folder}", "prt")' in card and "base_model: org/old" in card
    names = {name.split(".")[3] for name in files.read(folder / "model.safetensors") if name.count(".") == 4}
    after = {"post_attention_layernorm", "post_feedforward_layernorm"}  # of OLMo 2
    assert {name for name in names if "layernorm" in name} == (after if reward.arch.get("norms") else {
        "input_layernorm", "post_attention_layernorm"})
    with pytest.raises(ValueError, match="a base for text is needed"):
        weights.load(folder, "base", text=True)


@torch.no_grad()
def test_transformers_computes_the_same_logits(shared):
    transformers = pytest.importorskip("transformers")
    reward, folder = shared
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids(2, 9) % reward.size
    assert error(model(ids).logits, reward(ids)) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("What is it?")["input_ids"] == Tokenizer(TOKENIZER, "x").encode("What is it?")
    assert tokenizer.chat_template == reward.info["chat"]["template"]


def test_tables_are_those_of_the_file(in_texts, tmp_path, table):
    """Catches: A reward for text loses its source or its data, or a table is not put into the card."""
    before = table(*EVAL_LM, "--limit", 4)
    assert exported(REWARD, tmp_path / "x", "--table", tmp_path / "report.json") == 0
    after = table(*EVAL_LM, "--reward", tmp_path / "x", "--limit", 4)
    assert [(a["method"], a["nll"]) for a in before] == [(a["method"], a["nll"]) for a in after]
    card = (tmp_path / "x/README.md").read_text()
    assert "| method | beta |" in card and f"| base + reward (PRT) | 1 | {before[1]['form']:.4g} |" in card


@torch.no_grad()
def test_the_image_tower_of_a_reward_is_in_its_sources_clip(tiny, tmp_path):
    """Catches: The text tower is that of another CLIP, or the zero-shot head is not computed again."""
    assert exported(tiny.reward, tmp_path / "x") == 0
    reward, again = weights.load(tiny.reward), weights.load(tmp_path / "x", "prt", text=False)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert error(again(pixels), reward(pixels)) < 1e-4 and again.info["classes"] == reward.info["classes"]
    assert call("eval.py", "--reward", tmp_path / "x", "--base", tiny.new, "--device", "cpu") == 0


def test_a_source_in_openclips_layout_gives_its_config(tiny, tmp_path):
    """Catches: A config is made up where the source has one, with other head widths or preprocessing."""
    source = write_clip(tmp_path / "clip", seed=0)
    assert call("train_vision.py", "--data", tiny.data, "--source", source, "--steps", 2, "--batch", 8,
                "--warmup", 0, "--out", tmp_path / "r.pt", "--device", "cpu") == 0
    assert exported(tmp_path / "r.pt", tmp_path / "x") == 0
    before, after = (json.loads((folder / "open_clip_config.json").read_text())
                     for folder in (source, tmp_path / "x"))
    assert after.pop("prt")["beta"] == 1 and after == before
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    reward, again = weights.load(tmp_path / "r.pt"), weights.load(tmp_path / "x", "prt")
    with torch.no_grad():
        assert error(again(pixels), reward(pixels)) < 1e-4


@torch.no_grad()
def test_open_clip_computes_the_same_features(tiny, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    assert exported(tiny.reward, tmp_path / "x") == 0
    clip = open_clip.create_model(f"local-dir:{tmp_path / 'x'}").eval()
    reward, pixels = weights.load(tiny.reward), torch.randn(4, 3, 32, 32)
    assert error(clip.encode_image(pixels), reward.visual(pixels)) < 1e-4


def test_low_rank_rewards_are_merged(in_texts, tmp_path):
    assert call(*TUNE_LM, "--lora", 2, "--steps", 2, "--out", tmp_path / "lora.pt") == 0
    assert exported(tmp_path / "lora.pt", tmp_path / "x") == 0
    reward, again = (weights.load(tmp_path / name, "prt") for name in ("lora.pt", "x"))
    ids = random_ids(2, 9)
    assert torch.equal(again(ids), reward(ids)) and len(again.info["tokenizer"]) > 1000


def test_what_cannot_be_exported_is_refused(in_texts, tiny, tmp_path, capfd):
    """Catches: A folder that exists is overwritten, or the text tower of another CLIP is written."""
    (tmp_path / "here").mkdir()
    gpt2 = read(REWARD)
    gpt2["arch"] |= dict(layer_norm=True)
    gpt2["model"] |= {name.replace("weight", "bias"): torch.zeros(len(x)) for name, x in gpt2["model"].items()
                      if "norm" in name}
    torch.save(gpt2, tmp_path / "gpt2.pt")
    capfd.readouterr()
    for arguments, words in [((REWARD, tmp_path / "here"), "exists"),
                             ((NEW, tmp_path / "x"), "is needed here"),
                             ((tmp_path / "gpt2.pt", tmp_path / "x"), "GPT-2"),
                             ((tiny.reward, tmp_path / "x", "--source", tiny.new), "other weights")]:
        one_line(exported(*arguments), capfd.readouterr().err, words)
        assert not (tmp_path / "x").exists()
    folder = tmp_path / "y"
    assert exported(REWARD, folder) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(prt=config["prt"] | dict(beta=-1))))
    with pytest.raises(ValueError, match="prt: beta is -1"):
        weights.load(folder)
