"""Where an edit is made: the blocks of any transformer, and the place inside a block, found by structure.

A *block* is an element of the stack: the `nn.ModuleList` nearest to the root of the (text) decoder or encoder. Inside
a block the paper (arXiv 2603.00425, figure 1) distinguishes three places, each of them the output of a module:

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
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from torch import nn


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
_HOW_TO_NAME = (
    "Set `target_modules` to the names of the blocks (the modules in the model's `nn.ModuleList` of layers, as "
    "`model.named_modules()` prints them), as a list of suffixes or a regular expression."
)


@dataclass(frozen=True)
class Block:
    """One block: its qualified name, its index in its stack, the stack's name, and the module."""

    name: str
    index: int
    stack: str
    module: nn.Module


def text_stacks(model: nn.Module) -> list[str]:
    """Names of the stacks of blocks that process text: the decoder's (of a vision-language model: the language
    model's), and the encoder's as well if the model has both.

    Raises:
        ValueError: if the model has no recognisable stack.
    """
    roots = [model]
    if hasattr(model, "get_decoder"):
        roots = [model.get_decoder()]
        if getattr(model.config, "is_encoder_decoder", False):
            roots.insert(0, model.get_encoder())
    names = {id(module): name for name, module in model.named_modules()}
    stacks = []
    for root in roots:
        stack = _nearest_stack(root)
        if stack is not None and names[id(stack)] not in stacks:
            stacks.append(names[id(stack)])
    if not stacks and (stack := _nearest_stack(model)) is not None:
        stacks.append(names[id(stack)])  # `get_decoder()` may return a head that is named `decoder`: ModernBERT
    if not stacks:
        raise ValueError(f"No stack of transformer blocks was recognised in {type(model).__name__}. {_HOW_TO_NAME}")
    return stacks


def select_blocks(
    model: nn.Module,
    target_modules: list[str] | set[str] | str | None = None,
    exclude_modules: list[str] | set[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
) -> list[Block]:
    """The blocks that a configuration asks for; the arguments mean what they mean in PEFT's `LoraConfig`, for blocks.

    Raises:
        ValueError: if nothing matches, a target is no block, or an index is out of range.
    """
    if target_modules is None:
        blocks = [block for stack in text_stacks(model) for block in _blocks(model, stack)]
    else:
        blocks = _targeted(model, target_modules)
    if layers_pattern:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        kept = [b for b in blocks if any(re.fullmatch(rf"(.*\.)?{pattern}", b.stack) for pattern in patterns)]
        if not kept:
            stacks = sorted({b.stack for b in blocks})
            raise ValueError(f"`layers_pattern={layers_pattern!r}` matches none of the stacks {stacks}.")
        blocks = kept
    if layers_to_transform is not None:
        wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        if not wanted:
            raise ValueError("`layers_to_transform=[]` asks for no block; leave it unset for all.")
        available = {b.index for b in blocks}
        if wanted - available:
            raise ValueError(
                f"`layers_to_transform` asks for {sorted(wanted - available)}, but the blocks to choose from are "
                f"{min(available)} to {max(available)}."
            )
        blocks = [b for b in blocks if b.index in wanted]
    if exclude_modules:
        blocks = [b for b in blocks if not _matches(exclude_modules, b.name)]
        if not blocks:
            raise ValueError(f"`exclude_modules={exclude_modules!r}` excludes every block that was targeted.")
    return blocks


def site_module(block: Block, site: str) -> tuple[str, nn.Module]:
    """Qualified name and module whose output (for `"heads"`: whose input) is the place `site` in `block`.

    Raises:
        ValueError: if the block has no such place that can be recognised.
    """
    if site == "block":
        return block.name, block.module
    if site == "heads":
        name = heads_projection(block)[1]
        return f"{block.name}.{name}", block.module.get_submodule(name)
    norm_name = _branch_norm(block.module, site)
    if norm_name is not None:
        return f"{block.name}.{norm_name}", block.module.get_submodule(norm_name)
    name = _find(block.module, _ATTENTION if site == "attention" else _MLP)
    if name is None and site == "mlp":  # the MLP's linears lie in the block itself: OPT, BERT
        name = next((n for n in ("fc2", "output.dense") if _has(block.module, n)), None)
    is_part = site == "mlp" and name not in (None, "fc2", "output.dense") and _is_linear(block.module, name)
    if name is None or is_part:  # ALBERT's `ffn` is the MLP's first linear
        raise ValueError(
            f"No {site} was recognised in block {block.name!r} ({type(block.module).__name__}). Use `site='block'`."
        )
    module = block.module.get_submodule(name)
    if "residual" in inspect.signature(module.forward).parameters:  # Bloom: the skip is added inside the module
        inner = output_linear(module)
    elif _has(module, "output.dense"):  # BERT: likewise, in a submodule
        inner = "output.dense"
    else:
        return f"{block.name}.{name}", module
    return f"{block.name}.{name}.{inner}", module.get_submodule(inner)


def mlp_name(block: Block) -> str | None:
    """Name, in `block`, of the MLP itself, without a norm that follows it; None if it is no module of its own (OPT,
    BERT)."""
    name = _find(block.module, _MLP)
    return None if name is None or _is_linear(block.module, name) else name


def heads_projection(block: Block) -> tuple[str, str]:
    """Names, in `block`, of the attention and of the linear layer that projects its heads.

    Raises:
        ValueError: if the block has no attention, or no single such layer, that can be recognised.
    """
    name = None
    while deeper := _find(block.module.get_submodule(name or ""), _ATTENTION):  # GPT-Neo has one in the other
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
    found = [name for name, _ in module.named_children() if name in _OUTPUT_LINEAR]
    return found[0] if len(found) == 1 else None


def hidden_size(model: nn.Module, name: str) -> int:
    """Width `d` of the hidden states at module `name`, from the nearest configuration above it.

    Raises:
        ValueError: if no module above has a `config` with a `hidden_size`.
    """
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if hasattr(config, "get_text_config") and not hasattr(config, "hidden_size"):
            config = config.get_text_config()
        if hasattr(config, "hidden_size"):
            return config.hidden_size
        if not name:
            raise ValueError(
                f"The hidden size of {type(model).__name__} is unknown: its `config` has no `hidden_size`."
            )
        name = name.rpartition(".")[0]


def _nearest_stack(root: nn.Module) -> nn.ModuleList | None:
    """The longest of the shallowest ModuleLists with composite elements."""
    level = [root]
    while level:
        stacks = [m for m in level if _is_stack(m)]
        if stacks:
            return max(stacks, key=len)
        level = [child for module in level for child in module.children()]
    return None


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(list(m.children()) for m in module)


def _blocks(model: nn.Module, stack: str) -> list[Block]:
    return [Block(f"{stack}.{i}", i, stack, module) for i, module in enumerate(model.get_submodule(stack))]


def _targeted(model: nn.Module, target_modules) -> list[Block]:
    stacks = []
    for name, module in model.named_modules():
        if _is_stack(module) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks.append(name)
    blocks = [block for stack in stacks for block in _blocks(model, stack)]
    names = {block.name for block in blocks}
    adapters = tuple(name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    matched = [
        name
        for name, _ in model.named_modules()
        if name and _matches(target_modules, name) and not name.startswith(adapters)
    ]
    if not matched:
        raise ValueError(f"`target_modules={target_modules!r}` matches no module of {type(model).__name__}.")
    wrong = [name for name in matched if name not in names]
    if wrong:
        raise ValueError(
            f"`target_modules={target_modules!r}` matches {wrong[0]!r}, which is no block. The place inside a block "
            f"is chosen by `site`. {_HOW_TO_NAME}"
        )
    return [block for block in blocks if block.name in set(matched)]


def _matches(targets: list[str] | set[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return match_target_against_key(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def _find(module: nn.Module, pattern: re.Pattern) -> str | None:
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
    names = ("post_mlp_layernorm", "post_feedforward_layernorm")
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
