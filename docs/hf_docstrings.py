"""Hugging Face's docstrings in mkdocstrings: [`Name`] is a name, and types are in backticks."""

import re

from griffe import Extension


class HuggingFaceStyle(Extension):
    """Rewrites docstrings as they are collected; the sources keep their style."""

    def on_instance(self, *, obj, **kwargs) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"\[(`)~?(?:[\w.]+\.)?(\w+(?:\.\w+)?`)\](?!\()", r"\1\2", obj.docstring.value)
        text = re.sub(r"^( +\w+ \()`([^`]+)`((?:, \*optional\*)?\):)", _plain, text, flags=re.MULTILINE)
        obj.docstring.value = text


def _plain(match: re.Match) -> str:
    return f"{match[1]}{match[2]}{match[3].replace('*', '')}"
