"""What a command's parser and its action become: errors that are the user's, and those that are not."""

import pytest

from peft_steer.commands.parsing import make_parser, run
from peft_steer.utils.errors import UsageError


def test_what_is_not_installed():
    def action(args):
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    with pytest.raises(UsageError, match=r"^No module named 'gradio': pip install 'peft-steer\[play\]'$"):
        run(make_parser("x", "what it does"), action, [])


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_anything_else_keeps_its_traceback(error):
    def action(args):
        raise error

    with pytest.raises(type(error)):
        run(make_parser("x", "what it does"), action, [])


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        run(make_parser("x", "  what it does\n    as written"), lambda args: None, ["--help"])
    assert ended.value.code == 0
    assert "  what it does\n    as written" in capsys.readouterr().out
