"""Weighted sums of adapters, where one adapter equals the sum."""

import pytest
import torch
from peft import get_peft_model
from tiny import logits, make, randomize

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


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"kind": "linear"}, {}, "Only fixed vectors"),
        ({"kind": "vector", "second": {"kind": "vector", "layers_to_transform": [0]}}, {}, "Only fixed vectors"),
        ({"kind": "vector", "second": {"kind": "vector", "positions": "last"}}, {}, "Only fixed vectors"),
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
