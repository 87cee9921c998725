"""Counts lines of code, and fails if the project outgrows its limits: python .ci/sizes.py.

A line of code is neither blank, nor a comment, nor part of a docstring. What a command loads is found by
tests/test_recipes.py, which runs the commands; here, the two rings are counted by the names of their files.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ["prt.py", "data/files.py", "data/schema.py", "data/hub.py", "data/bpe.py", "models/scores.py",
          "models/runs.py", "models/weights.py", "models/flags.py"]
IMAGES = [*SHARED, "data/images.py", "data/clip_tokenizer.py", "models/clip.py"]
TEXT = [*SHARED, "data/text.py", "data/tokenizer.py", "models/gpt.py"]
CORES = {"train_vision.py": ([*IMAGES, "models/watch.py", "train_vision.py"], 1552),
         "train_lm.py": ([*TEXT, "models/watch.py", "train_lm.py"], 1749),
         "eval.py, images": ([*IMAGES, "eval.py", "models/records.py", "models/picture.py"], 1885),
         "eval.py, text": ([*TEXT, "eval.py", "models/records.py", "models/answers.py",
                            "models/cache.py"], 2157)}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}
ROOM, TOTAL, METHOD, FIT, TESTS, COLUMNS = 120, 4627, 300, 60, 9361, 110


def code_lines(source):
    """Returns the numbers of the lines that hold code."""
    docstrings, code = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - docstrings


def body_lines(source, function):
    """Returns how many lines of code the body of a function has."""
    node, = (node for node in ast.parse(source).body if getattr(node, "name", "") == function)
    return len({line for line in code_lines(source) if node.body[0].lineno <= line <= node.end_lineno})


def main():
    sources = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
               for pattern in ("*.py", "models/*.py", "data/*.py") for path in sorted(ROOT.glob(pattern))}
    code = {name: len(code_lines(source)) for name, source in sources.items()}
    for name, lines in code.items():
        print(f"{sources[name].count(chr(10)):5d} raw {lines:5d} code  {name}")
    tests = [*ROOT.glob("tests/test_*.py"), ROOT / "tests/conftest.py"]
    checks = {f"core of {name}": (sum(code[f] for f in files), limit)
              for name, (files, limit) in CORES.items()}
    core = {f for files, _ in CORES.values() for f in files}
    checks |= {f"room {name}": (lines, ROOM) for name, lines in code.items() if name not in core}
    checks |= {
        "all but tests": (sum(code.values()), TOTAL),
        "prt.py, raw": (sources["prt.py"].count("\n"), METHOD - 1),
        "body of prt.fit": (body_lines(sources["prt.py"], "fit"), FIT),
        "tests/test_*.py and conftest.py, raw": (sum(f.read_text("utf-8").count("\n") for f in tests), TESTS),
        "README.md, raw": ((ROOT / "README.md").read_text("utf-8").count("\n"), 200),
        "longest line": (max(len(line) for s in sources.values() for line in s.splitlines()), COLUMNS),
        "semicolons": (sum(token.string == ";" for source in sources.values()
                           for token in tokenize.generate_tokens(io.StringIO(source).readline)), 0)}
    for what, (found, limit) in checks.items():
        if found > limit or not what.startswith("room"):
            print(f"{what}: {found} (at most {limit})" + (" TOO MANY" if found > limit else ""))
    return any(found > limit for found, limit in checks.values())


if __name__ == "__main__":
    sys.exit(main())
