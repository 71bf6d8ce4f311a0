"""The loss on plain text: over windows, for adapters that need a prompt too, and in the bench."""

import json

import pytest
import torch
from grids import BASE, STEER, write_grid
from peft import get_peft_model
from tiny import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer import PostBlockSteerConfig
from peft_steer.bench.run import forgetting
from peft_steer_cli import main


TEXT = "It rained, and then it rained again."


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def surprise(model, tokenizer, window: int) -> float:
    """Mean of -log p(token | the tokens of its window before it), written plainly."""
    ids = tokenizer(TEXT).input_ids
    found = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        for i in range(1, len(part)):
            lengths = {"prompt_lengths": torch.tensor([len(part)])} if hasattr(model, "peft_config") else {}
            logits = model(torch.tensor([part]), **lengths).logits[0, i - 1]
            found.append(-logits.log_softmax(-1)[part[i]].item())
    return sum(found) / len(found)


@pytest.mark.parametrize("positions", [None, "last", "f1+l2"])
@pytest.mark.parametrize("window", [512, 10, 7])
def test_the_loss_of_every_token_but_a_windows_first(tiny_llama, text, monkeypatch, window, positions):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    monkeypatch.setattr(forgetting, "_WINDOW", window)
    plain = forgetting.text_loss(model, tokenizer, text)
    if positions:
        model = get_peft_model(model, PostBlockSteerConfig(r=2, positions=positions, task_type="CAUSAL_LM"))
        randomize(model, std=0.5)
    model.train()
    found = forgetting.text_loss(model, tokenizer, text)
    assert model.training
    with torch.no_grad():
        assert found == pytest.approx(surprise(model.eval(), tokenizer, window), abs=1e-5)
    # The last token of a window predicts none of it: steering it alone changes nothing here.
    assert (abs(found - plain) > 1e-4) == (positions == "f1+l2")


def test_a_cell_measures_it_before_and_after(tiny_llama, tmp_path, text):
    methods = [BASE, {**STEER, "positions": "f1+l2"}]
    grid = write_grid(tmp_path, model=tiny_llama, forgetting="text.txt", methods=methods)
    assert main(["bench", str(grid), "--output", str(tmp_path / "out")]) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").iterdir()]
    results = {result["cell"]["name"]: result for result in found}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = forgetting.text_loss(base, AutoTokenizer.from_pretrained(tiny_llama), text)
    assert results["base"]["forgetting"] is None
    assert results["post-block"]["forgetting"]["before"] == pytest.approx(plain)
    assert results["post-block"]["forgetting"]["after"] != pytest.approx(plain)
    assert results["post-block"]["decode_ratio"] > 0
    assert len(results["post-block"]["items"]["scores"]) == results["post-block"]["n"] == 40
