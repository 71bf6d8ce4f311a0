"""The console command `peft-steer`. Nothing of `peft_steer` or torch is imported before a command runs, so help and
mistyped commands answer at once. One module a command has its parser; the commands themselves are in `peft_steer`."""

from .main import main


__all__ = ["main"]
