"""Adapters' files and everything that loads them."""

import copy

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny import (
    ARCHITECTURES,
    HEAD_KINDS,
    KINDS,
    METHODS,
    METHODS_AT_SITES,
    STORED,
    adapted,
    adapter_state,
    as_saved,
    assert_equal_but_for_rounding,
    inputs,
    logits,
    make,
    randomize,
)

from peft_steer import LoreftConfig, PostBlockSteerConfig, SteerConfig


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((method, kind) for method in METHODS for kind in STORED), *(("steer", kind) for kind in HEAD_KINDS)],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(method, tmp_path, kind, dtype, autocast, low_cpu_mem_usage):
    """Every tensor comes back equal, in the adapter's own precision; so do the logits, but for rounding."""
    model = get_peft_model(
        make(dtype=dtype), METHODS[method](r=4, **(KINDS | HEAD_KINDS)[kind]), autocast_adapter_dtype=autocast
    )
    randomize(model, std=0.2)
    as_saved(model)
    found = {p.dtype for p in adapter_state(model).values() if p.is_floating_point()}
    assert found == {torch.float32 if autocast else dtype}
    model.eval().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(
        make(dtype=dtype), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
    )
    expected, found = adapter_state(model), adapter_state(loaded)
    assert expected.keys() == found.keys()
    if method == "joint" and low_cpu_mem_usage and autocast and dtype != torch.float32:
        # PEFT 0.21.2 then rounds LoRA's weights to the base's precision, whatever the file has
        assert all(torch.equal(found[k], x.to(dtype).float()) for k, x in expected.items() if ".steering." not in k)
        expected = {k: x for k, x in expected.items() if ".steering." in k}
    else:
        assert_equal_but_for_rounding(logits(loaded), logits(model))
    assert all(torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in expected.items())


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_by_every_loader(method, tmp_path, architecture, site):
    model = as_saved(adapted(architecture, method=method, site=site))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, architecture)
    assert not torch.equal(expected, logits(make(architecture), architecture))

    def check(loaded):
        assert_equal_but_for_rounding(logits(loaded.eval(), architecture), expected)

    check(PeftModel.from_pretrained(make(architecture), tmp_path / "adapter", adapter_name="other"))
    plain = make(architecture)
    plain.load_adapter(str(tmp_path / "adapter"))
    check(plain)
    injected = inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path / "adapter"), make(architecture))
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    check(injected)
    from_keys = inject_adapter_in_model(
        PeftConfig.from_pretrained(tmp_path / "adapter"),
        make(architecture),
        state_dict={k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()},
    )
    set_peft_model_state_dict(from_keys, get_peft_model_state_dict(model))
    check(from_keys)


def test_auto_classes(tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PostBlockSteerConfig(task_type="CAUSAL_LM")
    ).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, SteerConfig)
    assert (config.kind, config.activation, config.r, config.site) == ("nonlinear", "silu", 8, "block")
    for auto in (AutoPeftModelForCausalLM, tf.AutoModelForCausalLM):
        assert_equal_but_for_rounding(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))


def test_transformers_own_adapter_methods(tmp_path):
    model = make()
    plain = logits(model)
    model.add_adapter(LoreftConfig(r=4), adapter_name="one")
    model.add_adapter(SteerConfig(kind="vector"), adapter_name="two")
    randomize(model)
    model.set_adapter("one")
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert not torch.equal(one, two)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), two)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("damage", "message"), [("missing", "lacks"), ("extra", "extra"), ("nan", "finite"), ("shape", "shape")]
)
def test_a_damaged_checkpoint_is_refused(method, damage, message):
    state = {k: v.clone() for k, v in get_peft_model_state_dict(adapted(method=method)).items()}
    key = next(name for name in state if "W_down" in name)
    if damage == "missing":
        del state[key]
    elif damage == "extra":
        state[key.replace("W_down", "W_side")] = state[key]
    elif damage == "nan":
        state[key][0, 0] = torch.nan
    else:
        state[key] = state[key][:2]
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(adapted(method=method), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"hidden_size": 16}, {"num_hidden_layers": 4}])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_another_width_or_depth_is_refused(method, tmp_path, loader, change):
    adapted(method=method).save_pretrained(tmp_path)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**make().config.to_dict(), **change}))
    with pytest.raises(ValueError, match=r"made for a model with (steer_)?hidden_size=32 and (steer_)?num_blocks=3"):
        PeftModel.from_pretrained(other, tmp_path) if loader == "peft" else other.load_adapter(str(tmp_path))


@pytest.mark.parametrize("method", METHODS)
def test_a_config_may_serve_for_several_models(method):
    config = METHODS[method](r=4)
    assert get_peft_model(make("llama"), config).peft_config["default"] is config
    get_peft_model(tf.LlamaForCausalLM(tf.LlamaConfig(**{**make().config.to_dict(), "num_hidden_layers": 5})), config)


def test_a_preset_comes_back_as_itself(tmp_path):
    LoreftConfig(r=3, site="block").save_pretrained(tmp_path)
    loaded = LoreftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoreftConfig
    assert (loaded.r, loaded.site) == (3, "block")
    assert type(PeftConfig.from_pretrained(tmp_path)) is SteerConfig
    assert PeftConfig.from_pretrained(tmp_path).kind == "loreft"


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save(method, tmp_path):
    config = tf.LlamaConfig(**{**make().config.to_dict(), "num_labels": 3})
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(config).eval()
    model = get_peft_model(copy.deepcopy(base), METHODS[method](r=4, task_type="SEQ_CLS")).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    randomize(model)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    x = inputs()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal_but_for_rounding(loaded(**x).logits, model(**x).logits)
    rows = model(**x, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(rows, torch.stack([model(**x).logits[0], base(**x).logits[1]]))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_can_be_left_off(method):
    model = get_peft_model(make(dtype=torch.bfloat16), METHODS[method](), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_state(model).values()} == {torch.bfloat16}
