"""What files from outside may say: schemas.toml lists it, and `check` refuses all else.

So nothing in a file is silently ignored, and the code that uses it need not ask what it gets.
"""
import math
import re
import reprlib
import tomllib
from pathlib import Path

import torch

SCHEMAS = tomllib.loads(Path(__file__).with_name("schemas.toml").read_text("utf-8"))


def check(value, name, *schemas):
    """Raises ValueError unless a value is a dict as in all of the schemas, names or tables of schemas.toml.

    The message begins with `name` and the wrong key.
    """
    tables = [SCHEMAS[x] if isinstance(x, str) else x for x in schemas]
    ignored = [key for table in tables for key in table.get("(ignored)", [])]
    kinds = {key.removesuffix("?"): (kind, key.endswith("?"))  # of a key in two tables, the last one counts
             for table in tables for key, kind in table.items() if key != "(ignored)"}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {reprlib.repr(value):.60}, where there must be a dict")
    for key, (kind, optional) in kinds.items():
        x = value.get(key)
        if x is None and optional:
            continue
        if isinstance(kind, dict):
            check(x, f"{name}: {key}", kind)
        elif not fits(x, kind):
            found = "is missing" if x is None else f"is {reprlib.repr(x):.60}"
            needed = kind if isinstance(kind, str) else " or ".join(map(repr, kind))
            raise ValueError(f"{name}: {key} {found}; it must be {needed}")
    unknown = [f"{k!s:.50} {reprlib.repr(x):.50}" for k, x in value.items()
               if k not in kinds and k not in ignored and not is_empty(x)]
    if unknown and "*" not in ignored:
        raise ValueError(f"{name}: {', '.join(unknown[:5])}: not supported here")


def fits(x, kind):
    """Returns whether a value is of a kind, a key of KINDS, or one of a list of values."""
    if isinstance(kind, list):
        return any(type(x) is type(value) and x == value for value in kind)  # True is not 1
    return KINDS[kind](x)


def is_empty(x):
    return x is None or (isinstance(x, (bool, int, float, str, list, dict)) and not x)


def integer(low, high=2**31 - 1):
    return lambda x: type(x) is int and low <= x <= high  # a bool is an int, too


def number(above=-math.inf, below=math.inf):
    return lambda x: type(x) in (int, float) and above < x < below


def a(kind):
    return lambda x: isinstance(x, kind)


def all_of(kind, least=1, most=math.inf):
    """Returns a function that tells whether a value is a list of `least` to `most` such values."""
    return lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(kind, x))


KINDS = {
    "a text": a(str), "a bool": a(bool), "a dict": a(dict), "a list": a(list), "a tensor": a(torch.Tensor),
    "a positive integer": integer(1),
    "a whole number": integer(0),
    "a whole number or several": lambda x: integer(0)(x) or all_of(integer(0))(x),
    "an integer from 1 to 1000": integer(1, 1000),  # of layers, which take time to build
    "an integer from 1 to 4096": integer(1, 4096),  # of a head's width, for which RoPE makes a table
    "an integer from 32 to 1024": integer(32, 1024),
    "a positive number": number(above=0),
    "a share below 1": lambda x: number(0, 1)(x) or fits(x, [0, 0.0]),
    "a share above 0 and below 1": number(0, 1),
    "three numbers": all_of(number(), 3, 3),
    "three positive numbers": all_of(number(above=0), 3, 3),
    "four positive integers": all_of(integer(1), 4, 4),
    "four integers from 1 to 1000": all_of(integer(1, 1000), 4, 4),
    "a word": lambda x: isinstance(x, str) and re.fullmatch(r"\w[\w-]*", x),
    "full_attention in every layer": all_of(lambda x: x == "full_attention"),
    "texts": all_of(a(str)),
    "bools": all_of(a(bool)),
    "whole numbers": all_of(integer(0)),
    "zeros and ones": all_of(lambda x: fits(x, [0, 1])),
    "templates with {c}": all_of(lambda x: isinstance(x, str) and "{c}" in x),
    "a template with {}": lambda x: isinstance(x, str) and "{}" in x}
