"""Hidden states of a text, carried through a model one block at a time, in files instead of memory."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from peft_steer.utils.errors import UsageError

from ..inputs.pairs import Model, blocks_of
from ..inputs.texts import Batch, Texts
from .steering import replaced


class _Stop(Exception):
    """Ends a forward pass early."""


class Streams:
    """The input of the next block, `(rows, tokens, d)`, for each batch and each of several streams.

    The states are memory-mapped files in a temporary directory: every number takes two bytes or four on the disk, and
    memory only as far as the system has room.

    Args:
        model: The blocks of all streams get the arguments (masks, positions) that this model gives to its own.
        batch: Any batch, to see whether the blocks return tuples.
        folder: For the files.
    """

    def __init__(self, model: Model, batch: Batch, folder: Path):
        self.model, self.folder = model, folder
        self.device = next(model.parameters()).device
        self.batches: list[Batch] = []
        self._as_tuple = _return_tuples(model, batch)
        self._calls: tuple[int, list[_Call]] | None = None
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
        """The output of `block`, whose index is `index`, for the stream's present states."""
        if self._calls is None or self._calls[0] != batch:  # those of all batches would not fit into memory
            self._calls = (batch, _calls(self.model, self.batches[batch], as_tuple=self._as_tuple))
        _, args, kwargs = self._calls[1][index]
        output = block(self.read(stream, batch), *args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def streams(models: Mapping[str, Model], texts: Sequence[Texts]) -> Iterator[Streams]:
    """Streams by name, each at the entrance of its model's first block, for the batches of all texts.

    The models are of the same architecture.

    Raises:
        UsageError: If the temporary directory has too little space.
    """
    with tempfile.TemporaryDirectory(prefix="peft-steer-") as folder:
        states = Streams(next(iter(models.values())), next(iter(texts[0])), Path(folder))
        _check_space(Path(folder), states.model, len(models), texts)
        for text in texts:
            for batch in text.batches("Reading"):
                for name, model in models.items():
                    states.write(name, len(states.batches), _calls(model, batch, blocks=1)[0][0])
                states.batches.append(batch)
        yield states


def _check_space(folder: Path, model: Model, n: int, texts: Sequence[Texts]) -> None:
    tokens = sum(batch.input_ids.numel() for text in texts for batch in text)
    weights = cast(Any, model).get_input_embeddings().weight
    needed, free = n * tokens * weights.shape[-1] * weights.element_size(), shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the hidden states of {tokens} tokens take {needed / 1e9:.1f} GB, and {folder.parent} has "
            f"{free / 1e9:.1f} GB; name a larger directory in the environment variable TMPDIR, or lower --num_texts "
            "or --max_length"
        )


_Call = tuple[torch.Tensor, tuple, dict[str, Any]]


def _calls(model: Model, batch: Batch, blocks: int | None = None, as_tuple: bool = False) -> list[_Call]:
    """The arguments of the first `blocks` blocks (by default all) in a forward pass in which they compute nothing: a
    hidden state, the other positional arguments, the keyword arguments.

    Args:
        as_tuple: Whether the blocks return tuples.
    """
    modules = [block.module for block in blocks_of(model)][:blocks]
    calls: list[_Call] = []

    def skip(h: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((h, args, kwargs))
        if len(calls) == len(modules):
            raise _Stop
        return (h,) if as_tuple else h

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, skip))
        stack.enter_context(suppress(_Stop))
        model(**batch.inputs(model))
    return calls


def _return_tuples(model: Model, batch: Batch) -> bool:
    """Whether the blocks return tuples, as the first one does."""
    outputs = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)
        raise _Stop

    handle = blocks_of(model)[0].module.register_forward_hook(keep)
    try:
        with suppress(_Stop):
            model(**batch.inputs(model))
    finally:
        handle.remove()
    return isinstance(outputs[0], tuple)
