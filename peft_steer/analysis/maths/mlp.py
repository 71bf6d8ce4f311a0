"""A block's MLP as a function of its weights and its input, in float64: `f(W, h)`, a GLU or a plain MLP.

Its structure is found by names of attributes, as in `peft_steer.sites`. In a copy of the MLP quantized weights are
dequantized and a PEFT adapter's change of them (LoRA's `B A`) is merged; the model itself is not changed.
"""

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from peft_steer import SteerLayer
from peft_steer.sites import Block, mlp_name, output_linear
from peft_steer.utils.errors import UsageError


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block.

    Attributes:
        module: Maps the MLP's input `h`, `(..., d)`, to its output, `(..., d)`.
        first: The module whose first argument is `h`.
        output: Name in `module` of its last linear layer, `W_d`.
        takes_residual: Whether the module adds a second argument, the skip connection, itself (Bloom).
    """

    module: nn.Module
    first: nn.Module
    output: str
    takes_residual: bool = False


def find_mlp(block: Block) -> Mlp:
    """The MLP of `block`.

    Raises:
        UsageError: If it is not recognised as a GLU or a plain MLP (a mixture of experts is not).
    """
    name = mlp_name(block)
    if name is not None:
        module = block.module.get_submodule(name)
        output = output_linear(module)
        if not output:
            raise UsageError(
                f"the MLP {block.name}.{name} ({type(module).__name__}) does not end in one linear layer, as a GLU "
                "and a plain MLP do; a mixture of experts has no single Jacobian to compare steering with"
            )
        takes_residual = "residual" in inspect.signature(module.forward).parameters
        return Mlp(module, module, output, takes_residual)
    parts = {name: module for name, module in block.module.named_modules() if name}
    for names in (("fc1", "activation_fn", "fc2"), ("intermediate", "output.dense")):
        if all(name in parts for name in names):
            chain = OrderedDict((name.rpartition(".")[2], parts[name]) for name in names)
            return Mlp(nn.Sequential(chain), parts[names[0]], next(reversed(chain)))
    raise UsageError(f"no MLP was recognised in block {block.name!r} ({type(block.module).__name__})")


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64 in which every linear layer is an ordinary one with its effective weight:
    quantized weights are dequantized, active adapters merged.

    Raises:
        UsageError: If a layer's effective weight cannot be computed, or a layer edits activations.
    """
    if any(isinstance(m, SteerLayer) for m in module.modules()):
        raise UsageError(
            "the tuned model's MLPs are steered: their activations are edited, not their weights. Compare with a "
            "model or adapter that changes weights, such as LoRA"
        )
    if isinstance(module, BaseTunerLayer):
        return _merged(module)
    weight = getattr(module, "weight", None)
    if weight is not None and (not weight.is_floating_point() or type(weight) not in (nn.Parameter, torch.Tensor)):
        return _dequantized(module)
    new = copy.copy(module)
    new._parameters = {
        k: p if p is None else nn.Parameter(p.detach().double(), requires_grad=False)
        for k, p in module._parameters.items()
    }
    new._buffers = {
        k: b.double() if b is not None and b.is_floating_point() else b for k, b in module._buffers.items()
    }
    new._modules = {k: None if m is None else plain_copy(m) for k, m in module._modules.items()}
    return new


def _dequantized(module: nn.Module) -> nn.Module:
    weight = dequantize_module_weight(module)
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not weight.is_floating_point() or tuple(weight.shape) != shape:
        raise UsageError(
            f"the weights of {type(module).__module__}.{type(module).__name__} cannot be dequantized here; load the "
            "model without quantization, or with bitsandbytes'"
        )
    return _linear(weight.detach().double(), getattr(module, "bias", None))


def _merged(layer: BaseTunerLayer) -> nn.Module:
    """The linear layer with the same effect as the adapted one."""
    base: Any = plain_copy(layer.get_base_layer())
    if layer.disable_adapters:
        return base
    if not isinstance(layer, LoraLayer):
        raise UsageError(
            f"the change of weights of the adapter's {type(layer).__name__} is unknown: merge it into the base and "
            "give the merged model as the tuned one"
        )
    if layer.merged:  # the base layer has it already
        return base
    for name in layer.active_adapters:
        if name not in layer.lora_A and name not in layer.lora_embedding_A:
            continue
        if layer.lora_variant.get(name) is not None:
            raise UsageError(
                f"adapter {name!r} is a variant of LoRA (DoRA or another) that does not add `B A` to the weights; "
                "merge it into the base and give the merged model as the tuned one"
            )
        base.weight += _delta(layer, name).to(base.weight.device)
        if layer.lora_bias[name] and base.bias is None:
            raise UsageError(
                f"adapter {name!r} gives linear layers a bias (lora_bias) that they do not have in the base, which "
                "changes no weight; train it without lora_bias to compare it"
            )
        if layer.lora_bias[name]:
            lora_bias: Any = layer.lora_B[name].bias
            base.bias += lora_bias.detach().double() * layer.scaling[name]
    return base


def _delta(layer: Any, name: str) -> torch.Tensor:
    """`scaling * B A` in float64, in the layout of the base weight."""
    A, B = (linear[name].weight.detach().double() for linear in (layer.lora_A, layer.lora_B))
    delta = B @ A
    return (delta.t() if getattr(layer, "fan_in_fan_out", False) else delta) * layer.scaling[name]


def _linear(weight: torch.Tensor, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().double(), requires_grad=False)
    return linear
