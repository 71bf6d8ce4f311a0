"""Runs a command, and is the one place that reports a user's mistake."""

import argparse
import importlib
import sys

from peft_steer.utils.errors import UsageError


_OURS = ("peft_steer", "peft_steer_cli", "lm_eval_tasks")


def run(prog: str, target: str, arguments: argparse.Namespace | list[str], extra: str | None = None) -> int:
    """Calls a command with its arguments.

    Args:
        prog: How the user called it, for messages.
        target: `"module:function"`.
        arguments: Parsed, or the words of the command line.
        extra: Of this package, which installs what the command needs.

    Returns:
        The command's exit code, or 2 after a `UsageError`, whose message is printed, or if a package is not installed.
        Other errors keep their traceback.
    """
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments) or 0
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if extra is None or str(error.name).partition(".")[0] in _OURS:
            raise
        print(
            f"{prog}: needs {error.name!r}, which is not installed: pip install 'peft-steer[{extra}]'", file=sys.stderr
        )
        return 2
