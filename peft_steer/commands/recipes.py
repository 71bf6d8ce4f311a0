"""`peft-steer recipes`: the recipes that ship, listed, or one of them copied to be changed."""

import argparse
import re
import shutil
from itertools import takewhile
from pathlib import Path

from peft_steer.utils.errors import UsageError, suggest
from peft_steer.utils.recipes import find_recipe, recipe_names, recipes_folder


def main(argv: list[str]) -> int:
    """Runs `peft-steer recipes`.

    Raises:
        UsageError: if there is no such recipe, or its copy would replace a file.
    """
    parser = argparse.ArgumentParser(prog="peft-steer recipes", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    copy = commands.add_parser("copy", help="copy a recipe, to change it")
    copy.add_argument("name", help="as `peft-steer recipes` lists it")
    copy.add_argument("target", nargs="?", type=Path, help="file or folder (default: this folder)")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        names = recipe_names()
        width = max(map(len, names)) + 2
        lines = [f"{name:{width}}{_summary(name)}".rstrip() for name in names]
        print("\n".join([*lines, "", "`--config NAME` runs one of sft, grpo or dpo by its name."]))
        return 0
    print(_copy(arguments.name, arguments.target))
    return 0


def _summary(name: str) -> str:
    """The first sentence of the comment that the file begins with."""
    lines = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    paragraph = " ".join(line[1:].strip() for line in takewhile(re.compile(r"# *\S").match, lines))
    return re.split(r"(?<=[.?!])\s", paragraph, maxsplit=1)[0]


def _copy(name: str, target: Path | None) -> Path:
    source = find_recipe(name)
    if not source.is_file():
        raise UsageError(f"there is no recipe {name!r}{suggest(name, recipe_names())}")
    target = target or Path()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{str(target)!r} exists; name another file")
    shutil.copyfile(source, target)
    return target
