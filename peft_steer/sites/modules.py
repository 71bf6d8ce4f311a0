"""The place inside a block, found by structure.

Inside a block the paper (arXiv 2603.00425, figure 1) distinguishes three places, each of them the output of a module:

- `block`: the block's output, after the skip connection (post-block);
- `mlp`: what the MLP adds to the skip connection (post-MLP);
- `attention`: what the attention adds to the skip connection (pre-MLP);

and one that is the input of a module:

- `heads`: what the attention's heads return, side by side, before the output projection.

Where an architecture normalizes an output before adding it (Gemma 2), that norm's output is what is added. Names of
attributes such as `self_attn` or `down_proj` are looked for; names of models never are.
"""

import inspect
import re
from collections import deque
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .blocks import Block


SITES = ("block", "mlp", "attention", "heads")
_ATTENTION = re.compile(r"(self_?|linear_)?(attn|attention)", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn?|feed_?forward|DenseReluDense|(block_sparse_)?moe", re.IGNORECASE)
_OUTPUT_LINEAR = (
    "down_proj",
    "o_proj",
    "c_proj",
    "out_proj",
    "fc2",
    "fc_out",
    "dense_4h_to_h",
    "dense",
    "wo",
    "o",
    "w2",
)


def site_module(block: Block, site: str) -> tuple[str, nn.Module]:
    """Qualified name and module whose output (for `"heads"`: whose input) is the place `site` in `block`.

    Raises:
        ValueError: if the block has no such place that can be recognised.
    """
    if site == "block":
        return block.name, block.module
    if site == "heads":
        projection = heads_projection(block)[1]
        return f"{block.name}.{projection}", block.module.get_submodule(projection)
    norm_name = _branch_norm(block.module, site)
    if norm_name is not None:
        return f"{block.name}.{norm_name}", block.module.get_submodule(norm_name)
    name = _find(block.module, _ATTENTION if site == "attention" else _MLP)
    if name is None and site == "mlp":  # the MLP's linears lie in the block itself: OPT, BERT
        name = next((n for n in ("fc2", "output.dense") if _has(block.module, n)), None)
    # ALBERT's `ffn` is the MLP's first linear.
    if name is None or (site == "mlp" and name not in ("fc2", "output.dense") and _is_linear(block.module, name)):
        raise ValueError(
            f"No {site} was recognised in block {block.name!r} ({type(block.module).__name__}). Use `site='block'`."
        )
    module = block.module.get_submodule(name)
    if "residual" in inspect.signature(module.forward).parameters:  # Bloom: the skip is added inside the module
        linear = output_linear(module)
        if not linear:
            raise ValueError(
                f"No single linear layer ends the {site} of block {block.name!r} ({type(module).__name__}): "
                "it adds the skip connection itself. Use `site='block'`."
            )
        inner = linear
    elif _has(module, "output.dense"):  # BERT: likewise, in a submodule
        inner = "output.dense"
    else:
        return f"{block.name}.{name}", module
    return f"{block.name}.{name}.{inner}", module.get_submodule(inner)


def mlp_name(block: Block) -> str | None:
    """Name, in `block`, of the MLP itself, without a norm that follows it; None if it is not a module of its own (OPT,
    BERT)."""
    name = _find(block.module, _MLP)
    return None if name is None or _is_linear(block.module, name) else name


def heads_projection(block: Block) -> tuple[str, str]:
    """Names, in `block`, of the attention and of the linear layer that projects its heads.

    Raises:
        ValueError: if the block has no attention, or no single such layer, that can be recognised.
    """
    name = ""
    while deeper := _find(block.module.get_submodule(name), _ATTENTION):  # GPT-Neo has one in the other
        name = f"{name}.{deeper}" if name else deeper
        module = block.module.get_submodule(name)
        inner = "output.dense" if _has(module, "output.dense") else output_linear(module)
        if inner:
            return name, f"{name}.{inner}"
    raise ValueError(
        f"No output projection of attention heads was recognised in block {block.name!r} "
        f"({type(block.module).__name__}). Use another `site`."
    )


def output_linear(module: nn.Module) -> str | None:
    """Name of the linear layer whose output is `module`'s output ("" if it is `module` itself), or None if there is
    no such single layer (a mixture of experts)."""
    if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
        return ""
    names = [name for name, _ in module.named_children() if name in _OUTPUT_LINEAR]
    return names[0] if len(names) == 1 else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, without what PEFT may have put around it (other tuners, `modules_to_save`)."""
    inner: Any = module
    while True:
        if isinstance(inner, AuxiliaryTrainingWrapper):
            inner = inner.original_module
        elif isinstance(inner, BaseTunerLayer) and hasattr(inner, "base_layer"):
            inner = inner.base_layer
        else:
            return cast(nn.Module, inner)


def _find(module: nn.Module, pattern: re.Pattern[str]) -> str | None:
    """Name of the shallowest submodule whose attribute name is `pattern`."""
    queue = deque(module.named_children())
    while queue:
        name, child = queue.popleft()
        if pattern.fullmatch(name.rpartition(".")[2]):
            return name
        queue.extend((f"{name}.{inner}", m) for inner, m in child.named_children())
    return None


def _branch_norm(block: nn.Module, site: str) -> str | None:
    """The norm that a block applies to its attention's or MLP's output before adding it, if it does."""
    names: tuple[str, ...] = ("post_mlp_layernorm", "post_feedforward_layernorm")
    if site == "attention":
        names = ("post_self_attn_layernorm",)
        if _has(block, "post_feedforward_layernorm"):  # without it the same name is the norm before the MLP
            names += ("post_attention_layernorm",)
    return next((name for name in names if _has(block, name)), None)


def _is_linear(module: nn.Module, name: str) -> bool:
    weight = getattr(module.get_submodule(name), "weight", None)
    return weight is not None and weight.ndim == 2


def _has(module: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in module.named_modules())
