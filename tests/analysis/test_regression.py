"""The best low-rank maps, against their plain equations and against other maps."""

import logging

import numpy as np
import pytest
import torch

from peft_steer.analysis.maths.regression import PairMoments, fit


D = 6


def pairs(n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of very different scales with a mean, and outputs that depend on them in part."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 3, D, dtype=torch.float64)
    x = (torch.randn(n, D, generator=generator, dtype=torch.float64) + 1) * scales
    noise = torch.randn(n, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, (x / scales) @ weight + noise + 3


def moments_of(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> PairMoments:
    moments = PairMoments(D)
    weight = torch.ones(len(x)) if weight is None else weight
    for part in zip(x.split(17), y.split(17), weight.split(17), strict=True):
        moments.add(*part)
    return moments


def plain(x: np.ndarray, y: np.ndarray, r: int, affine: bool) -> np.ndarray:
    """Predictions of reduced-rank regression, from the data: least squares, then the first principal directions of
    what it predicts."""
    x0, y0 = (x.mean(0), y.mean(0)) if affine else (np.zeros(D), np.zeros(D))
    predicted = (x - x0) @ np.linalg.lstsq(x - x0, y - y0, rcond=None)[0]
    directions = np.linalg.svd(predicted)[2][:r]
    return predicted @ directions.T @ directions + y0


@pytest.mark.parametrize("affine", [True, False])
def test_every_rank_is_the_plain_regression(affine):
    (x, y), (x_new, y_new) = pairs(), pairs(seed=1)
    maps = fit(moments_of(x, y), affine)
    assert maps.ridge == 0
    residuals, residuals_new = (maps.residuals(moments_of(*data)) for data in ((x, y), (x_new, y_new)))
    for r in range(1, D + 1):
        edit = maps.of_rank(r)
        assert (edit.W_down.shape, edit.W_up.shape) == ((r, D), (D, r))
        torch.testing.assert_close(torch.linalg.svdvals(edit.W_down), torch.linalg.svdvals(edit.W_up))
        expected = plain(x.numpy(), y.numpy(), r, affine)
        np.testing.assert_allclose(edit(x), expected, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(residuals[r], ((y.numpy() - expected) ** 2).sum(1).mean(), rtol=1e-9)
        np.testing.assert_allclose(residuals_new[r], (y_new - edit(x_new)).square().sum(1).mean(), rtol=1e-9)
    assert torch.equal(edit.b, torch.zeros(D)) != affine


def test_a_weight_counts_as_so_many_pairs():
    x, y = pairs()
    times = torch.arange(len(x)) % 3 + 1
    weighted, repeated = (
        moments_of(x, y, times),
        moments_of(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0)),
    )
    maps, expected = fit(weighted), fit(repeated)
    torch.testing.assert_close(maps.of_rank(2)(x), expected.of_rank(2)(x))
    torch.testing.assert_close(maps.residuals(weighted), expected.residuals(repeated))


def test_no_other_map_of_the_rank_is_better():
    x, y = pairs()
    edit = fit(moments_of(x, y)).of_rank(2)
    best = (y - edit(x)).square().sum()
    generator = torch.Generator().manual_seed(3)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            W_down, W_up, b = (
                w + size * w.abs().mean() * torch.randn(w.shape, generator=generator, dtype=w.dtype)
                for w in (edit.W_down, edit.W_up, edit.b)
            )
            assert (y - x @ W_down.T @ W_up.T - b).square().sum() > best


def test_rank_zero_is_the_constant():
    x, y = pairs()
    residuals = fit(moments_of(x, y)).residuals(moments_of(x, y))
    np.testing.assert_allclose(residuals[0], (y - y.mean(0)).square().sum(1).mean())
    assert (residuals.diff() <= 0).all()


@pytest.mark.parametrize("case", ["few", "zero", "constant", "copied"])
def test_singular_moments_are_regularized_and_said_to_be(caplog, case):
    x, y = pairs(n=4 if case == "few" else 200)
    if case in ("zero", "constant"):
        x[:, 2] = 0 if case == "zero" else 0.7
    if case == "copied":
        x[:, 2] = x[:, 3]
    with caplog.at_level(logging.WARNING):
        maps = fit(moments_of(x, y), label="block 7")
    assert maps.ridge > 0
    assert "block 7 is singular" in caplog.text
    assert "ridge of 1e-06" in caplog.text
    edit = maps.of_rank(D)
    assert torch.isfinite(edit(x)).all()
    if case != "few":
        np.testing.assert_allclose(edit(x), plain(x.numpy(), y.numpy(), D, True), rtol=1e-3, atol=1e-3)


def test_a_ridge_that_is_given_stays(caplog):
    maps = fit(moments_of(*pairs(n=4)), ridge=0.3)
    assert maps.ridge == 0.3
    assert not caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_residuals_of_an_exact_map_are_not_negative(seed):
    x, _ = pairs(seed=seed)
    y = x[:, :2] @ torch.randn(2, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    residuals = fit(moments_of(x, y)).residuals(moments_of(x, y))
    assert (residuals >= 0).all()  # rounding would give some roots of negative numbers
    assert residuals[2] < 1e-12 * residuals[0]


def test_a_ridge_is_that_of_the_scaled_inputs():
    x, y = pairs()
    ridge = 0.3
    edit = fit(moments_of(x, y), ridge=ridge).of_rank(D)
    x0, y0 = (z.numpy() - z.numpy().mean(0) for z in (x, y))
    moment = x0.T @ x0
    weight = np.linalg.solve(moment + ridge * np.diag(np.diag(moment)), x0.T @ y0)
    np.testing.assert_allclose(edit(x) - y.mean(0), x0 @ weight, rtol=1e-7, atol=1e-7)
