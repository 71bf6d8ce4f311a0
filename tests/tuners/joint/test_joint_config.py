"""The configuration of a joint adapter: its file, what of LoRA's works, what is refused, what is constrained."""

import pytest
import torch
from joint_models import TOLERANCE, joint, worst
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from tiny import ARCHITECTURES, logits, make, randomize, steer_layers

from peft_steer import JointSteerLoraConfig, JointSteerLoraModel, orthogonality, project_


def test_registration():
    assert PeftType("JOINT_STEER_LORA") is JointSteerLoraConfig().peft_type
    assert JointSteerLoraModel.prefix == "lora_"


def test_config_file(tmp_path):
    JointSteerLoraConfig(
        r=3, steer_r=5, steer_kind="linear", orthogonal="periodic", orthogonal_interval=7
    ).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, JointSteerLoraConfig)
    assert (config.r, config.steer_r, config.steer_kind) == (3, 5, "linear")
    assert (config.orthogonal, config.orthogonal_interval) == ("periodic", 7)
    assert (config.steer_config().r, config.steer_config().kind) == (5, "linear")


def test_settings_of_lora_keep_working():
    """Each acts as in plain LoRA: with the steering half off, the logits are the same."""
    settings = [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.0\.self_attn\..*"},
    ]
    for setting in settings:
        plain = {"r": 4, "target_modules": "all-linear", **setting}
        model = joint(orthogonal="always", **plain)
        lora = get_peft_model(make(), LoraConfig(**plain)).eval()
        lora_names = [n for n, _ in lora.named_parameters()]
        assert [n for n, _ in model.named_parameters() if ".steering." not in n] == lora_names
        randomize(model, std=0.2)
        lora.load_state_dict({n: x for n, x in model.state_dict().items() if ".steering." not in n})
        both = logits(model)
        with model.set_halves("lora"):
            assert torch.equal(logits(model), logits(lora)), setting
        assert not torch.allclose(both, logits(lora))
        assert worst(model) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steer_r": 0}, "`r=0` must be an integer of at least 1"),
        ({"steer_kind": "cubic"}, "`kind='cubic'` is unknown"),
        ({"steer_site": "head"}, "`site='head'` is unknown; choose one of 'block', 'mlp', 'attention'"),
        (
            {"steer_kind": "linear", "steer_activation": "silu"},
            "`activation='silu'` contradicts `kind='linear'`",
        ),
        ({"steer_rank_pattern": {"x": 0}}, r"`rank_pattern\['x'\]=0`"),
        ({"steer_layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`"),
        (
            {"orthogonal": "sometimes"},
            "`orthogonal='sometimes'` is unknown; choose one of 'always', 'periodic', 'none'",
        ),
        ({"orthogonal": "periodic"}, "`orthogonal_interval=None` contradicts `orthogonal='periodic'`"),
        ({"orthogonal_interval": 5}, "`orthogonal_interval=5` contradicts `orthogonal=None`"),
        ({"orthogonal": "periodic", "orthogonal_interval": 0}, "`orthogonal_interval=0` must be an integer"),
        ({"orthogonal": "always", "steer_kind": "vector"}, "`orthogonal='always'` contradicts `steer_kind='vector'`"),
        ({"orthogonal": "always", "steer_kind": "loreft"}, "`orthogonal='always'` contradicts `steer_kind='loreft'`"),
        ({"orthogonal": "always", "steer_site": "attention"}, "contradicts `steer_site='attention'`"),
        ({"orthogonal": "always", "target_parameters": ["x"]}, "contradicts `target_parameters"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "`alora_invocation_tokens` cannot be combined"),
        ({"megatron_config": {}}, "`megatron_config` cannot be combined"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        JointSteerLoraConfig(**config)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {"target_modules": ["q_proj"]}, "LoRA does not target 'model.layers.0.mlp.down_proj'"),
        ("llama", {"layers_to_transform": [0], "target_modules": ["down_proj"]}, "cannot be kept at 'model.layers.1'"),
        ("gemma2", {}, "no single linear layer returns the output of 'model.layers.0.post_feedforward_layernorm'"),
        ("mixtral", {}, "no single linear layer returns the output of"),
        ("qwen3_moe", {}, "no single linear layer returns the output of"),
        ("llama", {"steer_layers_to_transform": [7]}, r"`layers_to_transform` asks for \[7\]"),
        ("llama", {"steer_r": 40}, "`r=40` at 'model.layers.0' is larger than the hidden size 32"),
    ],
)
def test_bad_injection(architecture, config, message):
    """Refused before anything is put into the model."""
    model = make(architecture)
    names = [name for name, _ in model.named_modules()]
    config = JointSteerLoraConfig(**{"target_modules": "all-linear", "orthogonal": "always", **config})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral"])
def test_without_a_constraint_every_architecture_works(architecture):
    model = joint(architecture, orthogonal="none")
    randomize(model, std=0.3)
    assert not torch.allclose(logits(model, architecture), logits(make(architecture), architecture))


def test_the_default_constrains_where_lora_writes(caplog):
    model = joint(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2])
    assert list(orthogonality(model)) == ["model.layers.0", "model.layers.2"]
    assert "1 of 3 steered blocks" in caplog.text
    caplog.clear()
    joint()
    assert caplog.text == ""


def test_unknown_adapter():
    with pytest.raises(ValueError, match=r"`adapter_name='typo'`: the model has the joint adapters \['default'\]"):
        orthogonality(joint(), "typo")
    with pytest.raises(ValueError, match="No edit of adapter 'default' can be projected"):
        project_(joint(steer_kind="vector"))
    with pytest.raises(ValueError, match="`adapter_names=\\['typo'\\]`"):
        joint().merge_lora_and_unload(adapter_names=["typo"])
    with pytest.raises(ValueError, match="cannot be combined into one"):
        joint().add_weighted_adapter(["default"], [1.0], "sum")


def test_every_architecture_has_a_place():
    """Every architecture either has the layer or says that it has not: none is passed over."""
    found = {}
    for architecture in ARCHITECTURES:
        model = joint(architecture, task_type=None)
        found[architecture] = len(orthogonality(model)) == len(steer_layers(model.get_base_model()))
    assert {a for a, complete in found.items() if not complete} == {"gemma2", "gemma3", "mixtral", "qwen3_moe"}
