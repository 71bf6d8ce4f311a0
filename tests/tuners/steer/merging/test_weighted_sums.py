"""Weighted sums of adapters, where one adapter equals the sum."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import assert_equal_but_for_rounding, logits, make, randomize

from peft_steer import SteerConfig


def two(second: dict | None = None, **config):
    model = get_peft_model(make(), SteerConfig(**config), "one")
    model.add_adapter("two", SteerConfig(**(config if second is None else second)))
    randomize(model, std=0.5)
    return model.eval()


@pytest.mark.parametrize("site", ["block", "mlp", "heads"])
def test_vectors(site):
    model = two(kind="vector", site=site, scale=0.5)
    model.base_model.set_scale("two", 2.0)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["one", "two"], [2.0, -0.5], "other")
    assert torch.equal(logits(model), both)  # the new ones are inactive
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["one", "two"])
    model.base_model.set_scale("one", 2.0)
    model.base_model.set_scale("two", -1.0)
    torch.testing.assert_close(logits(model), other, rtol=1e-5, atol=1e-5)


LINEAR = {"kind": "linear", "r": 3, "rank_pattern": {"layers.1": 2}}
NONLINEAR = {"kind": "nonlinear", "r": 3, "activation": "tanh"}
STACKED = {
    "linear": (LINEAR, LINEAR, {"kind": "linear", "r": 6, "use_bias": False}),
    "bias": ({**LINEAR, "use_bias": True}, LINEAR, {"kind": "linear", "r": 6, "use_bias": True}),
    "loreft": ({"kind": "loreft", "r": 2}, {"kind": "loreft", "r": 5}, {"kind": "linear", "r": 7, "use_bias": True}),
    "mixed": ({"kind": "vector"}, {"kind": "noreft", "r": 4}, {"kind": "linear", "r": 4, "use_bias": True}),
    "nonlinear": (NONLINEAR, NONLINEAR, {"kind": "nonlinear", "r": 6, "activation": "tanh"}),
}


@pytest.mark.parametrize("name", STACKED)
def test_ranks_side_by_side(name, tmp_path):
    first, second, expected = STACKED[name]
    model = two(second, **first)
    model.base_model.set_scale("two", 0.5)
    model.add_weighted_adapter(["one", "two"], [2.0, -3.0], "sum")
    model.set_adapter("sum")
    found = logits(model)
    model.base_model.set_adapter(["one", "two"])
    model.base_model.set_scale("one", 2.0)
    model.base_model.set_scale("two", -1.5)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    config = model.peft_config["sum"]
    assert {field: getattr(config, field) for field in expected} == expected
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(make(), tmp_path / "sum").eval()
    assert_equal_but_for_rounding(logits(loaded), found)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"kind": "linear", "second": {"kind": "nonlinear"}}, {}, "different activations"),
        ({"kind": "nonlinear", "second": {"kind": "vector"}}, {}, "or with one and a bias"),
        ({"kind": "nodireft", "activation": "silu"}, {}, "or with one and a bias"),
        ({"kind": "linear", "r": 20}, {}, "has rank 40, more than the width 32"),
        ({"kind": "jola", "site": "heads"}, {}, "LoFiT's and JoLA's edits are of no low rank"),
        ({"kind": "linear", "positions": "f1+l1", "share_weights": False}, {}, "the same sites and positions"),
        ({"kind": "vector", "second": {"kind": "vector", "layers_to_transform": [0]}}, {}, "the same sites"),
        ({"kind": "vector", "second": {"kind": "vector", "positions": "last"}}, {}, "the same sites and positions"),
        ({"kind": "vector"}, {"weights": [1.0]}, "one weight for each"),
        ({"kind": "vector"}, {"adapters": ["one", "three"]}, "one weight for each, of"),
        ({"kind": "vector"}, {"adapter_name": "two"}, "`adapter_name='two'` exists already"),
        ({"kind": "vector"}, {"combination_type": "svd"}, "`combination_type` chooses how LoRA's weights"),
    ],
)
def test_refused(config, arguments, message):
    model = two(**config)
    defaults = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum"}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{**defaults, **arguments})
    assert list(model.peft_config) == ["one", "two"]
