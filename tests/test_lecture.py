"""README.md and LECTURE.md quote what is in the files, and the lecture's Python prints what is shown."""
import ast
import re

import pytest
from conftest import ROOT

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(\d+(?:\.\d+)?)(%?)")
HEADER = re.compile(r"# (\S+\.py)(?:, (\w+))?\n")
QUOTES, RUNS = [], []  # (file, function or "", lines), and [code, what it prints]
for page in ("README.md", "LECTURE.md", "tests/solutions.md"):
    for language, text in BLOCK.findall((ROOT / page).read_text()):
        header = HEADER.match(text)
        if language == "python" and header:
            QUOTES.append((header[1], header[2] or "", text[header.end():]))
        elif page != "README.md" and language == "python":
            RUNS.append([text, ""])
        elif page != "README.md":
            RUNS[-1][1] += text


def source(file, function):
    """Returns the text of a file, or that of the one function of this name in it."""
    text = (ROOT / file).read_text()
    if not function:
        return text
    node, = (node for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.FunctionDef) and node.name == function)
    return ast.get_source_segment(text, node)


def is_quoted_from(quote, text):
    """Returns whether the lines of a quote follow each other in a text; a line "..." stands for any lines."""
    rest = [line.strip() for line in text.splitlines()]
    for part in quote.strip().split("\n...\n"):
        lines = [line.strip() for line in part.splitlines()]
        starts = [i for i in range(len(rest)) if rest[i:i + len(lines)] == lines]
        if not starts:
            return False
        rest = rest[starts[0] + len(lines):]
    return True


@pytest.mark.parametrize("file, function, quote", QUOTES, ids=[" ".join(quote[:2]) for quote in QUOTES])
def test_the_lecture_quotes_what_is_in_the_file(file, function, quote):
    """Catches: A line of the project has changed, and the lecture still explains the old one."""
    assert is_quoted_from(quote, source(file, function))


def test_the_lecture_quotes_the_method():
    """Catches: No quote is recognized, so that none is checked."""
    names = {function for file, function, _ in QUOTES if file == "prt.py"}
    assert names == {"tilt", "reward", "prt_loss", "fit", "combine", "generate"}


def differences(printed, expected):
    """Yields pairs of lines that differ in words, by 3 percentage points, or by 5% in another number."""
    for line, want in zip(printed.splitlines(), expected.splitlines(), strict=True):
        a, b = (NUMBER.findall(text) for text in (line, want))
        same = NUMBER.sub(r"0\2", line) == NUMBER.sub(r"0\2", want)
        if not same or any(abs(float(x) - float(y)) > (3 if unit else 0.01 + 0.05 * float(y))
                           for (x, _), (y, unit) in zip(a, b)):
            yield line, want


def test_the_lecture_prints_what_it_shows(capsys):
    """Catches: A solution does not run, or its result is another than the text explains."""
    names, wrong = {}, []
    for code, expected in RUNS:
        exec(compile(code, "LECTURE.md", "exec"), names)
        lines = capsys.readouterr().out.splitlines(keepends=True)
        printed = "".join(line for line in lines if not line.startswith("fit 300/300: "))
        wrong += differences(printed, expected)
    assert not wrong
