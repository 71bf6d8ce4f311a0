"""First and second moments of hidden states, accumulated in float64 over streamed batches."""

import logging

import torch


logger = logging.getLogger(__name__)


class Moments:
    """The moments of vectors `x`.

    Attributes:
        n: Number of vectors.
        total: `(d,)`, sum of `x`. square: `(d, d)`, sum of `x x^T`. Float64.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.n = 0
        self.total = torch.zeros(d, dtype=torch.float64, device=device)
        self.square = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """`x`: `(n, d)`."""
        x = x.double()
        self.n += len(x)
        self.total += x.sum(0)
        self.square.addmm_(x.T, x)

    @property
    def mean(self) -> torch.Tensor:
        """`(d,)`."""
        return self.total / self.n

    @property
    def mean_square(self) -> float:
        """`E |x|^2`."""
        return self.square.trace().item() / self.n

    def covariance(self) -> torch.Tensor:
        """`(d, d)`, `E (x - mean)(x - mean)^T`."""
        return self.square / self.n - torch.outer(self.mean, self.mean)


def warn_if_singular(moments: Moments, label: str) -> None:
    """Logs a warning if there are no more vectors than dimensions: the other directions are unknown."""
    if moments.n <= (d := len(moments.total)):
        logger.warning(
            "The moment matrix of %s is singular: %d vectors of width %d span at most %d directions. Give more text.",
            label,
            moments.n,
            d,
            moments.n,
        )


def spectrum(moments: Moments, ranks: tuple[int, ...]) -> dict[str, float]:
    """How many directions vectors spread over, from their covariance.

    Returns:
        `rms`: `sqrt(E |x|^2)`. `constant`: the share of `E |x|^2` that lies in the mean, which a fixed vector steers.
        `effective_rank`: exp of the entropy of the normalized eigenvalues (Roy and Vetterli, 2007).
        `participation`: `(sum l)^2 / sum l^2` of the eigenvalues `l`. `energy_r`: the share of the variance in the
        first `r` principal directions. NaN where nothing varies.
    """
    values = torch.linalg.eigvalsh(moments.covariance()).flip(0).clamp(min=0)
    share = values / values.sum()
    mean_square = moments.mean_square
    return {
        "rms": mean_square**0.5,
        "constant": moments.mean.square().sum().item() / mean_square if mean_square else float("nan"),
        "effective_rank": torch.special.entr(share).sum().exp().item(),
        "participation": 1 / share.square().sum().item(),
        **{f"energy_{r}": share[:r].sum().item() for r in ranks},
    }
