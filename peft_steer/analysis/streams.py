"""Hidden states of a text, carried through a model one block at a time, in files instead of memory."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .pairs import blocks_of
from .texts import Batch, Texts


class _Enough(Exception):
    """Ends a forward pass before a block."""


class Streams:
    """What enters the next block, of each batch and for each of several streams, `(rows, tokens, d)`.

    The states lie in memory-mapped files in a temporary directory: two bytes or four for each number, stream and
    token on the disk, and in memory only what the system finds room for. Positions and masks of each batch stay in
    memory.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self.batches: list[Batch] = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        self._states: dict[tuple[str, int], torch.Tensor] = {}

    def read(self, stream: str, batch: int) -> torch.Tensor:
        return self._states[stream, batch].to(self.device)

    def write(self, stream: str, batch: int, h: torch.Tensor) -> None:
        key = (stream, batch)
        if key not in self._states:
            file = str(self.folder / f"{stream}-{batch}")
            self._states[key] = torch.from_file(file, shared=True, size=h.numel(), dtype=h.dtype).view(h.shape)
        self._states[key].copy_(h)

    def through(self, block: nn.Module, index: int, stream: str, batch: int) -> torch.Tensor:
        """The output of `block`, the one with that index, for what the stream has reached."""
        args, kwargs = self._calls[batch][index]
        output = block(self.read(stream, batch), *args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def streams(models: dict[str, nn.Module], texts: Sequence[Texts]) -> Iterator[Streams]:
    """Streams by name, each at the entrance of its model's first block, for the batches of all texts.

    The arguments with which blocks are called (masks, positions) are those of the first model, which the others
    share, being of the same architecture.
    """
    (first, *others) = models
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
        found = Streams(Path(folder), next(models[first].parameters()).device)
        for text in texts:
            for batch in text.batches("Reading"):
                calls = _calls(models[first], batch)
                found.write(first, len(found.batches), calls[0][0])
                for name in others:
                    found.write(name, len(found.batches), _calls(models[name], batch, blocks=1)[0][0])
                found._calls.append([(args, kwargs) for _, args, kwargs in calls])
                found.batches.append(batch)
        yield found


def _calls(
    model: nn.Module, batch: Batch, blocks: int | None = None
) -> list[tuple[torch.Tensor, tuple, dict[str, Any]]]:
    """What the first `blocks` blocks (by default all) are called with in a forward pass, which goes no further: the
    hidden state, the other arguments, the keyword arguments."""
    modules = [block.module for block in blocks_of(model)][:blocks]
    calls: list[tuple[torch.Tensor, tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args[0], args[1:], kwargs))
        if module is modules[-1]:
            raise _Enough

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        model(**batch.inputs(model))
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls
