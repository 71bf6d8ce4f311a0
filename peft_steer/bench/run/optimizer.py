"""What the optimizer costs: the bytes that it keeps, and its share of the time of a step."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from peft_steer.utils.devices import has_accelerator


class OptimizerCost(TrainerCallback):
    """Measures the optimizer of a training, by the hooks that torch has before and after its step."""

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._started = self._step_started = 0.0
        self._inside = self._steps = 0.0

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has torch's
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps += _now() - self._step_started

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def summary(self) -> dict[str, Any]:
        """`optimizer_bytes`, of its state; `optimizer_share`, of the time of all steps."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        tensors = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        return {
            "optimizer_bytes": sum(tensor.nbytes for tensor in tensors),
            "optimizer_share": self._inside / self._steps if self._steps else None,
        }

    def _before(self, *args: Any) -> None:
        self._started = _now()

    def _after(self, *args: Any) -> None:
        self._inside += _now() - self._started


def _now() -> float:
    if has_accelerator():
        torch.accelerator.synchronize()
    return time.perf_counter()
