"""How a command runs: arguments are parsed before anything heavy is imported."""

import argparse
import logging
import warnings
from collections.abc import Callable

from peft_steer.utils.errors import UsageError


# What installs a module that a command needs.
_EXTRAS = {"gguf": "export", "gradio": "play", "lm_eval": "extract", "scipy": "extract", "bitsandbytes": "quant"}


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: list[str]) -> int:
    """Parses `argv` and runs `action`, which imports what it needs.

    Returns:
        0.

    Raises:
        UsageError: If `action` needs a module that is not installed.
    """
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
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        raise UsageError(f"{error}: pip install 'peft-steer[{_EXTRAS[error.name]}]'") from error
    finally:
        logger.setLevel(level)
    return 0


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `peft-steer COMMAND`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"peft-steer {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
