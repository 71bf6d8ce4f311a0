"""PEFT's helpers that go by LoRA's classes or names reach both halves of a joint adapter."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import joint_config, logits, make, randomize


@pytest.fixture
def model():
    model = get_peft_model(make(), joint_config(r=4, kind="nonlinear", scale=0.5))
    randomize(model, std=0.2)
    return model.eval()


def test_rescaling(model):
    before = logits(model)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), logits(make()))
    assert torch.equal(logits(model), before)
    half = copy.deepcopy(model)
    for name, module in half.named_modules():
        if name.endswith(".steering") or hasattr(module, "lora_alpha"):
            module.scaling = {key: 0.5 * value for key, value in module.scaling.items()}
    for name, module in half.named_modules():
        if name.endswith(".steering"):  # each half by itself, and not both by LoRA's
            module.strength = module.scaling.__getitem__
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(logits(model), logits(half))


def test_strength_is_changed_once(model):
    """PEFT's and diffusers' loops over all tuner layers find the edits once."""
    layer = model.base_model.model.model.layers[0].steering
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(3.0)
    assert layer.strength("default") == 1.5
    model.base_model.set_scale("default", 2.0)
    assert layer.strength("default") == 1.0


def test_input_casting_can_be_turned_off(model):
    before = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), before)


def test_loraplus_trains_both_halves(model):
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
