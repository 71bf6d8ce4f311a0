"""YAML 1.2's numbers, and errors that name the file."""

import pytest

from peft_steer.utils.errors import UsageError
from peft_steer.utils.yaml import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),
        ("-2E+3", -2000.0),
        ("+.5e2", 50.0),
        ("1.e3", 1000.0),
        ("7", 7),
        ("0.25", 0.25),
        ("1e", "1e"),
        ("e1", "e1"),
        ("'1e-1'", "1e-1"),
        ("{r: 8, rates: [1e-3, 2e-3]}", {"r": 8, "rates": [1e-3, 2e-3]}),
        ("yes it is", "yes it is"),
    ],
)
def test_numbers(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_errors(tmp_path):
    with pytest.raises(UsageError, match="is not valid YAML"):
        parse_yaml("[1")
    path = tmp_path / "grid.yaml"
    with pytest.raises(UsageError, match=rf"{path} cannot be read: No such file"):
        read_yaml(path)
    path.write_text("a: [")
    with pytest.raises(UsageError, match=rf"{path} is not valid YAML"):
        read_yaml(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=rf"{path} is not valid YAML"):
        read_yaml(path)
