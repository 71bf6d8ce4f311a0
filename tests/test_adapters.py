"""What PEFT and transformers do with adapters: files, several of them, mixed batches, strength, status, unloading."""

import copy
import io
import pickle

import pytest
import torch
import transformers as tf
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
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
    inputs,
    logits,
    make,
    randomize,
    steer_layers,
)

from peft_steer import LoreftConfig, PostBlockSteerConfig, SteerConfig


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


# --- files


@pytest.mark.parametrize(
    ("method", "kind"),
    [*((method, kind) for method in METHODS for kind in STORED), *(("steer", kind) for kind in HEAD_KINDS)],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(method, tmp_path, kind, dtype, autocast, low_cpu_mem_usage):
    """Every tensor comes back equal, in the adapter's own precision; so do the logits."""
    model = get_peft_model(
        make(dtype=dtype), METHODS[method](r=4, **(KINDS | HEAD_KINDS)[kind]), autocast_adapter_dtype=autocast
    )
    randomize(model, std=0.2)
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
        assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in expected.items())


@pytest.mark.parametrize(("method", "site"), METHODS_AT_SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_by_every_loader(method, tmp_path, architecture, site):
    model = adapted(architecture, method=method, site=site)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, architecture)
    assert not torch.equal(expected, logits(make(architecture), architecture))

    def check(loaded):
        assert torch.equal(logits(loaded.eval(), architecture), expected)

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
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


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
    assert torch.equal(loaded(**x).logits, model(**x).logits)
    rows = model(**x, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(rows, torch.stack([model(**x).logits[0], base(**x).logits[1]]))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_can_be_left_off(method):
    model = get_peft_model(make(dtype=torch.bfloat16), METHODS[method](), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_state(model).values()} == {torch.bfloat16}


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


# --- several adapters


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters(method):
    model = adapted(method=method)
    model.add_adapter("loreft", METHODS[method](kind="loreft", site="mlp", r=2))
    model.add_adapter("late", METHODS[method](kind="vector", layers_to_transform=[2]))
    randomize(model, std=0.5, seed=2)
    alone = {}
    for name in ("default", "loreft", "late"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        alone[name] = logits(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in model.named_parameters() if f".{name}." in n}
    assert len({x.sum().item() for x in alone.values()}) == 3
    model.base_model.set_adapter(["default", "late"])
    both = logits(model)
    model.base_model.set_adapter(["late", "default"])
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-6)  # whatever the order
    assert not torch.allclose(both, alone["default"])
    model.delete_adapter("late")
    assert not any(".late." in name for name, _ in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model), alone["default"])


def test_active_adapters_read_the_same_hidden_state():
    model = adapted(site="block", layers_to_transform=[2])
    model.add_adapter("other", SteerConfig(r=4, kind="linear", layers_to_transform=[2]))
    randomize(model, std=0.5, seed=2)
    model.base_model.set_adapter(["default", "other"])
    seen = []
    (layer,) = steer_layers(model.get_base_model()).values()
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model)
    ((h, out),) = seen
    expected = h + layer.steer_edit["default"].delta(h) + layer.steer_edit["other"].delta(h)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("method", "site", "architecture"),
    [
        (method, site, name)
        for method, site in METHODS_AT_SITES
        for name in ("llama", "opt", "gpt2", "bert", "t5")
        if (method, name) != ("joint", "opt")  # it flattens rows: LoRA refuses to mix them
    ],
)
def test_rows_with_different_adapters(method, architecture, site):
    model = adapted(architecture, method=method, site=site)
    model.add_adapter("other", METHODS[method](site=site, r=2, kind="loreft"))
    randomize(model, std=0.5, seed=2)
    x = inputs(architecture, rows=4)
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        mixed = model(**x, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**x).logits[row]
            else:
                model.set_adapter(name)
                expected = model(**x).logits[row]
            # LoRA takes a part of the rows at a time: float32 rounding, up to 5e-5 in T5 (in float64 none)
            torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4 if method == "joint" else 1e-5)
    model.set_adapter("default")
    assert torch.equal(model(**x).logits, model(**x, adapter_names=["default"] * 4).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_generation_with_different_adapters(method, architecture, beams):
    model = get_peft_model(make(architecture), METHODS[method](r=4), "first")
    model.add_adapter("other", METHODS[method](kind="vector"))
    randomize(model, std=1.0)
    model.eval()
    ids = inputs(architecture, rows=3)["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["first", "__base__", "other"], **options)
    for row, name in enumerate(["first", None, "other"]):
        if name is None:
            with model.disable_adapter():
                expected = model.generate(input_ids=ids, **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=ids, **options)
        assert torch.equal(mixed[row], expected[row])


def test_rows_with_a_head_of_their_own_and_beams():
    model = get_peft_model(make(), SteerConfig(r=4, modules_to_save=["lm_head"])).eval()
    randomize(model, std=1.0)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(-1)
    ids = inputs()["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **options)
    assert torch.equal(mixed[0], model.generate(input_ids=ids, **options)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=ids, **options)[1])


def test_rows_are_counted_by_the_inputs():
    """Whatever else is passed first."""
    model, ids = adapted(), inputs()["input_ids"]
    positions = torch.arange(ids.shape[1])[None]
    found = model(position_ids=positions, input_ids=ids, adapter_names=["default", "__base__"]).logits
    assert torch.equal(found, model(input_ids=ids, adapter_names=["default", "__base__"]).logits)


@pytest.mark.parametrize("method", METHODS)
def test_bad_adapter_names_per_row(method):
    model = adapted(method=method)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**inputs(), adapter_names=["default", "typo"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(**inputs(rows=4), adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs(), adapter_names=["default", "default"])
    assert all(layer.row_adapters is None for layer in steer_layers(model.get_base_model()).values())


def test_rows_of_a_merged_model_are_refused():
    merged = adapted(site="mlp", kind="linear")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        merged(**inputs(), adapter_names=["default", "default"])


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
