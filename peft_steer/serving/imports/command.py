"""What `peft-steer import` does: looks at the file, reads it, saves an adapter."""

import argparse
from pathlib import Path

from transformers import AutoConfig

from peft_steer.serving.export.gguf_vector import read_control_vector
from peft_steer.serving.words import describe_blocks, describe_vectors
from peft_steer.utils.errors import usage_errors
from peft_steer.utils.hub import find_model

from .adapter import make_adapter
from .foreign import Foreign, vectors
from .pyreft import is_pyreft, read_pyreft
from .tensors import SUFFIXES, read_tensors


def import_adapter(args: argparse.Namespace) -> None:
    """Runs the command; see `peft_steer/commands/import_.py` for the arguments.

    Raises:
        UsageError: If the file cannot be imported, or is of another model.
    """
    with usage_errors():
        foreign = read(args.source, args)
        base = find_model(args.base).path
    with usage_errors(f"--base: {args.base!r} cannot be loaded: "):
        AutoConfig.from_pretrained(base)
    with usage_errors():
        model = make_adapter(base, foreign, args.scale, name=args.base)
    model.save_pretrained(args.output, save_embedding_layers=False)
    print(f"Written to {args.output}: kind={foreign.kind!r}, site={foreign.site!r}, {_describe(foreign)}.")
    if foreign.kind == "vector":
        print("The strength is up to you: set it with --scale, or with `model.base_model.set_scale`.")
    if args.source.suffix == ".gguf" and 0 in foreign.states:
        print("It has direction.0, which this adapter adds to block 0, as EasySteer does; llama.cpp refuses the file.")


def _describe(foreign: Foreign) -> str:
    if foreign.kind != "vector":
        return describe_blocks(foreign.states)
    return describe_vectors({block: state["v"] for block, state in foreign.states.items()})


def read(source: Path, args: argparse.Namespace) -> Foreign:
    """What the file or folder says, and the flags that say the rest.

    Raises:
        ValueError: If it is of no known kind, or a flag contradicts it.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {str(source)!r}")
    if source.is_dir():
        if not is_pyreft(source):
            raise ValueError(
                f"{source}: a folder, but not one of pyreft's. (A folder that PEFT saved needs no import; of a folder "
                "of vectors, name one file.)"
            )
        _refuse(args, ("site", "layers"), "a folder of pyreft's says it itself")
        return read_pyreft(source, args.positions, args.activation)
    _refuse(args, ("positions", "activation"), "it is for folders of pyreft's; vectors are added to every token")
    if source.suffix == ".gguf":
        _refuse(args, ("site", "layers"), "a control vector says it itself")
        return vectors(read_control_vector(source))
    if source.suffix in SUFFIXES:
        return read_tensors(source, args.site, args.layers)
    raise ValueError(f"{source}: the ending must be one of .gguf, {', '.join(SUFFIXES)}")


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: {why}")
