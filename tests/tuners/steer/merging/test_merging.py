"""Folding edits into weights: the same logits where it is exact, a reason where it is not."""

import copy

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURES, HEAD_KINDS, KINDS, REFT, SITES, SMALL, adapted, logits, make, randomize, steer_layers

from peft_steer import SteerConfig


AFFINE = ("vector", "linear", "linear_bias", "loreft", "noreft", "direft", "nodireft")
NORM_BETWEEN = {"gemma2", "gemma3"}
EXPERTS = {"mixtral", "qwen3_moe"}


def mergeable(architecture, site, kind):
    if kind not in (*AFFINE, *HEAD_KINDS) or (site == "block" and kind != "vector"):
        return False
    if site == "heads":  # the projection reads what is edited
        return True
    if architecture in NORM_BETWEEN or (architecture in EXPERTS and site != "attention"):
        return False
    return not (architecture == "bert" and site == "block")


CASES = [
    (site, architecture, kind)
    for site in SITES
    for architecture in ARCHITECTURES
    for kind in [*(AFFINE if site != "heads" else ("linear_bias",)), "silu"]
    if kind not in REFT or architecture == "llama"
]
CASES += [("heads", "llama", kind) for kind in AFFINE if kind != "linear_bias"]
CASES += [("heads", architecture, kind) for architecture in ("llama", "gpt2") for kind in HEAD_KINDS]


@pytest.mark.parametrize(("site", "architecture", "kind"), CASES)
def test_merging(tmp_path, architecture, site, kind):
    model = adapted(architecture, scale=0.5, **{"site": site, **(KINDS | HEAD_KINDS)[kind]})
    plain, expected = logits(make(architecture), architecture), logits(model, architecture)
    state = copy.deepcopy(model.state_dict())
    if not mergeable(architecture, site, kind):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"cannot be merged: .*\. Keep it unmerged"):
                merge()
        assert torch.equal(logits(model, architecture), expected)
        return

    model.merge_adapter()
    torch.testing.assert_close(logits(model, architecture), expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, architecture), plain)
    assert torch.equal(logits(model, architecture), expected)

    model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], x) for k, x in state.items())

    merged = model.merge_and_unload()
    assert not steer_layers(merged)
    torch.testing.assert_close(logits(merged, architecture), expected, rtol=1e-3, atol=1e-4)
    try:
        merged.save_pretrained(tmp_path)
    except ValueError as error:
        assert "would drop it" in str(error)  # noqa: PT017
        assert kind != "linear"
    else:
        loaded = type(merged).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(logits(loaded, architecture), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "saved"), [("llama", False), ("qwen3", False), ("gpt2", True), ("opt", True)]
)
def test_a_bias_that_the_configuration_does_not_have_is_not_lost_silently(tmp_path, architecture, saved):
    merged = adapted(architecture, kind="vector").merge_and_unload()
    if saved:
        merged.save_pretrained(tmp_path)
    else:
        with pytest.raises(ValueError, match="would drop it"):
            merged.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="would drop it"):
            copy.deepcopy(merged).save_pretrained(tmp_path)


def test_the_adapter_itself_is_saved_while_merged(tmp_path):
    model = adapted(site="mlp", kind="linear")
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_half_precision(dtype):
    model = adapted(dtype=dtype, site="mlp", kind="linear")
    expected, plain = logits(model), logits(make(dtype=dtype))
    merged = logits(model.merge_and_unload())
    assert (merged - expected).norm() < 0.1 * (expected - plain).norm()


def test_two_adapters():
    model = adapted(site="mlp", kind="linear")
    model.add_adapter("other", SteerConfig(r=2, site="mlp", kind="linear", use_bias=True))
    randomize(model, std=0.5, seed=2)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    with pytest.raises(ValueError, match="Merge all active adapters together"):
        model.merge_adapter(["default"])
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    for change in (lambda: model.set_scale("default", 2.0), lambda: model.scale_layer(2.0)):
        with pytest.raises(ValueError, match="unmerge"):
            change()
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")


def test_unloading_with_one_of_two_merged():
    model = adapted(site="mlp", kind="linear")
    model.add_adapter("other", SteerConfig(r=2, site="mlp", kind="linear"))
    randomize(model, std=0.5)
    expected = logits(model)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(
        logits(model.merge_and_unload(adapter_names=["default"])), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("training", [False, True])
def test_merging_leaves_the_mode_alone(training):
    model = adapted(kind="vector").train(training)
    model.get_base_model().model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    model.merge_adapter()
    assert [m.training for m in model.modules()] == modes


def test_post_norm_and_scaled_blocks_are_refused():
    """No attribute tells them; what a linear layer adds does not arrive as it is."""
    post_norm = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
    )  # fmt: skip
    scaled = tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, residual_multiplier=0.5))
    for model in (post_norm, scaled):
        for layers in (None, [1]):
            steered_model = get_peft_model(model, SteerConfig(kind="vector", layers_to_transform=layers))
            with pytest.raises(ValueError, match="normalized, scaled or otherwise changed"):
                steered_model.merge_adapter()
            steered_model.unload()


def test_an_unknown_adapter_is_not_merged_silently():
    model = adapted(kind="vector")
    for merge in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match=r"no adapters \['typo'\]"):
            merge(["typo"])


def test_merging_while_disabled_is_refused():
    model = adapted(kind="vector")
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model.merge_adapter()


def test_a_vector_below_an_edit_that_would_read_it():
    """Folded into the MLP, the block's vector would be seen by the edit at the MLP's output."""
    model = adapted(site="block", kind="vector")
    model.add_adapter("reader", SteerConfig(site="mlp", kind="linear", r=4))
    randomize(model, std=0.5)
    model.base_model.set_adapter(["default", "reader"])
    expected = logits(model)
    with pytest.raises(ValueError, match="would read it"):
        model.merge_adapter(["default"])
    model.merge_adapter(["reader"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_strength_changes_nowhere_if_a_layer_is_merged():
    model = adapted(kind="vector", layers_to_transform=[0, 1])
    model.add_adapter("other", SteerConfig(site="mlp", kind="vector", layers_to_transform=[2]))
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    before = logits(model)
    with pytest.raises(ValueError, match="unmerge"):
        model.scale_layer(2.0)
    assert torch.equal(logits(model), before)


def test_two_sites_in_one_linear_are_refused():
    model = adapted(site="block", kind="vector")
    model.add_adapter("other", SteerConfig(site="mlp", kind="vector"))
    with pytest.raises(ValueError, match="same linear layer"):
        model.merge_adapter(["default", "other"])


@pytest.mark.parametrize("kind", ["linear", "loreft"])
def test_safe_merge(kind):
    model = adapted(site="mlp", kind=kind)
    before = copy.deepcopy(model.state_dict())
    layer = next(iter(steer_layers(model.get_base_model()).values()))
    with torch.no_grad():
        next(layer.steer_edit["default"].parameters())[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items() if "steer_edit" not in k)


def test_unload_of_a_merged_model_is_the_base():
    model = adapted(site="mlp", kind="linear")
    model.merge_adapter()
    assert torch.equal(logits(model.unload()), logits(make()))
