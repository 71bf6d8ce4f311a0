"""`peft-steer analyze`: one module an analysis, with its docstring, `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import logging
import sys
import warnings

import transformers


ANALYSES = {
    "first-order": "what a change of MLP weights does to their output, and what steering before the MLP can do of it",
    "where": "in which term of each block the change made by fine-tuning lies: MLP, attention or skip path",
    "errors": "how an error at a block grows to the model's output, and the ranks that this suggests",
    "joint": "the halves of a joint adapter: whether they share directions, and what each scores alone",
    "linear": "how linear the change made by fine-tuning is: the best maps of each rank, and how near they come",
    "oracle": "steer by what fine-tuning does to the hidden states: how near it comes to the tuned model, and spectra",
}
_MODULES = {"errors": "error_growth"}  # where the module's name is not the analysis's
_USAGE = "usage: peft-steer analyze ANALYSIS --base MODEL --tuned MODEL_OR_ADAPTER ...\n\n" + "\n".join(
    f"  {name:13}{text}" for name, text in ANALYSES.items()
)


def main(argv: list[str]) -> int:
    """Runs `peft-steer analyze`. Returns 0, or 2 if the arguments cannot be used as given."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n`peft-steer analyze ANALYSIS --help` says more.")
        return 0 if argv else 2
    if argv[0] not in ANALYSES:
        print(f"peft-steer analyze: unknown analysis {argv[0]!r}\n{_USAGE}", file=sys.stderr)
        return 2
    module = _MODULES.get(argv[0], argv[0].replace("-", "_"))
    return run_module(f"peft_steer.analysis.{module}", f"peft-steer analyze {argv[0]}", argv[1:])


def run_module(name: str, prog: str, argv: list[str]) -> int:
    """Parses the arguments of an analysis and runs it. Flags may be written with `-` for `_`, as TRL's.

    Returns:
        0, or 2 if it raised `ValueError` or `OSError`, whose message is printed.
    """
    module = importlib.import_module(name)
    parser = argparse.ArgumentParser(
        prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    flags = [word.partition("=") if word.startswith("--") else (word, "", "") for word in argv]
    argv = [
        flag.replace("-", "_").replace("__", "--", 1) + sep + value if flag.startswith("--") else flag
        for flag, sep, value in flags
    ]
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("peft_steer").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about PEFT's use of its names
    args = parser.parse_args(argv)
    try:
        if args.output.is_file():
            raise NotADirectoryError(f"--output: {str(args.output)!r} is a file; name a directory")
        module.run(args)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0
