"""Small factors of every affine edit give its `dh`, in float64 and at the rank of its parameters."""

import pytest
import torch
from tiny import HEAD_KINDS, KINDS, D, adapted, reference_delta, steer_layers

from peft_steer.serving.export.factors import factors


AFFINE = ["vector", "linear", "linear_bias", "loreft", "noreft", "direft", "nodireft"]


def edit_of(**config):
    model = adapted(**config)
    return next(iter(steer_layers(model).values())).steer_edit["default"]


@pytest.mark.parametrize("kind", AFFINE)
def test_factors(kind):
    edit, h = edit_of(r=4, **KINDS[kind]), torch.randn(5, D, dtype=torch.float64)
    U, down, v = factors(edit)
    rank = 0 if kind == "vector" else 4
    assert (U.shape, down.shape) == ((D, rank), (rank, D))
    found = h @ down.T @ U.T + v
    torch.testing.assert_close(found, reference_delta(edit, h), atol=2e-5, rtol=1e-5)
    assert found.abs().max() > 0.1


def test_factors_of_heads():
    edit, h = edit_of(**HEAD_KINDS["jola"]), torch.randn(5, D, dtype=torch.float64)
    U, down, v = factors(edit)
    torch.testing.assert_close(h @ down.T @ U.T + v, reference_delta(edit, h), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["silu", "direft_tanh", "nodireft_relu"])
def test_not_affine(kind):
    with pytest.raises(ValueError, match="not an affine function"):
        factors(edit_of(r=4, **KINDS[kind]))
