"""Fields of a configuration that belong to one kind of intervention: their defaults and what they may be."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """A field that only some kinds have.

    Attributes:
        default: Its value if the configuration leaves it at None.
        check: Raises `ValueError` if a value, given after the field's name, is not allowed. Not asked about None.
    """

    default: Any
    check: Callable[[str, Any], None]


def check_member(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in list(allowed):
        raise ValueError(f"`{name}={value!r}` is unknown; choose one of {', '.join(map(repr, allowed))}.")


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}={value!r}` must be an integer of at least 1.")


def check_non_negative(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}={value!r}` must be a finite number of at least 0.")
