"""Separate edits for the prompt's first and last tokens: `share_weights=False`, in both tuners, and its old name."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import METHODS, inputs, make, randomize

from peft_steer import LoreftConfig, SteerConfig, orthogonality


def test_the_old_name_of_share_weights(tmp_path):
    """Files that have it load as they were meant; whoever writes it is told the new one."""
    SteerConfig(positions="f2+l1", share_weights=False, r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("share_weights", "tie_weights"))
    for cls in (PeftConfig, SteerConfig, LoreftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded.share_weights is False
        assert "tie_weights" not in loaded.to_dict()
    with pytest.raises(ValueError, match=r"`tie_weights=False` is now `share_weights=False`"):
        SteerConfig(positions="f2+l1", tie_weights=False)


def test_a_joint_adapter_with_an_edit_for_each_end(tmp_path):
    """First and last tokens have edits of their own, each orthogonal to what LoRA writes, in the file too."""
    config = METHODS["joint"](positions="f2+l1", share_weights=False, r=3)
    model = get_peft_model(make(), config)
    randomize(model, std=0.3)
    model.eval()
    assert len(orthogonality(model)) == 6
    assert max(orthogonality(model).values()) < 1e-5
    batch = {**inputs(), "prompt_lengths": torch.tensor([5, 5])}
    before = model(**batch).logits
    for name, p in model.named_parameters():
        if ".suffix." in name:
            p.data.zero_()
    changed = (model(**batch).logits - before).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 4 + [True] * 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
