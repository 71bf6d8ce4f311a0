"""Separate edits for the prompt's first and last tokens: `share_weights=False`, in both tuners, and its old name."""

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, steered
from tiny import (
    METHODS,
    assert_equal_but_for_rounding,
    inputs,
    make,
    randomize,
    reference_delta,
    steer_layers,
)
from training import gradients

from peft_steer import LoreftConfig, SteerConfig, orthogonality, steered_positions


@pytest.mark.parametrize("kind", ["vector", "linear", "nonlinear", "loreft"])
def test_separate_weights(kind, tmp_path):
    """The first tokens have one edit, the last ones another; both are trained and saved."""
    model = steered(kind=kind, positions="f2+l1", share_weights=False)
    tied = steered(kind=kind, positions="f2+l1")
    assert model.get_nb_trainable_parameters()[0] == 2 * tied.get_nb_trainable_parameters()[0]
    seen = []
    layer = next(iter(steer_layers(model).values()))
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**batch()).loss.backward()
    h, out = seen
    edits = layer.steer_edit["default"]
    for row, (first, last) in enumerate((([0, 1], [4]), ([0, 1], [3]))):
        rest = [i for i in range(9) if i not in first + last]
        assert torch.equal(out[row, rest], h[row, rest])
        for name, at in (("prefix", first), ("suffix", last)):
            want = reference_delta(edits[name], h[row, at])
            torch.testing.assert_close((out - h)[row, at].double(), want, rtol=1e-3, atol=1e-5)
    assert steered_positions(model) == 6
    for name, g in gradients(model).items():  # no completion depends on what the last block makes of the first tokens
        assert (g.abs().sum() > 0) != ("layers.2" in name and "prefix" in name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, adapter_name="other").eval()
    assert_equal_but_for_rounding(loaded(**batch()).logits, model(**batch()).logits)
    native = make()
    native.load_adapter(str(tmp_path))
    assert_equal_but_for_rounding(native(**batch()).logits, model(**batch()).logits)
    assert torch.equal(
        loaded.generate(**tokens_of_a_prompt(), **GREEDY), model.generate(**tokens_of_a_prompt(), **GREEDY)
    )


@pytest.mark.parametrize("positions", ["all", "last", "f7", "prompt"])
def test_separate_weights_need_two_ends(positions):
    with pytest.raises(ValueError, match=r"`share_weights=False` contradicts `positions="):
        SteerConfig(positions=positions, share_weights=False)


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
