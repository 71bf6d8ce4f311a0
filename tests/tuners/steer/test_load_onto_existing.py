"""A file that is loaded onto an adapter of its name acts as the file says, or is refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import METHODS, as_saved, logits, make, randomize

from peft_steer import LoreftConfig, SteerConfig


def saved(path, config):
    model = get_peft_model(make(), config).eval()
    randomize(model)
    as_saved(model)
    model.save_pretrained(path)
    return model


CHANGES = {
    "scale": {"scale": 3.0},
    "activation": {"activation": "relu"},
    "positions": {"positions": "completion"},
    "layers": {"layers_to_transform": [0, 1, 2]},
    "kind": {"kind": "linear"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused(tmp_path, method, change):
    common = {"kind": "nonlinear", "r": 4}
    saved(tmp_path, METHODS[method](**{**common, **CHANGES[change]}))
    model = get_peft_model(make(), METHODS[method](**common)).eval()
    before = logits(model)
    (field,) = CHANGES[change]
    with pytest.raises(ValueError, match=rf"adapter 'default' cannot take the weights of .*`(steer_)?{field}`"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_configuration_loads(tmp_path, method):
    """As trainers do it to restore the best checkpoint; the strength that was set meanwhile stays."""
    config = {"kind": "linear", "r": 4, "target_modules": ["layers.0", "layers.2"]}
    expected = logits(saved(tmp_path, METHODS[method](**config)))
    model = get_peft_model(make(), METHODS[method](**config)).eval()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    again.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(again), expected)


def test_another_method_is_refused_and_lora_is_left_to_peft(tmp_path):
    saved(tmp_path / "lora", LoraConfig(r=4, target_modules=["q_proj"]))
    model = get_peft_model(make(), SteerConfig(r=4))
    with pytest.raises(ValueError, match="`peft_type`"):
        model.load_adapter(tmp_path / "lora", "default")
    lora = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"]))
    lora.load_adapter(tmp_path / "lora", "default")


def test_the_warning_for_unknown_fields_names_the_preset(tmp_path):
    LoreftConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"kind"', '"new_field": 1,\n  "kind"'))
    with pytest.warns(UserWarning, match=r"\['new_field'\] for class LoreftConfig, these are ignored"):
        config = LoreftConfig.from_pretrained(tmp_path)
    assert (type(config), config.kind) == (LoreftConfig, "loreft")
