"""Directions against their definitions on the same states, and numbers pinned at a fixed seed."""

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from peft_steer.extraction.directions import direction, with_norm
from peft_steer.extraction.report import auc, report


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(0)
    common, shift = torch.randn(40, 12, generator=g), torch.randn(12, generator=g)
    noise = torch.randn(2, 40, 12, generator=g)
    return common + shift + 0.5 * noise[0], common + 0.5 * noise[1]


def same_line(a, b):
    a, b = (torch.as_tensor(x).double() / torch.as_tensor(x).double().norm() for x in (a, b))
    return abs(a @ b).item()


def test_mean_difference(states):
    positive, negative = states
    expected = sum(p - n for p, n in zip(positive, negative, strict=True)) / len(positive)
    torch.testing.assert_close(direction(positive, negative, "mean"), expected, atol=1e-6, rtol=0)


def test_centred_component_is_that_of_repeng(states):
    """repeng's `pca_diff`: scikit-learn's PCA, which centres, of the differences."""
    positive, negative = states
    v = direction(positive, negative, "pca_centred")
    expected = PCA(n_components=1).fit((positive - negative).numpy()).components_[0]
    assert same_line(v, expected) > 1 - 1e-6
    assert v.norm().item() == pytest.approx(1, abs=1e-6)


def test_uncentred_component_is_that_of_repeng_and_of_steering_vectors(states):
    """repeng's `pca_center`: of all states about their pair's middle. steering-vectors: of the differences and their
    negatives, about zero."""
    positive, negative = states
    v = direction(positive, negative, "pca_uncentred")
    middle = (positive + negative) / 2
    centred = PCA(n_components=1).fit(torch.cat([positive - middle, negative - middle]).numpy()).components_[0]
    differences = positive - negative
    moments = torch.cat([differences, -differences]).double()
    largest = torch.linalg.eigh(moments.T @ moments).eigenvectors[:, -1]
    assert same_line(v, centred) > 1 - 1e-6
    assert same_line(v, largest) > 1 - 1e-6
    assert same_line(v, direction(positive, negative, "pca_centred")) < 0.9  # they are different methods


@pytest.mark.parametrize("method", ["mean", "pca_centred", "pca_uncentred"])
def test_the_sign_is_towards_positive(method, states):
    positive, negative = states
    v = direction(positive, negative, method)
    assert (positive - negative).mean(0) @ v >= 0
    torch.testing.assert_close(direction(negative, positive, method), -v)


PINNED = {
    "mean": [0.8697, 1.4779, -1.0195],
    "pca_centred": [0.1953, 0.4998, -0.2846],
    "pca_uncentred": [0.3199, 0.5665, -0.3864],
}


@pytest.mark.parametrize("method", PINNED)
def test_pinned(method, states):
    found = direction(*states, method)[:3]
    torch.testing.assert_close(found, torch.tensor(PINNED[method]), atol=2e-4, rtol=0)


def test_norms(states):
    v, h = direction(*states), torch.cat(states)
    assert torch.equal(with_norm(v, "own", h), v)
    assert with_norm(v, "unit", h).norm().item() == pytest.approx(1)
    assert with_norm(v, "states", h).norm().item() == pytest.approx(h.norm(dim=1).mean().item(), rel=1e-5)


def test_equal_states_are_refused(states):
    with pytest.raises(ValueError, match="do not differ"):
        direction(states[0], states[0])
    with pytest.raises(ValueError, match="'median' must be one of"):
        direction(*states, "median")


def test_auc_is_scikit_learns():
    g = torch.Generator().manual_seed(1)
    p, n = (torch.randn(30, generator=g).double().numpy().round(1) for _ in range(2))  # rounded: with ties
    expected = roc_auc_score([1] * 30 + [0] * 30, [*p, *n])
    assert float(auc(p, n)) == pytest.approx(expected, abs=1e-12)


def test_the_interval_covers_the_true_area():
    """Of 40 samples with a true AUC of 0.76, all but a few intervals of 95 % must hold it."""
    g = torch.Generator().manual_seed(2)
    e1 = torch.eye(3)[0]
    true, inside = 0.7602, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt(2))
    for _ in range(40):
        negative = torch.randn(60, 3, generator=g)
        positive = torch.randn(60, 3, generator=g) + e1
        found = report(0, e1, positive, negative, (positive, negative))
        inside += found.auc_low <= true <= found.auc_high
        assert found.auc_low <= found.auc <= found.auc_high
        assert found.right == (positive[:, 0] > negative[:, 0]).sum()
    assert 34 <= inside <= 40
