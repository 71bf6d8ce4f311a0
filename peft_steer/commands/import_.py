"""Makes an adapter of another tool's file.

    peft-steer import vector.gguf -o DIR --base MODEL                      # llama.cpp, repeng, EasySteer
    peft-steer import vectors.pt -o DIR --base MODEL                       # hotwire, steering-vectors, EasySteer
    peft-steer import REFT_FOLDER -o DIR --base MODEL --positions f7+l7 --activation none    # pyreft

The result is loaded by `PeftModel.from_pretrained` and does what the file does in its own tool. Files are never
unpickled. Of the base only the shapes are needed.
"""

import argparse
from pathlib import Path

from peft_steer.utils.errors import UsageError

from .parsing import make_parser, run


def main(argv: list[str]) -> int:
    """Runs `peft-steer import`."""
    parser = make_parser("import", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="FILE_OR_DIR", help="what the other tool saved")
    add("--output", "-o", required=True, type=Path, metavar="DIR", help="a new folder for the adapter")
    add("--base", required=True, metavar="MODEL", help="the model that it was made for")
    add("--scale", type=float, default=1.0, help="strength that is recorded in the adapter (default: 1)")
    add("--site", choices=("block", "mlp", "attention"), help="of tensors: where they are added (default: block)")
    add("--layers", type=int, nargs="+", metavar="N", help="of tensors: the blocks, counted from 0")
    add("--positions", help="of pyreft: which tokens are edited, such as f7+l7, l1 or all")
    add(
        "--activation",
        choices=("none", "silu", "relu", "gelu", "tanh"),
        help="of pyreft: its act_fn (none: linear, its default)",
    )
    return run(parser, _import, argv)


def _import(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UsageError(f"--output: {str(args.output)!r} exists; name another")
    from peft_steer.serving.imports import command

    command.import_adapter(args)
