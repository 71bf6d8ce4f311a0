"""`Site`: one place of one block, and all that an edit there needs to know."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .blocks import Block, hidden_size
from .heads import head_shape
from .modules import site_module


@dataclass(frozen=True)
class Site:
    """A place in a model where one edit is made.

    Attributes:
        block: The block that it is in.
        place: Which of `SITES` it is.
        name: Qualified name of the module whose output is edited; at `"heads"`, whose input is.
        module: That module.
        width: Width `d` of what is edited.
        head_dim: At `"heads"`: the width of one of the heads that lie side by side. None elsewhere.
        rank: Of the edit; 0 until a configuration has said it.
    """

    block: Block
    place: str
    name: str
    module: nn.Module
    width: int
    head_dim: int | None = None
    rank: int = 0

    @property
    def num_heads(self) -> int:
        """How many heads lie side by side; 1 where there are none to tell apart."""
        return self.width // (self.head_dim or self.width)


def find_sites(
    model: nn.Module, blocks: Iterable[Block], places: Iterable[str], width: int | None = None
) -> dict[str, Site]:
    """The `places` in each of the `blocks`, by the name of the edited module. `width` is that of the hidden states
    where the model does not show it.

    Raises:
        ValueError: if a block lacks one of the places, or two of them are at one module.
    """
    sites: dict[str, Site] = {}
    places = list(places)
    for block in blocks:
        for place in places:
            name, module = site_module(block, place)
            if name in sites:
                raise ValueError(
                    f"`site={places!r}` names two places at the module {name!r}; use an adapter for each."
                )
            if place == "heads":
                number, head_dim = head_shape(block)
                sites[name] = Site(block, place, name, module, number * head_dim, head_dim)
            else:
                sites[name] = Site(block, place, name, module, hidden_size(model, name, width))
    return sites
