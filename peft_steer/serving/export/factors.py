"""An affine edit as a product of small matrices, whatever its kind."""

import torch

from peft_steer.interventions.base import Intervention


@torch.no_grad()
def factors(edit: Intervention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`(U, D, v)` with `dh = U D h + v`, shapes `(d, r)`, `(r, d)` and `(d,)`, in float64; `v` is None for zero.

    Of `dh = M h + v`, which every kind gives. At the heads `M` is diagonal: `D` reads the entries that are not zero.
    Elsewhere the rank `r` is that of the parameters: what `M` maps `r` random vectors to spans all that it maps
    anything to. `U` is an orthonormal basis of it, and `D = U^T M`.

    Raises:
        ValueError: If the edit is no affine function of `h`.
    """
    affine = edit.affine()
    if affine is None:
        raise ValueError(f"{type(edit).__name__} with an activation is no affine function of the hidden state")
    M, v = (x if x is None else x.detach().double() for x in affine)
    if M is None:
        return v.new_zeros(len(v), 0), v.new_zeros(0, len(v)), v
    if torch.equal(M, M.diag().diag()):
        D = torch.eye(len(M), dtype=M.dtype, device=M.device)[M.diag() != 0]
        return D.t() * M.diag()[:, None], D, v
    r = min(min(p.shape) for p in edit.parameters() if p.ndim == 2)
    probes = torch.randn(len(M), r, generator=torch.Generator().manual_seed(0), dtype=M.dtype).to(M.device)
    U = torch.linalg.qr(M @ probes).Q
    U = torch.linalg.qr(M @ (M.t() @ U)).Q  # again, for the rounding in `M`
    return U, U.t() @ M, v
