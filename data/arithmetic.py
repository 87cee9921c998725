"""The built-in text: word problems of one step.

The old base's text has half of the facts, the new base's all. Training problems use the facts in the old
base's text, and test problems use the others.
"""
import random

NAMES = ["Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Ida", "Max", "Zoe"]
ITEMS = ["apples", "books", "coins", "eggs", "shells", "stamps", "cards", "pens", "stones", "cakes"]
STORIES = {"+": ["{n} has {a} {i} and buys {b} more.", "{n} has {a} {i} and finds {b} more.",
                 "{n} picks {a} {i} and then {b} more."],
           "-": ["{n} has {a} {i} and sells {b}.", "{n} has {a} {i} and loses {b}.",
                 "{n} had {a} {i} and gave {b} away."],
           "x": ["{n} has {a} bags of {b} {i} each.", "{n} fills {a} boxes with {b} {i} each.",
                 "{n} buys {a} packs of {b} {i}."]}
ENDS = {"+": "Now it is {c} in all.", "-": "Now {c} are left.", "x": "That makes {c} in all."}
COUNTS = dict(old=40_000, new=40_000, train=4_000, test=1_000)


def facts():
    """Returns all facts as (a, sign, b, result); a <= b for the signs "+" and "x", which commute."""
    sums = [(a, "+", b, a + b) for a in range(1, 21) for b in range(a, 21)]
    products = [(a, "x", b, a * b) for a in range(2, 13) for b in range(a, 13)]
    return sums + products + [(a, "-", b, a - b) for a in range(2, 21) for b in range(1, a)]


def arithmetic(split):
    """Yields segments: pages of text for the splits "old" and "new", problems for "train" and "test"."""
    known = {fact: random.Random(f"{fact}").random() < 0.5 for fact in facts()}
    pool = [fact for fact, old in known.items() if split == "new" or (not old if split == "test" else old)]
    rng = random.Random(f"arithmetic {split}")
    problems = split in ("train", "test")

    def item():
        a, sign, b, c = rng.choice(pool)
        a, b = (b, a) if sign != "-" and rng.random() < 0.5 else (a, b)
        values = dict(n=rng.choice(NAMES), i=rng.choice(ITEMS), a=a, b=b, c=c)
        story, equation = " " + rng.choice(STORIES[sign]).format(**values), f" {a} {sign} {b} = {c}"
        if problems:
            return [(story + " How many?", False), (f"{equation} #### {c}", True)]
        heading = f" #### {values['i']}" if rng.random() < 0.2 else ""
        question = " How many?" if rng.random() < 0.5 else ""
        end = " " + ENDS[sign].format(**values)
        return heading + rng.choice([equation, story + question + end, story + question + equation])

    for _ in range(COUNTS[split]):
        yield item() if problems else [("".join(item() for _ in range(rng.randint(1, 4))), True)]


def load(source, split):
    """Returns what text.load does, for arithmetic, arithmetic-old, and arithmetic-new."""
    if split == "test" and source != "arithmetic":
        raise FileNotFoundError(f"--data {source}: it has no test split")
    split = source.partition("-")[2] or split
    return " {}", [(f"arithmetic {i}", parts) for i, parts in enumerate(arithmetic(split))]
