"""Which configurations go into PEFT's tests, which test modules run, and what is expected of them.

Nothing is dropped silently. `REFUSED` tests run, and must fail with the refusal that is named: a merge that a steering
adapter refuses by design. `NOT_APPLICABLE` tests are skipped with the reason that is named, `LEFT_OUT` ones are not
collected. Whatever else fails is a failure, and so is a `REFUSED` test that passes. What is deselected beyond that are
tests that name PEFT's other methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from blocks import MODEL_ID


@dataclass(frozen=True)
class Case:
    """One configuration: its name in test ids, its class and its arguments."""

    name: str
    config_cls: type
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expectation:
    """What is expected of the tests that all patterns match: `test` in full, `case` and `where` (the id) anywhere."""

    test: str
    reason: str
    case: str = ""
    where: str = ""
    message: str = ""

    def matches(self, test: str, case: str, where: str) -> bool:
        found = re.fullmatch(self.test, test), re.search(self.case, case), re.search(self.where, where)
        return all(match is not None for match in found)


def steer_cases() -> list[Case]:
    from peft_steer import LoreftConfig, PostBlockSteerConfig, SteerConfig

    return [
        Case("block-nonlinear", PostBlockSteerConfig, {"r": 4}),
        Case("block-linear-bias", PostBlockSteerConfig, {"r": 4, "kind": "linear", "use_bias": True}),
        Case("block-vector", SteerConfig, {"site": "block", "kind": "vector"}),
        Case("mlp-loreft", LoreftConfig, {"r": 4}),
        Case("attention-linear", SteerConfig, {"site": "attention", "kind": "linear", "r": 4}),
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
    are no configurations. Empty where ours do not apply: see `LEFT_OUT`."""
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

_LINEARS = "targets linears inside a block and reads the adapter's attributes from them"
_LORA = "about LoRA's layers for convolutions, embeddings or attention modules, or about its speed"
_DEFAULTS = "about PEFT's table of default target_modules by model type; blocks are found by structure"

# Tests that are parametrized over PEFT's configurations and are not run with ours.
LEFT_OUT = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "add_weighted_adapter is for LoRA and IA3",
    "test_default_target_modules_list_of_str": _DEFAULTS,
    "test_default_target_modules_not_set_model_type_set_raises": _DEFAULTS,
    "test_default_target_modules_not_set_raises": _DEFAULTS,
    "test_default_target_modules_str": _DEFAULTS,
    "test_mixed_adapter_batches_lora_conv1d_emb": _LORA,
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": _LORA,
    "test_mixed_adapter_batches_lora_conv2d": _LORA,
    "test_mixed_adapter_batches_lora_opt_timing": _LORA,
    "test_mixed_adapter_batches_mha_raises": _LORA,
    "test_mixed_adapter_batches_unsupported_layer_raises": _LORA,
    "test_set_adapter_non_overlapping_modules": _LINEARS,
    "test_set_adapter_non_overlapping_modules_to_save": _LINEARS,
    "test_set_requires_grad": _LINEARS,
}

_MERGES = (
    r"test_merge_layers\w*|test_safe_merge|test_disable_adapters_with_merging|test_delete_merged_adapter_\w+"
    r"|test_multiple_active_adapters_merge_and_unmerge|test_sequential_merge_\w+|test_unmerge_after_\w+"
    r"|test_mixed_adapter_batches_merged_raises|test_forward_b?float16\w*"  # these two merge at their end
)

# PEFT's tests of LoRA on models without blocks that they define themselves.
NO_BLOCKS = (
    r"test_custom_lora_layer_\w+",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    "test_load_does_not_overwrite_similarly_named_sibling",
    "test_load_resized_embedding_ignore_mismatched_sizes",
    "test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
    "test_mha_gradients_set_correctly",
    r"test_multiple_active_adapters_with_(different|same)_trainable_token_indices_\w+",
    "test_repr_lora_(conv1d|conv2d|embedding)",
    "test_requires_grad_follows_inference_mode_trainable_token_indices",
    "test_requires_grad_lora_(conv2d|emb_conv1d)",
    "test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_saving_and_loading",
    "test_set_adapter_non_overlapping_trainable_token_indices",
    "test_target_layer_without_in_features_out_features",
    "test_training_works",
    "test_unload_adapter_multihead_attention",
)

REFUSED: dict[str, list[Expectation]] = {
    "steer": [
        Expectation(
            _MERGES,
            "a nonlinear edit equals no change of a weight",
            case="block-nonlinear",
            message="a nonlinear edit equals no change of a weight",
        ),
        Expectation(
            _MERGES,
            "a low-rank edit at the block's output reads the skip connection, which is no linear layer's output",
            case="block-linear",
            message="it reads the skip connection",
        ),
        Expectation(
            _MERGES,
            "the block normalizes the MLP's output after adding it (post-norm)",
            case="block-vector",
            where="[Bb]ert|Bart",
            message="is normalized, scaled or otherwise changed before the place of the edit",
        ),
        Expectation(
            "test_merge_layers",
            "merging needs a bias that the architecture lacks, and the next from_pretrained would drop it",
            case="block-vector|mlp-loreft",
            where="T5|qwen2|Llama",
            message="cannot be saved with the adapter merged",
        ),
        Expectation(
            _MERGES,
            "a norm stands between the last linear layer and the edit",
            case="block-vector|mlp-loreft|attention-linear",
            where="Gemma3",
            message="stands between the last linear layer and the edit",
        ),
    ],
    "joint": [
        Expectation(
            ".*",
            "aLoRA acts on some tokens only, steering on all of them",
            case="alora",
            message="`alora_invocation_tokens` cannot be combined with steering",
        ),
        Expectation(
            _MERGES,
            "the steering half cannot be merged",
            case="JointSteerLoraConfig",
            message="The steering half of a joint adapter cannot be merged",
        ),
        Expectation(
            "test_lora_embed_scale_is_applied|test_merge_and_unload_fixes_tie_word_embeddings_config",
            "the steering half cannot be merged",
            message="The steering half of a joint adapter cannot be merged",
        ),
        Expectation(
            "test_nested_config_survives_save_load_roundtrip",
            "Arrow routes tokens through other LoRA adapters, without their steering",
            where="arrow_config",
            message="`arrow_config` cannot be combined with steering",
        ),
        Expectation(
            "|".join(NO_BLOCKS),
            "the test's model has no blocks to steer",
            message="No stack of transformer blocks was recognised",
        ),
        Expectation(
            "test_multiple_active_adapters_forward",
            "the test's model has no blocks to steer",
            where="trainable_tokens",
            message="No stack of transformer blocks was recognised",
        ),
        Expectation(
            "test_add_adapter_rejects_duplicate_name_without_mutation",
            "PeftMixedModel has a fixed list of the methods that it mixes",
            where=r"\[True\]",
            message="is not compatible with the `PeftMixedModel`",
        ),
        Expectation(
            "test_multiple_active_adapters_forward",
            "joint adapters have no weighted sum",
            where="LoRA (Same|Different)",
            message="Joint adapters cannot be combined into one",
        ),
        Expectation(
            r"test_weighted_combination_of_adapters",
            "joint adapters have no weighted sum",
            message="Joint adapters cannot be combined into one",
        ),
    ],
    "lora": [],
    "beft": [],
}

NOT_APPLICABLE: dict[str, list[Expectation]] = {
    "steer": [
        Expectation(
            r"test_from_pretrained_forward_compatible\w*",
            "a preset is SteerConfig with other defaults: its file says STEER, so PEFT loads, and names, SteerConfig",
            case="block-nonlinear|block-linear-bias|mlp-loreft",
        ),
    ],
    "joint": [
        Expectation(
            r"test_requires_grad_(follows_inference_mode_modules|lora_(different|same)_targets|modules_to_save)\w*",
            "lists the trainable parameters, which are LoRA's alone; here the edits are trained too",
        ),
        Expectation(
            "test_repr_lora_(linear|paramwrapper)",
            "prints the width of PEFT's MLP, in whose place stands a model with blocks",
        ),
        Expectation(
            "test_parameters_after_loading_model",
            "three steps at a learning rate of 0.5 diverge on the model that stands for PEFT's MLP",
        ),
        Expectation(
            "test_only_params_are_updated",
            "a learning rate of 1e-3 moves edits that start at zero by less than the test resolves",
            case="monteclora_config",
        ),
    ],
    "lora": [],
    "beft": [],
}
