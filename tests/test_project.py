"""The project as a whole: the direction of its imports, its docstrings, and its Markdown files."""
import ast
import functools
import graphlib
import importlib.util
import json
import re
import shutil
import sys
import tomllib
from types import ModuleType, SimpleNamespace

import helpers
import pytest
import torch
from conftest import ROOT, output, png
from test_recipes import sizes

import models
import prt
from data import files, images, schema
from models import flags, pretrain, scores, weights
from models.clip import classifier
from models.gpt import GPT

SCRIPTS = {"train_vision", "train_lm", "eval"}
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("data/*.py")]
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(PATHS)}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_there_is_no_python_outside_the_files_that_are_counted():
    assert {path.stem for path in ROOT.glob("*.py")} == {"prt", *SCRIPTS}
    assert {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.py")
            if path.relative_to(ROOT).parts[0] != "out"} == {"models", "data", "tests", "tests/measure"}


# Imports

def module(name):
    """Returns the name by which a file is imported."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(name) for name in SOURCES} - {"models", "data"}
CORE = {module(name) for files, _ in sizes.CORES.values() for name in files}


def imported(nodes):
    """Returns the names of the modules of the project that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES


ANYWHERE = {module(name): imported(ast.walk(tree)) for name, tree in TREES.items()}  # also in functions
AT_THE_TOP = {module(name): imported(tree.body) for name, tree in TREES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_from_data_to_models_to_scripts(name):
    """Catches: The method needs files, or the data need models, so that neither can be read alone."""
    assert not ANYWHERE[name] & SCRIPTS
    assert name != "prt" or not ANYWHERE[name]
    assert not name.startswith("data.") or all(other.startswith("data.") for other in ANYWHERE[name])


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_rooms_where_they_are_needed(name):
    """Catches: A room that can be deleted is needed before any of its functions is called."""
    assert AT_THE_TOP[name] <= CORE


def test_the_imports_have_no_cycle():
    """Imports in functions lead from the core to a room, which may need the core."""
    graphlib.TopologicalSorter(AT_THE_TOP).prepare()


def test_the_imports_are_those_that_the_files_show():
    """Catches: The rules above hold because no import is recognized."""
    assert AT_THE_TOP["train_lm"] >= {"prt", "models.flags", "models.runs", "models.weights", "data.text"}
    assert {"models.tickets", "models.pretrain"} <= ANYWHERE["train_lm"] - AT_THE_TOP["train_lm"]


# Docstrings

def public(node):
    """Yields the public functions and classes of a module, and the public methods of its classes."""
    for child in node.body:
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def documented():
    """Yields (name, node) for what needs a docstring: modules, and definitions of more than three lines."""
    for name, tree in TREES.items():
        if tree.body:
            yield name, tree
        code = sizes.code_lines(SOURCES[name])
        for node in public(tree):
            body = range(node.body[0].lineno, node.end_lineno + 1)
            if len(code & set(body)) > 3:
                yield f"{name}:{node.lineno} {node.name}", node


def test_every_module_and_every_longer_public_function_and_class_has_a_docstring():
    missing = [name for name, node in documented() if not ast.get_docstring(node)]
    assert not missing, "\n".join(missing)


# The Markdown files: their links, and the Python of the READMEs

MARKDOWN = {path.relative_to(ROOT).as_posix(): path.read_text()
            for folder in ("", "data/", "models/", "tests/") for path in ROOT.glob(f"{folder}*.md")}


def blocks(language):
    """Returns the pages' blocks in a language. test_lecture.py has those of LECTURE.md."""
    texts = "\n".join(text for name, text in MARKDOWN.items() if name.endswith(("README.md", "RESULTS.md")))
    return re.findall(rf"^```{language}\n(.*?)^```$", texts, re.DOTALL | re.MULTILINE)


# Blocks that begin with a file and a function are quotes, which test_lecture.py checks.
BLOCKS, WORDS = [code for code in blocks("python") if not re.match(r"# \S+\.py", code)], []


def prose(text):
    """Returns a Markdown text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Returns the anchors that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [(name, link) for name, text in MARKDOWN.items() for link in re.findall(r"\]\(([^)]+)\)", prose(text))
         if not link.startswith("https://")]


@pytest.mark.parametrize("name, link", LINKS)
def test_a_link_in_a_markdown_file_leads_to_a_file_and_a_heading(name, link):
    """Catches: A file or heading was renamed, or a relative path starts in another folder."""
    path, _, anchor = link.partition("#")
    target = (ROOT / name).parent / path if path else ROOT / name
    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text())


def test_the_links_of_all_markdown_files_are_found():
    names = {name for name, _ in LINKS}
    assert names >= {"README.md", "data/README.md", "models/README.md", "tests/README.md", "tests/RESULTS.md"}


def block(word):
    """Marks a test whose argument `code` is the READMEs' Python block that contains the word."""
    WORDS.append(word)
    codes = [code for code in BLOCKS if word in code]
    return pytest.mark.parametrize("code", codes, ids=[word] * len(codes))


def run(code, **names):
    exec(compile(code, "README.md", "exec"), names)


@block("out/shapes-0")
def test_the_readme_counts_right_colors_and_right_forms(code, in_shapes, capsys):
    run(code)
    printed = capsys.readouterr().out.splitlines()
    data = images.load("shapes", "test", 32)
    prompts = images.prompts(data.classes, data.templates)
    r = prt.reward(scores.predict(weights.load("out/shapes-0/reward.pt"), data.images))
    truth = [data.classes[label].split() for label in data.labels]
    expected = []
    for name in ("old", "new"):
        logits = scores.predict(classifier(weights.load(f"out/shapes-0/{name}.pt"), prompts), data.images)
        for title, log_probs in (("alone", logits), ("+ reward", prt.tilt(logits, r))):
            answers = [data.classes[answer].split() for answer in log_probs.argmax(-1)]
            color, form = (sum(a[i] == t[i] for a, t in zip(answers, truth)) / len(truth) for i in (0, 1))
            expected.append(f"{name} {title}: color {color:.1%}, form {form:.1%}")
    assert printed == expected


@block("RewardProcessor")
def test_the_readme_puts_a_reward_on_a_model_of_another_program(code, tmp_path, monkeypatch):
    """Catches: The continuation is not that of prt.generate, or the padding of a batch changes it."""
    torch.manual_seed(0)  # the snippet's bfloat16 changes no most likely token of these models
    text = pretrain.TOKENIZER.read_text()
    base = GPT(pretrain.GPTS["old"] | dict(vocab=550, end=549)).eval()
    torch.manual_seed(1)
    model, ids, pad = GPT(base.arch).eval(), torch.tensor([[3, 1, 4, 1, 5], [39, 39, 39, 2, 6]]), [0, 2]
    files.save(tmp_path / "out/gsm8k-prt.pt",
               dict(kind="gpt", method="prt", beta=1.0, arch=model.arch, model=model.state_dict(),
                    data="gsm8k", source="x", tokenizer=text, template="{}"))
    continuations = []

    @torch.no_grad()
    def generate(input_ids, attention_mask, logits_processor):
        """Greedy decoding as in transformers, without a cache."""
        for _ in range(12):
            scores = torch.cat([base(row[None, n:])[:, -1] for row, n in zip(input_ids, pad)])
            for processor in logits_processor:
                scores = processor(input_ids, scores)
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
        continuations.append(input_ids)

    monkeypatch.chdir(tmp_path)
    run(code.replace('"cuda"', '"cpu"'), model=SimpleNamespace(generate=generate),
        tokenizer=SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: text)),
        inputs=dict(input_ids=ids, attention_mask=(torch.arange(5) >= torch.tensor(pad)[:, None]).long()))
    result, = continuations
    for row, n, given in zip(result, pad, ids):
        assert row[None, n:].equal(prt.generate(base, [(1.0, model)], given[None, n:], length=12))
        assert not row[None, n:].equal(prt.generate(base, [], given[None, n:], length=12))


BIRDS = [("001.Black_footed_Albatross/46_18.jpg", "train"), ("001.Black_footed_Albatross/09_34.jpg", "test"),
         ("002.Laysan_Albatross/02_1027.jpg", "test"), ("002.Laysan_Albatross/03_1033.jpg", "train")]


@block("CUB_200_2011")
def test_the_readme_sorts_cub_into_a_folder_that_data_takes(code, tmp_path, monkeypatch):
    """Catches: Birds are in the wrong split or class, or the data set of the folder cannot be read."""
    cub = tmp_path / "CUB_200_2011"
    names, splits = "", ""
    for i, (name, split) in enumerate(BIRDS):
        path = cub / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((0, 60 * i, 0)))
        names += f"{i + 1} {name}\n"
        splits += f"{i + 1} {split == 'train':d}\n"
    (cub / "images.txt").write_text(names)
    (cub / "train_test_split.txt").write_text(splits)
    monkeypatch.chdir(tmp_path)
    run(code)
    for split, greens in dict(train=[0, 180], test=[60, 120]).items():
        data = images.load("cub", split, 8)
        assert data.classes == ["Black footed Albatross", "Laysan Albatross"]
        assert data.templates == ["a photo of a {c}, a type of bird."]
        assert data.labels.tolist() == [0, 1]
        assert data.images[:, 1, 0, 0].tolist() == greens


@block("photos")
def test_the_readme_splits_a_folder_of_classes(code, tmp_path, monkeypatch):
    """Catches: An image is in both splits or none, or a class is in one only."""
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png((25 * i, 0, 0)))
    monkeypatch.chdir(tmp_path)
    run(code)
    train, test = (images.load("sorted", split, 8).images[:, 0, 0, 0].tolist() for split in ("train", "test"))
    assert len(test) == 4 and sorted(train + test) == sorted(2 * [*range(0, 250, 25)])


@block("timm")
def test_the_readme_wraps_a_network_of_timm(code, tmp_path, monkeypatch):
    """Catches: The module on the page has no size, or takes other images than the scripts give it."""
    def create_model(name, num_classes, checkpoint_path):
        trunk = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                    torch.nn.Linear(3, num_classes))
        trunk.pretrained_cfg = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        return trunk

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    (tmp_path / "net.py").write_text(code)
    names = {f"{tmp_path}/net.py:old", f"{tmp_path}/net.py:new"}
    monkeypatch.setattr(flags, "NAMED", names)
    for name in sorted(names):
        network = weights.load_base(name, dict(kind="classifier", classes=range(10), templates=[]))
        assert network.arch == dict(net=name, image_size=224)


@block("csv")
def test_the_readme_turns_a_table_into_rows(code, tmp_path, monkeypatch):
    """Catches: A line break or a quote in a cell breaks the row."""
    (tmp_path / "rows.csv").write_text('question,answer\n"1 + 1,\n""plus""",2\nx,y\n')
    monkeypatch.chdir(tmp_path)
    run(code)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [dict(prompt='1 + 1,\n"plus"', response="2"), dict(prompt="x", response="y")]


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="needs setuptools, which pip brings")
def test_the_method_can_be_installed_alone(tmp_path):
    """Catches: `pip install .` installs models/ or nothing, or prt.py needs a file of the clone."""
    for name in ("prt.py", "pyproject.toml", "models/gpt.py", "data/files.py"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    output("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site",
           tmp_path / "clone", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "site").glob("*.py")] == ["prt.py"]
    assert not (tmp_path / "site/models").exists()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import prt; print(prt.__file__)"
    assert output("-c", code, cwd=tmp_path).strip() == str(tmp_path / "site/prt.py")


def test_the_readme_names_every_file():
    """Catches: A file is missing in the README's reading order, or is gone."""
    page = (ROOT / "README.md").read_text().split("## Files")[1]
    assert set(re.findall(r"\]\((\S+\.py)\)", page)) == {name for name, source in SOURCES.items() if source}


def test_each_python_block_of_a_readme_is_run_by_one_test():
    """Catches: A new block that no test runs, or a test that is skipped since its block is gone."""
    tested = {word: [code for code in BLOCKS if word in code] for word in WORDS}
    assert {word: len(codes) for word, codes in tested.items()} == dict.fromkeys(WORDS, 1)
    assert sorted(code for codes in tested.values() for code in codes) == sorted(BLOCKS)


def test_the_readme_adds_a_family_of_models(tmp_path, monkeypatch):
    """Catches: The diff no longer fits models/gpt.py, or does not do what the text around it says."""
    diff, = blocks("diff")
    source = SOURCES["models/gpt.py"]
    for hunk in diff.split("\n\n"):
        lines = hunk.strip("\n").split("\n")
        before, after = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert source.count(before) == 1
        source = source.replace(before, after)
    changed = ModuleType("changed")
    exec(compile(source, "gpt.py", "exec"), vars(changed))
    monkeypatch.setattr(models, "gpt", changed)
    table, = blocks("toml")
    monkeypatch.setitem(schema.SCHEMAS, "seed_oss", tomllib.loads(table)["seed_oss"])
    seed_oss = functools.partial(helpers.edited, name="qwen2", model_type="seed_oss", head_dim=16,
                                 attention_bias=True, residual_dropout=0.1)
    model, reference = weights.load(seed_oss(tmp_path)), helpers.expected("qwen2")
    with torch.no_grad():
        assert helpers.error(model(reference["ids"]), reference["logits"]) < 1e-4
    for key, value in dict(attention_bias=False, attention_out_bias=True, head_dim=None).items():
        with pytest.raises(ValueError, match=key):
            weights.load(seed_oss(tmp_path / key, **{key: value}))
