"""Where completions begin, for a trainer that does not show the model its labels."""

from collections.abc import Callable
from typing import Any


class MarkCompletions:
    """A data collator whose batches have a `completion_mask`, made of the labels of another's.

    transformers' `Trainer` takes the labels out of the batch if it computes the loss itself (`label_smoothing_factor`,
    `compute_loss_func`). An adapter with `positions` then cannot see where prompts end, and training stops.

    Args:
        collator: makes batches with `labels`.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        batch = self.collator(features)
        batch["completion_mask"] = batch["labels"] != -100
        return batch
