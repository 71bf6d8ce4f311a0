"""LoFiT (arXiv 2406.01563): heads are chosen first, then a vector is trained at each of them."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from .base import at_least_float32
from .heads import HeadEdit
from .optimizer_hooks import Update, whole
from .options import Option, check_count, check_non_negative


logger = logging.getLogger(__name__)


class Lofit(HeadEdit):
    """LoFiT (arXiv 2406.01563), in the stages of its authors' code. First `A` of all heads is trained, `v` staying at
    zero, with `l1_lambda * sum |A|` added to the loss. After `selection_step` optimizer steps the `num_heads` heads
    with the largest L2 norm of `A` are chosen, over all layers; of equals, those in lower layers, with lower numbers.
    `A` returns to zero, with what the optimizer remembers of both, and from then on only the chosen heads' `v` are
    trained.

    The buffer `selected`, `(H,)`, says which heads may act. It is saved with the adapter, as the number of steps is.

    Args:
        chosen: how many heads are chosen; None for a tenth.
        selection_step, l1_lambda: as above.
        args, kwargs: those of [`HeadEdit`].
    """

    selected: torch.Tensor
    options: ClassVar[Mapping[str, Option]] = {
        "num_heads": Option(None, check_count),
        "selection_step": Option(100, check_count),
        "l1_lambda": Option(5e-4, check_non_negative),
    }

    @classmethod
    def arguments(cls, config: Any) -> dict[str, Any]:
        return {
            "chosen": config.num_heads,
            "selection_step": config.selection_step,
            "l1_lambda": config.l1_lambda,
        }

    @classmethod
    def check_heads(cls, config: Any, total: int) -> None:
        if config.num_heads is not None and config.num_heads > total:
            raise ValueError(
                f"`num_heads={config.num_heads}` cannot be chosen: the targeted blocks have {total} heads."
            )

    @classmethod
    def before_saving(cls, config: Any, tensors: dict[str, torch.Tensor]) -> None:
        steps = max((int(x) for key, x in tensors.items() if key.endswith(".steps")), default=0)
        if steps < config.selection_step:
            logger.warning(
                "LoFiT's heads are not chosen yet: %d of `selection_step=%d` optimizer steps are done, and the saved "
                "adapter edits all heads. Train longer, or lower `selection_step`.",
                steps,
                config.selection_step,
            )

    def __init__(
        self,
        *args: Any,
        chosen: int | None,
        selection_step: int,
        l1_lambda: float,
        init_weights: bool = True,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.chosen, self.selection_step, self.l1_lambda = chosen, selection_step, l1_lambda
        self.register_buffer("selected", torch.ones(len(self.A), dtype=torch.bool, device=self.steps.device))
        self.reset_parameters(init_weights)

    def acting(self) -> tuple[torch.Tensor, torch.Tensor]:
        # By multiplication, not by a branch: every parameter has a gradient in both stages, which DDP insists on, and
        # the stage need not be read from the device.
        first = self.steps < self.selection_step
        v = at_least_float32(self.v) * self.selected[:, None]
        return at_least_float32(self.A) * first, torch.where(first, v.detach(), v)

    @property
    def has_chosen(self) -> bool:
        return not self.steps.is_meta and int(self.steps.item()) >= self.selection_step

    def acting_parameters(self) -> int:
        return int(self.selected.sum()) * self.v.shape[1] if self.has_chosen else self.A.numel()

    @staticmethod
    def outlook(edits: list[Any]) -> str | None:
        if edits[0].has_chosen:
            return None
        count, heads = _count(edits)
        return (
            f"LoFiT: {count * edits[0].v.shape[1]:,d} remain after {edits[0].selection_step} optimizer steps, when "
            f"{count} of {heads} heads are chosen"
        )

    @staticmethod
    def before_step(edits: list[Any], update: Update) -> None:
        if edits[0].steps.item() < edits[0].selection_step:
            for edit in edits:
                update.add_gradient(edit.A, edit.l1_lambda * edit.A.sign())

    @staticmethod
    def after_step(edits: list[Any], update: Update) -> None:
        HeadEdit.after_step(edits, update)
        if edits[0].steps.item() == edits[0].selection_step:
            _select(edits, update)


def _count(edits: list[Lofit]) -> tuple[int, int]:
    """How many heads are chosen, and of how many."""
    heads = sum(len(edit.A) for edit in edits)
    return edits[0].chosen or max(1, heads // 10), heads


def _select(edits: list[Lofit], update: Update) -> None:
    norms = torch.cat([at_least_float32(whole(edit.A)).norm(dim=1) for edit in edits])
    if not norms.isfinite().all():
        raise RuntimeError("LoFiT cannot choose heads: `A` is not finite. Lower the learning rate.")
    count, _ = _count(edits)
    chosen = torch.zeros_like(norms, dtype=torch.bool)
    chosen[norms.sort(descending=True, stable=True).indices[:count]] = True
    for edit, selected in zip(edits, torch.split(chosen, [len(edit.A) for edit in edits]), strict=True):
        edit.selected.copy_(selected)
        for p in (edit.A, edit.v):
            p.zero_()
            update.forget(p)
    logger.info(
        "LoFiT chose %d of %d heads: %s",
        count,
        len(norms),
        [(edit.place, head) for edit in edits for head in edit.selected.nonzero().flatten().tolist()],
    )
