"""Ranks for the blocks that together cost as many parameters as a uniform rank."""

from collections.abc import Sequence

import torch


def by_gain(gains: Sequence[float], r: int, width: int) -> list[int]:
    """Ranks in proportion to the gains of errors, from 1 to `width`, and `r` on average.

    They minimize `sum gain_i^2 * (error of block i)^2` if the spectrum of what each block has to add falls off as
    `1 / j^2`, so that rank `r_i` leaves out `1 / r_i`.
    """
    total = r * len(gains)
    exact = [total * gain / sum(gains) for gain in gains]
    ranks = [min(width, max(1, int(x))) for x in exact]
    while (step := (sum(ranks) < total) - (sum(ranks) > total)) != 0:
        candidates = [i for i, rank in enumerate(ranks) if 1 <= rank + step <= width]
        ranks[max(candidates, key=lambda i: step * (exact[i] - ranks[i]))] += step
    return ranks


def by_energy(gains: Sequence[float], spectra: Sequence[torch.Tensor], r: int) -> list[int]:
    """Ranks that minimize `sum gain_i^2 * (energy of block i beyond its rank)`, at least 1 and `r` on average.

    Args:
        gains: Of each block's errors.
        spectra: Eigenvalues of the second moment of what each block has to add, `(d,)`, descending.
        r: The uniform rank.
    """
    energies = [(gain**2 * values[1:].double()).tolist() for gain, values in zip(gains, spectra, strict=True)]
    ordered = sorted(((energy, i) for i, values in enumerate(energies) for energy in values), reverse=True)
    ranks = [1] * len(gains)
    for _, i in ordered[: (r - 1) * len(gains)]:
        ranks[i] += 1
    return ranks
