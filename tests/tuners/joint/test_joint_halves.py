"""The two halves of a joint adapter: switched, merged, in its file."""

import copy

import pytest
import torch
import transformers as tf
from joint_models import MODES, TOLERANCE, joint, train, worst
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import (
    adapter_state,
    as_saved,
    assert_equal_but_for_rounding,
    joint_config,
    logits,
    make,
    randomize,
    steer_layers,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from peft_steer import JointSteerLoraConfig, SteerConfig, project_


def test_file(tmp_path):
    """Saving projects what is written and leaves the model as it is; loading and projecting again changes nothing."""
    for mode, config in MODES.items():
        model = joint(**config)
        randomize(model, std=0.5)
        raw = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"].W_down.detach().clone()
        model.save_pretrained(tmp_path / mode)
        live = steer_layers(model.get_base_model())["model.layers.0"].steer_edit["default"].W_down
        assert torch.equal(live, raw)
        if mode != "none":
            as_saved(model)
        saved = adapter_state(model)
        expected = logits(model)
        loaded = PeftModel.from_pretrained(make(), tmp_path / mode)
        assert adapter_state(loaded).keys() == saved.keys()
        assert all(torch.equal(x, saved[n]) for n, x in adapter_state(loaded).items())
        assert_equal_but_for_rounding(logits(loaded), expected)
        W = steer_layers(loaded.get_base_model())["model.layers.0"].steer_edit["default"].W_down
        assert torch.equal(W, raw) == (mode == "none")
        assert (worst(loaded) < TOLERANCE) == (mode != "none")
        project_(loaded)
        assert worst(loaded) < TOLERANCE
        if mode == "none":
            assert not torch.allclose(logits(loaded), expected, atol=1e-3)
        else:
            assert_equal_but_for_rounding(logits(loaded), expected)


@pytest.mark.parametrize("mode", MODES)
def test_saving_below_checkpoint_wrappers(mode):
    """As FSDP's `fsdp_activation_checkpointing` puts them around the blocks."""
    model = joint(**MODES[mode])
    randomize(model, std=0.5)
    other = copy.deepcopy(model)
    expected = get_peft_model_state_dict(model)
    apply_activation_checkpointing(other, check_fn=lambda module: "DecoderLayer" in type(module).__name__)
    assert any("_checkpoint_wrapped_module" in name for name, _ in other.named_modules())
    found = get_peft_model_state_dict(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_halves():
    model = joint()
    randomize(model, std=0.3)
    plain, both = logits(make()), logits(model)
    seen = {}
    for halves in ("lora", "steer"):
        with model.set_halves(halves):
            seen[halves] = logits(model)
            with model.disable_adapter():
                assert torch.equal(logits(model), plain)
            assert torch.equal(logits(model), seen[halves])
        assert torch.equal(logits(model), both)
    model.set_halves("steer")
    assert torch.equal(logits(model), seen["steer"])
    steering = get_peft_model(make(), SteerConfig(r=4, kind="nonlinear")).eval()
    for name, layer in steer_layers(steering.get_base_model()).items():
        edit = steer_layers(model.get_base_model())[name].steer_edit["default"]
        layer.steer_edit["default"].W_down.data.copy_(edit.W_read)
        layer.steer_edit["default"].W_up.data.copy_(edit.W_up)
    torch.testing.assert_close(logits(steering), seen["steer"])
    model.add_adapter("other", joint_config(r=2, init_weights=False))
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, plain)
    model.set_halves("lora")
    assert torch.equal(logits(model), plain)  # whose LoRA half is still zero
    model.set_halves("both")
    model.set_adapter("default")
    assert torch.equal(logits(model), both)
    with pytest.raises(ValueError, match="`halves='none'` is unknown; choose one of 'both', 'lora', 'steer'"):
        model.set_halves("none")


def test_one_half_can_be_trained():
    model = joint(orthogonal="always").train()
    before = adapter_state(model)
    with model.set_halves("lora"):
        train(model, weight_decay=0.0)
    changed = {n for n, x in adapter_state(model).items() if not torch.equal(x, before[n])}
    assert {n for n in changed if not n.endswith("W_down")} == {n for n in before if ".steering." not in n}
    assert worst(model) < TOLERANCE


def test_scale():
    model = joint(steer_kind="vector")
    randomize(model, std=0.3)
    full = logits(model)
    model.set_scale("default", 0)
    assert torch.equal(logits(model), logits(make()))
    model.set_scale("default", 2.0)
    assert not torch.equal(logits(model), full)
    model.unscale_layer()
    assert torch.equal(logits(model), full)


@pytest.mark.parametrize("kind", ["vector", "linear", "nonlinear", "loreft"])
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_merging_lora(tmp_path, kind, names):
    model = joint(steer_kind=kind, steer_scale=0.5)
    model.add_adapter("other", joint_config(r=2, kind="linear", use_bias=True))
    randomize(model, std=0.2)
    model.base_model.set_adapter(names)
    model.set_scale("default", 1.5)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged: .* `merge_lora_and_unload\(\)`"):
            merge()
    merged = model.merge_lora_and_unload()
    assert [type(merged.peft_config[name]) for name in names] == [SteerConfig] * len(names)
    assert list(merged.peft_config) == names
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "adapter")
    strengths = {n: m.scaling[n] for m in steer_layers(merged.get_base_model()).values() for n in m.scaling}
    merged.unload().save_pretrained(tmp_path / "base")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    for name in names[1:]:
        again.load_adapter(tmp_path / "adapter" / name, name)
    again.base_model.set_adapter(names)
    again.set_scale("default", 1.5)
    assert {n: m.scaling[n] for m in steer_layers(again.get_base_model()).values() for n in m.scaling} == strengths
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)


def test_merging_lora_keeps_trained_modules():
    config = tf.LlamaConfig(**{**make().config.to_dict(), "num_labels": 3})
    base = tf.LlamaForSequenceClassification(config).eval()
    model = get_peft_model(base, JointSteerLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")).eval()
    randomize(model, std=0.2)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model)
    merged = model.merge_lora_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert any("score" in name for name in get_peft_model_state_dict(merged))
