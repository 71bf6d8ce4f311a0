"""What is done around every step of an optimizer for the edits that ask for it, whatever the trainer.

One call of an optimizer's `step` is one update, under gradient accumulation, checkpointing, DDP, FSDP2 and loss
scaling alike. So before it is the place to add a penalty's gradient, once for an update, and after it to count steps
and to change stages. A penalty added to the model's loss instead would be missing where a trainer computes the loss
from logits (DPO, GRPO), and would be multiplied by the number of accumulated batches or processes where a trainer
divides by the number of tokens, as transformers' does. What clips gradients sees them without the penalty's.
"""

import weakref
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .base import Intervention


class Group:
    """Stands for the edits of one adapter in one model; a copy of the model has a group of its own."""

    def __init__(self):
        self.size = 0


class SteppedEdit(Intervention):
    """An edit that does something around the steps of whatever optimizer trains it.

    Args:
        group: shared by the edits of one adapter in one model; this one alone by default.
    """

    def __init__(self, group: Group | None = None):
        super().__init__()
        self.group = group or Group()
        self.place = self.group.size
        self.group.size += 1
        _live.add(self)

    def __setstate__(self, state: dict) -> None:  # of a copy, or after unpickling
        super().__setstate__(state)
        _live.add(self)

    @staticmethod
    def before_step(edits: list["SteppedEdit"]) -> None:
        """An optimizer is about to update `edits`, all of one group, in the order of their places."""

    @staticmethod
    def after_step(edits: list["SteppedEdit"], optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` has updated `edits`, all of one group, in the order of their places."""


_live: "weakref.WeakSet[SteppedEdit]" = weakref.WeakSet()


def whole(x: torch.Tensor) -> torch.Tensor:
    """A distributed tensor in full (collective); any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def refuse_flat(name: str, p: torch.Tensor, remedy: str = "") -> None:
    """Raise `RuntimeError` if an optimizer trains something else in the place of the matrix `p`.

    FSDP1 flattens parameters, and shows views of them; DeepSpeed marks those that it keeps in partitions of its own
    (stages 1, 2; stage 3).
    """
    if p.ndim != 2 or p.numel() == 0 or not p.is_leaf or hasattr(p, "_hp_mapping") or hasattr(p, "ds_id"):
        raise RuntimeError(
            f"`{name}` cannot be changed between steps: FSDP1 and DeepSpeed's ZeRO train flattened copies of "
            f"parameters. Use DDP or FSDP2{remedy}."
        )


def add_gradient(p: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to the gradient of `p`, if the loss gave it one."""
    if p.grad is not None:
        p.grad.add_(gradient.to(p.grad.dtype))


def _groups(optimizer: torch.optim.Optimizer) -> list[list[SteppedEdit]]:
    """The edits that `optimizer` trains, by group; in the same order on every rank."""
    if not _live:
        return []
    position = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    found: dict[Group, dict[int, SteppedEdit]] = defaultdict(dict)
    first: dict[Group, int] = {}
    for edit in _live:
        at = [position[id(p)] for p in edit.parameters() if id(p) in position]
        if at:
            found[edit.group][edit.place] = edit
            first[edit.group] = min([*at, first.get(edit.group, at[0])])
    return [[edits[place] for place in sorted(edits)] for _, edits in sorted(found.items(), key=lambda x: first[x[0]])]


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for edits in _groups(optimizer):
        edits[0].before_step(edits)


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for edits in _groups(optimizer):
        edits[0].after_step(edits, optimizer)


# One hook for every optimizer.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
