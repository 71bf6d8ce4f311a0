"""How a command runs: arguments are parsed before anything heavy is imported, and a user's mistake is one line."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable


# What installs a module that a command needs.
_EXTRAS = {"gguf": "export", "gradio": "play", "lm_eval": "extract", "scipy": "extract", "bitsandbytes": "quant"}


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: list[str]) -> int:
    """Parses `argv` and runs `action`, which imports what it needs.

    Returns:
        0, or 2 if it raised `ValueError` or `OSError`, or needs a module that is not there. The message is printed.
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
        print(f"{parser.prog}: {error}: pip install 'peft-steer[{_EXTRAS[error.name]}]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)
    return 0


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of `peft-steer COMMAND`, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"peft-steer {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
