"""What PEFT and transformers do with an adapter: registration, choice of blocks, strength, status, unloading."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from tiny import (
    METHODS,
    adapted,
    logits,
    make,
    randomize,
    steer_layers,
)

from peft_steer import SteerConfig


# --- registration


def test_registration_is_a_proper_enum_member():
    member = PeftType("STEER")
    assert member is PeftType.STEER
    assert member == "STEER"
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def test_importing_again_keeps_the_registration():
    import importlib

    import peft_steer.registration

    before = len(list(PeftType))
    importlib.reload(peft_steer.registration)
    assert peft_steer.registration.add_peft_type("STEER") is PeftType.STEER
    assert len(list(PeftType)) == before


# --- which blocks


def layer_indices(**config):
    return [
        int(name.split(".")[2])
        for name in steer_layers(get_peft_model(make(), SteerConfig(r=4, **config)).get_base_model())
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"layers_to_transform": [0, 2]}, [0, 2]),
        ({"layers_to_transform": 1}, [1]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"target_modules": ["layers.1"]}, [1]),
        ({"target_modules": ["layers.0", "model.layers.2"]}, [0, 2]),
        ({"target_modules": r".*layers\.[12]"}, [1, 2]),
        ({"exclude_modules": ["layers.1"]}, [0, 2]),
        ({"exclude_modules": r".*\.[02]"}, [1]),
        ({"target_modules": ["layers.1"], "site": "mlp"}, [1]),
        ({"target_modules": ["layers.0", "layers.1"], "layers_to_transform": [1]}, [1]),
    ],
)
def test_choice_of_blocks(config, expected):
    assert layer_indices(**config) == expected


def test_layers_pattern_names_a_stack():
    model = get_peft_model(make("t5"), SteerConfig(layers_to_transform=[0], layers_pattern="decoder.block"))
    assert list(steer_layers(model.get_base_model())) == ["decoder.block.0"]


def test_rank_pattern():
    model = get_peft_model(make(), SteerConfig(r=4, rank_pattern={"layers.1": 7, r"layers\.2": 2}))
    ranks = [layer.steer_edit["default"].W_down.shape[0] for layer in steer_layers(model.get_base_model()).values()]
    assert ranks == [4, 7, 2]


def test_a_vision_tower_can_be_named():
    model = get_peft_model(make("llava"), SteerConfig(r=4, target_modules=r".*vision.*layers\.0"))
    ((name, layer),) = steer_layers(model.get_base_model()).items()
    assert "vision" in name
    assert layer.in_features == layer.out_features == 16


# --- strength


def test_scale():
    model = adapted(kind="vector", scale=0.5)
    half = logits(model)
    model.set_scale("default", 2.0)
    full = logits(model)
    torch.testing.assert_close(full, logits(adapted(kind="vector", scale=1.0)))
    model.scale_layer(0.5)
    torch.testing.assert_close(logits(model), half)
    model.unscale_layer(0.5)
    torch.testing.assert_close(logits(model), full)
    model.unscale_layer()
    torch.testing.assert_close(logits(model), half)
    model.set_scale("default", 0)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="does not exist"):
        model.set_scale("typo", 1.0)


# --- status and counting


def test_status(capsys):
    model = adapted()
    model.add_adapter("other", SteerConfig(kind="vector", layers_to_transform=[2]))
    status = get_model_status(model)
    assert (status.adapter_model_type, status.num_adapter_layers, status.active_adapters) == (
        "SteerModel",
        3,
        ["default"],
    )
    assert (status.enabled, status.merged_adapters, status.available_adapters) == (True, [], ["default", "other"])
    assert status.trainable_params == 3 * 2 * 4 * 32
    layers = get_layer_status(model)
    assert [layer.name for layer in layers] == [f"model.model.layers.{i}.steering" for i in range(3)]
    assert layers[2].requires_grad == {"default": True, "other": False}
    model.print_trainable_parameters()
    assert "trainable params: 768" in capsys.readouterr().out
    model.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["default", "other"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 768 + 32


# --- leaving no trace, and copies


@pytest.mark.parametrize("method", METHODS)
def test_unload(method):
    base = make()
    modules = [name for name, _ in base.named_modules()]
    state = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, METHODS[method](r=4))
    randomize(model)
    plain = model.unload()
    assert plain is base
    assert [name for name, _ in plain.named_modules()] == modules
    assert all(torch.equal(x, state[name]) for name, x in plain.state_dict().items())
    assert not any(m._forward_hooks for m in plain.modules())
    assert torch.equal(logits(plain), logits(make()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_independent(method, how):
    model = adapted(method=method)
    before = logits(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(other), before)
    randomize(other, std=1.0, seed=5)
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)
    other.unload()
    assert torch.equal(logits(model), before)


def test_lora_can_be_added_to_a_steered_model():
    model = make()
    model.add_adapter(SteerConfig(r=4, kind="linear"), adapter_name="steer_one")
    randomize(model, std=0.5)
    alone = logits(model)
    model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False), adapter_name="lora_one")
    model.set_adapter(["steer_one", "lora_one"])
    both = logits(model)
    assert not torch.equal(both, alone)
    model.set_adapter("lora_one")
    assert not torch.equal(logits(model), both)
    model.set_adapter("steer_one")
    assert torch.equal(logits(model), alone)
