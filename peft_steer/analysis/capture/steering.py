"""Hidden states recorded and edited at the sites of a model's blocks, by hooks that last as long as a context."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from peft_steer.positions.layout import cached_length
from peft_steer.sites import site_module

from ..inputs.pairs import Model, blocks_of


Place = tuple[str, int]  # a site and the index of a block


def modules_at(model: Model, sites: Sequence[str]) -> dict[Place, nn.Module]:
    """The modules whose outputs are the `sites` (`"block"`, `"mlp"`, `"attention"`) of every block."""
    return {(site, block.index): site_module(block, site)[1] for block in blocks_of(model) for site in sites}


@contextmanager
def record(model: Model, sites: Sequence[str]) -> Iterator[Mapping[Place, torch.Tensor]]:
    """The outputs of the last forward pass, `(rows, tokens, d)` each, with the edits of the model's own adapters."""
    outputs: dict[Place, torch.Tensor] = {}

    def keep(place: Place) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            outputs[place] = _hidden(output)

        return hook

    with ExitStack() as stack:
        for place, module in modules_at(model, sites).items():
            stack.callback(module.register_forward_hook(keep(place)).remove)
        yield outputs


@contextmanager
def edited(model: Model, sites: Sequence[str], delta: Callable[[Place, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Adds `delta(place, h)` to the output `h` of each place, so that later places read the steered stream."""

    def edit(place: Place) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            h = _hidden(output)
            steered = h + delta(place, h)
            return steered if isinstance(output, torch.Tensor) else (steered, *output[1:])

        return hook

    with ExitStack() as stack:
        for place, module in modules_at(model, sites).items():
            stack.callback(module.register_forward_hook(edit(place)).remove)
        yield


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """While the context lasts, calling `module` calls `forward`."""
    had = "forward" in vars(module)  # as with accelerate's hooks
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward


@contextmanager
def oracle(base: Model, tuned: Model, sites: Sequence[str]) -> Iterator[None]:
    """The paper's oracle (arXiv 2603.00425), `dh = h_tuned - h_base`, on the stream that is already steered: in every
    forward pass of `base`, `tuned` first reads the same tokens, and its output at each of the `sites` replaces the
    base's.

    At `"block"` only the final norm and the head of the base are left. Generation with a cache works if it starts
    within the context: `tuned` then has a cache of its own.

    Raises:
        ValueError: In a forward pass with a cache that was filled outside the context.
    """
    follower = _CacheFollower()

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            tuned(*args, **{**kwargs, "past_key_values": follower.own(kwargs.get("past_key_values"))})

    with record(tuned, sites) as targets, edited(base, sites, lambda place, h: targets[place] - h):
        handle = base.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _CacheFollower:
    """The second model's cache: one for each generation, cropped and reordered with the first model's."""

    def __init__(self) -> None:
        self._of: tuple[Cache, Cache] | None = None

    def own(self, cache: Cache | None) -> Cache | None:
        if cache is None:
            return None
        if self._of is None or self._of[0] is not cache:
            if cached_length(cache):
                raise ValueError(
                    "The oracle cannot go on from a cache that it has not seen; start the generation anew."
                )
            self._of = (cache, copy.deepcopy(cache))
            for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
                setattr(cache, name, _both(*(getattr(each, name) for each in self._of)))
        return self._of[1]


def _both(first: Callable, second: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> None:
        first(*args, **kwargs)
        second(*args, **kwargs)

    return call


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
