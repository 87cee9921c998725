"""Draws the README's figures.

python tests/measure/figures.py bytes table.json data/bytes.png
python tests/measure/figures.py answer out/arithmetic-0 "Eva has 4 bags of 12 eggs each. How many?" x.png
python tests/measure/figures.py generations out/generations/table.json data/generations.png
python tests/measure/figures.py curves out/mine.pt out/other.pt x.png

The first draws accuracy over bytes, from a table of eval.py --json with rewards of several kinds, so that it
has their bytes. The second draws what eval.py --prompt prints in a terminal, with its colors. The third draws
accuracy over the bases of generations.py, from one or more tables of it: means over the seeds, in bands from
the lowest to the highest; below them, the seconds of training that each base needs. The fourth draws the logs
of runs: the loss (of what was trained on; on held-out examples with dots) and the accuracy over the steps.
"""
import contextlib
import io
import itertools
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[2]))
import eval as eval_script
from data import files
from models import flags, runs

GRAY, BLUE = "#dddddd", "#0077bb"
COLORS = BLUE, "#ee7733", "#009988", "#cc3311", "#555555"  # of runs
# What the README calls the rows and files.
NAMES = {"alone": "new base alone", "reward": "PRT", "ticket_base": "ticket on the old base",
         "ticket_random": "random ticket", "lora_1": "rank 1", "lora_4": "rank 4",
         "fine-tuned": "new base fine-tuned"}


def axes(pen, font, box, ticks, gap=6, top_value=1.0):
    """Draws the axes of accuracy, and returns the function that places (x, accuracy) on the sheet.

    box: left, top, right, and bottom. ticks: x -> name below it; the first and the last x are at the ends.
    gap: between the left axis and its percentages. top_value: at the top; if not 1, there are no percentages.
    """
    left, top, right, bottom = box
    first, *_, last = ticks

    def place(x, y):
        share = (x - first) / (last - first), y / top_value
        return left + share[0] * (right - left), bottom - share[1] * (bottom - top)

    for percent in range(0, 101, 20):
        value = top_value * percent / 100
        _, y = place(first, value)
        pen.line((left, y, right, y), GRAY)
        pen.text((left - gap, y), f"{percent}%" if top_value == 1 else f"{value:.2f}", "black", font, "rm")
    for tick, name in ticks.items():
        x, _ = place(tick, 0)
        pen.line((x, top, x, bottom), GRAY)
        pen.text((x, bottom + 8), name, "black", font, "ma")
    return place


def chart(lines, ticks, width=660, height=400, margin=50):
    """Returns a picture of accuracy over bytes, which are on a logarithmic scale.

    lines: list of (name, color, points, labels), with points (bytes, accuracy) and a label for each or None.
    ticks: powers of ten on the axis of bytes; the first and the last are its ends.
    """
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    names = {exponent: f"{10**(exponent % 3)} {('bytes', 'KB', 'MB')[exponent // 3]}" for exponent in ticks}
    place = axes(pen, font, (margin, margin, width - margin, height - margin), names)
    taken = []
    for i, (name, color, points, labels) in enumerate(lines):
        places = [place(math.log10(max(size, 10 ** ticks[0])), accuracy) for size, accuracy in points]
        if name:
            pen.line(places, color, 2)
            pen.text((margin + 10, margin + 18 * i), name, color, font)
        for (x, y), label in sorted(zip(places, labels or [None] * len(places)), key=lambda x: x[0][1]):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), color)
            if label:
                x = max(x, margin + pen.textbbox((0, 0), label, font)[2] / 2 + 4)
                write_free(pen, font, (x, y), label, color, taken)
    return sheet


def write_free(pen, font, point, label, color, taken):
    """Writes a label above its point, or below it, or as much farther as it has to be to cover no other one.

    taken: the boxes of labels so far, to which its own is added.
    """
    x, y = point
    for distance in (-9, 9, -46, 46, -83, 83):
        options = dict(font=font, anchor="ma" if distance > 0 else "md", align="center")
        box = pen.textbbox((x, y + distance), label, **options)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            break
    taken.append(box)
    if abs(distance) > 9:
        pen.line((x, y, x, y + distance), color)
    pen.text((x, y + distance), label, color, **options)


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


# Row of generations.py's table -> its label, color, and corners of its marks (None: a circle). People who are
# color-blind can tell these colors apart.
LINES = {"base alone": ("base alone", "#777777", None), "base + EFT": ("+ EFT", "#dd6600", 3),
         "base fine-tuned": ("tuned anew", "#222222", 4), "base + reward (PRT)": ("+ reward", BLUE, None)}
PANELS = dict(shapes="Pictures: accuracy", arithmetic="Text: right answers")


def draw_generations(tables, path):
    """Draws a panel for each world of generations.py, twice as large as it is meant to be shown.

    tables: the files that generations.py wrote.
    """
    results = [result for table in tables for result in json.loads(Path(table).read_text())]
    sheet = Image.new("RGB", (1600, 680), "white")
    pen, font = ImageDraw.Draw(sheet, "RGBA"), ImageFont.load_default(26)
    for world, left in dict(shapes=210, arithmetic=970).items():
        rows = defaultdict(list)  # row -> for each generation, (mean, lowest, highest) over the seeds
        for seeds in zip(*(result["generations"] for result in results if result["world"] == world)):
            for row in seeds[0]:
                values = [numbers[row] for numbers in seeds]
                rows[row].append((statistics.mean(values), min(values), max(values)))
        draw_panel(pen, font, PANELS[world], rows, (left, 60, left + 450, 490))
    save(sheet, path)


def draw_panel(pen, font, title, rows, box):
    """Draws four lines over the generations, and below them the seconds of training that each one needs.

    rows: as in `draw_generations`. box: as in `axes`.
    """
    left, top, right, bottom = box
    numbers = range(1, len(rows["base alone"]) + 1)
    place = axes(pen, font, box, {i: str(i) for i in numbers}, gap=18)
    pen.text((left, top - 16), title, "black", font, "ls")
    ends, places = {}, {}
    for row, (_, color, _) in LINES.items():
        means, lowest, highest = ([place(*point) for point in zip(numbers, line)] for line in zip(*rows[row]))
        places[row] = means
        pen.polygon([*lowest, *reversed(highest)], f"{color}33")
    for row, (label, color, corners) in LINES.items():
        pen.line(places[row], color, 5)
        for x, y in places[row]:
            if corners:
                pen.regular_polygon((x, y, 12), corners, fill=color)
            else:
                pen.circle((x, y), 9, color)
        ends[label, color] = places[row][-1][1]
    for (label, color), y in apart(ends, 30).items():
        pen.text((right + 18, y), label, color, font, "lm")

    cells = {"generation": ("black", []),
             "parameters": ("black", [f"{x:.0f}K" for x, *_ in rows["thousand parameters"]])}
    for row, line in {"fine-tuning, s": "base fine-tuned", "reward, s": "base + reward (PRT)"}.items():
        label, color, _ = LINES[line]
        cells[label] = color, [f"{x:.0f} s" for x, *_ in rows[row]]
    for i, (name, (color, words)) in enumerate(cells.items()):
        y = bottom + 8 + 40 * i
        pen.text((left - 55, y), name, color, font, "ra")
        for number, word in zip(numbers, words):
            pen.text((place(number, 0)[0], y), word, color, font, "ma")


def draw_curves(runs, path):
    """Draws loss and accuracy over the steps of runs, named by their checkpoints or the folder of these."""
    runs = [str(file).removesuffix(".jsonl") for run in runs
            for file in (sorted(Path(run).glob("*.pt.jsonl")) if Path(run).is_dir() else [run])]
    logs = {}
    for out in runs:
        with files.explain(f"{out}.jsonl", ValueError):  # without a last line that was cut off
            logs[out] = [json.loads(line) for line in files.read_text(f"{out}.jsonl").split("\n")[:-1]]
    steps = max((row.get("step", 0) for log in logs.values() for row in log), default=0)
    if not steps:
        raise ValueError(f"{', '.join(runs)}: no step is logged so far")
    sheet = Image.new("RGB", (1100, 420 + 22 * len(logs)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for panel, (key, held_out_key) in enumerate((("loss", "nll"), ("accuracy", "accuracy"))):
        trained, held_out = {}, {}
        for out, log in logs.items():
            trained[out] = [(row["step"], row[key]) for row in log if key in row]
            held_out[out] = [(row["step"], row["held_out"][held_out_key]) for row in log if "held_out" in row]
        values = [y for lines in (trained, held_out) for line in lines.values() for _, y in line]
        left = 70 + 540 * panel
        place = axes(pen, font, (left, 50, left + 430, 350), {0: "0", steps: f"{steps} steps"},
                     top_value=1.0 if key == "accuracy" else 1.05 * max(values))
        title = f"{key}, the mean since the last point (dots: on held-out examples)"
        pen.text((left, 20), title, "black", font)
        for i, out in enumerate(logs):
            color = COLORS[i % len(COLORS)]
            pen.line([place(*point) for point in trained[out]], color, 2)
            for point in held_out[out]:
                pen.circle(place(*point), 5, color)
            pen.text((70, 390 + 22 * i), out, color, font)
    save(sheet, path)


def apart(heights, gap):
    """Returns heights, by name, moved so that they are a gap or more from each other, in the same order."""
    heights, order = dict(heights), sorted(heights, key=heights.get)
    for _ in range(20):  # moving two apart may bring them closer to others
        for above, below in itertools.pairwise(order):
            lack = max(0, gap - heights[below] + heights[above]) / 2
            heights[above] -= lack
            heights[below] += lack
    return heights


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
    commands = dict(bytes=["table"], answer=["run", "prompt"], generations=["tables"], curves=["runs"])
    for name, words in commands.items():
        picture = pictures.add_parser(name)
        for word in words:
            picture.add_argument(word, nargs="+" if word in ("tables", "runs") else None)
        picture.add_argument("path")
    arguments = vars(p.parse_args())
    draw = dict(bytes=draw_bytes, answer=draw_answer, generations=draw_generations, curves=draw_curves)
    draw[arguments.pop("picture")](**arguments)


if __name__ == "__main__":
    runs.main(main)
