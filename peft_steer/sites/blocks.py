"""The blocks of any transformer: which stacks a model has, and which blocks a configuration asks for.

A *block* is an element of the stack: the `nn.ModuleList` (or `nn.Sequential` of equal blocks) nearest to the root of
the (text) decoder or encoder.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from torch import nn


_HOW_TO_NAME = (
    "Set `target_modules` to the names of the blocks (the modules in the model's list of layers, as "
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
        transformer: Any = model
        roots = [transformer.get_decoder()]
        if getattr(model.config, "is_encoder_decoder", False):
            roots.insert(0, transformer.get_encoder())
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
        ValueError: if nothing matches, a target is not a block, or an index is out of range.
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


def hidden_size(model: nn.Module, name: str, default: int | None = None) -> int:
    """Width `d` of the hidden states at module `name`: from the nearest configuration above it, else from the module's
    own norms and linear layers, if they agree, else `default`.

    Raises:
        ValueError: if none of them tells.
    """
    module, above = model.get_submodule(name), name
    while True:
        config: Any = getattr(model.get_submodule(above), "config", None)
        if hasattr(config, "get_text_config") and not hasattr(config, "hidden_size"):
            config = config.get_text_config()
        if hasattr(config, "hidden_size"):
            return int(config.hidden_size)
        if not above:
            break
        above = above.rpartition(".")[0]
    width = _width_of(module) or default
    if width is None:
        raise ValueError(
            f"The hidden size of {type(model).__name__} at {name!r} is unknown: it has no `config` with a "
            "`hidden_size`, and its norms and linear layers do not agree. Set `hidden_size`."
        )
    return width


def _width_of(module: nn.Module) -> int | None:
    """The width that a module reads and returns: its norms', or its first and last linear layer's, if they agree."""
    norms = {
        weight.numel()
        for m in module.modules()
        if "norm" in type(m).__name__.lower() and isinstance(weight := getattr(m, "weight", None), torch.Tensor)
    }
    if len(norms) == 1:
        return norms.pop()
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if linears and not norms and linears[0].in_features == linears[-1].out_features:
        return linears[0].in_features
    return None


def _nearest_stack(root: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """The longest of the shallowest stacks."""
    level = [root]
    while level:
        stacks = [m for m in level if _is_stack(m)]
        if stacks:
            return max(stacks, key=lambda stack: len(stack))
        level = [child for module in level for child in module.children()]
    return None


def _is_stack(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.Sequential]:
    """Whether it is a list of composite modules; one that runs its elements itself, only if they are of one class."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not all(list(m.children()) for m in module):
        return False
    alike = len({type(m) for m in module}) == 1
    return len(module) > 0 and (isinstance(module, nn.ModuleList) or (alike and len(module) > 1))


def _blocks(model: nn.Module, stack: str) -> list[Block]:
    return [Block(f"{stack}.{i}", i, stack, module) for i, module in enumerate(model.get_submodule(stack).children())]


def _targeted(model: nn.Module, target_modules: list[str] | set[str] | str) -> list[Block]:
    stacks: list[str] = []
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
            f"`target_modules={target_modules!r}` matches {wrong[0]!r}, which is not a block. The place inside a "
            f"block is chosen by `site`. {_HOW_TO_NAME}"
        )
    return [block for block in blocks if block.name in set(matched)]


def _matches(targets: list[str] | set[str] | str, name: str) -> bool:
    if isinstance(targets, str):
        return match_target_against_key(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)
