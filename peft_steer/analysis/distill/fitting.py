"""A fine-tuned model as linear edits of the base's block outputs, in closed form, block after block."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from peft_steer.utils.errors import UsageError
from peft_steer.utils.files import atomic_path

from ..capture.streams import streams
from ..inputs.pairs import Pair, blocks_of
from ..inputs.texts import Texts
from ..maths.regression import LowRankMap, PairMoments, fit


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedBlock:
    """The edit of one block.

    Attributes:
        name: Of the block's module.
        edit: `dh = W_up W_down h + b`.
        error, error_held_out: The distance to the tuned model that is left at this block's output, relative to the
            base's, `sqrt(E w |h_tuned - h_steered|^2 / E w |h_tuned - h_base|^2)`, on the text it was fitted to and on
            other text. The weight of a token is `w = 1 / |h_base|^2`: blocks read their input through a norm, so the
            few tokens with enormous activations are no more important than others.
    """

    name: str
    edit: LowRankMap
    error: float
    error_held_out: float

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.edit.W_down)


@torch.no_grad()
def fit_blocks(
    pair: Pair, texts: Texts, held_out: Texts, r: int = 8, max_error: float | None = None, ridge: float = 0.0
) -> list[FittedBlock]:
    """Fits an edit to every block's output, from the first block to the last, each on the stream that the edits before
    it have steered, so that it corrects what they left (arXiv 2603.00425's oracle, `dh = h_tuned - h_base`, by
    reduced-rank regression). Blocks below the first one that fine-tuning changed get none.

    Only one block is fitted at a time: the moments take 32 d^2 bytes for the whole model.

    Args:
        r: The rank of every block.
        max_error: Instead of `r`: each block gets the smallest rank at which `error_held_out` is at most this, or,
            with a warning, the rank with the least error if none reaches it.
        ridge: See [`~peft_steer.analysis.maths.regression.fit`].

    Raises:
        UsageError: If the tuned model does what the base does.
    """
    models = {"steered": pair.base, "base": pair.base, "tuned": pair.tuned}
    fitted: list[FittedBlock] = []
    d, n = pair.base.config.get_text_config().hidden_size, len(texts)
    with streams(models, (texts, held_out)) as states:
        blocks = zip(blocks_of(pair.base), blocks_of(pair.tuned), strict=True)
        for ours, theirs in tqdm(list(blocks), desc="Fitting", unit="block"):
            parts = [_Part(batches, d, states.device) for batches in (range(n), range(n, len(states.batches)))]
            for part in parts:
                for batch in part.batches:
                    h, base, tuned = (
                        states.through(module, ours.index, name, batch)
                        for name, module in (("steered", ours.module), ("base", ours.module), ("tuned", theirs.module))
                    )
                    part.add(states.batches[batch].tokens, h, base, tuned)
                    for name, state in (("steered", h), ("base", base), ("tuned", tuned)):
                        states.write(name, batch, state)
            if not parts[0].change:
                continue  # fine-tuning has changed nothing so far
            maps = fit(parts[0].moments, ridge=ridge, label=f"block {ours.index}")
            errors = [(maps.residuals(part.moments) / part.change).sqrt() for part in parts]
            rank = r if max_error is None else _smallest_rank(errors[1], max_error, ours.name)
            edit = maps.of_rank(rank)
            for batch in range(len(states.batches)):
                h = states.read("steered", batch)
                states.write("steered", batch, h + edit(h))
            fitted.append(FittedBlock(ours.name, edit, errors[0][rank].item(), errors[1][rank].item()))
    if not fitted:
        raise UsageError("on this text the tuned model does what the base does: there is nothing to distil")
    return fitted


_TENSORS = ("W_down", "W_up", "b")


def save_fit(path: Path, blocks: list[FittedBlock], facts: dict[str, Any]) -> None:
    """Writes a fit to a safetensors file, with `facts` that JSON can hold."""
    rows = [{"name": block.name, "error": block.error, "error_held_out": block.error_held_out} for block in blocks]
    tensors = {f"{block.name}.{name}": getattr(block.edit, name).contiguous() for block in blocks for name in _TENSORS}
    metadata = {"facts": json.dumps(facts), "blocks": json.dumps(rows)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata)


def load_fit(path: Path) -> tuple[list[FittedBlock], dict[str, Any]]:
    """The fit and the facts in a file of [`save_fit`]."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        return [
            FittedBlock(edit=LowRankMap(*(file.get_tensor(f"{row['name']}.{name}") for name in _TENSORS)), **row)
            for row in json.loads(metadata["blocks"])
        ], json.loads(metadata["facts"])


class _Part:
    """Moments of `(h, h_tuned - h)` on some batches, and the mean square of `h_tuned - h_base`."""

    def __init__(self, batches: range, d: int, device: torch.device):
        self.batches = batches
        self.moments = PairMoments(d, device)
        self._change = 0.0

    def add(self, keep: torch.Tensor, *states: torch.Tensor) -> None:
        h, base, tuned = (state[keep] for state in states)
        base, tuned = base.double(), tuned.double()
        weight = 1 / base.square().sum(-1)
        self.moments.add(h, tuned - h.double(), weight)
        self._change += (weight * (tuned - base).square().sum(-1)).sum().item()

    @property
    def change(self) -> float:
        """The mean square of `h_tuned - h_base`, weighted."""
        return self._change / self.moments.weight


def _smallest_rank(errors: torch.Tensor, max_error: float, name: str) -> int:
    """The smallest rank of at least 1 whose error, `errors[r]`, is at most `max_error`."""
    reached = (errors[1:] <= max_error).nonzero()
    if len(reached):
        return int(reached[0]) + 1
    best = int(errors[1:].argmin()) + 1
    logger.warning(
        "%s: no rank reaches an error of %g; rank %d is taken, with an error of %.3g",
        name,
        max_error,
        best,
        errors[best],
    )
    return best
