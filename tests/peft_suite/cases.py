"""Which configurations go into PEFT's tests, which test modules run, and what is expected of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blocks import MODEL_ID


@dataclass(frozen=True)
class Case:
    """One configuration: its name in test ids, its class and its arguments."""

    name: str
    config_cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)


def steer_cases() -> list[Case]:
    from peft_steer import LofitConfig, LoreftConfig, PostBlockSteerConfig, SteerConfig

    return [
        Case("block-nonlinear", PostBlockSteerConfig, {"r": 4}),
        Case("block-linear-bias", PostBlockSteerConfig, {"r": 4, "kind": "linear", "use_bias": True}),
        Case("block-vector", SteerConfig, {"site": "block", "kind": "vector"}),
        Case("mlp-loreft", LoreftConfig, {"r": 4}),
        Case("attention-linear", SteerConfig, {"site": "attention", "kind": "linear", "r": 4}),
        Case("heads-lofit", LofitConfig),
    ]


# Test module -> the task type of PEFT's configurations in it.
MODEL_TESTS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
MODULES = [*MODEL_TESTS, "test_config", "test_custom_models"]

# Arguments of PEFT's LoRA configurations that do not tell them apart in the summary.
COMMON_ARGUMENTS = {"task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"}

# Tests that name no configuration of ours but go through every registered method.
STEER_TESTS = {"test_from_peft_type"}


def steer_parameters(module: str, test: str, names: list[str]) -> list[tuple[str, tuple]] | None:
    """The parameters that stand in for PEFT's in a test parametrized over `names`, each with its id; None where PEFT's
    are no configurations. Empty where ours do not apply: see `expected.LEFT_OUT`."""
    cases = steer_cases()
    if names == ["config_class", "mandatory_kwargs"]:
        return [(c.name, (c.config_cls, c.kwargs)) for c in cases]
    if names == ["config_cls", "config_kwargs"] and module in MODEL_TESTS:
        return [(c.name, (c.config_cls, {"task_type": MODEL_TESTS[module], **c.kwargs})) for c in cases]
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        cases += [
            Case(f"{c.name}-modules-to-save", c.config_cls, {**c.kwargs, "modules_to_save": ["lin1"]}) for c in cases
        ]
        return [(c.name, (c.name, MODEL_ID, c.config_cls, c.kwargs)) for c in cases]
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        return [
            (f"{c.name}-{kind}", (c.name, "steer", c.config_cls, {**random, **first}, {**random, **second}))
            for c in cases
            for random in [{**c.kwargs, "init_weights": False}]
            for kind, first, second in [
                ("same", {}, {}),
                ("different", {"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
            ]
        ]
    if names == ["test_name", "config0", "config1"] and test in MIXED_BATCHES:
        return [(c.name, (c.name, *_pair(c, *MIXED_BATCHES[test]))) for c in cases]
    if test == "test_mixed_adapter_batches_lora_wrong_adapter_name_raises":
        return [(c.name, (c.name, _pair(c, {}, {})[0])) for c in cases]
    if test == "test_adapter_name_makes_no_difference":
        return [(c.name, _pair(c, {}, {})[:1]) for c in cases]
    if test == "test_save_pretrained_with_target_modules":
        return [(c.name, (c.config_cls,)) for c in cases]
    if names == ["config_cls"] and test in ON_BLOCKS:
        return [(c.name, (OnBlocks(c),)) for c in cases if c.name.startswith("block")]
    return [] if {"config", "config_cls", "config_class", "config0"} & set(names) else None


@dataclass(frozen=True)
class OnBlocks:
    """Stands for a configuration class in tests that target linears by name: targets the blocks around them."""

    case: Case

    def __call__(self, target_modules: list[str], **kwargs: Any):
        targets = [name.removesuffix(".lin0") for name in target_modules if name != "lin0"]
        return self.case.config_cls(**{**self.case.kwargs, "target_modules": targets or None, **kwargs})


ON_BLOCKS = {
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    "test_multiple_active_adapters_with_different_modules_to_save_works",
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises",
    "test_multiple_active_adapters_with_same_modules_to_save_raises",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
}


def _pair(case: Case, first: dict, second: dict) -> tuple:
    return tuple(case.config_cls(**{**case.kwargs, "init_weights": False, **kwargs}) for kwargs in (first, second))


# PEFT's tests of batches with a different adapter in each row -> what sets the two adapters apart.
MIXED_BATCHES: dict[str, tuple[dict, dict]] = {
    "test_mixed_adapter_batches_mlp": ({}, {"r": 2}),
    "test_mixed_adapter_batches_different_target_layers": ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": ({"layers_to_transform": [0]}, {}),
    "test_mixed_adapter_batches_multiple_modules_to_save": (
        {"modules_to_save": ["lin1"]},
        {"modules_to_save": ["lin1"]},
    ),
    "test_mixed_adapter_batches_length_mismatch_raises": ({}, {}),
    "test_mixed_adapter_batches_training_mode_raises": ({}, {}),
    "test_mixed_adapter_batches_disabled": ({}, {}),
    "test_mixed_adapter_batches_merged_raises": ({}, {}),
}
