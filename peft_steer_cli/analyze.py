"""The arguments of `peft-steer analyze`."""

import argparse

from .arguments import at_least, directory, non_negative
from .documentation import docstring
from .inputs import add_base_arguments, add_pair_arguments, add_text_arguments


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peft-steer analyze",
        description="What fine-tuning changes in the hidden states, and what steering can follow.",
    )
    analyses = parser.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for name, (module, add_arguments, text) in ANALYSES.items():
        analysis = analyses.add_parser(
            name,
            help=text,
            description=docstring(f"peft_steer.analysis.{module}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        analysis.set_defaults(module=module)
        add_arguments(analysis)
    return parser


def _first_order(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add_text_arguments(parser, held_out=False)
    add = parser.add_argument
    add("--tokens", type=at_least(1), default=16, help="tokens, each of another text (default: 16)")
    add("--layers_to_transform", type=at_least(0), nargs="+", metavar="I", help="these blocks only (default: all)")
    add(
        "--output",
        "-o",
        type=directory,
        required=True,
        metavar="DIR",
        help="table and figure; resumes a run",
    )


def _where(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add_text_arguments(parser, held_out=False)
    parser.add_argument("--output", "-o", type=directory, required=True, metavar="DIR", help="table and figure")


def _errors(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser, required=False)
    add_text_arguments(parser, held_out=False)
    add = parser.add_argument
    add("--probes", type=at_least(1), default=4, help="texts to put errors into (default: 4)")
    add("--iterations", type=at_least(1), default=4, help="steps of the power iteration (default: 4)")
    add("--r", type=at_least(1), default=8, help="the uniform rank to compare with (default: 8)")
    add("--output", "-o", type=directory, required=True, metavar="DIR", help="table and figure")


def _joint(parser: argparse.ArgumentParser) -> None:
    add_base_arguments(parser)
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR_OR_ID", help="a joint adapter of the base")
    add("--task", required=True, metavar="NAME", help="an lm-eval task")
    add("--include_path", metavar="DIR", help="a folder with more lm-eval tasks")
    add("--num_fewshot", type=at_least(0), help="examples in a prompt, instead of the task's own number")
    add("--limit", type=at_least(1), help="at most this many documents (default: all)")
    add("--batch_size", type=at_least(1), default=8, help="documents at a time (default: 8)")
    add("--output", "-o", type=directory, required=True, metavar="DIR", help="tables and figure")


def _linear(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add_text_arguments(parser)
    parser.set_defaults(num_texts=2048)
    add = parser.add_argument
    add("--output", "-o", type=directory, required=True, metavar="DIR", help="tables and figures")
    add("--ranks", type=at_least(1), nargs="+", default=[1, 8, 64], help="of the maps (default: 1 8 64)")
    add(
        "--ridge",
        type=non_negative,
        default=0.0,
        help="relative to the moments' diagonal (default: 0)",
    )
    add("--compare", nargs="+", default=[], metavar="ADAPTER", help="adapters of the base to measure beside the maps")
    add("--new_tokens", type=at_least(1), default=16, help="tokens to generate after each prompt (default: 16)")


def _oracle(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--output", "-o", type=directory, required=True, metavar="DIR", help="tables and figures")
    parser.add_argument(
        "--new_tokens", type=at_least(1), default=16, help="tokens to generate after each prompt (default: 16)"
    )


# The name on the command line: the module, what adds its arguments, and a line of help.
ANALYSES = {
    "first-order": (
        "first_order",
        _first_order,
        "what a change of MLP weights does to their output, and what steering before the MLP can do of it",
    ),
    "where": (
        "where",
        _where,
        "in which term of each block the change made by fine-tuning lies: MLP, attention or skip path",
    ),
    "errors": (
        "error_growth",
        _errors,
        "how an error at a block grows to the model's output, and the ranks this suggests",
    ),
    "joint": (
        "joint",
        _joint,
        "the halves of a joint adapter: whether they share directions, and what each scores alone",
    ),
    "linear": (
        "linear",
        _linear,
        "how linear the change made by fine-tuning is: the best maps of each rank, and how near they come",
    ),
    "oracle": (
        "oracle",
        _oracle,
        "steer by what fine-tuning does to the hidden states: how near it comes to the tuned model, and spectra",
    ),
}
