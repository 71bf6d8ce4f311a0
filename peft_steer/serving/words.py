"""How exports and imports name what they hold."""

from collections.abc import Iterable

import torch


def describe_blocks(blocks: Iterable[int]) -> str:
    """`"block 10"`, `"blocks 1 to 29"`, or `"blocks 3, 7, 12"`."""
    known = sorted(blocks)
    if len(known) == 1:
        return f"block {known[0]}"
    if known == list(range(known[0], known[-1] + 1)):
        return f"blocks {known[0]} to {known[-1]}"
    return f"blocks {', '.join(map(str, known))}"


def describe_vectors(vectors: dict[int, torch.Tensor]) -> str:
    """The blocks of some vectors, and how long these are."""
    norms = [f"{v.norm().item():.3g}" for v in sorted(vectors.values(), key=torch.norm)]
    size = f"norm {norms[0]}" if len(norms) == 1 else f"norms {norms[0]} to {norms[-1]}"
    return f"{describe_blocks(vectors)}, {size}"
