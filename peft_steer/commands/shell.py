"""Runs a command, and is the one place that reports a user's mistake."""

import argparse
import importlib
import sys

from peft_steer.utils.errors import UsageError


def run(prog: str, target: str, arguments: argparse.Namespace | list[str]) -> int:
    """Calls a command with its arguments.

    Args:
        prog: How the user called it, for messages.
        target: `"module:function"`.
        arguments: Parsed, or the words of the command line.

    Returns:
        The command's exit code, or 2 after a `UsageError`, whose message is printed. Other errors keep their
        traceback.
    """
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments) or 0
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
