"""The ReFT family in a model: each learns, from its own start; `f` where plain autograd computes it."""

import pytest
import torch
from peft import get_peft_model
from tiny import inputs, make, reference_delta

from peft_steer import SteerConfig
from peft_steer.interventions import KINDS


FORMS = [
    (kind, activation)
    for kind in ("loreft", "noreft", "direft", "nodireft")
    for activation in (None, "silu", "relu", "gelu", "tanh")
    if not (kind == "loreft" and activation) and (kind, activation) != ("direft", "relu")
]


@pytest.mark.parametrize(("kind", "activation"), FORMS)
def test_it_learns_from_its_start(kind, activation):
    """The start is no point at which the gradient of everything is zero: a few steps change every parameter."""
    torch.manual_seed(0)
    model = get_peft_model(make(), SteerConfig(kind=kind, activation=activation, r=4)).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    x = inputs(rows=4)
    losses = []
    for _ in range(8):
        loss = model(**x, labels=x["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in start.items())


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noreft_with_a_nonlinear_f(dtype, activation):
    """Value, gradients and start of the form that is not fused."""
    torch.manual_seed(0)
    edit = KINDS["noreft"].build(SteerConfig(kind="noreft", activation=activation), 24, 5, dtype=dtype)
    h = torch.randn(6, 24, dtype=dtype, requires_grad=True)
    assert torch.equal(edit(h), h)
    with torch.no_grad():
        for p in edit.parameters():
            p.add_(0.3 * torch.randn_like(p))
    eps = torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = edit(h, 0.7)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), h.double() + 0.7 * reference_delta(edit, h), rtol=16 * eps, atol=16 * eps)
    edit, h = edit.double(), h.detach().double().requires_grad_()
    names = [name for name, _ in edit.named_parameters()]

    def f(h, *values):
        return torch.func.functional_call(edit, dict(zip(names, values, strict=True)), (h, 0.7))

    assert torch.autograd.gradcheck(f, (h, *edit.parameters()))


def test_direft_reads_no_more_than_loreft_and_writes_the_same_rows():
    """The two have the same parameters; they differ by `R^T R h`."""
    torch.manual_seed(0)
    loreft, direft = (
        KINDS[kind].build(SteerConfig(kind=kind, init_weights=False), 32, 4) for kind in ("loreft", "direft")
    )
    direft.load_state_dict(loreft.state_dict())
    h = torch.randn(7, 32)
    torch.testing.assert_close(direft.delta(h) - loreft.delta(h), h @ loreft.R.T @ loreft.R)


@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_rows_can_be_assigned(kind):
    """As an import of a checkpoint does it."""
    edit = KINDS[kind].build(SteerConfig(kind=kind), 24, 5)
    rows = torch.linalg.qr(torch.randn(24, 5))[0].t()
    edit.R = rows
    torch.testing.assert_close(edit.R, rows, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="orthonormal rows"):
        edit.R = 2 * rows
