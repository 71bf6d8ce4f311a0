"""The command `peft-steer`, in this process."""

import sys
from unittest import mock

from peft_steer.commands.cli import main


def peft_steer(*words: object) -> int:
    """Runs `peft-steer` with these words and returns its exit code."""
    with mock.patch.object(sys, "argv", ["peft-steer", *map(str, words)]):
        try:
            return main()
        except SystemExit as exit_:  # argparse's way to refuse
            return int(exit_.code or 0)
