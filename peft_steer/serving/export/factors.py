"""An affine edit as a product of small matrices, whatever its kind."""

import torch

from peft_steer.interventions.base import Intervention


@torch.no_grad()
def factors(edit: Intervention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(U, D, v)` with `dh = U D h + v`, shapes `(d, r)`, `(r, d)` and `(d,)`, in float64.

    Raises:
        ValueError: If the edit is not an affine function of `h`.
    """
    affine, form = edit.affine(), edit.low_rank()
    if affine is None:
        raise ValueError(f"{type(edit).__name__} with an activation is not an affine function of the hidden state")
    if form is not None:
        U, D, v = form.B.double(), form.A.double(), form.v
    else:  # an edit of heads: `M` is diagonal, and `D` reads the entries that are not zero
        M, v = affine
        assert M is not None
        assert torch.equal(M, M.diag().diag())
        diagonal = M.detach().diag().double()
        D = torch.eye(len(M), dtype=torch.float64, device=M.device)[diagonal != 0]
        U = D.t() * diagonal[:, None]
    return U, D, U.new_zeros(len(U)) if v is None else v.detach().double()
