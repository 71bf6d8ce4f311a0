"""PEFT's helpers that go by LoRA's classes or names reach both halves of a joint adapter."""

import copy

import peft
import pytest
import torch
import transformers
from joint_models import joint, train, worst
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import ArrowConfig, LoraGAConfig, create_arrow_model, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tiny import adapter_state, inputs, joint_config, logits, make, randomize

from peft_steer import JointSteerLoraConfig, SteerConfig


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


def moved(model, optimizer):
    """The last parts of the names of what one step changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = inputs()
    model(**x, labels=x["input_ids"]).loss.backward()
    optimizer.step()
    return {name.rsplit(".", 3)[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_the_riemannian_optimizer_trains_both_halves(model):
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert moved(model, optimizer) == {"lora_A", "lora_B", "lora_steer_edit"}
    plain = get_peft_model(make(), joint_config(r=4, kind="nonlinear", scale=0.5))
    randomize(plain, std=0.2)
    moved(plain.eval(), torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01))
    steering = [name for name in adapter_state(plain) if name.endswith("W_up")]
    assert steering
    for name in steering:  # which it leaves to the optimizer (W_down is projected, by another `lora_B`)
        torch.testing.assert_close(adapter_state(model)[name], adapter_state(plain)[name])


def test_lorafa_is_refused(model):
    """Paired by name, `W_down` and `W_up` would be trained as LoRA's `A` and `B`."""
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    before = adapter_state(model)
    with pytest.raises(RuntimeError, match=r"LoRA-FA cannot train joint adapters: .*lora_steer_edit.*JointOptimizer"):
        moved(model, optimizer)
    assert all(torch.equal(x, before[name]) for name, x in adapter_state(model).items())
    lora = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert moved(lora, create_lorafa_optimizer(lora, r=4, lora_alpha=8, lr=1e-3)) == {"lora_B"}
    steer = get_peft_model(make(), SteerConfig())
    randomize(steer)
    assert moved(steer, create_lorafa_optimizer(steer, r=4, lora_alpha=8, lr=1e-3)) == {"steer_edit"}


@pytest.mark.parametrize("config", [SteerConfig(), joint_config(r=4)], ids=["steer", "joint"])
def test_hotswapping_is_refused(config, tmp_path):
    model = get_peft_model(make(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Hotswapping only supports LORA but .*STEER.* was passed"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    base = make()
    base.load_adapter(str(tmp_path), "default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(str(tmp_path), "default", hotswap=True)


def test_hotswapping_weights_leaves_the_strength(model):
    """PEFT's lower function checks no type and writes LoRA's scaling into every module that it meets."""
    other = copy.deepcopy(model)
    randomize(other, seed=5, std=0.3)
    want = logits(other)
    assert not torch.allclose(logits(model), want, atol=0.01)
    weights = {name: x for name, x in other.state_dict().items() if ".lora_" in name}
    hotswap_adapter_from_state_dict(model, weights, "default", model.peft_config["default"])
    torch.testing.assert_close(logits(model), want)


def test_preparing_for_hotswapping_changes_nothing(model):
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch.testing.assert_close(logits(model), before)
    model.base_model.set_scale("default", 0.0)
    torch.testing.assert_close(logits(model), logits(make()))


def test_eva(tmp_path):
    model = joint(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    peft.initialize_lora_eva_weights(model, [inputs(seed=i) for i in range(40)], show_progress_bar=False)
    assert torch.equal(logits(model), logits(make()))
    train(model)
    assert worst(model) < 1e-5
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), logits(model))


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_eva_that_moves_ranks_is_refused():
    for config in ({}, {"eva_config": EvaConfig(rho=1.5)}):
        with pytest.raises(ValueError, match=r"`eva_config` has rho=.* Set `eva_config=EvaConfig\(rho=1.0\)`"):
            JointSteerLoraConfig(target_modules=["q_proj"], init_lora_weights="eva", **config)


@pytest.mark.parametrize("how", ["lora_ga", "corda"])
def test_starts_that_change_the_base(how):
    base, x = make(), inputs(rows=1)
    before = logits(base)
    config = JointSteerLoraConfig(
        r=4,
        steer_r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=how,
        **({"lora_ga_config": LoraGAConfig()} if how == "lora_ga" else {"corda_config": CordaConfig()}),
    )
    if how == "lora_ga":
        preprocess_loraga(base, config, lambda: base(**x, labels=x["input_ids"]).loss.backward())
    else:
        preprocess_corda(base, config, lambda: [base(**inputs(rows=1, seed=i)) for i in range(40)])
    model = get_peft_model(base, config).eval()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    train(model)
    assert worst(model) < 1e-5


def test_what_is_lora_alone_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*JointSteerLayer"):
        peft.convert_to_lora(model, 4)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*SteerLayer"):
        peft.convert_to_lora(get_peft_model(make(), SteerConfig()), 4)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        create_arrow_model(make(), [str(tmp_path)] * 2, ArrowConfig(top_k=1))


def test_modules_that_lora_must_not_touch():
    """Mamba's kernels read the weight of `out_proj` and never call it."""
    config = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(transformers.MambaForCausalLM(config), JointSteerLoraConfig(target_modules=["out_proj"]))
