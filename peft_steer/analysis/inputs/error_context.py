"""Errors of libraries, as errors of the user that name the flag and the value."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from peft_steer.utils.errors import UsageError


@contextmanager
def error_context(flag: str, value: str, problem: str, *also: type[BaseException]) -> Iterator[None]:
    """Raises `UsageError`, `flag: 'value' problem (the library's message)`, for an `OSError`, a `ValueError` or one of
    the classes in `also`."""
    kinds: tuple[type[BaseException], ...] = (OSError, ValueError, *also)
    try:
        yield
    except kinds as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise UsageError(f"{flag}: {value!r} {problem} ({reason})") from error
