"""The arguments of `peft-steer cost`."""

import argparse

from .arguments import at_least, writable_file
from .documentation import docstring
from .inputs import DTYPES


# The names in `peft_steer.cost.methods.PRESETS`.
PRESETS = (
    "lora",
    "post_block",
    "post_block_linear",
    "vector",
    "loreft",
    "noreft",
    "direft",
    "nodireft",
    "lofit",
    "jola",
    "joint",
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-steer cost",
        description=docstring("peft_steer.cost.command"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="a causal language model")
    add("--random_weights", action="store_true", help="take only the model's config, with weights drawn at random")
    add(
        "--method",
        action="append",
        metavar="METHOD",
        help=f"{', '.join(PRESETS)} (default: all of these), or PEFT_TYPE:key=value,..., or an adapter's .json; "
        "may be repeated. lora is always measured, as the reference",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of the base; the first is timed")
    add("--gradient_checkpointing", action="store_true", help="take step time and peak memory with it")
    add("--batch_size", type=at_least(1), default=4, help="rows of the training batch (default: 4)")
    add("--length", type=at_least(2), default=128, help="tokens in each row (default: 128)")
    add("--new_tokens", type=at_least(1), default=16, help="tokens to decode, for one row (default: 16)")
    add("--rounds", type=at_least(2), default=10, help="of the timings, at least 2 (default: 10)")
    add("--seed", type=at_least(0), default=0, help="of the batch and of the order in a round (default: 0)")
    add("--output", type=writable_file, metavar="FILE.json", help="write all figures, with each round's times")
    return parser
