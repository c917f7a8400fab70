"""The built-in laws do what they say, and the drift they steer by equals its reference."""

import numpy as np
import pytest

from gapaware import Observation, reference
from gapaware.drift import drift, per_learning_rate
from gapaware.law import (
    DRIFT_TARGET,
    FIRST_PULL,
    GROWTH,
    RECOVERY,
    RETAIN_TARGET,
    drift_law,
    retain_law,
)
from gapaware.spectrum import adiabaticity, spectrum

W, P, SPAN = 10, 3000, 5.0


def observe(updates, *, lrs=None, scale=1.0, memory=None, target=DRIFT_TARGET, **more):
    n = len(updates)
    gram = updates @ updates.T
    lrs = np.full(n, 1e-3) if lrs is None else np.asarray(lrs)
    described = {
        "step": 100,
        "row": "all",
        "spectrum": spectrum(gram, lr=1e-3, window=W),
        "gram": gram,
        "decay_gram": None,
        "decay_cross": None,
        "lrs": lrs,
        "scales": np.full(n, scale),
        "spans": np.full(n, SPAN),
        "lr": float(lrs[-1]),
        "peak_lr": float(lrs.max()),
        "scale": scale,
        "pull": 0.0,
        "interval": int(SPAN),
        "min_scale": 1.0,
        "max_scale": 64.0,
        "target": target,
        "window": W,
        "momentum_memory": 15,
        "loss": None,
        "memory": memory or {},
    }
    return Observation(**{**described, **more})


def updates(drifting: float, n: int = W + 1, seed: int = 0):
    """White noise, with a common direction of `drifting` times its norm."""
    random = np.random.default_rng(seed)
    common = random.normal(size=P)
    return random.normal(size=(n, P)) + drifting * common


@pytest.mark.parametrize("drifting", [0.0, 0.3, 2.0])
def test_drift_equals_reference(drifting):
    random = np.random.default_rng(1)
    x, spans = updates(drifting), random.integers(1, 9, W + 1).astype(float)
    distances = random.uniform(0.5, 2.0, W + 1)
    expected = reference.distant_cosines(x, distances, spans, 15)
    seen = drift(per_learning_rate(x @ x.T, distances), spans, 15)
    assert seen.mean == pytest.approx(np.mean(expected))
    assert seen.doubt == pytest.approx(np.std(expected))


def test_per_learning_rate_equals_the_gram_matrix_of_divided_updates():
    x, distances = updates(0.5), np.linspace(0.1, 3.0, W + 1)
    divided = x / distances[:, None] * distances[-1]
    np.testing.assert_allclose(per_learning_rate(x @ x.T, distances), divided @ divided.T)


def test_adiabaticity_equals_reference():
    x = updates(1.0)
    assert adiabaticity(x @ x.T) == pytest.approx(reference.adiabaticity(x))


def test_no_two_updates_beyond_momentum():
    x = updates(1.0)
    assert drift(x @ x.T, np.ones(W + 1), memory=15) is None
    decision = drift_law(observe(x, spans=np.ones(W + 1)))
    assert decision.scale == 1.0
    assert "shorter than momentum" in decision.why


def test_steady_drift_grows_at_most_by_the_rate():
    decision = drift_law(observe(updates(2.0), scale=2.0))
    assert decision.scale == pytest.approx(2.0 * GROWTH**SPAN)
    assert "grow" in decision.why


def test_more_drift_grows_faster():
    grown = [drift_law(observe(updates(x))).scale for x in (0.4, 0.5, 2.0)]
    assert 1.0 < grown[0] < grown[1] < grown[2]


def test_white_noise_shrinks_what_has_grown():
    decision = drift_law(observe(updates(0.0), scale=8.0))
    assert decision.scale < 8.0
    assert "shrink" in decision.why


def test_oscillation_shrinks():
    x = updates(0.0) * 0.1 + np.where(np.arange(W + 1) % 2, 1.0, -1.0)[:, None]
    assert drift_law(observe(x, scale=8.0)).scale < 8.0


def test_a_filling_window_holds():
    decision = drift_law(observe(updates(2.0, n=W)))
    assert decision.scale == 1.0
    assert "filling" in decision.why


def test_warming_up_does_not_grow_but_may_shrink():
    lrs = np.linspace(1e-4, 1e-3, W + 1)
    x = updates(2.0) * lrs[:, None]
    decision = drift_law(observe(x, lrs=lrs))
    assert decision.scale == 1.0
    assert "warms up" in decision.why
    assert drift_law(observe(updates(0.0) * lrs[:, None], lrs=lrs, scale=4.0)).scale < 4.0


def test_cooling_down_holds_whatever_is_seen():
    for x in (updates(2.0), updates(0.0)):
        decision = drift_law(observe(x, scale=4.0, memory={"highest_lr": 3e-3}))
        assert decision.scale == 4.0
        assert "cools down" in decision.why
        assert decision.memory == {"highest_lr": 3e-3}


def test_a_peak_before_the_first_step_seen_counts_but_not_in_a_warm_up():
    x = updates(2.0)
    assert drift_law(observe(x)).scale > 1
    assert drift_law(observe(x, peak_lr=1.9e-3)).scale > 1
    decision = drift_law(observe(x, peak_lr=3e-3))
    assert decision.scale == 1.0
    assert "cools down" in decision.why
    assert decision.memory == {"highest_lr": 1e-3}  # it may be one that the schedule never reaches

    lrs = np.linspace(1e-5, 1e-4, W + 1)
    warming = {"lrs": lrs, "peak_lr": 1e-3, "scale": 4.0}
    assert "warms up" in drift_law(observe(x * lrs[:, None], **warming)).why
    assert drift_law(observe(updates(0.0) * lrs[:, None], **warming)).scale < 4.0


def test_a_turning_spectrum_vetoes_growth():
    # a weak common direction, seen clearly over many parameters, in updates whose size jumps
    x = updates(0.4) * np.where(np.arange(W + 1) % 2, 0.5, 1.5)[:, None]
    decision = drift_law(observe(x))
    assert adiabaticity(x @ x.T) > 3
    assert decision.scale == 1.0
    assert "turns" in decision.why


def test_the_schedule_is_not_read_as_a_change_of_the_spectrum():
    """Updates that shrink with the schedule alone give the decision of updates that do not."""
    lrs = np.linspace(1e-3, 6e-4, W + 1)
    x = updates(2.0)
    scheduled = drift_law(observe(x * lrs[:, None], lrs=lrs))
    constant = drift_law(observe(x))
    assert scheduled.scale == pytest.approx(constant.scale)


def test_a_strong_drift_lost_in_noise_halves_the_factor_and_caps_it():
    strong = drift_law(observe(updates(2.0), scale=8.0))
    assert strong.memory["strongest_drift"] > 0.3
    lost = drift_law(observe(updates(0.0), scale=8.0, memory=strong.memory))
    assert lost.scale == 4.0
    assert "back to half" in lost.why
    again = drift_law(observe(updates(2.0), scale=4.0, memory=lost.memory))
    assert 4.0 < again.scale <= 4.0 * RECOVERY**SPAN
    # a weak drift that is lost is noise, and shrinks the factor a little, as ever
    weak = drift_law(observe(updates(0.0), scale=8.0, memory={"strongest_drift": 0.2}))
    assert 6.5 < weak.scale < 8.0
    # without a factor the run has done it itself
    alone = drift_law(observe(updates(0.0), scale=1.0, memory={"strongest_drift": 0.9}))
    assert alone.memory["ceiling"] == 64.0


def test_retain_law_gives_way_adiabatically():
    """|dρ/dt| = 𝒜*·ρ²: the rate of change over the gap squared is the target, at any step."""
    seen = [observe(updates(0.0), target=RETAIN_TARGET, step=step) for step in (0, 1, 500, 501)]
    pulls = [retain_law(observation).pull for observation in seen]
    assert pulls[0] == pytest.approx(FIRST_PULL)
    for before, after in (pulls[:2], pulls[2:]):
        assert (before - after) / (before * after) == pytest.approx(RETAIN_TARGET)
    assert all(retain_law(observation).scale == 1.0 for observation in seen)
