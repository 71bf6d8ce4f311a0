"""The console command `peft-steer`."""

import importlib
import sys


# Each is a module with `main(argv) -> exit code`, imported only when it is called for.
COMMANDS = {
    "bench": ("peft_steer.bench.command", "compare PEFT methods on a task, as a grid file says"),
    "cost": ("peft_steer.cost", "measure the memory and the time of PEFT methods on a model"),
    "sft": ("peft_steer.train.sft", "fine-tune with TRL's SFTTrainer, as a recipe says"),
    "grpo": ("peft_steer.train.grpo", "reinforcement learning with TRL's GRPOTrainer"),
    "dpo": ("peft_steer.train.dpo", "preference optimization with TRL's DPOTrainer"),
    "analyze": (
        "peft_steer.analysis.command",
        "what fine-tuning changes in the hidden states, and what steering can follow",
    ),
    "distill": (
        "peft_steer.analysis.distill.command",
        "turn a fine-tuned model or an adapter into a steering adapter",
    ),
    "recipes": ("peft_steer.commands.recipes", "list the recipes that ship, or copy one"),
    "tasks": ("peft_steer.commands.tasks", "list the tasks that ship, with splits and licences, or show one"),
    "lm-eval": ("peft_steer.commands.lm_eval", "lm-evaluation-harness, knowing our adapters and tasks"),
}
_USAGE = "usage: peft-steer COMMAND ...\n\n" + "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())


def main() -> int:
    """Runs the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n`peft-steer COMMAND --help` says more.")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"peft-steer: unknown command {arguments[0]!r}\n{_USAGE}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
