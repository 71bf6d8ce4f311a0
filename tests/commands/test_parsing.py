"""How a command ends: 0, or 2 with one line about the user's mistake or about what is not installed."""

import pytest

from peft_steer.commands.parsing import make_parser, run


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("--r is 0"), "peft-steer x: --r is 0\n"),
        (FileNotFoundError("no file 'a'"), "peft-steer x: no file 'a'\n"),
        (
            ModuleNotFoundError("No module named 'gradio'", name="gradio"),
            "peft-steer x: No module named 'gradio': pip install 'peft-steer[play]'\n",
        ),
    ],
)
def test_a_mistake_is_one_line(error, message, capsys):
    def action(args):
        raise error

    assert run(make_parser("x", "what it does"), action, []) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_anything_else_is_a_bug_and_shown_as_one(error):
    def action(args):
        raise error

    with pytest.raises(type(error)):
        run(make_parser("x", "what it does"), action, [])


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        run(make_parser("x", "  what it does\n    as written"), lambda args: None, ["--help"])
    assert ended.value.code == 0
    assert "  what it does\n    as written" in capsys.readouterr().out
