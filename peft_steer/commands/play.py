"""A local page to play with adapters: base and steered side by side.

    peft-steer play --model MODEL --adapter happy=DIR --adapter terse=DIR2

Both texts come from the same prompt and seed. A slider sets the strength, below zero too; adapters can be switched and
added up, blocks switched off; tokens are coloured by how far the steered model is from the base; and the settings can
be copied as code. Only this machine reaches the page, unless --host says otherwise.
"""

import argparse

from peft_steer.utils.errors import UsageError

from .parsing import make_parser, run


def main(argv: list[str]) -> int:
    """Runs `peft-steer play`."""
    parser = make_parser("play", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base: a folder or hub id")
    add("--adapter", required=True, action="append", metavar="NAME=DIR", help="may be given several times")
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 for the network (default: 127.0.0.1)")
    add("--port", type=int, help="default: the first free one from 7860")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--load-in-4bit", action="store_true", help="nf4, by bitsandbytes")
    add("--load-in-8bit", action="store_true")
    return run(parser, _play, argv)


def _play(args: argparse.Namespace) -> None:
    args.adapters = {}
    for word in args.adapter:
        name, separator, folder = word.partition("=")
        if not separator or not name or not folder:
            raise UsageError(f"--adapter {word}: write NAME=DIR")
        if name in args.adapters:
            raise UsageError(f"--adapter {word}: there are two adapters {name!r}")
        args.adapters[name] = folder
    if args.load_in_4bit and args.load_in_8bit:
        raise UsageError("--load-in-8bit contradicts --load-in-4bit")
    from peft_steer.play import command

    command.play(args)
