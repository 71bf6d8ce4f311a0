"""`peft-steer analyze`: each analysis is a module whose docstring is its help, with `run(args)`. Its arguments are in
`peft_steer_cli/analyze.py`."""

import argparse
import importlib
import logging
import warnings
from types import ModuleType

import transformers


def run(args: argparse.Namespace) -> None:
    """Runs the analysis in the module `args.module`.

    Raises:
        UsageError: If the models, the text or the flags cannot be used as given.
    """
    flags = {name: value for name, value in vars(args).items() if name not in ("analysis", "module")}
    run_module(importlib.import_module(f"peft_steer.analysis.{args.module}"), argparse.Namespace(**flags))


def run_module(module: ModuleType, args: argparse.Namespace) -> None:
    """Runs an analysis with the log of `peft_steer` and without the warnings of other libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("peft_steer").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    # PEFT still uses names that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    module.run(args)
