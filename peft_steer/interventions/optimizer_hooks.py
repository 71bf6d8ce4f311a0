"""What is done around every step of an optimizer for the edits that ask for it, whatever the trainer.

One update is one call of an optimizer's `step`, under gradient accumulation, checkpointing, DDP and FSDP2 alike. So
before it is the place to add a penalty's gradient, once for an update, and after it to count steps, to change stages
and to project. A penalty added to the model's loss instead would be missing where a trainer computes the loss from
logits (DPO, GRPO), and would be multiplied by the number of accumulated batches or processes where a trainer divides
by the number of tokens, as transformers' does. What clips gradients sees them without the penalty's.

A fused optimizer under a `GradScaler` is called with gradients that are still scaled, and skips the update by itself
where they overflowed. torch tells such an optimizer so in `optimizer.grad_scale` and `optimizer.found_inf`.
"""

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .base import Intervention


class Group:
    """Stands for the edits of one adapter in one model; a copy of the model has a group of its own."""

    def __init__(self) -> None:
        self.size = 0


class SteppedEdit(Intervention):
    """An edit that does something around the updates of whatever optimizer trains it.

    Args:
        group: shared by the edits of one adapter in one model; this one alone by default.
    """

    def __init__(self, group: Group | None = None):
        super().__init__()
        self.group = group or Group()
        self.place = self.group.size
        self.group.size += 1
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, or after unpickling
        super().__setstate__(state)
        _live.add(self)

    def updated_with(self) -> list[nn.Parameter]:
        """The parameters of which an update concerns this edit."""
        return list(self.parameters())

    @staticmethod
    def before_step(edits: list["SteppedEdit"], update: "Update") -> None:
        """`edits`, all of one group, in the order of their places, are about to be updated."""

    @staticmethod
    def after_step(edits: list["SteppedEdit"], update: "Update") -> None:
        """`edits`, all of one group, in the order of their places, have been updated."""


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


class Update:
    """One step of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._position = {id(p): i for i, p in enumerate(trained)}

    @property
    def skipped(self) -> bool:
        """Whether the optimizer leaves the parameters as they are, since gradients overflowed."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is not None and bool(whole(found_inf).item())

    def add_gradient(self, p: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add to the gradient of `p`, if it is trained; if the loss gave it none, this is its gradient."""
        if id(p) not in self._position:
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:  # the optimizer will divide by it
            gradient = gradient * scale.to(gradient.device)
        if p.grad is None:
            p.grad = gradient.to(p.dtype)
        else:
            p.grad.add_(gradient.to(p.grad.dtype))

    def forget(self, p: nn.Parameter) -> None:
        """Drop what the optimizer remembers of `p`."""
        self.optimizer.state.pop(p, None)

    def groups(self) -> list[list[SteppedEdit]]:
        """The edits that are updated, by group; in the same order on every rank."""
        edits_of: dict[Group, dict[int, SteppedEdit]] = defaultdict(dict)
        first: dict[Group, int] = {}
        for edit in _live:
            at = [self._position[id(p)] for p in edit.updated_with() if id(p) in self._position]
            if at:
                edits_of[edit.group][edit.place] = edit
                first[edit.group] = min([*at, first.get(edit.group, at[0])])
        return [
            [edits_of[group][place] for place in sorted(edits_of[group])]
            for group in sorted(first, key=lambda group: first[group])
        ]


@torch.no_grad()
def _before(update: Update) -> None:
    if update.skipped:
        return
    for edits in update.groups():
        edits[0].before_step(edits, update)


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not _live:
        return None
    update = Update(optimizer)
    if kwargs.get("grad_scaler") is not None and update.groups():
        raise RuntimeError(
            f"{type(optimizer).__name__} unscales its gradients within `step(grad_scaler=...)`, where no penalty can "
            "be added and no skipped step be seen. Use an optimizer of torch's, or train in bfloat16."
        )
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # `args` begin with the optimizer
    if not callable(closure):
        _before(update)
        return None

    def with_penalty() -> Any:  # the gradients are made within the step, several times perhaps
        loss = closure()
        _before(update)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_penalty}
    return (args[0], with_penalty, *args[2:]), kwargs


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _live:
        return
    update = Update(optimizer)
    if update.skipped:
        return
    for edits in update.groups():
        edits[0].after_step(edits, update)


# One hook for every optimizer.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
