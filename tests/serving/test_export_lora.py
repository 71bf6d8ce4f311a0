"""Affine edits exported as LoRA: PEFT's own LoRA gives the adapter's logits, and what is not a LoRA is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import D, adapted, adapter_state, inputs, make

from peft_steer.serving.export import export_lora


AFFINE = {
    "linear": {"kind": "linear"},
    "linear_bias": {"kind": "linear", "use_bias": True},
    "loreft": {"kind": "loreft"},
    "noreft": {"kind": "noreft"},
    "direft": {"kind": "direft"},
    "nodireft": {"kind": "nodireft"},
    "vector": {"kind": "vector"},
}
SITES = ["mlp", "attention", "heads", ["mlp", "attention"], ["mlp", "heads"]]


def logits(model, architecture="llama"):
    with torch.no_grad():
        return model(**inputs(architecture)).logits


def with_biases(model):
    """Random biases, which a tiny random model has as zeros: an edit of an output reads them."""
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith(".bias") and "steering" not in name and "lora" not in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def as_lora(folder, architecture="llama"):
    """PEFT's own LoRA on a fresh copy of the base."""
    model = PeftModel.from_pretrained(with_biases(make(architecture)), folder).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    return model


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("kind", AFFINE)
def test_lora_gives_the_same_logits(kind, site, tmp_path):
    model = adapted(site=site, **AFFINE[kind])
    model.base_model.set_scale("default", 0.7)
    export_lora(model, tmp_path, constants="bias")
    expected, base = logits(model), logits(make())
    torch.testing.assert_close(logits(as_lora(tmp_path)), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 0.01  # the control: a missing edit would show


@pytest.mark.parametrize("kind", ["lofit", "jola"])
def test_heads_as_trained(kind, tmp_path):
    model = adapted(site="heads", kind=kind)
    if kind == "lofit":  # past its choice of heads: `v` of the chosen ones acts, `A` does not
        for name, buffer in model.named_buffers():
            if name.endswith("steps"):
                buffer.fill_(1000)
            if name.endswith("selected"):
                buffer.copy_(torch.arange(len(buffer)) % 2 == 0)
    export_lora(model, tmp_path, constants="bias")
    expected = logits(model)
    torch.testing.assert_close(logits(as_lora(tmp_path)), expected, atol=1e-5, rtol=0)
    assert (expected - logits(make())).abs().max() > 0.01
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    assert rank == 1 if kind == "lofit" else rank > 1


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_architectures(architecture, tmp_path):
    model = with_biases(adapted(architecture, site=["mlp", "attention"], kind="loreft"))
    export_lora(model, tmp_path, constants="bias")
    expected = logits(model, architecture)
    torch.testing.assert_close(logits(as_lora(tmp_path, architecture), architecture), expected, atol=1e-5, rtol=0)
    assert (expected - logits(with_biases(make(architecture)), architecture)).abs().max() > 0.01


def test_one_rank_padded(tmp_path):
    model = adapted(site=["mlp", "attention"], kind="linear", rank_pattern={r".*self_attn": 2, r".*0\.mlp": 7})
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(as_lora(tmp_path)), logits(model), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["lora_bias"]) == (7, 7, {}, False)
    shapes = {x.shape for key, x in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in key}
    assert {shape[0] for shape in shapes} == {7}


def test_module_names_are_short_where_they_can_be(tmp_path):
    export_lora(adapted(site=["mlp", "attention"], kind="linear"), tmp_path / "all")
    export_lora(adapted(site="mlp", kind="linear", layers_to_transform=[1]), tmp_path / "one")
    export_lora(adapted("gpt2", site="mlp", kind="linear"), tmp_path / "gpt2", constants="bias")
    names = {
        name: set(json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"])
        for name in ("all", "one", "gpt2")
    }
    assert names == {
        "all": {"down_proj", "o_proj"},
        "one": {"model.layers.1.mlp.down_proj"},
        "gpt2": {"mlp.c_proj"},  # `c_proj` would be the attention's as well
    }


def test_no_constant_no_bias(tmp_path):
    export_lora(adapted(site="mlp", kind="linear"), tmp_path)
    assert not any("bias" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_constants_as_a_control_vector(tmp_path):
    from peft_steer.serving.export.gguf_vector import read_control_vector

    model = adapted(site="mlp", kind="loreft", layers_to_transform=[1, 2])
    export_lora(model, tmp_path, constants="vector")
    vectors = read_control_vector(tmp_path / "control_vector.gguf")
    lora = as_lora(tmp_path)
    assert (logits(lora) - logits(model)).abs().max() > 0.01  # without the vectors
    layers = lora.get_base_model().model.layers
    for block, v in vectors.items():  # what llama.cpp adds to a block's output
        layers[block].register_forward_hook(lambda module, args, out, v=v: out + v)
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="block 0"):
        export_lora(adapted(site="mlp", kind="loreft"), tmp_path / "0", constants="vector")


def test_the_adapter_is_unchanged(tmp_path):
    model = adapted(site="mlp", kind="loreft")
    before, state = logits(model), adapter_state(model)
    export_lora(model, tmp_path, constants="drop")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(x, state[key]) for key, x in adapter_state(model).items())


@pytest.mark.parametrize(
    ("config", "constants", "message"),
    [
        ({"site": "block", "kind": "linear"}, None, "vLLM"),
        ({"site": ["mlp", "block"], "kind": "loreft"}, "bias", "vLLM"),
        ({"site": "mlp", "kind": "nonlinear"}, None, "activation='silu'"),
        ({"site": "mlp", "kind": "direft", "activation": "tanh"}, None, "activation='tanh'"),
        ({"site": "mlp", "kind": "loreft"}, None, "--constants bias"),
        ({"site": "mlp", "kind": "loreft"}, "none", "constants='none' must be one of"),
        ({"site": "mlp", "kind": "vector"}, "drop", "nothing would be steered"),
        ({"site": "attention", "kind": "loreft"}, "vector", "read by the block's MLP"),
        ({"site": ["attention", "heads"], "kind": "linear"}, None, "same linear layer"),
        ({"site": "mlp", "kind": "linear", "positions": "last"}, None, "positions='last'"),
        ({"site": "mlp", "kind": "linear", "modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"method": "joint", "site": "mlp", "kind": "linear"}, None, "JOINT_STEER_LORA"),
    ],
)
def test_refused(config, constants, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_lora(adapted(**config), tmp_path / "out", constants=constants)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("architecture", "message"), [("gemma2", "the norm"), ("mixtral", "no single linear layer")])
def test_architectures_refused(architecture, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_lora(adapted(architecture, site="mlp", kind="linear"), tmp_path / "out")


def test_edit_sizes_are_those_of_the_linear_layers(tmp_path):
    pairs = export_lora(adapted(site=["mlp", "heads"], kind="linear"), tmp_path)
    assert {name.rpartition(".")[2]: (pair.A.shape[1], pair.B.shape[0]) for name, pair in pairs.items()} == {
        "down_proj": (48, D),
        "o_proj": (D, D),
    }
