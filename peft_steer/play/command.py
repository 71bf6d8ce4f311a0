"""What `peft-steer play` does: loads a session and serves its page."""

import argparse

from transformers import AutoConfig

from peft_steer.utils.errors import usage_errors
from peft_steer.utils.hub import find_model

from .page import launch
from .session import load


def play(args: argparse.Namespace) -> None:
    """Runs the command; see `peft_steer/commands/play.py` for the arguments. Returns when it is interrupted."""
    bits = 4 if args.load_in_4bit else 8 if args.load_in_8bit else None
    path = find_model(args.model).path
    with usage_errors(f"--model: {args.model!r} cannot be loaded: "):
        AutoConfig.from_pretrained(path)
    with usage_errors():
        session = load(args.model, path, args.adapters, args.dtype, bits)
    with usage_errors(kinds=(OSError,)):  # a port that is taken
        launch(session, args.host, args.port)
