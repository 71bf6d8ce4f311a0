"""From the command line to a command's arguments."""

import argparse
import difflib
import importlib
import sys
from dataclasses import dataclass

from .arguments import with_underscores
from .upstream import hush


@dataclass(frozen=True)
class Command:
    """A command of `peft-steer`.

    Attributes:
        help: A line for the list of commands.
        target: `"module:function"`. It is given the parsed arguments, or the words if `parser` is None, and returns
            the exit code.
        extra: The extra of the package that installs what it needs.
        parser: The module of this package whose `make_parser()` returns the command's parser; None for commands whose
            flags come from TRL or lm-eval.
    """

    help: str
    target: str
    extra: str = "train"
    parser: str | None = None


COMMANDS = {
    "bench": Command(
        "compare PEFT methods on a task, as a grid file says", "peft_steer.bench.command:run", "bench", "bench"
    ),
    "cost": Command(
        "measure the memory and the time of PEFT methods on a model", "peft_steer.cost.command:run", "train", "cost"
    ),
    "sft": Command("fine-tune with TRL's SFTTrainer, as a recipe says", "peft_steer.train.sft:main"),
    "grpo": Command("reinforcement learning with TRL's GRPOTrainer", "peft_steer.train.grpo:main"),
    "dpo": Command("preference optimization with TRL's DPOTrainer", "peft_steer.train.dpo:main"),
    "analyze": Command(
        "what fine-tuning changes in the hidden states, and what steering can follow",
        "peft_steer.analysis.command:run",
        "analysis",
        "analyze",
    ),
    "distill": Command(
        "turn a fine-tuned model or an adapter into a steering adapter",
        "peft_steer.analysis.distill.command:main",
        "analysis",
        "distill",
    ),
    "recipes": Command("list the recipes that ship, or copy one", "peft_steer.commands.recipes:main"),
    "tasks": Command(
        "list the tasks that ship, with splits and licences, or show one",
        "peft_steer.commands.tasks:run",
        "eval",
        "tasks",
    ),
    "extract": Command(
        "make a steering vector of contrastive pairs, without training", "peft_steer.commands.extract:main", "extract"
    ),
    "export": Command(
        "write an adapter for llama.cpp, as LoRA, or as a whole model", "peft_steer.commands.export:main", "export"
    ),
    "import": Command(
        "make an adapter of another tool's vectors or interventions", "peft_steer.commands.import_:main", "export"
    ),
    "play": Command(
        "a local page: base and steered side by side, with a slider", "peft_steer.commands.play:main", "play"
    ),
    "serve": Command(
        "an OpenAI-compatible server for adapters, by vLLM", "peft_steer.serving.vllm.serve:main", "vllm"
    ),
    "lm-eval": Command(
        "lm-evaluation-harness with our adapters and tasks", "peft_steer.commands.lm_eval:main", "eval"
    ),
}
_USAGE = "usage: peft-steer COMMAND ...\n\n" + "\n".join(f"  {name:10}{c.help}" for name, c in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: The words after `peft-steer`; by default those of this process.

    Returns:
        The exit code: 0; 2 if the command cannot be used as given; others as the command documents.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n`peft-steer COMMAND --help` says more.")
        return 0 if argv else 2
    name, *words = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        print(f"peft-steer: unknown command {name!r}{hint}\n{_USAGE}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    arguments: list[str] | argparse.Namespace = words
    if command.parser is not None:
        parser = importlib.import_module(f"peft_steer_cli.{command.parser}").make_parser()
        try:
            arguments = parser.parse_args(with_underscores(words))
        except SystemExit as exit_:  # argparse has printed the help or the error
            return int(exit_.code or 0)
    hush()  # before PEFT is imported
    from peft_steer.commands.shell import run

    return run(f"peft-steer {name}", command.target, arguments, command.extra)
