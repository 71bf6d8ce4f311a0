"""`peft-steer analyze`: each analysis is a module with its docstring, `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import logging
import sys
import warnings

import transformers


# The name on the command line: the module, and a line of help.
ANALYSES = {
    "first-order": (
        "first_order",
        "what a change of MLP weights does to their output, and what steering before the MLP can do of it",
    ),
    "where": ("where", "in which term of each block the change made by fine-tuning lies: MLP, attention or skip path"),
    "errors": (
        "error_growth",
        "how an error at a block grows to the model's output, and the ranks this suggests",
    ),
    "joint": ("joint", "the halves of a joint adapter: whether they share directions, and what each scores alone"),
    "linear": (
        "linear",
        "how linear the change made by fine-tuning is: the best maps of each rank, and how near they come",
    ),
    "oracle": (
        "oracle",
        "steer by what fine-tuning does to the hidden states: how near it comes to the tuned model, and spectra",
    ),
}
_USAGE = "usage: peft-steer analyze ANALYSIS --base MODEL --tuned MODEL_OR_ADAPTER ...\n\n" + "\n".join(
    f"  {name:13}{text}" for name, (_, text) in ANALYSES.items()
)


def main(argv: list[str]) -> int:
    """Runs `peft-steer analyze`. Returns 0, or 2 if there is no such analysis.

    Raises:
        UsageError: If the models, the text or the flags cannot be used as given.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n`peft-steer analyze ANALYSIS --help` says more.")
        return 0 if argv else 2
    if argv[0] not in ANALYSES:
        print(f"peft-steer analyze: unknown analysis {argv[0]!r}\n{_USAGE}", file=sys.stderr)
        return 2
    run_module(f"peft_steer.analysis.{ANALYSES[argv[0]][0]}", f"peft-steer analyze {argv[0]}", argv[1:])
    return 0


def run_module(name: str, prog: str, argv: list[str]) -> None:
    """Parses the arguments of an analysis and runs it. Flags may be written with `-` for `_`, as TRL's."""
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    args = parser.parse_args([_with_underscores(word) for word in argv])
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("peft_steer").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    # PEFT still uses names that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    module.run(args)


def _with_underscores(word: str) -> str:
    """`--train-steps=4` as `--train_steps=4`; words that are not flags as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value
