"""The end of a message about a name that nobody knows."""

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or a list of all of them if none is near."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else f". Known: {', '.join(sorted(by_lower.values()))}"
