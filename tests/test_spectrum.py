"""Spectra agree with the SVD of the true updates."""

import itertools

import numpy as np
import pytest

from gapaware import reference
from gapaware.spectrum import REGIME_BOUNDS, regime, spectrum

W, P = 10, 4000


def windows():
    random = np.random.default_rng(0)
    drift = random.normal(size=P)
    yield "random", random.normal(size=(W + 1, P))
    yield "drift and noise", drift + 0.3 * random.normal(size=(W + 1, P))
    yield "collinear", np.linspace(1, 2, W + 1)[:, None] * drift
    yield "low rank", random.normal(size=(W + 1, 2)) @ random.normal(size=(2, P))
    yield "badly scaled", random.normal(size=(W + 1, P)) * np.logspace(0, -5, W + 1)[:, None]
    yield "tiny", 1e-12 * (drift + 0.5 * random.normal(size=(W + 1, P)))


@pytest.mark.parametrize("updates", [pytest.param(x, id=name) for name, x in windows()])
def test_equals_reference(updates):
    seen = spectrum(reference.gram(updates), lr=1e-3, window=W)
    sigma = reference.singular_values(updates[1:])
    np.testing.assert_allclose(seen.sigma, sigma, atol=2e-6 * sigma[0])
    resolved = sigma > 1e-5 * sigma[0]
    k = reference.gap_position(sigma) if resolved.all() else seen.gap_position
    assert seen.gap_position == k
    if resolved.all():
        assert seen.gap_position_thesis == reference.gap_position_thesis(sigma)
        np.testing.assert_allclose(seen.gap_ratio, sigma[k - 1] / sigma[k], rtol=1e-6)
    np.testing.assert_allclose(seen.gap, reference.gap(sigma, k), rtol=1e-5)
    np.testing.assert_allclose(seen.g23, sigma[1] ** 2 - sigma[2] ** 2, atol=1e-10 * sigma[0] ** 2)
    np.testing.assert_allclose(seen.adiabaticity, reference.adiabaticity(updates), rtol=1e-4)
    np.testing.assert_allclose(
        seen.adiabatic_parameter, reference.adiabatic_parameter(updates, 1e-3), rtol=1e-4
    )
    # a direction is only as well defined as the distance to its neighbours
    separated = resolved & (np.abs(np.diff(sigma, append=0)) > 1e-3 * sigma[0])
    np.testing.assert_allclose(
        seen.alpha[separated], reference.stability(updates)[separated], atol=1e-3
    )
    np.testing.assert_allclose(seen.effective_rank, reference.effective_rank(sigma), rtol=1e-3)
    np.testing.assert_allclose(seen.coherence, reference.coherence(updates[1:]), rtol=1e-9)
    np.testing.assert_allclose(seen.update_norm, np.sqrt((updates[1:] ** 2).sum() / W), rtol=1e-9)


def test_decay_share_equals_reference():
    random = np.random.default_rng(0)
    decay, gradient = random.normal(size=(W + 1, P)), 0.3 * random.normal(size=(W + 1, P))
    updates = decay + gradient
    seen = spectrum(
        updates @ updates.T,
        lr=1.0,
        window=W,
        decay_gram=decay @ decay.T,
        decay_cross=updates @ decay.T,
    )
    assert seen.decay_share == pytest.approx(reference.decay_share(updates[1:], decay[1:]))


def test_zero_updates_are_left_out():
    random = np.random.default_rng(0)
    moving = random.normal(size=(7, P))
    with_zeros = np.zeros((W + 1, P))
    with_zeros[[0, 1, 3, 5, 6, 8, 9]] = moving
    seen = spectrum(with_zeros @ with_zeros.T, lr=1.0, window=W)
    np.testing.assert_allclose(seen.sigma, reference.singular_values(moving[1:]), rtol=1e-9)


def test_too_few_updates_give_no_spectrum():
    updates = np.random.default_rng(0).normal(size=(3, P))
    assert spectrum(updates @ updates.T, lr=1.0, window=W) is None
    assert spectrum(np.zeros((W + 1, W + 1)), lr=1.0, window=W) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_is_refused(bad):
    gram = np.eye(W + 1)
    gram[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectrum(gram, lr=1.0, window=W)


def test_regimes_cover_every_positive_a_once():
    bounds = sorted(REGIME_BOUNDS.values())
    assert bounds[0][0] == 0
    assert bounds[-1][1] == np.inf
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert regime(np.inf) == "forgetting"
    assert regime(np.nan) == "undetermined"


def test_lr_zero_divides_nothing():
    updates = np.random.default_rng(0).normal(size=(W + 1, P))
    assert spectrum(updates @ updates.T, lr=0.0, window=W).adiabatic_parameter == np.inf
