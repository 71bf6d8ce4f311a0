"""Adapters saved before the package's modules were moved load bit for bit.

`saved/` has one of each kind, on the tiny Llama of `tiny.make`, with the logits that they gave when they were saved.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make

import peft_steer  # noqa: F401  (registers the tuner types)


SAVED = sorted((Path(__file__).parent / "saved").iterdir())


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: folder.name)
def test_loads_bit_for_bit(folder, tmp_path):
    model = PeftModel.from_pretrained(make(), folder).eval()
    ids = torch.arange(3, 11)[None]
    positions = getattr(model.peft_config["default"], "positions", "all")
    where = {} if positions == "all" else {"prompt_lengths": torch.tensor([5])}
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), **where).logits[0, -1]
        base = make()(ids).logits[0, -1]
    expected = load_file(folder / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - base).abs().max() > 0.01

    model.save_pretrained(tmp_path)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
