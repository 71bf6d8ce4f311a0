"""Which tokens are steered: the specifications, and their masks, given where each prompt ends.

- `"all"`: every token, padding too. It needs no mask;
- `"last"`: the last token of the prompt;
- `"f7+l7"`, `"f3"`, `"l5"`, ...: the first and the last tokens of the prompt (ReFT, arXiv 2404.03592, section 4.1).
  Each count is capped at `n // 2` for a prompt of `n` tokens, so that the two never overlap;
- `"prompt"`, `"completion"`: every token before, or after, the prompt's end.

The embedding of padding is steered by `"all"` alone. Where a prompt ends is found in `layout.py`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


_ENDS = re.compile(r"(?:f([1-9]\d*))?(?:(?:^|(?<=\d)\+)l([1-9]\d*))?")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass stand in their sequences; every tensor is `(batch, tokens)`.

    Args:
        index: how many tokens of its sequence precede a token, padding not counted.
        length: length of the prompt of a token's sequence.
        valid: False at padding.
    """

    index: torch.Tensor
    length: torch.Tensor
    valid: torch.Tensor


def check_positions(positions: str) -> None:
    """Raise `ValueError` unless `positions` is a specification."""
    if positions not in ("all", "last", "prompt", "completion") and not is_ends(positions):
        raise ValueError(
            f"`positions={positions!r}` is unknown; choose 'all', 'last', 'prompt', 'completion', or the first and "
            "last tokens of the prompt, such as 'f7+l7', 'f3' or 'l5'."
        )


def is_ends(positions: str) -> bool:
    """Whether `positions` names first and last tokens, as `"f7+l7"` does."""
    return isinstance(positions, str) and positions != "" and _ENDS.fullmatch(positions) is not None


def split(positions: str) -> tuple[str, ...]:
    """`"f7+l5"` as `("f7", "l5")`; any other specification alone."""
    return tuple(positions.split("+"))


def select(positions: str, layout: Layout) -> torch.Tensor:
    """The tokens that `positions` names, a boolean mask `(batch, tokens)`."""
    index, length = layout.index, layout.length
    if positions == "all":
        return torch.ones_like(layout.valid)
    if positions == "prompt":
        chosen = index < length
    elif positions == "completion":
        chosen = index >= length
    elif positions == "last":
        chosen = index == length - 1
    else:
        first, last = _counts(positions)
        half = length // 2
        chosen = (index < half.clamp(max=first)) | ((index < length) & (index >= length - half.clamp(max=last)))
    return chosen & layout.valid


def _counts(positions: str) -> tuple[int, int]:
    """How many first and last tokens `"f7+l7"` and the like name."""
    match = _ENDS.fullmatch(positions)
    if match is None:
        raise ValueError(f"`positions={positions!r}` does not name first and last tokens.")
    first, last = match.groups()
    return int(first or 0), int(last or 0)


class Selection:
    """The masks of one forward pass, each made when a layer asks for it first.

    Args:
        layout (callable): returns the [`Layout`], or None where every token comes after the prompt. It raises
            `ValueError` if the prompts' ends are unknown.
    """

    def __init__(self, layout: Callable[[], Layout | None]):
        self._find_layout = layout
        self._layout: Layout | None = None
        self._masks: dict[str, torch.Tensor | bool] = {}
        self._rows: dict[str, torch.Tensor] = {}

    def mask(self, positions: str) -> torch.Tensor | bool:
        """Mask `(batch, tokens)`; or True for every token, False for none."""
        if positions not in self._masks:
            layout = self._layout = self._layout or self._find_layout()
            self._masks[positions] = positions == "completion" if layout is None else select(positions, layout)
        return self._masks[positions]

    def rows(self, positions: str) -> torch.Tensor:
        """Indices of the chosen tokens in the flattened batch, ascending."""
        if positions not in self._rows:
            mask = torch.as_tensor(self.mask(positions))
            self._rows[positions] = mask.flatten().nonzero().flatten()
        return self._rows[positions]
