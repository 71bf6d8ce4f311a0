"""YAML as users write it."""

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-3 as a string, as YAML 1.1 does. This one reads a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        UsageError: If it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{text!r} is not valid YAML: {error}") from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        UsageError: If there is no such file, or it is not valid YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
