"""What a merged model keeps of its base goes wherever the model goes: casts, moves, copies; no file has it."""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from tiny import adapted, logits, make

from peft_steer import SteerConfig


CONFIGS = {
    "vector": {"kind": "vector", "site": "block"},
    "linear": {"kind": "linear", "site": "mlp"},
    "heads": {"kind": "linear", "site": "heads", "use_bias": True},
}


def base_state(model):
    return {k: x for k, x in model.state_dict().items() if "steering" not in k}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_cast_while_merged(config, architecture):
    model = adapted(architecture, **CONFIGS[config])
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = make(architecture).to(torch.bfloat16).state_dict()
    for key, x in base_state(model).items():
        assert torch.equal(x, expected[key.removeprefix("base_model.model.")]), key


def test_a_move_while_merged():
    model = adapted(**CONFIGS["linear"])
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_copy_while_merged_has_a_base_of_its_own(config, copier):
    model = adapted(**CONFIGS[config])
    expected = logits(model)
    before = {k: x.clone() for k, x in base_state(model).items()}
    model.merge_adapter()
    merged = logits(model)
    if copier == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.unmerge_adapter()
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(model), merged)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    model.unmerge_adapter()
    assert all(torch.equal(x, before[key]) for key, x in base_state(model).items())


def test_a_state_dict_while_merged():
    """The names are the base's, and what is loaded back acts as the merged model."""
    model = adapted(**CONFIGS["linear"])
    keys = list(model.state_dict())
    model.merge_adapter()
    state, merged = model.state_dict(), logits(model)
    assert list(state) == keys
    plain = make()
    plain.load_state_dict({k.removeprefix("base_model.model."): x for k, x in state.items() if "steering" not in k})
    assert torch.equal(logits(plain), merged)


def test_what_was_trained_is_trained_again():
    model = get_peft_model(make(), SteerConfig(kind="linear", site="mlp"))
    weight = model.base_model.model.model.layers[0].mlp.down_proj
    weight.requires_grad_(True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert weight.weight.requires_grad
