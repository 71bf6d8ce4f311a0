"""The flags that name the models and the texts of an analysis."""

import argparse

from .arguments import at_least


DTYPES = ("float32", "bfloat16", "float16")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `find_base` reads."""
    add = parser.add_argument_group("models").add_argument
    add("--base", required=True, metavar="DIR_OR_ID", help="a causal language model")
    add("--dtype", choices=DTYPES, default="float32", help="of both models (default: float32)")
    add("--load_in_4bit", action="store_true", help="quantize the base, also below an adapter, to nf4")
    add("--load_in_8bit", action="store_true", help="quantize the base, also below an adapter, to int8")


def add_pair_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags that `find_pair` reads; without `required`, `--tuned` may be left out."""
    add_base_arguments(parser)
    optional = "" if required else " (optional)"
    parser.add_argument(
        "--tuned",
        required=required,
        metavar="DIR_OR_ID",
        help=f"the same model fine-tuned, or a PEFT adapter of it{optional}",
    )


def add_text_arguments(parser: argparse.ArgumentParser, held_out: bool = True) -> None:
    """Adds the flags that `load_texts` reads; without `held_out`, for an analysis that holds no texts out."""
    add = parser.add_argument_group("text").add_argument
    add("--task", metavar="NAME", help="an lm-eval task: prompts and answers of its training split")
    add("--include_path", metavar="DIR", help="a folder with more lm-eval tasks")
    add("--num_fewshot", type=at_least(0), help="examples in a prompt, instead of the task's own number")
    add(
        "--dataset",
        metavar="FILE_OR_ID",
        help="a file of text, or a .json, .jsonl, .csv or .parquet file or a data set of the hub with a column "
        "`text`, or `prompt` and `completion`",
    )
    add("--dataset_config", metavar="NAME", help="the data set's configuration")
    add("--split", metavar="NAME", help="the data set's split (default: train)")
    add("--num_texts", type=at_least(1), default=256, help="at most this many texts (default: 256)")
    if held_out:
        add("--held_out", type=at_least(1), default=64, help="further texts, to measure on (default: 64)")
    else:
        parser.set_defaults(held_out=None)
    add("--batch_size", type=at_least(1), default=8, help="texts at a time (default: 8)")
    add("--max_length", type=at_least(2), default=512, help="tokens of a text; the rest is cut off (default: 512)")
    add("--seed", type=at_least(0), default=0, help="for the choice of texts (default: 0)")
