"""bitsandbytes' 4-bit layers on a CPU, computed as everywhere else."""

import logging
from typing import Any

from torch import nn


logger = logging.getLogger(__name__)


def keep_unpacked(model: nn.Module) -> None:
    """Turn off a path of bitsandbytes' `Linear4bit` that loses gradients and precision.

    On CPUs with AVX512-BF16, bitsandbytes (seen in 0.50.2) packs the weight in the first evaluation and from then on
    computes in bfloat16 and outside autograd, in later training too, so what lies below gets wrong gradients or
    none. A packed weight is unpacked here; but packing has rounded its scales to bfloat16, and nothing brings them
    back, so this is logged. Call it before the first evaluation.
    """
    rounded = False
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            rounded |= _unpack(module)
    if rounded:
        logger.warning(
            "The 4-bit base was evaluated before, and bitsandbytes then rounded the scales of its weights to bfloat16 "
            "on this CPU. Load it again for the exact weights."
        )


def _unpack(layer: Any) -> bool:
    """Whether the layer was packed."""
    packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    scales = layer.weight.quant_state.absmax if packed else None
    layer.state_dict()  # unpacks
    if scales is not None:
        # Of plain scales it leaves the packed order, (K / block size, N); doubly quantized ones it quantizes anew.
        state = layer.weight.quant_state
        state.absmax, state.nested = scales.T.float().reshape(-1), False
    return packed
