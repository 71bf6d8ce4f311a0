"""What is expected of PEFT's tests with our configurations.

Nothing is dropped silently. `REFUSED` tests run, and must fail with the refusal that is named: a merge that a steering
adapter refuses by design. `NOT_APPLICABLE` tests are skipped with the reason that is named, `LEFT_OUT` ones are not
collected. Whatever else fails is a failure, and so is a `REFUSED` test that passes. What is deselected beyond that are
tests that name PEFT's other methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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
            "no change of a weight equals a nonlinear edit",
            case="block-nonlinear",
            message="no change of a weight equals a nonlinear edit",
        ),
        Expectation(
            _MERGES,
            "a low-rank edit at the block's output reads the skip connection, which no linear layer returns",
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
            "test_merge_layers",
            "merging needs a bias that the architecture lacks, and the next from_pretrained would drop it",
            case="heads-lofit",
            where="GPTJ|Llama|qwen2|Gemma3|T5",
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
            where="^(?!.*trainable_tokens)",
            message="The steering half of a joint adapter cannot be merged",
        ),
        Expectation(
            "test_lora_embed_scale_is_applied|test_merge_and_unload_fixes_tie_word_embeddings_config"
            r"|test_gpt2_dora_merge_and_unload\w*",
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
            f"test_multiple_active_adapters_forward|{_MERGES}",
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
            r"test_weighted_combination_of_adapters|test_add_weighted_adapter_\w+"
            r"|test_multiple_adapters_\w+_merging_adapters(_raises)?",
            "joint adapters have no weighted sum",
            message="Joint adapters cannot be combined into one",
        ),
        Expectation(
            "test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises",
            "the steering half cannot be merged",
            where=r"\[linear",
            message="The steering half of a joint adapter cannot be merged",
        ),
        Expectation(
            "test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises"
            "|test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias",
            "the test's model has no blocks to steer",
            where="conv2d",
            message="No stack of transformer blocks was recognised",
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
            case="block-nonlinear|block-linear-bias|mlp-loreft|heads-lofit",
        ),
        Expectation(
            "test_only_params_are_updated",
            "LoFiT's first stage trains `A` alone; the test ends before the heads are chosen and their `v` is trained",
            case="heads-lofit",
        ),
    ],
    "joint": [
        Expectation(
            r"test_requires_grad_(follows_inference_mode_modules|lora_(different|same)_targets|modules_to_save)\w*",
            "lists the trainable parameters, which are LoRA's alone; here the edits are trained too",
        ),
        Expectation(
            "test_multirank_2",
            "reads `lora_A` of every adapter layer, and the edits have none",
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
