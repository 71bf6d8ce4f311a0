"""How a command runs: arguments are parsed before anything heavy is imported, and a user's mistake is one line."""

import argparse
import logging
import sys
from collections.abc import Callable


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: list[str]) -> int:
    """Parses `argv` and runs `action`, which imports what it needs.

    Returns:
        0, or 2 if it raised `ValueError`, `OSError` or `ImportError`, whose message is printed.
    """
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("peft_steer").setLevel(logging.INFO)
    try:
        action(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `peft-steer COMMAND`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"peft-steer {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
