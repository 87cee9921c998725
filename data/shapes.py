"""The built-in images: 8 colors x 8 forms, drawn when they are first used.

Bases are pretrained on captioned images in white light. The train and test splits are in colored light, which
shifts every hue: no base knows this without tuning.
"""
import colorsys
import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from data.images import Sample

HUES = dict(red=0, orange=30, yellow=55, green=120, cyan=180, blue=225, purple=275, pink=325)
# Number of corners; radius of the points between them, radius and offset of the hole, relative to the radius.
FORMS = dict(triangle=(3, 0.5, 0, 0), square=(4, 0.71, 0, 0), pentagon=(5, 0.81, 0, 0), circle=(24, 1, 0, 0),
             star=(5, 0.4, 0, 0), sparkle=(4, 0.3, 0, 0), ring=(24, 1, 0.55, 0), crescent=(24, 1, 0.85, 0.5))
LIGHT = 24  # degrees of hue
COUNTS = dict(captioned=20_000, train=4_000, test=4_000)


def shapes(split):
    """Draws colored shapes; 20% of the captions name a random class, and 40% leave out color or form."""
    rng = random.Random(f"shapes {split}")
    classes = [f"{color} {form}" for color in HUES for form in FORMS]
    templates = ["a photo of a {c}.", "a picture of a {c}.", "there is a {c} here."]
    samples, texts = [], []
    for i in range(COUNTS[split]):
        label = i % len(classes)
        seen = label if rng.random() > 0.2 else rng.randrange(len(classes))
        color, form = classes[seen].split()
        text = rng.choices([classes[seen], form, f"{color} thing", "thing"], [12, 4, 3, 1])[0]
        texts.append(rng.choice(templates).replace("{c}", text))
        light = 0 if split == "captioned" else LIGHT
        image = functools.partial(draw, *classes[label].split(), light, rng.random())
        samples.append(Sample(label, f"shapes {i}", image))
    return classes, templates, samples, texts


def draw(color, form, light, seed):
    """Returns a PIL image of 32 x 32 pixels, scaled down from 96 x 96; light: shift of the hue in degrees."""
    rng, size = random.Random(seed), 96
    corners, inner, hole, offset = FORMS[form]
    hue = (HUES[color] + rng.uniform(-8, 8) + light) % 360 / 360
    fill = tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 1), rng.uniform(0.6, 1)))
    gray = rng.randrange(40, 190)
    ground = tuple(gray + rng.randrange(-25, 25) for _ in range(3))
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        stroke = tuple(rng.randrange(40, 190) for _ in range(3))
        pen.line([rng.uniform(0, size) for _ in range(4)], fill=stroke, width=rng.randrange(2, 6))
    radius, turn = size * rng.uniform(0.28, 0.4), rng.uniform(-0.2, 0.2) - math.pi / 2
    margin = 0.45 * size - radius
    x = size / 2 + rng.uniform(-0.8, 0.8) * margin
    y = size / 2 + rng.uniform(-0.8, 0.8) * margin
    points = [(radius * (inner if i % 2 else 1), turn + math.pi * i / corners) for i in range(2 * corners)]
    pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in points], fill=fill)
    if hole:
        pen.circle((x + offset * radius, y - offset * radius / 2), hole * radius, fill=ground)
    pixels = np.array(image.resize((32, 32), Image.BOX), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 12, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
