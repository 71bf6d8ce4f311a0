"""Every wrong setting has an error that names the field, the value and the remedy."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model, inject_adapter_in_model
from tiny import inputs, make
from torch import nn

from peft_steer import LoreftConfig, PostBlockSteerConfig, SteerConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "`r=0` must be an integer of at least 1"),
        ({"r": -3}, "`r=-3`"),
        ({"r": 2.0}, "`r=2.0`"),
        ({"rank_pattern": {"layers.1": 0}}, r"`rank_pattern\['layers.1'\]=0`"),
        ({"scale": float("nan")}, "`scale=nan` must be a finite number"),
        ({"scale": "big"}, "`scale='big'`"),
        ({"kind": "cubic"}, "`kind='cubic'` is unknown; choose one of 'vector', 'linear', 'nonlinear', 'loreft'"),
        ({"site": "postblock"}, "`site='postblock'` is unknown; choose one of 'block', 'mlp', 'attention'"),
        ({"positions": "first"}, "`positions='first'` is unknown; choose 'all', 'last', 'prompt'"),
        (
            {"kind": "nonlinear", "activation": "swish"},
            "`activation='swish'` is unknown; choose one of 'silu', 'relu'",
        ),
        ({"kind": "linear", "activation": "silu"}, "`activation='silu'` contradicts `kind='linear'`"),
        ({"kind": "loreft", "activation": "silu"}, "`activation='silu'` contradicts `kind='loreft'`: only the kinds"),
        ({"kind": "direft", "activation": "relu"}, "`activation='relu'` contradicts `kind='direft'`"),
        ({"kind": "noreft", "activation": "swish"}, "`activation='swish'` is unknown"),
        ({"kind": "vector", "use_bias": True}, "`use_bias=True` contradicts `kind='vector'`"),
        ({"kind": "nonlinear", "use_bias": True}, "`use_bias=True` contradicts `kind='nonlinear'`"),
        ({"kind": "vector", "rank_pattern": {"x": 2}}, "`rank_pattern` contradicts `kind='vector'`"),
        ({"target_modules": "all-linear"}, "`target_modules='all-linear'` names linears"),
        ({"target_modules": r".*layers\.1", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
    ],
)
def test_config(config, message):
    with pytest.raises(ValueError, match=message):
        SteerConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 33}, "`r=33` at 'model.layers.0' is larger than the hidden size 32"),
        ({"rank_pattern": {"layers.2": 40}}, "`r=40` at 'model.layers.2'"),
        ({"layers_to_transform": [1, 3]}, r"`layers_to_transform` asks for \[3\], but .* 0 to 2"),
        ({"layers_to_transform": []}, r"`layers_to_transform=\[\]` asks for no block"),
        ({"layers_to_transform": -1}, r"`layers_to_transform` asks for \[-1\]"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, r"`layers_pattern='h'` matches none .*'model.layers'"),
        ({"target_modules": ["q_proj"]}, "matches 'model.layers.0.self_attn.q_proj', which is not a block"),
        ({"target_modules": ["layers.7"]}, r"`target_modules={'layers.7'}` matches no module"),
        ({"exclude_modules": r".*layers\.\d"}, "excludes every block"),
    ],
)
def test_injection(config, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SteerConfig(**config))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["layers", "mlp", "model", "self_attn", "steering", "steer_edit", "0", "a.b", "keys"])
def test_adapter_name_that_is_part_of_a_path(name):
    with pytest.raises(ValueError, match=f"`adapter_name='{name}'`"):
        get_peft_model(make(), SteerConfig(), adapter_name=name)
    model = get_peft_model(make(), SteerConfig())
    with pytest.raises(ValueError, match=f"`adapter_name='{name}'`"):
        model.add_adapter(name, SteerConfig())


def test_a_failed_second_adapter_leaves_the_first():
    model = get_peft_model(make(), SteerConfig(kind="vector")).eval()
    before = model(**inputs()).logits
    with pytest.raises(ValueError, match="hidden size"):
        model.add_adapter("second", SteerConfig(r=64))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**inputs()).logits, before)
    model.add_adapter("second", SteerConfig(r=2))


def test_model_without_blocks():
    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.hidden(x))

    with pytest.raises(
        ValueError, match=r"No stack of transformer blocks was recognised in Perceptron\. Set `target_modules`"
    ):
        get_peft_model(Perceptron(), SteerConfig())


def test_block_without_the_site():
    model = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4))
    with pytest.raises(ValueError, match=r"No mlp was recognised in block 'backbone\.layers\.0'"):
        get_peft_model(model, SteerConfig(site="mlp"))
    get_peft_model(model, SteerConfig(site="block"))


def test_the_first_linear_of_an_mlp_is_no_mlp():
    model = tf.AlbertModel(
        tf.AlbertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=32, num_hidden_layers=2)
    )
    with pytest.raises(ValueError, match="No mlp was recognised"):
        get_peft_model(model, SteerConfig(site="mlp"))


def test_a_state_dict_for_another_site():
    state = {f"model.layers.{i}.mlp.steering.steer_edit.v": torch.zeros(32) for i in range(3)}
    with pytest.raises(ValueError, match=r"has weights for 'model.layers.0.mlp', which .* \(site='block'\)"):
        inject_adapter_in_model(SteerConfig(kind="vector"), make(), state_dict=state)


def test_output_that_is_no_tensor():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tf.PretrainedConfig(hidden_size=4)
            self.layers = nn.ModuleList([nn.ModuleDict({"x": nn.Linear(4, 4)})])
            self.layers[0].forward = lambda x: {"hidden": x}

        def forward(self, x):
            return self.layers[0](x)

    model = get_peft_model(Odd(), SteerConfig(r=2))
    with pytest.raises(TypeError, match="ModuleDict returns dict; only a tensor or a tuple"):
        model(torch.randn(1, 4))


def test_presets():
    assert (PostBlockSteerConfig().site, PostBlockSteerConfig().kind, PostBlockSteerConfig().activation) == (
        "block",
        "nonlinear",
        "silu",
    )
    assert (PostBlockSteerConfig().r, LoreftConfig().kind, LoreftConfig().site) == (8, "loreft", "mlp")
    assert LoreftConfig(site="block").site == "block"
    assert PostBlockSteerConfig(kind="linear").activation is None
