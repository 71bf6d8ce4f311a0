"""The arguments of `peft-steer distill`."""

import argparse

from .arguments import at_least, directory, non_negative, positive
from .documentation import docstring
from .inputs import add_pair_arguments, add_text_arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-steer distill",
        description=docstring("peft_steer.analysis.distill.command"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pair_arguments(parser)
    add_text_arguments(parser)
    parser.set_defaults(num_texts=2048)
    add = parser.add_argument_group("adapter").add_argument
    add("--output", "-o", type=directory, required=True, metavar="DIR", help="the adapter, and distill.json")
    add("--r", type=at_least(1), default=8, help="rank of every block (default: 8)")
    add("--max_error", type=positive, metavar="E", help="instead of --r: choose ranks that leave at most this error")
    add(
        "--ridge",
        type=non_negative,
        default=0.0,
        help="relative to the moments' diagonal (default: 0)",
    )
    add = parser.add_argument_group("training").add_argument
    add("--train_steps", type=at_least(0), default=0, help="steps by KL after the fit (default: 0)")
    add("--learning_rate", type=positive, metavar="RATE", help="of these steps (default: 2e-4)")
    add(
        "--from_scratch",
        type=positive,
        nargs="?",
        const=2e-3,
        metavar="RATE",
        help="also train the same adapter from zero for as long as fit and training took, at this learning rate "
        "(default: 2e-3, the better of 2e-3 and 5e-3 in recipes/bench/quickstart_rates.yaml)",
    )
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="score base, tuned model and adapter on --task")
    add("--limit", type=at_least(1), help="documents to score them on (default: all)")
    return parser
