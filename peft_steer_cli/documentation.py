"""The docstring of a module that is not imported: it is the help of a command."""

import ast
from importlib.util import find_spec
from pathlib import Path


def docstring(module: str) -> str:
    """The docstring of a module of `peft_steer`, read from its file."""
    package, *names = module.split(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*names).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
