"""The best map of a given rank from `h` to `dh`, for every rank at once, from second moments alone.

Reduced-rank regression (Izenman, 1975): among the maps `M` of rank `r`, `E |y - M x|^2` is least for
`M = V_r V_r^T B`, where `B = E[y x^T] E[x x^T]^-1` is the unrestricted solution and the columns of `V_r` are the first
`r` eigenvectors of `B E[x x^T] B^T`, the covariance of what it predicts. With a bias `x` and `y` are centred first. It
is the paper's linearized oracle (arXiv 2603.00425).
"""

import logging
from dataclasses import dataclass, replace

import torch


logger = logging.getLogger(__name__)

# The inputs' moments, scaled to a unit diagonal, count as singular if an eigenvalue is below this.
_SINGULAR = 1e-11
_RIDGE = 1e-6


class PairMoments:
    """First and second moments of weighted pairs of vectors `(x, y)`, in float64: 16 d^2 bytes for any number of
    pairs.

    Attributes:
        n: Number of pairs. weight: Sum of their weights.
        x, y: `(d,)`, sums. xx: `(d, d)`, sum of `x x^T`. xy: `(d, d)`, sum of `x y^T`. yy: `(1,)`, sum of `|y|^2`.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        self.n, self.weight = 0, 0.0
        self.x, self.y, self.xx, self.xy, self.yy = (
            torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((d,), (d,), (d, d), (d, d), (1,))
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """`x`, `y`: `(n, d)`; `weight`: `(n,)`."""
        x, y, weight = x.double(), y.double(), weight.double()[:, None]
        self.n += len(x)
        self.weight += weight.sum().item()
        self.x += (weight * x).sum(0)
        self.y += (weight * y).sum(0)
        self.xx.addmm_(x.T, weight * x)
        self.xy.addmm_(x.T, weight * y)
        self.yy += (weight * y.square()).sum()

    def about(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Means of `(x_i - x)(x_i - x)^T`, of `(x_i - x)(y_i - y)^T` and of `|y_i - y|^2`, for given `x` and `y`."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        xx = self.xx / self.weight - torch.outer(x, mean_x) - torch.outer(mean_x, x) + torch.outer(x, x)
        xy = self.xy / self.weight - torch.outer(x, mean_y) - torch.outer(mean_x, y) + torch.outer(x, y)
        yy = self.yy / self.weight - 2 * y @ mean_y + y @ y
        return xx, xy, yy.item()


@dataclass(frozen=True)
class LowRankMap:
    """`y = W_up W_down x + b`, the parameters of a linear edit (`kind="linear"`, `use_bias=True`), in float64.

    Attributes:
        W_down: `(r, d)`. W_up: `(d, r)`. b: `(d,)`.
    """

    W_down: torch.Tensor
    W_up: torch.Tensor
    b: torch.Tensor

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """`dh` of hidden states `(..., d)`, in their dtype."""
        W_down, W_up, b = (x.to(h.dtype) for x in (self.W_down, self.W_up, self.b))
        return h @ W_down.T @ W_up.T + b


@dataclass(frozen=True)
class RankedMaps:
    """The best maps of all ranks.

    Attributes:
        V: `(d, d)`, orthonormal columns, the most important first. A: `(d, d)`: rank `r` has `M = V[:, :r] A[:r]`.
        x, y: `(d,)`, subtracted from the inputs and added to the outputs; zero without a bias.
        ridge: Was added to the diagonal of the inputs' moments, relative to it.
    """

    V: torch.Tensor
    A: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    ridge: float

    def of_rank(self, r: int) -> LowRankMap:
        """The best map of rank `r`, its two factors of the same size."""
        V, A = self.V[:, :r], self.A[:r]
        left, values, right = torch.linalg.svd(A, full_matrices=False)
        root = values.sqrt()
        return LowRankMap(root[:, None] * right, V @ (left * root), self.y - V @ (A @ self.x))

    def up_to(self, r: int) -> "RankedMaps":
        """The maps of ranks up to `r`, as copies that free the others' memory."""
        return replace(self, V=self.V[:, :r].clone(), A=self.A[:r].clone())

    def residuals(self, moments: PairMoments) -> torch.Tensor:
        """`(d + 1,)`: `E |y - M x - b|^2` at rank 0 (the bias alone), 1, ..., d, on any pairs."""
        xx, xy, yy = moments.about(self.x, self.y)
        # The columns of V are orthonormal, so the ranks' shares add up.
        gains = 2 * ((self.A @ xy) * self.V.T).sum(1) - ((self.A @ xx) * self.A).sum(1)
        return torch.cat([gains.new_tensor([yy]), yy - gains.cumsum(0)]).clamp(min=0)


def fit(moments: PairMoments, affine: bool = True, ridge: float = 0.0, label: str = "the inputs") -> RankedMaps:
    """The best maps of all ranks, with a bias or without.

    Args:
        ridge: Added to the diagonal of `E[x x^T]`, relative to it, so that the largest coordinates do not set its
            scale.
        label: What the inputs are, for the log.

    A singular `E[x x^T]`, such as that of fewer vectors than dimensions, is regularized with a ridge of 1e-6 unless a
    sufficient one is given, and the log says so.
    """
    zero = torch.zeros_like(moments.x)
    x, y = (moments.x / moments.weight, moments.y / moments.weight) if affine else (zero, zero)
    xx, xy, _ = moments.about(x, y)
    varies = xx.diagonal() > _SINGULAR * moments.xx.diagonal() / moments.weight  # else what is left is rounding
    scale = torch.where(varies, xx.diagonal().rsqrt(), 0.0)
    values, Q = torch.linalg.eigh(scale[:, None] * xx * scale)
    if values[0] + ridge < _SINGULAR * values[-1]:
        ridge = _RIDGE
        logger.warning(
            "The moment matrix of %s is singular (%d vectors of width %d): regularized with a ridge of %g of its "
            "diagonal. More text makes that unnecessary.",
            label,
            moments.n,
            len(x),
            ridge,
        )
    root = scale[:, None] * Q * (values.clamp(min=0) + ridge).rsqrt()  # E[x x^T]^-1 = root root^T
    # B = (root^T xy)^T root^T, and the covariance of what it predicts is P^T P.
    P = root.T @ xy
    _, _, Vt = torch.linalg.svd(P)
    return RankedMaps(Vt.T, Vt @ P.T @ root.T, x, y, ridge)
