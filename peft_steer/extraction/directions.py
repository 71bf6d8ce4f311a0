"""A direction from contrastive states. `h+` and `h-`, `(pairs, d)`: the states of each pair's texts at one place.

- `mean`: `mean(h+ - h-)`, as CAA (arXiv 2312.06681) and steering-vectors by default;
- `pca_centred`: the first principal component of `h+ - h-` about their mean, of norm 1, as repeng by default (after
  RepE, arXiv 2310.01405);
- `pca_uncentred`: the same about zero, as steering-vectors; it equals the component of all `h+ - m` and `h- - m` with
  `m` the pair's middle, repeng's `pca_center`.

A component has no sign: it is chosen so that `h+` projects higher than `h-` on average. The centred component is the
largest *difference among* the differences, and need not lie near their mean.
"""

import torch


METHODS = ("mean", "pca_centred", "pca_uncentred")
NORMS = ("own", "unit", "states")


def direction(positive: torch.Tensor, negative: torch.Tensor, method: str = "mean") -> torch.Tensor:
    """The direction from `negative` to `positive` states, `(d,)` in float32, computed in float64.

    Raises:
        ValueError: If the states do not differ.
    """
    differences = positive.double() - negative.double()
    mean = differences.mean(0)
    if method == "mean":
        vector = mean
    elif method in METHODS:
        rows = differences - mean if method == "pca_centred" else differences
        component = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        vector = component if component @ mean >= 0 else -component
    else:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}")
    if not differences.any() or not vector.isfinite().all():
        raise ValueError("the states of positive and negative texts do not differ (or are not finite)")
    return vector.float()


def with_norm(v: torch.Tensor, norm: str, states: torch.Tensor) -> torch.Tensor:
    """`v` with its `"own"` norm, with norm 1 (`"unit"`), or with the mean norm of `states`, `(n, d)` (`"states"`)."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(map(repr, NORMS))}")
    if norm == "own":
        return v
    return v / v.norm() * (states.norm(dim=-1).mean() if norm == "states" else 1)
