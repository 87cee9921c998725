"""The picture of test images with two models' answers."""
import math

import torch
from PIL import Image, ImageDraw, ImageFont


def draw_picture(data, *answers, columns=8, rows=4, cell=120):
    """Returns a grid of random test images, with the models' answers [N] below: right ones are green."""
    n = min(columns * rows, len(data.labels))
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:n].tolist()
    sheet = Image.new("RGB", (columns * cell, math.ceil(n / columns) * (cell + 30)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for position, i in enumerate(chosen):
        x, y = position % columns * cell, position // columns * (cell + 30)
        image = Image.fromarray(data.images[i].permute(1, 2, 0).numpy())  # [3, S, S] -> [S, S, 3]
        sheet.paste(image.resize((cell - 6, cell - 6), Image.BICUBIC), (x + 3, y + 3))
        for line, answer in enumerate(answers):
            name, right = data.classes[answer[i]], answer[i] == data.labels[i]
            while pen.textlength(name, font) > cell - 6:
                name = name[:-2] + "…"
            pen.text((x + 4, y + cell - 2 + 14 * line), name, "green" if right else "red", font)
    return sheet
