"""`peft-steer tasks`: what it prints is what the YAML files and the data say."""

import json
import re

import paper_data
import pytest

from peft_steer.evaluation.tasks import OUR_TASKS
from peft_steer_cli import main


def run(capsys, *arguments: str) -> str:
    assert main(["tasks", *arguments]) == 0
    return capsys.readouterr().out


def test_every_task_with_its_splits_and_licence(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: a/b\noutput_type: multiple_choice\n")
    out = run(capsys, "--include_path", str(tmp_path))
    rows = [tuple(re.split(r"\s{2,}", line)) for line in out.split("\n\n")[0].splitlines()]
    assert rows[0] == ("task", "train / validation / test", "output type", "licence of the data", "source")
    ours = {path.name for path in OUR_TASKS.rglob("*.yaml")} - {"_default.yaml", "steer_paper.yaml"}
    assert len(rows) == 1 + len(ours) + 1
    assert ("steer_gsm8k", "7,473 / 264 / 1,055", "generate_until", "MIT", "openai/gsm8k (main)") in rows
    assert ("listops", "20,000 / 1,000 / 1,000", "multiple_choice", "Apache-2.0", "generated") in rows
    assert ("own", "– / – / –", "multiple_choice", "–", "a/b") in rows
    assert all("–" not in row[3:] for row in rows if row[0] != "own")
    assert "\nsteer_paper: steer_boolq, steer_winogrande, steer_listops, steer_gsm8k, " in out


def test_one_task_with_a_prompt(capsys, tmp_path):
    data_dir = paper_data.write(tmp_path / "data", times=10)
    out = run(capsys, "steer_boolq", "--metadata", json.dumps({"data_dir": str(data_dir)}))
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert facts["source"] == "google/boolq"
    assert facts["metrics"] == "exact_match"
    assert facts["to read"] == str(OUR_TASKS / "paper/README.md")
    assert json.loads(facts["parameters"])["divide"]["held_out"] == "test"
    assert "Loaded: 20 / 16 / 4." in out
    assert "  | Passage: The bridge was built of oak.\n" in out
    assert out.endswith("  | Answer: False.\n")
    assert "No example: task 'steer_boolq': Couldn't reach 'google/boolq' on the Hub" in run(capsys, "steer_boolq")
    assert run(capsys, "steer_paper").startswith("steer_paper: a group of steer_boolq, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steer_bolq"], "there is no task 'steer_bolq', did you mean 'steer_boolq'?"),
        (["listops", "--include_path", "nowhere"], "--include_path: there is no folder 'nowhere'"),
    ],
)
def test_what_is_not_there(arguments, message, capsys):
    assert main(["tasks", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("{max_depth: 6}", "is not JSON:"), ("6", "is not a JSON object")])
def test_metadata_are_json(text, message, capsys):
    assert main(["tasks", "listops", "--metadata", text]) == 2
    assert message in capsys.readouterr().err
