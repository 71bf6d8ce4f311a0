"""What another tool's file says, in our terms."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Foreign:
    """An adapter of another tool.

    Attributes:
        kind: Ours, as in [`~peft_steer.SteerConfig`], as are `site`, `positions` and `activation`.
        states: By block, the parameters of our intervention by name. With edits of their own for first and last tokens
            (`tied=False`) the names begin with `prefix.` and `suffix.`.
    """

    kind: str
    states: dict[int, dict[str, torch.Tensor]]
    site: str = "block"
    positions: str = "all"
    activation: str | None = None
    tied: bool = field(default=True)

    @property
    def ranks(self) -> dict[int, int]:
        """The rank of each block's edit; vectors have none."""
        sizes = {block: [x.shape[0] for x in state.values() if x.ndim == 2] for block, state in self.states.items()}
        return {block: size[0] for block, size in sizes.items() if size}


def vectors(by_block: dict[int, torch.Tensor], site: str = "block") -> Foreign:
    """Fixed vectors, `(d,)` by block."""
    return Foreign("vector", {block: {"v": v.detach().float()} for block, v in sorted(by_block.items())}, site)
