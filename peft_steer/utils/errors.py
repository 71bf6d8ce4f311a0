"""What a user did wrong, told apart from everything that is a fault of the program."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """The command or its files cannot be used as written. Raised before the work begins; `peft-steer` prints the
    message without a traceback and exits with 2."""


@contextmanager
def usage_errors(prefix: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turns errors of these kinds into a `UsageError`, the prefix before the message. Only around calls that check or
    find what a user has named."""
    try:
        yield
    except kinds as error:
        raise UsageError(f"{prefix}{error}") from error


def suggest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or a list of all of them if none is near."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else f". Known: {', '.join(sorted(by_lower.values()))}"
