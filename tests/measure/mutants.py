"""Measures whether the tests notice faults: plants 60 of them, one at a time, and runs the tests on each.

    python tests/measure/mutants.py make        # draws the mutants and writes mutants.json, without results
    python tests/measure/mutants.py run before  # runs the tests on each; `run after` is for a later state
    python tests/measure/mutants.py report      # prints all results, and the mutants that only `before` kills

A mutant is one statement of a function, or the condition of its `if` or `while`, and what replaces it. It
is found by the function's qualified name and by the statement, in any file outside of tests/, so that
functions may move; where one was renamed or its line rewritten, "moved" in the list, added by hand, has the
new form. Each gets a fresh copy of the project; the first test that fails kills it. All mutants meet the
tests of their module first, and the survivors all other tests then. A run that was ended continues where it
was. Without a mutant, the tests must pass. The list was made with Python 3.11.
"""
import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT, LIST = Path(__file__).resolve().parents[2], Path(__file__).with_suffix(".json")
COUNT, PER_FUNCTION, SECONDS = 60, 2, dict(related=1200, rest=3600)
NAMES = re.findall(r"\S+", """
reward tilt prt_loss kl schedule generate QuickGELU.forward Attention.forward Block.forward resize
VisionTransformer.forward Preprocess.forward cosine CLIP.encode_text CLIP.forward classifier
Bottleneck.forward AttentionPool.forward ModifiedResNet.forward ConvNeXtBlock.forward ConvNeXt.forward
frequencies rotate sample attention_mask MLP.forward GPT.features GPT.embed speculative draft accept
accepted_drafts residual stopping fill_after_end probabilities TopK.forward MaskedWeight.__init__
MaskedWeight.right_inverse counts randomize clip_tokens merge vocabulary split_pattern shuffled hold_out
chunk_size interrupt gpt_architecture download rope_parameters gpt_tensors check_gpt clip_architecture augment
read_image resize_crop webdataset tar_members folder draw segments token_ids encode blocks group_by_length
by_length collate atomic safetensors_entry colored Redirect.redirect_request final_number draw_picture
""")  # mutants are drawn from these functions
# Name of a file -> names of its tests, if these are not test_NAME.py alone.
RELATED = dict(clip="clip weights", convnets="clip weights", gpt="gpt weights decode", weights="weights gpt",
               gpt2="gpt weights", cache="gpt decode prt", ticket_files="tickets", hub="files weights",
               shapes="images", image_files="images", text_files="text", arithmetic="text", pretrain="text",
               clip_tokenizer="tokenizer", sentencepiece="tokenizer", sampling="decode", answers="eval",
               picture="eval")
TEXTUAL = "test_project.py"  # left out: it compares the source's text, which every mutant changes
PAIRS = ("Add Sub", "Mult Div", "Mod FloorDiv", "BitOr BitAnd", "Lt LtE", "Gt GtE", "Eq NotEq", "Is IsNot",
         "In NotIn", "And Or")
SWAPS = {getattr(ast, a): getattr(ast, b) for p in PAIRS for a, b in (p.split(), p.split()[::-1])}
KINDS = ("operator", "constant", "operator", "constant", "condition", "dropped")
# What is not mutated: statements with these words, which are of GPUs, messages, time, speed, or layout, or
# whose mutants change nothing; the arguments of such calls; and dimensions and seeds.
WORDS = re.compile(r"cuda|write\(|monotonic|% 8|print\(|\[:\d\d|top_p < 1|queries=1|paste\(|text\(|position %"
                   r"|left, right =|Image.new|repeat_interleave|checkpoint|for _, policy|ended = ended")
QUIET = {"desc", "disable", "non_blocking", "maxsize", "timeout", "enable_gqa", "files.explain", "dim"}
SHAPED = re.compile(r"(shape|cat|stack|sum|mean|chunk|cum\w+|view|flatten|transpose|permute|squeeze|roll|"
                    r"arg\w+|rand|index_\w+|keepdim|manual_seed|read)$")


def functions(tree, prefix=""):
    """Yields (qualified name, node) for each function and method that is not in another function."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def units(root):
    """Yields (path, function's name, node, its text) for all that mutants may replace in a project."""
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text() if "tests" not in path.relative_to(root).parts else "")
        for name, node in ((name, node) for name, function in functions(tree) for node in ast.walk(function)):
            if isinstance(node, ast.If | ast.While):
                node = node.test
            elif not isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.Expr | ast.Continue):
                continue
            yield path, name, node, ast.unparse(node)


def parts(node):
    """Yields a node and those below it that may be mutated."""
    named = getattr(node, "func", getattr(node, "value", None))  # of a call or a subscript
    name = getattr(node, "arg", None) or (ast.unparse(named) if isinstance(named, ast.expr) else "")
    if not isinstance(node, ast.JoinedStr | ast.UnaryOp) and name not in QUIET:
        yield node
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Constant) and SHAPED.search(name)):
                yield from parts(child)


def change(node):
    """Returns (kind, field, new value) of a mutated node, or None if it has no mutant."""
    match node:
        case ast.BinOp(left=ast.Constant(value=str())) | ast.BinOp(right=ast.Constant(value=str())):
            return None
        case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAPS:
            return "operator", "op", SWAPS[type(node.op)]()
        case ast.Compare(ops=[op]):
            return "operator", "ops", [SWAPS[type(op)]()]
        case ast.Constant(value=bool(x)):
            return "constant", "value", not x
        case ast.Constant(value=int(x) | float(x)):
            return "constant", "value", x + 1
        case ast.IfExp(test=test):
            return "condition", "test", ast.UnaryOp(ast.Not(), test)


def variants(unit):
    """Yields (kind, text) of each mutant of a statement or condition."""
    for node in parts(unit):
        if found := change(node):
            kind, field, new = found
            old = getattr(node, field)
            setattr(node, field, new)
            yield kind, ast.unparse(unit)
            setattr(node, field, old)
    if isinstance(unit, ast.expr):
        yield "condition", f"not ({ast.unparse(unit)})"
    if isinstance(unit, ast.Assign):  # dropped if the names that it sets are defined before
        used, names = ({x.id for x in ast.walk(part) if isinstance(x, ast.Name)}
                       for part in (unit.value, unit.targets[0]))
        if names <= used:
            yield "dropped", "pass"
    elif isinstance(unit, ast.AugAssign | ast.Continue) or isinstance(unit, ast.Expr) and (
            isinstance(unit.value, ast.Call)):  # an expression that is no call is a docstring
        yield "dropped", "pass"


def make():
    """Writes the list of mutants: the kinds take turns, and no function has more than PER_FUNCTION."""
    candidates, chosen, project = {kind: [] for kind in KINDS}, [], [*units(ROOT)]
    rng = random.Random(0)
    places = Counter((name, text) for _, name, _, text in project)
    for _, name, unit, text in project:
        if name in NAMES and places[name, text] == 1 and not WORDS.search(text):
            for kind, mutated in variants(unit):
                candidates[kind].append(dict(function=name, kind=kind, original=text, mutated=mutated))
    while len(chosen) < COUNT:
        mutant = rng.choice(candidates[KINDS[len(chosen) % len(KINDS)]])
        taken = [other["original"] for other in chosen if other["function"] == mutant["function"]]
        if len(taken) < PER_FUNCTION and mutant["original"] not in taken:
            chosen.append(mutant)
    LIST.write_text(json.dumps(chosen, indent=1) + "\n")


def plant(mutant, root):
    """Puts a mutant into the project at root, if it fits one place; returns its file's name without .py."""
    mutant = mutant.get("moved", mutant)
    found = [(path, unit) for path, name, unit, text in units(root)
             if (name, text) == (mutant["function"], mutant["original"])]
    if len(found) != 1:
        raise LookupError(f"it fits {len(found)} places")
    path, unit = found[0]
    lines = path.read_bytes().splitlines(keepends=True)  # bytes, as ast counts columns
    before = b"".join(lines[:unit.lineno - 1]) + lines[unit.lineno - 1][:unit.col_offset]
    after = lines[unit.end_lineno - 1][unit.end_col_offset:] + b"".join(lines[unit.end_lineno:])
    path.write_bytes(before + mutant["mutated"].encode() + after)
    return path.stem


def outcome(mutant, stage):
    """Returns in words what the tests of a stage, "related" or "rest", do to a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))
        try:
            module = plant(mutant, root)
        except LookupError as error:
            return f"not planted: {error}"
        every = sorted(path.name for path in root.glob("tests/test_*.py") if path.name != TEXTUAL)
        related = [f"test_{name}.py" for name in RELATED.get(module, module).split()]
        related = [name for name in related if name in every] or every  # all, if the module is unknown
        names = related if stage == "related" else sorted({*every} - {*related})
        if not names:  # all tests have met it as related ones
            return "survived"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   f"--basetemp={folder}/tmp", *(f"tests/{name}" for name in names)]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=SECONDS[stage])
        except subprocess.TimeoutExpired:
            return f"killed by a timeout of {SECONDS[stage]} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that tests have started
            process.wait()
    if not process.returncode:
        return "survived" if stage == "rest" else "passed related"
    if process.returncode in (3, 4, 5):  # an internal error of pytest, its arguments, or no tests
        raise RuntimeError(output)
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE)
    return f"killed by {failed[1] if failed else f'exit code {process.returncode}'}"


def run(key):
    """Tests the mutants that lack a result, and saves the list after each."""
    mutants = json.loads(LIST.read_text())
    for stage, state in dict(related=None, rest="passed related").items():
        for i, mutant in enumerate(mutants):
            if mutant.get(key) == state:
                start, mutant[key] = time.monotonic(), outcome(mutant, stage)
                seconds = time.monotonic() - start
                print(f"{i} {mutant['function']}: {mutant[key]}, {seconds:.0f} s", flush=True)
                LIST.write_text(json.dumps(mutants, indent=1) + "\n")


def report():
    """Prints each mutant with its results, and how many of these there are."""
    mutants = json.loads(LIST.read_text())
    for i, mutant in enumerate(mutants):
        before, after = (mutant.get(f"result_{when}", "not run") for when in ("before", "after"))
        lost = " LOST" if before.startswith("killed") and after.startswith("survived") else ""
        print(f"{i} {mutant['function']}, {mutant['kind']}: {before}; {after}{lost}\n"
              f"    {mutant['original']}\n    {mutant['mutated']}")
    for key in ("result_before", "result_after"):
        print(key, dict(Counter(mutant.get(key, "not run").split(" by ")[0] for mutant in mutants)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", "before" | "after" as when]:
            run(f"result_{when}")
        case ["make" | "report" as command]:
            globals()[command]()
        case _:
            sys.exit(__doc__)
