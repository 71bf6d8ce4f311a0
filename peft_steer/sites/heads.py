"""How many heads an attention has, and how wide they are where its output projection reads them."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .blocks import Block
from .modules import heads_projection, unwrapped


# Of values, where they differ from queries' and keys' (MLA, linear attention), so first.
_NUMBER = ("num_v_heads", "num_heads", "num_attention_heads", "n_heads", "n_head")
_WIDTH = ("v_head_dim", "head_v_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


def input_width(linear: Any) -> int:
    """Width of what a linear layer, quantized or not, reads."""
    linear = unwrapped(linear)
    return int(linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features)


def head_shape(block: Block) -> tuple[int, int]:
    """Number `H` of a block's heads and their width: `H * width` is what the output projection reads.

    Both are what the attention itself says (with grouped queries there are as many heads here as queries have); what
    it does not say comes from its configuration or from the other of the two.

    Raises:
        ValueError: if there is no attention or projection, or if the numbers do not fit.
    """
    attention, projection = (block.module.get_submodule(name) for name in heads_projection(block))
    width = input_width(projection)
    number, head_dim = _said_by(attention, _NUMBER), _said_by(attention, _WIDTH)
    config = getattr(attention, "config", None)
    if number is None:
        number = getattr(config, "num_attention_heads", None)
    if head_dim is None and number:
        head_dim = width // number
    if number is None and head_dim:
        number = width // head_dim
    if not number or not head_dim or number * head_dim != width:
        raise ValueError(
            f"The heads of {type(attention).__name__} in block {block.name!r} cannot be told apart: it says {number} "
            f"heads of width {head_dim}, and its output projection reads {width}. Use `site='attention'`."
        )
    return number, head_dim


def _said_by(attention: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        for module in (attention, *attention.children()):  # BERT's says it in a submodule
            if isinstance(found := getattr(module, name, None), int):
                return found
    return None
