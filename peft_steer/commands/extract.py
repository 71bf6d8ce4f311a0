"""Makes a steering vector of contrastive pairs, without training.

    peft-steer extract --model MODEL --pairs pairs.json --layers 14 -o DIR
    peft-steer extract --model MODEL --positive-system "You are cheerful." --negative-system "You are gloomy." \\
        --questions questions.txt --layers 10 11 12 -o DIR
    peft-steer extract --model MODEL --pairs pairs.json --layers 14 --task sentiment --scales 0 1 2 4 -o DIR

The pairs are a JSON, CSV or Parquet file or a data set of the hub with the columns `positive` and `negative`, texts or
messages; with a column `prompt` they are two answers to it. Part of them is held out: the report has, for each block,
how well the vector tells them apart and how large it is beside the states there, and, for each strength, what it does
to the odds of the answers and to the model's distance from the base. With --task the strength is chosen by its score.
The result is an ordinary adapter of kind "vector".
"""

import argparse
from pathlib import Path

from peft_steer.utils.errors import UsageError

from .parsing import make_parser, run


def main(argv: list[str]) -> int:
    """Runs `peft-steer extract`."""
    parser = make_parser("extract", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base: a folder or hub id")
    add("--output", "-o", required=True, type=Path, metavar="DIR", help="a new folder for the adapter")
    add = parser.add_argument_group("pairs").add_argument
    add("--pairs", metavar="FILE_OR_DATASET", help="a file or a data set of the hub")
    add("--split", default="train", help="of a data set of the hub (default: train)")
    add("--positive-column", default="positive", metavar="NAME")
    add("--negative-column", default="negative", metavar="NAME")
    add("--positive-system", metavar="TEXT", help="instead of pairs: two system prompts ...")
    add("--negative-system", metavar="TEXT")
    add("--questions", metavar="FILE", help="... over questions, one a line, or a JSON list")
    add("--held-out", type=float, default=0.25, metavar="SHARE", help="of the pairs, for the report (default: 0.25)")
    add("--seed", type=int, default=0, help="of what is held out (default: 0)")
    add = parser.add_argument_group("vector").add_argument
    add("--method", default="mean", choices=("mean", "pca_centred", "pca_uncentred"))
    add("--tokens", default="last", choices=("last", "mean"), help="a text's last token, or the mean of its span")
    add("--site", default="block", choices=("block", "mlp", "attention", "heads"))
    add("--layers", type=int, nargs="+", metavar="N", help="the blocks, from 0 (default: all, whose effects add up)")
    add(
        "--norm",
        default="own",
        choices=("own", "unit", "states"),
        help="own: the method's (of a component 1). states: the mean norm of the states there (default: own)",
    )
    add = parser.add_argument_group("strength").add_argument
    add("--scale", type=float, default=1.0, help="recorded in the adapter, unless --task chooses (default: 1)")
    add("--scales", type=float, nargs="+", metavar="S", help="to report (default: -2 to 2)")
    add("--task", help="choose the strength by this task's score on its validation split")
    add("--include-path", metavar="DIR", help="folder with more tasks, as lm-eval's")
    add("--num-fewshot", type=int, metavar="N")
    add("--limit", type=int, metavar="N", help="documents to score (default: all)")
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=int, default=8, metavar="N")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--load-in-4bit", action="store_true", help="nf4, by bitsandbytes")
    add("--load-in-8bit", action="store_true")
    return run(parser, _extract, argv)


def _extract(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UsageError(f"--output: {str(args.output)!r} exists; name another")
    systems = {"--positive-system": args.positive_system, "--negative-system": args.negative_system}
    by_systems = {**systems, "--questions": args.questions}
    given = [name for name, value in by_systems.items() if value is not None]
    if bool(args.pairs) == bool(given):
        raise UsageError("give either --pairs, or --positive-system, --negative-system and --questions")
    if given and len(given) < len(by_systems):
        missing = [name for name in by_systems if name not in given]
        raise UsageError(f"{missing[0]} is missing: {given[0]} needs {' and '.join(missing)}")
    of_pairs = {"split": "train", "positive_column": "positive", "negative_column": "negative"}
    for name, default in of_pairs.items():
        if given and getattr(args, name) != default:
            raise UsageError(f"--{name.replace('_', '-')} is for --pairs")
    for name, value, ok, needs in (
        ("held-out", args.held_out, 0 <= args.held_out < 1, "be at least 0 and below 1"),
        ("batch-size", args.batch_size, args.batch_size >= 1, "be at least 1"),
        ("limit", args.limit, args.limit is None or (args.task and args.limit >= 1), "be at least 1, with --task"),
        ("num-fewshot", args.num_fewshot, args.num_fewshot is None or args.task, "come with --task"),
        ("include-path", args.include_path, args.include_path is None or args.task, "come with --task"),
        ("scale", args.scale, args.scale == 1 or not args.task, "be left to --task, which chooses it"),
        ("load-in-8bit", True, not (args.load_in_4bit and args.load_in_8bit), "come without --load-in-4bit"),
    ):
        if not ok:
            raise UsageError(f"--{name} is {value}, it must {needs}")
    from peft_steer.extraction import command

    command.extract(args)
