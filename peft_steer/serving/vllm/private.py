"""All that depends on private names of vLLM (those of the versions in `options.TRIED`)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import vllm.lora.utils
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.v1.worker.gpu_input_batch import InputBatch


_OURS = "is_ours"  # the mark of what has been replaced already


def rename(model: nn.Module) -> Callable[[str], str]:
    """The map from transformers' names of modules to those of a model of vLLM."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return (lambda name: name) if mapper is None else mapper.get_rename_mapper()._map_name


def token_slots(layer: BaseLinearLayerWithLoRA, tokens: int) -> torch.Tensor:
    """The LoRA slot of each token of the batch, -1 for none. (The property without the underscore has as many as the
    batch has, which a compiled graph would take for a constant.)"""
    return layer.punica_wrapper._token_lora_indices[:tokens]


def keep_plain_weights(model: nn.Module) -> None:
    """On a CPU: do not pack the weights of linear layers, which are to be written again."""
    for module in model.modules():
        if isinstance(module, LinearBase):
            module._cpu_skip_gemm_dispatch = True


def add_lora_layer(layer: type[BaseLinearLayerWithLoRA]) -> None:
    """Have the LoRA manager try `layer` first."""
    if layer not in vllm.lora.utils._all_lora_classes:
        vllm.lora.utils._all_lora_classes = (layer, *vllm.lora.utils._all_lora_classes)


def wrap_loading(load: Callable[[WorkerLoRAManager, Any], LoRAModel | None]) -> None:
    """Have `load(manager, request)` make what a LoRA request names; where it returns None, vLLM does."""
    original = WorkerLoRAManager._load_adapter
    if getattr(original, _OURS, False):
        return

    def _load_adapter(self: WorkerLoRAManager, lora_request: Any) -> LoRAModel:
        return load(self, lora_request) or original(self, lora_request)

    setattr(_load_adapter, _OURS, True)
    WorkerLoRAManager._load_adapter = _load_adapter


def make_lora(manager: WorkerLoRAManager, request: Any, tensors: dict[str, torch.Tensor], rank: int) -> LoRAModel:
    """vLLM's object for an adapter, from pairs `lora_A`, `lora_B` by PEFT's names, whose factor is 1.

    Raises:
        ValueError: if the engine was opened for smaller ranks.
    """
    helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
    helper.validate_legal(manager.lora_config)
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return LoRAModel.from_lora_tensors(
        lora_model_id=request.lora_int_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )


def model_of(manager: WorkerLoRAManager) -> nn.Module:
    """The model that the manager's adapters act in."""
    return manager._adapter_manager.model


def modules_with_slots(manager: WorkerLoRAManager) -> set[str]:
    """vLLM's names of the modules that take adapters; of those that vLLM packs into one, the parts' names."""
    inner = manager._adapter_manager
    packed = (inner.packed_modules.get(name, [name]) for name in inner.modules)
    return {part for parts in packed for part in parts}


def wrap_token_mapping(select: Callable[[Any, int, int, int], Iterable[bool] | None]) -> None:
    """Have `select(request, first, n, prompt_length)` say which of the next `n` tokens, from index `first` on, the
    adapter of a LoRA request acts on; None for all of them. The request's adapter may not be loaded yet."""
    original = InputBatch.make_lora_inputs
    if getattr(original, _OURS, False):
        return

    def make_lora_inputs(self: InputBatch, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        prompts, tokens, requests = original(self, num_scheduled_tokens, num_sampled_tokens)
        chosen, start = list(tokens), 0
        for row in range(self.num_reqs):
            n, first = int(num_scheduled_tokens[row]), int(self.num_computed_tokens_cpu[row])
            adapter = int(self.request_lora_mapping[row])
            request = self.lora_id_to_lora_request.get(adapter)
            mask = None if request is None else select(request, first, n, int(self.num_prompt_tokens[row]))
            if mask is not None:
                chosen[start : start + n] = [adapter if here else 0 for here in mask]
            start += n
        return prompts, tuple(chosen), requests

    setattr(make_lora_inputs, _OURS, True)
    InputBatch.make_lora_inputs = make_lora_inputs


def keep_to_slots() -> None:
    """Have vLLM's LoRA on CPUs leave tokens without an adapter alone: their slot is -1, which its operations take for
    the last one (vllm-project/vllm#48421)."""
    for module in (lora_ops, punica_cpu):  # the second imported them from the first
        for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
            operation = getattr(module, name)
            if not getattr(operation, _OURS, False):
                setattr(module, name, _masked(operation))


def _masked(operation: Callable) -> Callable:
    """`operation`, which is linear in its first argument, with zeros there for the slot -1."""

    def masked(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, *args: Any, **kwargs: Any):
        operation(x.masked_fill((slots < 0)[:, None], 0), w, out, slots, *args, **kwargs)

    setattr(masked, _OURS, True)
    return masked
