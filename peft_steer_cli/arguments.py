"""Types of arguments: argparse refuses a value that cannot be used, with the name of the flag."""

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of a whole number that is not below `smallest`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if number < smallest:
            raise ArgumentTypeError(f"must be at least {smallest}, not {number}")
        return number

    return parse


def positive(text: str) -> float:
    """The type of a number above 0."""
    number = _finite(text)
    if number <= 0:
        raise ArgumentTypeError(f"must be above 0, not {text}")
    return number


def non_negative(text: str) -> float:
    """The type of a number of at least 0."""
    number = _finite(text)
    if number < 0:
        raise ArgumentTypeError(f"must be at least 0, not {text}")
    return number


def directory(text: str) -> Path:
    """The type of a directory that exists or can be made."""
    path = Path(text)
    if path.is_file():
        raise ArgumentTypeError(f"{text!r} is a file; name a directory")
    return path


def writable_file(text: str) -> Path:
    """The type of a file to write, in a directory that exists."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{text!r} is a directory; name a file")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no directory {str(path.parent)!r} for {text!r}")
    return path


def folder(text: str) -> Path:
    """A folder that exists."""
    path = Path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"there is no folder {text!r}")
    return path


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def with_underscores(words: list[str]) -> list[str]:
    """`--train-steps=4` as `--train_steps=4`, as TRL's flags; words that are not flags as they are."""
    parts = [word.partition("=") for word in words]
    return [
        "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else flag + equals + value
        for flag, equals, value in parts
    ]


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not math.isfinite(number):
        raise ArgumentTypeError(f"must be a finite number, not {text}")
    return number
