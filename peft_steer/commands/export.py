"""Writes a trained adapter in a format that other engines read.

    peft-steer export ADAPTER --format gguf-vector -o vector.gguf    # llama.cpp: fixed vectors at the blocks
    peft-steer export ADAPTER --format lora -o DIR                   # PEFT, vLLM, llama.cpp: edits inside a block
    peft-steer export ADAPTER --format merged -o DIR                 # a whole model

Each file gives the adapter's own log-probabilities, or the export is refused and says what to do instead. LoRA and
merged models are loaded again and compared with the adapter.
"""

import argparse
from pathlib import Path

from peft_steer.utils.errors import UsageError

from .parsing import make_parser, run


FORMATS = ("gguf-vector", "lora", "merged")
# Which flag belongs to which formats: none is accepted and ignored.
_OF = {"constants": ("lora",), "drop_block_0": ("gguf-vector", "lora"), "architecture": ("gguf-vector",)}


def main(argv: list[str]) -> int:
    """Runs `peft-steer export`."""
    parser = make_parser("export", __doc__)
    add = parser.add_argument
    add("adapter", help="folder or hub id of the adapter")
    add("--format", required=True, choices=FORMATS)
    add("--output", "-o", required=True, type=Path, metavar="PATH", help="a .gguf file, or a new folder")
    add("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")
    add("--scale", type=float, help="strength, as a factor of the adapter's own (default: 1)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base's weights (default: auto, that of its file)",
    )
    add(
        "--constants",
        choices=("bias", "vector", "drop"),
        help="lora: what becomes of constants. bias: a bias in the LoRA, for PEFT alone. vector: a control vector "
        "beside it, for llama.cpp alone. drop: leave them out",
    )
    add("--drop-block-0", action="store_true", help="leave out block 0's vector, which llama.cpp cannot add")
    add("--architecture", metavar="NAME", help="gguf-vector: llama.cpp's name of an architecture that is not known")
    return run(parser, _export, argv)


def _export(args: argparse.Namespace) -> None:
    for name, formats in _OF.items():
        if getattr(args, name) and args.format not in formats:
            raise UsageError(f"--{name.replace('_', '-')} is for --format {' and '.join(formats)}, not {args.format}")
    if args.drop_block_0 and args.format == "lora" and args.constants != "vector":
        raise UsageError("--drop-block-0 needs --constants vector with --format lora: only a control vector drops it")
    if args.output.exists():
        raise UsageError(f"--output: {str(args.output)!r} exists; name another")
    from peft_steer.serving.export import command

    command.export(args)
