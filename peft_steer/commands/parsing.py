"""How a command runs: arguments are parsed before anything heavy is imported."""

import argparse
import logging
import warnings
from collections.abc import Callable


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: list[str]) -> int:
    """Parses `argv`, runs `action`, which imports what it needs, and returns 0."""
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logger = logging.getLogger("peft_steer")
    level = logger.level
    logger.setLevel(logging.INFO)
    # About transformers' own code, PEFT's for merging, and a kernel that is faster and not needed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        action(args)
    finally:
        logger.setLevel(level)
    return 0


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `peft-steer COMMAND`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"peft-steer {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
