"""The equations, against the same equations written plainly in float64; their gradients; what they keep for
backward."""

import pytest
import torch
from tiny import HEAD_KINDS, KINDS, reference_delta

from peft_steer import SteerConfig


D, R, HEAD_DIM = 24, 5, 6
ALL_KINDS = KINDS | HEAD_KINDS


def build(kind: str, **kwargs):
    """In evaluation mode: in training, JoLA's gates are random."""
    config = SteerConfig(**ALL_KINDS[kind], **{k: kwargs.pop(k) for k in ("init_weights",) if k in kwargs})
    return config.intervention.build(config, D, R, HEAD_DIM, **kwargs).eval()


def edit(kind: str, dtype=torch.float32, std: float = 0.3, seed: int = 0):
    torch.manual_seed(seed)
    module = build(kind, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn_like(p))
    return module.to(dtype)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, D), (7, D), (1, 1, D)])
def test_value(kind, dtype, shape):
    module = edit(kind, dtype)
    h = torch.randn(shape, dtype=dtype)
    expected = h.double() + 0.7 * reference_delta(module, h)
    out = module(h, 0.7)
    assert out.dtype == dtype
    assert out.shape == h.shape
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=16 * eps, atol=16 * eps)
    with torch.no_grad():  # where `b` is a column of `W_up`, another sum
        tolerance = 8 * eps if kind == "linear_bias" else 0.0
        torch.testing.assert_close(module(h, 0.7), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((h + 0.7 * module.delta(h)).double(), expected, rtol=32 * eps, atol=32 * eps)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_the_start(kind, dtype):
    """`dh = 0` exactly, whatever dtype the adapter is cast to and from."""
    torch.manual_seed(0)
    module = build(kind)
    h = torch.randn(3, 4, D).to(dtype)
    for cast in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(module.to(cast)(h), h)
    acting = build(kind, init_weights=False)
    assert not torch.equal(acting(h), h)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradcheck(kind):
    module = edit(kind, torch.float64)
    h = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    trained = {n: p for n, p in module.named_parameters() if (kind, n) != ("lofit", "v")}  # in its first stage
    names, parameters = tuple(trained), tuple(trained.values())

    def f(h, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (h, 0.7))

    assert torch.autograd.gradcheck(f, (h, *parameters))


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind != "vector"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_gradients_are_those_of_the_plain_equation(kind, dtype, tolerance):
    """Every parameter's and the input's gradient, against the unfused equation in float64; hidden states much larger
    than the edit, as in a real model."""
    h = (8 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))).to(dtype)
    grad = torch.randn(64, D, generator=torch.Generator().manual_seed(2)).to(dtype)

    def gradients(module, h):
        h = h.detach().requires_grad_()
        out = module(h, 0.7) if h.dtype == dtype else h + 0.7 * module.delta(h)
        out.backward(grad.to(h.dtype))
        return {"h": h.grad} | {name: p.grad for name, p in module.named_parameters()}

    module = edit(kind, torch.float32, std=0.05)
    expected = gradients(edit(kind, torch.float32, std=0.05).double(), h.double())
    for name, found in gradients(module, h).items():
        if (kind, name) == ("lofit", "v"):  # not trained in the first stage
            assert not found.any()
            continue
        error = (found.double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_output_is_kept(kind):
    """For backward the edit keeps its output, which the next block keeps anyway, and tensors of width r; never `h`."""
    module = edit(kind)
    h = torch.randn(50, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = module(h)
    large = {x.untyped_storage().data_ptr() for x in kept if x.shape[-1] == D and x.numel() == h.numel()}
    assert h.untyped_storage().data_ptr() not in large
    assert large <= {out.untyped_storage().data_ptr()}
    assert all(x.numel() <= max(50 * R, D * R) for x in kept if x.untyped_storage().data_ptr() not in large)


def test_nothing_is_kept_without_gradients():
    module = edit("silu").requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        module(torch.randn(5, D))
    assert kept == []


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_autocast_does_not_change_the_dtype_of_the_hidden_state(kind):
    module, h = edit(kind), torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(h).dtype == torch.float32
        assert torch.equal(module(h), edit(kind)(h).to(torch.float32))


@pytest.mark.parametrize("kind", ["loreft", "direft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stay_orthonormal(dtype, kind):
    """After training steps in its own dtype, with weight decay and a large rate, and after a round trip through
    bf16."""
    torch.manual_seed(0)
    module = SteerConfig(kind=kind).intervention.build(SteerConfig(kind=kind), 64, 8, dtype=dtype)
    start = module.R.clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(50):
        h = torch.randn(16, 64, dtype=dtype)
        (module(h) - h.roll(1, -1)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for m in (module, module.to(torch.bfloat16)):
        assert m.R.dtype == torch.float32
        torch.testing.assert_close(m.R @ m.R.T, torch.eye(8), rtol=0, atol=2e-6)
    assert (module.R - start).norm() > 1


def test_second_derivatives_are_refused_rather_than_wrong():
    h = torch.randn(6, D, requires_grad=True)
    (grad,) = torch.autograd.grad(edit("silu")(h).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
