"""Runs of the analyses beside and after each other, and what they say of pairs and machines that are beyond them."""

import json
import logging

import pytest
import torch
from analysis_models import analyze, save_tuned
from command_line import peft_steer
from filelock import FileLock
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from peft_steer import LoreftConfig
from peft_steer.analysis.capture import streams


@pytest.fixture
def arguments(tiny_llama, tmp_path) -> list[str]:
    """Of a pair, a text and an output directory."""
    (tmp_path / "sums.csv").write_text("prompt,completion\n" + "".join(f"{a}+{a}=,is {2 * a}\n" for a in range(20)))
    tuned = save_tuned(tiny_llama, tmp_path / "tuned", "lora")
    text = ["--dataset", str(tmp_path / "sums.csv"), "--batch_size", "8"]
    return ["--base", tiny_llama, "--tuned", tuned, *text, "--output", str(tmp_path / "out")]


def test_first_order_goes_on_with_the_same_models_only(arguments, tiny_llama, tmp_path, capsys):
    words = ["first-order", *arguments, "--tokens", "2"]
    assert peft_steer("analyze", *words, "--layers_to_transform", "1") == 0
    rows = json.loads((tmp_path / "out/first_order.json").read_text())["rows"]
    assert {row["block"] for row in rows} == {1}
    assert peft_steer("analyze", *words) == 0
    after = json.loads((tmp_path / "out/first_order.json").read_text())["rows"]
    assert {row["block"] for row in after} == {0, 1}
    assert [row for row in after if row["block"] == 1] == rows
    save_tuned(tiny_llama, tmp_path / "tuned", LoraConfig(r=4, target_modules="all-linear"))
    assert peft_steer("analyze", *words) == 2
    assert "is from a run with files " in capsys.readouterr().err
    assert peft_steer("analyze", *words, "--max_length", "5") == 2
    assert "max_length 512 instead of 5" in capsys.readouterr().err


@pytest.mark.parametrize("analysis", ["first-order", "distill"])
def test_two_runs_in_one_directory(arguments, tmp_path, capsys, analysis):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        command = ["distill"] if analysis == "distill" else ["analyze", analysis]
        assert peft_steer(*command, *arguments) == 2
    assert "--output: another run is at work in" in capsys.readouterr().err


def test_the_printed_command_scores_the_same_model(arguments, capsys):
    assert peft_steer("distill", *arguments, "--load_in_4bit") == 0
    assert ",load_in_4bit=True,peft=" in capsys.readouterr().out


def test_whole_models_are_not_compared_with_quantized_bases(arguments, tiny_llama, tmp_path, capsys, monkeypatch):
    tuned = save_tuned(tiny_llama, tmp_path / "full", "full")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert peft_steer("analyze", "where", *arguments, "--tuned", tuned, "--load_in_4bit") == 2
    assert "--tuned is a whole model, which is not quantized" in capsys.readouterr().err


def test_the_oracle_of_an_adapter_with_positions(tiny_llama, tmp_path, capsys):
    adapter = LoreftConfig(r=2, positions="last", task_type="CAUSAL_LM")
    assert analyze(tmp_path, tiny_llama, "oracle", adapter=adapter) == 0
    assert "Generations are not compared" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/oracle.json").read_text())
    assert "same_generations" not in found
    assert {row["site"]: row["kl"] < 1e-6 < 1e-4 for row in found["rows"]}["block"]


def test_a_head_that_no_edit_can_follow_is_said(arguments, tiny_llama, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for linear in (model.lm_head, model.model.layers[0].mlp.down_proj):
            linear.weight.mul_(1.2)
    model.save_pretrained(tmp_path / "head")
    with caplog.at_level(logging.WARNING, "peft_steer"):
        assert peft_steer("distill", *arguments, "--tuned", str(tmp_path / "head")) == 0
    assert "changes what follows the blocks (its final norm or head)" in caplog.text
    found = json.loads((tmp_path / "out/distill.json").read_text())
    assert found["out_of_reach"] > 1e-3


def test_states_that_do_not_fit_on_the_disk(arguments, capsys, monkeypatch):
    monkeypatch.setattr(streams.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))
    assert peft_steer("distill", *arguments) == 2
    assert "GB; name a larger directory in the environment variable TMPDIR" in capsys.readouterr().err


def test_texts_that_are_cut_before_their_answers_are_counted(arguments, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "peft_steer"):
        assert peft_steer("analyze", "where", *arguments, "--max_length", "5") == 0
    assert "10 of 20 texts are left out: --max_length 5 cuts off their whole answer" in caplog.text
