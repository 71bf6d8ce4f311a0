"""The command `peft-steer`, in this process."""

from peft_steer_cli import main


def peft_steer(*words: object) -> int:
    """Runs `peft-steer` with these words and returns its exit code."""
    return main(list(map(str, words)))
