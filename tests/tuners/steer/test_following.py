"""What a trainer pushes to an engine: the edits of a model that is followed, and an error for one that is not."""

import copy
import re

import pytest
import torch
from tiny import KINDS, METHODS, adapted, inputs, logits

from peft_steer.tuners.steer import following


def called_from(module: str, model) -> None:
    """`model.merge_adapter()`, written in a module of that name."""
    exec("model.merge_adapter()", {"__name__": module, "model": model})


def pushed(model) -> dict[str, torch.Tensor]:
    """The parameters that TRL pushes between merging and unmerging, under the names that it gives them."""
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    return {name: p.detach().clone() for name, p in names.items() if model.prefix not in name}


def followed(model) -> following.Follower:
    """A follower of everything that `model` has."""
    forms = following.forms(model.base_model)
    follower = following.Follower({(name, letter) for name, form in forms.items() for letter in form.tensors()})
    following.follow(model.base_model, follower)
    return follower


BIASES = [("block", "vector"), ("mlp", "vector"), ("mlp", "loreft"), ("attention", "linear_bias"), ("heads", "vector")]


@pytest.mark.parametrize(("site", "kind"), BIASES)
def test_trl_cannot_push_a_bias_that_the_engine_lacks(site, kind):
    model = adapted(site=site, **KINDS[kind])
    before = logits(model)
    with pytest.raises(ValueError, match=r"biases, which vLLM would leave out.*use_vllm=False"):
        called_from("trl.generation.vllm_generation", model)
    assert torch.equal(logits(model), before)
    assert not any(layer.merged for layer in following.layers(model.base_model).values())


@pytest.mark.parametrize(("site", "kind"), BIASES)
def test_others_merge_as_before(site, kind):
    model = adapted(site=site, **KINDS[kind])
    before = logits(model)
    called_from("users_own.trl", model)
    assert all(layer.merged for layer in following.layers(model.base_model).values())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_what_an_engine_takes_may_be_pushed():
    """Into weights alone, or into a bias that the model has."""
    for architecture, site, kind in (("llama", "mlp", "linear"), ("opt", "block", "vector")):
        model = adapted(architecture, site=site, **KINDS[kind])
        called_from("trl.generation.vllm_generation", model)
        assert all(layer.merged for layer in following.layers(model.base_model).values())


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_merged_says_why_there_are_no_rollouts(method):
    model = adapted(method=method, **KINDS["silu"])
    with pytest.raises(ValueError, match=r"cannot be merged.*No vLLM engine follows this model"):
        called_from("trl.experimental.async_grpo.async_grpo_trainer", model)
    with pytest.raises(ValueError, match="cannot be merged") as error:
        model.merge_adapter()
    assert "vLLM" not in str(error.value)


@pytest.mark.parametrize(("method", "site"), [("steer", "block"), ("steer", "mlp"), ("joint", "block")])
@pytest.mark.parametrize("kind", ["vector", "silu", "loreft", "noreft"])
def test_a_followed_model_shows_its_edits(method, site, kind):
    model = adapted(method=method, site=site, **KINDS[kind])
    follower, before = followed(model), logits(model)
    base = {name: p for name, p in pushed(model).items() if ".live_" not in name}
    called_from("trl.generation.vllm_generation", model)
    shown = pushed(model)
    live = {name: p for name, p in shown.items() if ".steering.live_" in name}
    assert {tuple(re.split(r"\.steering\.live_", name)) for name in live} == follower.names
    h = torch.randn(5, 32)
    for name, layer in following.layers(model.base_model).items():
        x = {letter: live.get(f"{name}.steering.live_{letter}") for letter in "ABcv"}
        delta = torch.zeros_like(h) if x["A"] is None else torch.nn.functional.linear(h, x["A"], x["c"])
        if kind == "silu":
            delta = torch.nn.functional.silu(delta)
        delta = delta @ x["B"].t() if x["A"] is not None else delta
        delta = delta if x["v"] is None else delta + x["v"]
        expected = layer.steer_edit["default"].delta(h).detach().expand_as(h)
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-4)
    changed = {name for name in base if not torch.equal(base[name], shown[name])}
    assert bool(changed) == (method == "joint")  # LoRA does merge
    assert follower.frozen_base == (method == "steer")
    follower.received |= follower.names
    model.unmerge_adapter()
    assert set(pushed(model)) == set(base)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_that_did_not_arrive_is_an_error(method):
    model = adapted(method=method, **KINDS["silu"])
    follower = followed(model)
    model.merge_adapter()
    follower.received |= set(sorted(follower.names)[1:])
    with pytest.raises(RuntimeError, match=r"1 of \d+ tensors of the edits did not reach the engine"):
        model.unmerge_adapter()
    assert not any(".live_" in name for name in pushed(model))


def test_a_synchronization_that_was_broken_off_is_begun_again():
    model = adapted(method="joint", **KINDS["silu"])
    follower, before = followed(model), pushed(model)
    model.merge_adapter()
    first = pushed(model)
    follower.received |= follower.names
    model.merge_adapter()
    assert not follower.received
    for name, p in pushed(model).items():
        torch.testing.assert_close(p, first[name], atol=1e-5, rtol=1e-4)
    follower.received |= follower.names
    model.unmerge_adapter()
    for name, p in pushed(model).items():
        torch.testing.assert_close(p, before[name], atol=1e-5, rtol=1e-4)


def test_trained_modules_are_pushed():
    model = adapted(modules_to_save=["lm_head"], **KINDS["silu"])
    follower = followed(model)
    model.merge_adapter()
    assert not follower.frozen_base


def test_a_copy_is_not_followed():
    model = adapted(**KINDS["silu"])
    follower = followed(model)
    assert following.followers(model.base_model) == [follower]
    assert not following.followers(copy.deepcopy(model).base_model)


def test_positions_are_not_followed():
    model = adapted(positions="prompt", **KINDS["silu"])
    with pytest.raises(ValueError, match=r"positions='prompt'.*use_vllm=False"):
        following.forms(model.base_model)


def test_who_is_followed():
    """The one model in training that was loaded from there."""
    model = adapted(**KINDS["silu"])
    model.base_model.model.name_or_path = "somewhere"
    assert following.in_training("somewhere") is model.base_model
    assert following.in_training("elsewhere") is None
    other = adapted(**KINDS["silu"])
    other.base_model.model.name_or_path = "somewhere"
    assert following.in_training("somewhere") is None
    other.requires_grad_(False)
    assert following.in_training("somewhere") is model.base_model
    assert inputs()  # both are alive until here
