"""Errors of libraries, with the flag and the value that they are about."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def blaming(flag: str, value: str, says: str, *also: type[Exception]) -> Iterator[None]:
    """Puts `flag: 'value' says` before the message of what a library raises: `OSError`, which stays one, `ValueError`
    and the classes in `also`, which become `ValueError`."""
    try:
        yield
    except (OSError, ValueError, *also) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise kind(f"{flag}: {value!r} {says} ({reason})") from error
