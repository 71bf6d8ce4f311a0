"""Several adapters on one model, and rows of a batch with different ones."""

import pytest
import torch
from peft import (
    get_peft_model,
)
from tiny import (
    METHODS,
    METHODS_AT_SITES,
    adapted,
    assert_equal_but_for_rounding,
    inputs,
    logits,
    make,
    randomize,
    steer_layers,
)

from peft_steer import SteerConfig


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
    assert_equal_but_for_rounding(logits(model), alone["default"])


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
    assert_equal_but_for_rounding(model(**x, adapter_names=["default"] * 4).logits, model(**x).logits)


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
