"""Where an edit is made: the blocks of a model, and the place inside a block."""

from .blocks import Block, hidden_size, select_blocks, text_stacks
from .heads import head_shape
from .modules import SITES, heads_projection, mlp_name, output_linear, site_module
from .site import Site, find_sites


__all__ = [
    "SITES",
    "Block",
    "Site",
    "find_sites",
    "head_shape",
    "heads_projection",
    "hidden_size",
    "mlp_name",
    "output_linear",
    "select_blocks",
    "site_module",
    "text_stacks",
]
