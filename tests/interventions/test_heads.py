"""Attention heads at the input of the output projection: found in every kind of attention, or refused."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import GPT2, SMALL, inputs, make, randomize, reference_delta, steer_layers
from torch import nn

from peft_steer import LofitConfig, SteerConfig


WIDE = {**SMALL, "head_dim": 16}
MLA = {
    **{k: v for k, v in SMALL.items() if k != "head_dim"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
NEXT = {
    **SMALL,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 0,
    "mlp_only_layers": [0, 1],
}
# the model, and number and width of the heads in each block
ATTENTIONS = {
    "grouped": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), [(4, 8)] * 3),
    "head_dim of its own": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**WIDE)), [(4, 16)] * 3),
    "fused": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)), [(4, 8)] * 3),
    "one key": (
        lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**{**GPT2, "vocab_size": 99}, multi_query=True)),
        [(4, 8)] * 3,
    ),
    "latent": (lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**MLA)), [(4, 12)] * 3),
    "linear": (lambda: tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**NEXT)), [(4, 12), (4, 8)]),
    "one in the other": (
        lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                vocab_size=99,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=64,
            )
        ),
        [(4, 8)] * 2,
    ),
}


def build(attention):
    torch.manual_seed(0)
    return ATTENTIONS[attention][0]().eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_heads_are_edited_by_the_equation(attention):
    x = inputs()
    plain = build(attention)(**x).logits
    model = get_peft_model(build(attention), LofitConfig(scale=0.5)).eval()
    layers = steer_layers(model.get_base_model())
    assert [tuple(layer.steer_edit["default"].A.shape) for layer in layers.values()] == ATTENTIONS[attention][1]
    assert torch.equal(model(**x).logits, plain)
    randomize(model, std=0.5)
    base = build(attention)
    for name, layer in layers.items():

        def edit(module, args, edit=layer.steer_edit["default"]):
            return ((args[0] + 0.5 * reference_delta(edit, args[0])).float(),)

        base.get_submodule(name).register_forward_pre_hook(edit)
    expected = base(**x).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(**x).logits, expected, rtol=1e-3, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(**x).logits, plain)


# the rows (or columns) of a weight that make the values of one key-value head, and the heads that read them
VALUES = {
    "grouped": (lambda block: block.self_attn.v_proj.weight[:8], [0, 1]),
    "head_dim of its own": (lambda block: block.self_attn.v_proj.weight[16:], [2, 3]),
    "fused": (lambda block: block.self_attn.qkv_proj.weight[-8:], [2, 3]),
    "latent": (lambda block: block.self_attn.kv_b_proj.weight[20 + 8 : 40], [1]),
}


@pytest.mark.parametrize("attention", VALUES)
def test_a_head_is_where_its_values_go(attention):
    """Without the values of one key-value head, what is split off for the heads that share it is zero, and nothing
    else is."""
    rows, heads = VALUES[attention]
    model = build(attention)
    with torch.no_grad():
        rows(model.model.layers[1]).zero_()
    model = get_peft_model(model, LofitConfig(layers_to_transform=[1]))
    (layer,) = steer_layers(model.get_base_model()).values()
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(**inputs())
    found = seen[0].unflatten(-1, layer.steer_edit["default"].A.shape).abs().amax(dim=(0, 1, 3))
    assert [i for i, x in enumerate(found) if x == 0] == heads


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "loreft", "vector"])
def test_other_kinds_edit_the_heads_side_by_side(kind):
    model = get_peft_model(build("head_dim of its own"), SteerConfig(site="heads", kind=kind, r=40)).eval()
    assert {layer.out_features for layer in steer_layers(model.get_base_model()).values()} == {64}
    before = model(**inputs()).logits
    randomize(model)
    assert not torch.equal(model(**inputs()).logits, before)
    if kind != "vector":
        with pytest.raises(ValueError, match=r"`r=65` at .* is larger than the heads' joint width 64"):
            get_peft_model(build("head_dim of its own"), SteerConfig(site="heads", kind=kind, r=65))


@pytest.mark.parametrize("architecture", ["bloom", "bert", "llama"])
def test_attention_and_heads_of_one_module(architecture):
    """In some architectures both are at the output projection: its output and its input."""
    model = get_peft_model(make(architecture), SteerConfig(site="attention", kind="linear", r=4), "out").eval()
    model.add_adapter("in", SteerConfig(site="heads", kind="linear", r=4))
    randomize(model, std=0.5)
    x = inputs(architecture)
    alone = {}
    for name in ("out", "in"):
        model.set_adapter(name)
        alone[name] = model(**x).logits
    model.base_model.set_adapter(["out", "in"])
    both = model(**x).logits
    assert not any(torch.allclose(both, logits) for logits in alone.values())
    rows = model(**x, adapter_names=["in", "out"]).logits
    torch.testing.assert_close(rows, torch.stack([alone["in"][0], alone["out"][1]]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="same linear layer"):
        model.merge_adapter()
    plain = model.unload()
    assert torch.equal(plain(**x).logits, make(architecture)(**x).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_no_attention():
    model = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4))
    with pytest.raises(ValueError, match=r"No output projection of attention heads .* 'backbone\.layers\.0'"):
        get_peft_model(model, SteerConfig(site="heads"))


def test_heads_that_do_not_fit():
    model = make()
    model.model.layers[0].self_attn.head_dim = 7
    with pytest.raises(ValueError, match=r"cannot be told apart: it says 4 heads of width 7.* reads 32"):
        get_peft_model(model, LofitConfig())


def test_a_projection_without_positional_arguments():
    model = get_peft_model(make(), LofitConfig())
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    assert isinstance(projection, nn.Linear)
    with pytest.raises(TypeError, match="no positional argument"):
        projection(input=torch.zeros(1, 32))
