"""The form that engines run equals the equations, written plainly in float64."""

import pytest
import torch
from tiny import HEAD_KINDS, KINDS, reference_delta

from peft_steer import SteerConfig
from peft_steer.interventions import KINDS as CLASSES
from peft_steer.interventions.low_rank import ACTIVATIONS


KINDS = KINDS | {"noreft_tanh": {"kind": "noreft", "activation": "tanh"}}
D, R = 24, 5


def build(config: SteerConfig, *args, **kwargs):
    return CLASSES[config.kind].build(config, *args, **kwargs)


def edit(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    made = build(SteerConfig(r=R, **KINDS[kind]), D, R, dtype=torch.float64)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value(kind, dtype):
    made = edit(kind, dtype)
    h = torch.randn(7, D)
    delta = made.low_rank(0.7).delta(h, ACTIVATIONS)
    torch.testing.assert_close(delta.double(), 0.7 * reference_delta(made, h), atol=1e-5, rtol=1e-5)
    assert 0.7 * reference_delta(made, h).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_do_not_depend_on_values(kind):
    """An engine is built for the shapes at the start of a training, where much is zero."""
    start = build(SteerConfig(r=R, **KINDS[kind]), D, R).low_rank()
    later = edit(kind).low_rank()
    assert start.activations == later.activations
    assert {n: x.shape for n, x in start.tensors().items()} == {n: x.shape for n, x in later.tensors().items()}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_heads_have_none(kind):
    made = build(SteerConfig(**HEAD_KINDS[kind]), D, R, head_dim=6)
    assert made.low_rank() is None
