"""The parser of a command. How a command ends is in `test_cli.py`."""

import pytest

from peft_steer.commands.parsing import make_parser, run


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        run(make_parser("x", "  what it does\n    as written"), lambda args: None, ["--help"])
    assert ended.value.code == 0
    assert "  what it does\n    as written" in capsys.readouterr().out
