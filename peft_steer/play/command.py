"""What `peft-steer play` does: loads a session and serves its page."""

import argparse

from peft_steer.utils.hub import find_model

from .session import load


def play(args: argparse.Namespace) -> None:
    """Runs the command; see `peft_steer/commands/play.py` for the arguments. Returns when it is interrupted."""
    try:
        from .page import launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("the page needs gradio: pip install 'peft-steer[play]'") from error
    bits = 4 if args.load_in_4bit else 8 if args.load_in_8bit else None
    session = load(args.model, find_model(args.model).path, args.adapters, args.dtype, bits)
    launch(session, args.host, args.port)
