"""Types of arguments: argparse prints their errors with the name of the flag."""

import json
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
