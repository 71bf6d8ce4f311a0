"""Positions with several adapters, files, injection, merging and unloading."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from positions_batch import batch, tokens_of_a_prompt
from positions_reference import GREEDY, SPECS, expected, mask_of, steered
from tiny import (
    METHODS,
    assert_equal_but_for_rounding,
    inputs,
    make,
    randomize,
    steer_layers,
)

from peft_steer import SteerConfig, steered_positions


def test_injected_without_a_peft_model():
    """transformers' own adapters, and PEFT's `inject_adapter_in_model`."""
    want = steered(positions="f2+l1").generate(**tokens_of_a_prompt(), **GREEDY)
    native = make()
    native.add_adapter(SteerConfig(r=4, kind="nonlinear", positions="f2+l1"))
    for model in (native, inject_adapter_in_model(SteerConfig(r=4, kind="nonlinear", positions="f2+l1"), make())):
        randomize(model, std=0.5)
        assert torch.equal(model.eval().generate(**tokens_of_a_prompt(), **GREEDY), want)
        model(**batch())
        assert steered_positions(model) == 6


def test_saved_and_loaded(tmp_path):
    model = steered(positions="f2+l1")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert_equal_but_for_rounding(loaded.eval()(**batch()).logits, model(**batch()).logits)
    assert torch.equal(mask_of(loaded), mask_of(model))


def test_several_adapters_with_other_positions():
    """Active together, each where it acts; rows of one batch with different ones."""
    model = steered(positions="f2")
    model.add_adapter("second", SteerConfig(kind="vector", positions="completion"))
    model.add_adapter("everywhere", SteerConfig(kind="vector"))
    randomize(model, std=0.5)
    x = batch()
    model.base_model.set_adapter(["default", "second"])
    seen = []
    layer = next(iter(steer_layers(model).values()))
    layer.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    model(**x)
    h, out = seen
    first, second = layer.steer_edit["default"], layer.steer_edit["second"]
    want = h.clone()
    f2 = torch.tensor([expected("f2", 5, 9), [*expected("f2", 4, 6), *[False] * 3]])
    rest = torch.tensor([expected("completion", 5, 9), [*expected("completion", 4, 6), *[False] * 3]])
    want[f2] += first.delta(h)[f2]
    want[rest] += second.v
    torch.testing.assert_close(out, want)
    assert steered_positions(model) == int((f2 | rest).sum()) == 4 + 6

    x = {**tokens_of_a_prompt()}
    names = ["default", "__base__", "second", "everywhere"]
    four = {name: value.repeat(2, 1) for name, value in x.items()}
    together = model.generate(**four, adapter_names=names, **GREEDY)
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in four.items()}
        assert torch.equal(model.generate(**row, adapter_names=[name], **GREEDY)[0], together[i])
    model.set_adapter("everywhere")
    model(**batch())
    assert steered_positions(model) == 18
    with model.disable_adapter():
        model(**batch())
        assert steered_positions(model) == 0


def test_with_a_lora_adapter_that_does_not_need_positions():
    """Where no adapter acts that needs to know the prompt, nothing has to be known."""
    model = steered(positions="last")
    with model.disable_adapter():
        want = make()(**inputs()).logits
        assert torch.equal(model(**inputs()).logits, want)
    mixed = model.generate(**tokens_of_a_prompt(), adapter_names=["__base__", "__base__"], **GREEDY)
    assert torch.equal(mixed, make().generate(**tokens_of_a_prompt(), **GREEDY))


@pytest.mark.parametrize("method", ["steer", "joint"])
def test_layers_that_come_and_go(method):
    """The list of layers that is kept follows copies, further adapters at other blocks, blocks that are copied into
    another model, and unloading."""
    ids = inputs()["input_ids"]
    model = steered(method=method, positions="last", layers_to_transform=[0])
    name = {"steer": "layers_to_transform", "joint": "steer_layers_to_transform"}[method]

    def masks(m):
        m(input_ids=ids, prompt_lengths=[3, 4])
        return {key: layer.steered.nonzero().tolist() for key, layer in steer_layers(m.get_base_model()).items()}

    last = [[0, 2], [1, 3]]
    assert masks(model) == {"model.layers.0": last}
    other = copy.deepcopy(model)
    config = METHODS[method](kind="nonlinear", r=4, positions="last", layers_to_transform=[2])
    assert getattr(config, name) == [2]
    other.add_adapter("more", config)
    other.base_model.set_adapter(["default", "more"])
    assert masks(other) == {"model.layers.0": last, "model.layers.2": last}
    assert masks(model) == {"model.layers.0": last}
    layers = model.get_base_model().model.layers
    masks(model)
    layers[1] = copy.deepcopy(layers[0])
    layers[1].self_attn.layer_idx = 1
    assert masks(model) == {"model.layers.0": last, "model.layers.1": last}
    bare = other.unload()
    assert not any("_kept_layers" in vars(m) for m in bare.modules())
    assert torch.equal(bare(input_ids=ids).logits, make()(input_ids=ids).logits)


@pytest.mark.parametrize("spec", SPECS)
def test_merging_is_refused(spec):
    model = steered(kind="vector", site="mlp", positions=spec)
    with pytest.raises(ValueError, match=r"positions=.* edits some tokens, a weight all of them"):
        model.merge_adapter()


def test_unloading_leaves_the_model_as_it_was():
    base = make()
    before = {name for m in base.modules() for name in vars(m)}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules())
    model = get_peft_model(base, SteerConfig(positions="last")).unload()
    assert {name for m in model.modules() for name in vars(m)} == before
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert model.generate.__func__ is type(model).generate
