"""Draws the README's figures.

python tests/measure/figures.py bytes table.json data/bytes.png
python tests/measure/figures.py answer out/arithmetic-0 "Eva has 4 bags of 12 eggs each. How many?" x.png

The first draws accuracy over bytes, from a table of eval.py --json with rewards of several kinds, so that it
has their bytes. The second draws what eval.py --prompt prints in a terminal, with its colors.
"""
import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval as eval_script
from data import files
from models import flags, runs

GRAY, BLUE = "#dddddd", "#0077bb"
# What the README calls the rows and files.
NAMES = {"alone": "new base alone", "reward": "PRT", "ticket_base": "ticket on the old base",
         "ticket_random": "random ticket", "fine-tuned": "new base fine-tuned"}


def chart(lines, ticks, width=660, height=400, margin=50):
    """Returns a picture of accuracy over bytes, which are on a logarithmic scale.

    lines: list of (name, color, points, labels), with points (bytes, accuracy) and a label for each or None.
    ticks: powers of ten on the axis of bytes; the first and the last are its ends.
    """
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)

    def place(size, accuracy):
        x = (math.log10(max(size, 10 ** ticks[0])) - ticks[0]) / (ticks[-1] - ticks[0])
        return margin + x * (width - 2 * margin), height - margin - accuracy * (height - 2 * margin)

    for percent in range(0, 101, 20):
        x, y = place(0, percent / 100)
        pen.line((x, y, width - margin, y), GRAY)
        pen.text((x - 6, y), f"{percent}%", "black", font, "rm")
    for exponent in ticks:
        x, y = place(10**exponent, 0)
        pen.line((x, margin, x, y), GRAY)
        name = f"{10**(exponent % 3)} {('bytes', 'KB', 'MB')[exponent // 3]}"
        pen.text((x, y + 8), name, "black", font, "ma")
    for i, (name, color, points, labels) in enumerate(lines):
        places = [place(*point) for point in points]
        if name:
            pen.line(places, color, 2)
            pen.text((margin + 10, margin + 18 * i), name, color, font)
        for k, ((x, y), label) in enumerate(zip(places, labels or [None] * len(places))):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), color)
            if label:  # every other label above its point, since points may be close to each other
                above = k % 2 == 1
                x = max(x, margin + pen.textbbox((0, 0), label, font)[2] / 2 + 4)
                pen.text((x, y - 9 if above else y + 9), label, color, font, "md" if above else "ma",
                         align="center")
    return sheet


def draw_bytes(table, path):
    """Draws the rows of a table of eval.py that stand on the new base."""
    rows = json.loads(Path(table).read_text())["rows"]
    points, labels = [], []
    for row in rows:
        if row["method"].startswith("base") and "sum" not in row["method"]:
            name = re.sub(r"^base \+ |^base | \(PRT\)|\S*/|\.pt", "", row["method"])
            models = 1 if row["method"] in ("base alone", "base fine-tuned") else 3 if name == "EFT" else 2
            points.append((row["bytes"], row["top1"]))
            count = f"{models} models" if models > 1 else "1 model"
            labels.append(f"{NAMES.get(name, name)}\n{row['top1']:.1%}, {count}")
    save(chart([("", BLUE, points, labels)], range(3, 8)), path)


class Terminal(io.StringIO):
    """Takes what is printed, with colors."""

    def isatty(self):
        return True


def draw_answer(run, prompt, path, size=15):
    """Draws the answers to a prompt, without and with the reward; colors as in a terminal."""
    screen, command = Terminal(), ["eval.py", "--run", run, "--prompt", prompt]
    with contextlib.redirect_stdout(screen), mock.patch.object(sys, "argv", command):
        eval_script.main()
    lines = [line for line in screen.getvalue().splitlines() if line.strip()]
    font, pad = ImageFont.load_default(size), 12
    plain = [re.sub(r"\033\[[\d;]*m", "", line) for line in lines]
    width = max(font.getlength(text) for text in [prompt, *plain]) + 2 * pad + 20
    sheet = Image.new("RGB", (int(width), pad + (len(lines) + 1) * (size + 10) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((pad, pad), prompt, "#555555", font)
    for i, line in enumerate(lines, 1):
        x, y = pad, pad + i * (size + 10)
        for color, piece in re.findall(r"(?:\033\[48;5;(\d+)m\033\[30m)?([^\033]+)(?:\033\[0m)?", line):
            length = font.getlength(piece)
            if color:
                pen.rectangle((x, y - 2, x + length, y + size + 4), rgb(int(color)))
            pen.text((x, y), piece, "black", font)
            x += length
    save(sheet, path)


def rgb(code):
    """Returns the color of one of the 216 codes (16 to 231) of a terminal's color cube."""
    levels = (0, 95, 135, 175, 215, 255)
    return tuple(levels[(code - 16) // base % 6] for base in (36, 6, 1))


def save(sheet, path):
    with files.atomic(path) as f:
        sheet.save(f, "PNG", optimize=True)


def main():
    p = flags.parser(__doc__)
    pictures = p.add_subparsers(dest="picture", required=True)
    for name, words in dict(bytes=("table", "path"), answer=("run", "prompt", "path")).items():
        picture = pictures.add_parser(name)
        for word in words:
            picture.add_argument(word)
    arguments = vars(p.parse_args())
    dict(bytes=draw_bytes, answer=draw_answer)[arguments.pop("picture")](**arguments)


if __name__ == "__main__":
    runs.main(main)
