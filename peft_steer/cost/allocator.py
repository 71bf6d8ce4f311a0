"""Exact memory figures, from the events of torch's allocators.

Hooks on saved tensors would miss what a gradient checkpoint holds beside them, and resident memory includes what the
C library has not returned yet. The allocator sees each storage when it is made and when it is freed.
"""

import gc
import os
from collections.abc import Callable, Mapping
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function


_RELEASE = "peft_steer.cost: release"
# Kineto, which the profiler starts, would print two lines at each start and stop. It reads this when first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def saved_bytes(model: torch.nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes that a training forward keeps for backward: what is freed when its loss is dropped.

    Parameters, the batch and anything that outlives the loss (such as a cache of rotary angles) do not count.

    Args:
        model: A transformers or PEFT model; it is in training mode during the measurement.
        batch: Its keyword arguments, on its device and with `labels`.

    Raises:
        ValueError: If the model returns no loss.
    """
    was_training = model.training
    model.train()
    device = next(model.parameters()).device
    gc.freeze()  # so that the collections below search only what the forward makes
    try:
        if device.type != "cpu":
            memory = torch.get_device_module(device)
            loss = _loss(model, batch)
            gc.collect()
            before = memory.memory_allocated(device)
            del loss
            gc.collect()
            return before - memory.memory_allocated(device)
        with profile(profile_memory=True) as events:
            loss = _loss(model, batch)
            gc.collect()
            with record_function(_RELEASE):
                del loss
                gc.collect()
    finally:
        gc.unfreeze()
        model.train(was_training)
    release = next(e.start_ns() for e in _kineto(events) if e.name() == _RELEASE)
    return -sum(size for time, size in _changes(events) if time >= release)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once while `function` ran, above those allocated before it."""
    gc.collect()
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        function()
        return memory.max_memory_allocated(device) - before
    with profile(profile_memory=True) as events:
        function()
    return max(accumulate(size for _, size in _changes(events)), default=0)


def _loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.enable_grad():
        loss = model(**batch).loss
    if loss is None:
        raise ValueError(f"{type(model).__name__} returned no loss. The batch needs `labels`, it has {sorted(batch)}.")
    return loss


def _changes(events: profile) -> list[tuple[int, int]]:
    """(time in ns, bytes allocated or, if negative, freed) on the CPU, in order."""
    memory = (e for e in _kineto(events) if e.name() == "[memory]")
    return sorted(((e.start_ns(), e.nbytes()) for e in memory), key=itemgetter(0))


def _kineto(events: profile) -> list[Any]:
    assert events.kineto_results is not None
    return events.kineto_results.events()
