"""Modules that carry steering layers are wrapped, renamed and unwrapped by others: order makes no difference."""

import copy

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from tiny import inputs, make, randomize, steer_layers
from torch import nn

from peft_steer import JointSteerLoraConfig, LofitConfig, SteerConfig, SteerModel


OTHERS = {
    "lora": lambda: LoraConfig(target_modules="all-linear", r=4),
    "dora": lambda: LoraConfig(target_modules="all-linear", r=4, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["o_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(target_modules=["o_proj"], r=4),
}
OURS = {
    "lofit": lambda: LofitConfig(init_weights=False),
    "heads": lambda: SteerConfig(site="heads", kind="nonlinear", r=4),
    "mlp": lambda: SteerConfig(site="mlp", kind="nonlinear", r=4),
}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(), **kwargs).logits


def both(order):
    """The model with two adapters, added in this order by transformers, with equal weights; both act by default."""
    model = make()
    for name, config in order:
        model.add_adapter(config(), adapter_name=name)
    model.set_adapter([name for name, _ in order])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("other", OTHERS)
def test_the_order_does_not_matter(ours, other, tmp_path):
    ours, other = ("first", OURS[ours]), ("second", OTHERS[other])
    one, two = both([ours, other]), both([other, ours])
    assert [n for n in one.state_dict() if "steering" in n] == [n for n in two.state_dict() if "steering" in n]
    assert set(one.state_dict()) == set(two.state_dict())
    torch.testing.assert_close(logits(one), logits(two), rtol=1e-5, atol=1e-5)

    state = get_peft_model_state_dict(one, adapter_name="first")
    alone = get_peft_model_state_dict(inject_adapter_in_model(ours[1](), make(), "first"), adapter_name="first")
    assert state.keys() == alone.keys()
    one.set_adapter("first")
    expected = logits(one)
    assert not torch.allclose(expected, logits(make()), atol=1e-3)
    one.save_pretrained(tmp_path)
    again = make()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), expected)


@pytest.mark.parametrize("wrapped", ["o_proj", "mlp"])
@pytest.mark.parametrize("ours", OURS)
def test_modules_to_save_at_a_steered_module(ours, wrapped, tmp_path):
    """What is trained and saved as a whole is steered too, whoever came first; there is one edit and no copy of it."""
    if (ours == "mlp") != (wrapped == "mlp"):
        pytest.skip("not the steered module")
    configs = {"first": OURS[ours](), "second": LoraConfig(target_modules=["q_proj"], modules_to_save=[wrapped])}
    results = []
    for order in (["first", "second"], ["second", "first"]):
        model = make()
        for name in order:
            get_peft_model(model, copy.deepcopy(configs[name]), name)
        for m in model.modules():
            if isinstance(m, AuxiliaryTrainingWrapper):  # PEFT turns it off when another adapter is added
                m.set_adapter("second")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".steering." in name or ".input_steering." in name or ".modules_to_save." in name:
                    generator = torch.Generator().manual_seed(p.numel())
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        results.append((sorted(model.state_dict()), logits(model.eval())))
    assert results[0][0] == results[1][0]
    assert not any("steering" in n and "modules_to_save" in n for n in results[0][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


def test_what_wraps_may_go_again():
    model = inject_adapter_in_model(LofitConfig(init_weights=False), make()).eval()
    keys, expected = list(model.state_dict()), logits(model)
    lora = LoraModel(model, LoraConfig(target_modules="all-linear"), "lora")
    assert torch.equal(logits(model), expected)
    lora.unload()
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)
    layer = next(iter(steer_layers(model).values()))
    assert type(layer.steered_module) is nn.Linear


def test_a_copy_of_a_wrapped_model_is_steered_on_its_own():
    model = both([("first", OURS["lofit"]), ("second", OTHERS["lora"])])
    expected = logits(model)
    other = copy.deepcopy(model)
    for layer in steer_layers(other).values():
        for p in layer.parameters():
            p.data.zero_()
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(other), expected, atol=1e-3)


def test_a_replaced_module_is_still_steered():
    """As a quantizer does it: another module takes the place."""
    model = get_peft_model(make(), SteerConfig(site="heads", kind="linear", r=4)).eval()
    randomize(model)
    expected = logits(model)
    attention = model.base_model.model.model.layers[1].self_attn
    new = nn.Linear(32, 32, bias=False)
    new.weight = attention.o_proj.weight
    attention.o_proj = new
    assert torch.equal(logits(model), expected)


def test_files_with_the_wrapper_in_their_names_load(tmp_path):
    model = get_peft_model(make(), SteerConfig(site="heads", kind="linear", r=4)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {key.replace("o_proj.", "o_proj.base_layer."): x for key, x in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), logits(model))


def test_what_would_be_copied_with_its_edits_is_refused():
    model = get_peft_model(make(), LofitConfig())
    with pytest.raises(ValueError, match="`modules_to_save` would copy 'self_attn'"):
        model.add_adapter("other", LofitConfig(modules_to_save=["self_attn"]))


def test_transparent_wrappers_leave_the_layers_inside():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = get_peft_model(make(), SteerConfig(kind="linear", r=4)).eval()
    randomize(model)
    keys, expected = list(model.state_dict()), logits(model)
    layers = model.base_model.model.model.layers
    layers[1] = checkpoint_wrapper(layers[1])
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)


def test_joint_beside_another_lora():
    model = get_peft_model(make(), JointSteerLoraConfig(r=4, target_modules="all-linear", steer_site="mlp")).eval()
    assert not isinstance(model.base_model, SteerModel)
    randomize(model, std=0.2)
    keys = [n for n in model.state_dict() if "steering" in n]
    expected = logits(model)
    inject_adapter_in_model(LoHaConfig(target_modules=["q_proj"], r=4), model.base_model.model, "loha")
    assert [n for n in model.state_dict() if "steering" in n] == keys
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
