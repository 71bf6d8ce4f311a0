"""Two theorems of arXiv 2603.00425 about where to steer, shown on models that are built to their assumptions."""

import pytest
import tiny
import torch
from peft import get_peft_model

from peft_steer import SteerConfig


LAST = 2  # the steered block, the last of three


def steered(model: torch.nn.Module, site: str, kind: str, seed: int = 1) -> torch.nn.Module:
    config = SteerConfig(r=4, site=site, kind=kind, use_bias=kind == "linear", layers_to_transform=[LAST])
    model = get_peft_model(model, config)
    tiny.randomize(model, std=0.5, seed=seed)
    return model.eval()


def edit_of(model: torch.nn.Module) -> torch.nn.Module:
    (layer,) = tiny.steer_layers(model).values()
    return layer.steer_edit["default"]


def shift(model: torch.nn.Module) -> torch.Tensor:
    """What the adapter adds to the last block's output at every token, `(2, 7, d)`."""
    outputs = []
    handle = (
        model.get_base_model()
        .model.layers[LAST]
        .register_forward_hook(
            lambda module, args, output: outputs.append(output if torch.is_tensor(output) else output[0])
        )
    )
    tiny.logits(model)
    with model.disable_adapter():
        tiny.logits(model)
    handle.remove()
    return outputs[0] - outputs[1]


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "loreft"])
def test_without_an_mlp_post_mlp_steering_is_a_constant(kind):
    """With `W_d = 0` the MLP says nothing of the token: a function of its output is one vector, and the weights that
    read it get no gradient. Post-block steering still reads the skip connection."""
    differences, reads, writes = {}, {}, {}
    for site in ("mlp", "block"):
        model = tiny.make()
        model.model.layers[LAST].mlp.down_proj.weight.data.zero_()
        model = steered(model, site, kind)
        added = shift(model).flatten(0, 1)
        differences[site] = (added - added[0]).norm(dim=-1).max()
        model(**tiny.inputs(), labels=tiny.inputs()["input_ids"]).loss.backward()
        edit = edit_of(model)
        reads[site] = (edit.W if kind == "loreft" else edit.W_down).grad.norm()
        writes[site] = (edit.W_up if kind == "nonlinear" else edit.b).grad.norm()
    assert differences["mlp"] < 1e-5
    assert differences["block"] > 0.01
    assert reads["mlp"] < 1e-5 * reads["block"]
    # the constant is learned, but by a nonlinear edit: silu(0) = 0
    assert (writes["mlp"] < 1e-5 * writes["block"]) == (kind == "nonlinear")


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_post_block_steering_reproduces_post_mlp_steering(kind):
    """If skip and MLP write into complementary subspaces, `P` onto the MLP's, then `A P` at the block's output is `A`
    at the MLP's, at the same rank (`W_down' = W_down P`)."""
    half = tiny.D // 2
    P = torch.diag((torch.arange(tiny.D) >= half).float())

    def complementary() -> torch.nn.Module:
        model = tiny.make()
        model.model.embed_tokens.weight.data[:, half:] = 0
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.data[half:] = 0
            layer.mlp.down_proj.weight.data *= 30  # as large as what the skip connection carries
            layer.mlp.down_proj.weight.data[half:] *= float(i == LAST)
            layer.mlp.down_proj.weight.data[:half] *= float(i != LAST)
        return model

    post_mlp, post_block = (steered(complementary(), site, kind) for site in ("mlp", "block"))
    edit = edit_of(post_block)
    edit.load_state_dict(edit_of(post_mlp).state_dict())
    expected = tiny.logits(post_mlp)
    assert not torch.allclose(tiny.logits(post_block), expected, atol=1e-3)  # it reads the skip connection too
    with torch.no_grad():
        edit.W_down.copy_(edit.W_down @ P)
    assert edit.W_down.shape == edit_of(post_mlp).W_down.shape
    torch.testing.assert_close(tiny.logits(post_block), expected, atol=1e-5, rtol=1e-5)
    with post_mlp.disable_adapter():
        assert not torch.allclose(tiny.logits(post_mlp), expected, atol=1e-3)
