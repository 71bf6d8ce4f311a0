"""A new kind is one class: everything else asks it."""

from typing import ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import logits, make, randomize
from torch import nn

from peft_steer import SteerConfig
from peft_steer.interventions import KINDS, Intervention
from peft_steer.interventions.options import Option, check_count


class Cap(Intervention):
    """`dh = a * f(h)`, with a vector `a` and a field of its own."""

    has_rank = False
    activations = ("tanh",)
    default_activation = "tanh"
    options: ClassVar = {"num_heads": Option(3, check_count)}

    @classmethod
    def arguments(cls, config):
        return {"power": config.num_heads}

    def __init__(self, d, power, init_weights=True, device=None, dtype=None):
        super().__init__()
        self.power = power
        self.a = nn.Parameter(torch.zeros(d, device=device, dtype=dtype))

    def delta(self, h):
        return self.a.to(h.dtype) * torch.tanh(h) ** self.power


def test_one_class_is_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "cap", Cap)
    config = SteerConfig(kind="cap")
    assert (config.activation, config.num_heads) == ("tanh", 3)
    with pytest.raises(ValueError, match=r"`rank_pattern` contradicts `kind='cap'`"):
        SteerConfig(kind="cap", rank_pattern={"x": 2})
    with pytest.raises(ValueError, match=r"`num_heads=0` must be an integer of at least 1"):
        SteerConfig(kind="cap", num_heads=0)
    with pytest.raises(ValueError, match=r"`num_heads=4` contradicts `kind='linear'`: only kind='lofit', 'cap'"):
        SteerConfig(kind="linear", num_heads=4)
    model = get_peft_model(make(), config).eval()
    assert torch.equal(logits(model), logits(make()))
    randomize(model, std=0.5)
    steered = logits(model)
    assert not torch.allclose(steered, logits(make()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), steered)
    with pytest.raises(ValueError, match="no change of a weight equals a nonlinear edit"):
        model.merge_and_unload()
