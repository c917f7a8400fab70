"""The built-in laws do what they say, and what they steer by equals its reference."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gapaware import GapAware, Observation, reference
from gapaware.controller import plain
from gapaware.drift import drift, newest, per_learning_rate
from gapaware.law import (
    AGAIN,
    BRAKE,
    COHERENT_LEAP,
    DESCENT,
    DRIFT_TARGET,
    EARLY,
    FEWEST,
    FIRST_STRIDE,
    GROWTH,
    LASTING,
    LEAP,
    LEAVING,
    LENGTHENING,
    MOMENTUM_EXPONENT,
    PROBING,
    RECOVERY,
    REST,
    RETREAT,
    SHRINKAGE,
    SOONEST,
    STRIDE,
    WANDERING,
    WINDOW_GROWTH,
    drift_law,
)
from gapaware.momentum import interval_for
from gapaware.retain_law import FIRST_PULL, RETAIN_TARGET, retain_law
from gapaware.spectrum import adiabaticity, spectrum
from gapaware.trend import Trend
from gapaware.trial import FAR, NEAR, SMALL, STILL, Trial

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
        "push": 0.0,
        "interval": int(SPAN),
        "min_scale": 1.0,
        "max_scale": 64.0,
        "max_push": 2.0,
        "target": target,
        "window": W,
        "momentum_memory": 15,
        "weight_norm": 1e6,
        "loss": None,
        "earlier_losses": (),
        "kept": False,
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


def test_a_window_is_not_full_before_it_spans_what_momentum_remembers():
    """Close snapshots fill a short one sooner; meanwhile a factor that is too large still comes down."""
    x, spans = updates(0.7), np.full(W + 1, 1.6)
    assert drift(x @ x.T, spans, memory=15) is not None
    assert drift(x[1:] @ x[1:].T, spans[1:], memory=15) is None
    begun = drift_law(observe(x, spans=spans, scale=8.0))
    assert (begun.scale, "filling" in begun.why) == (8.0, True)
    assert drift_law(observe(x, spans=np.full(W + 1, 1.7), scale=8.0)).scale > 8.0
    risen = trend(*np.linspace(0.7, 1.4, 12))
    assert drift_law(observe(x, spans=spans, scale=8.0, loss=1.4, memory=risen)).scale < 8.0


def test_steady_drift_grows_at_most_by_the_rate():
    # 0.7 is a drift of 0.33: far above the target, and not coherent
    decision = drift_law(observe(updates(0.7), scale=2.0))
    assert decision.scale == pytest.approx(2.0 * GROWTH)
    assert "steady drift" in decision.why


def test_growth_is_in_units_of_the_momentum_memory():
    often = drift_law(observe(updates(0.7), spans=np.full(W + 1, 2.0)))
    assert often.scale == pytest.approx(GROWTH ** (3 * 2.0 / 15))
    seldom = drift_law(observe(updates(0.7), spans=np.full(W + 1, 50.0)))
    assert seldom.scale == pytest.approx(GROWTH)


@pytest.mark.parametrize(
    ("memory", "span", "thirds"),
    [(15, 5, 1), (20, 7, 4 / 3), (30, 10, 2), (30, 4, 0.8), (300, 99, 2)],
)
def test_a_long_memory_is_not_waited_for(memory, span, thirds):
    """As Muon's 30 steps: the rates are those of AdamW's 15, a step, of which an update has more."""
    given = {"momentum_memory": memory, "spans": np.full(W + 1, span), "step": 5000}
    steady = drift_law(observe(updates(0.7), scale=2.0, target=DRIFT_TARGET / 2, **given))
    assert steady.scale == pytest.approx(2.0 * GROWTH**thirds)


@pytest.mark.parametrize(("memory", "pace"), [(15, 1.0), (24, 1.6), (30, 2.0), (60, 2.0)])
def test_the_target_is_higher_where_updates_are_longer(memory, pace):
    """Noise adds up more slowly than drift does."""
    given = {"momentum_memory": memory, "spans": np.full(W + 1, memory / 3), "step": 5000}
    for x in (updates(0.45), updates(0.3)):  # drifts of 0.18 and 0.08
        alike = drift_law(observe(x, scale=2.0, target=pace * DRIFT_TARGET))
        longer = drift_law(observe(x, scale=2.0, **given))
        assert longer.scale / 2.0 == pytest.approx((alike.scale / 2.0) ** pace)


def test_a_window_of_a_long_memory_is_full_as_soon_as_one_of_adamw():
    given = {"momentum_memory": 30, "spans": np.full(W + 1, 5.0), "target": DRIFT_TARGET / 2}
    assert drift_law(observe(updates(0.7), step=54, **given)).scale == 1.0
    assert drift_law(observe(updates(0.7), step=55, **given)).scale == pytest.approx(GROWTH)


def test_drift_grows_the_factor_no_more_than_fourfold_in_a_window():
    scales = np.linspace(1.0, 4.9, W + 1)
    x = updates(0.7) * scales[:, None]
    decision = drift_law(observe(x, scale=4.9, scales=scales))
    assert decision.scale == pytest.approx(WINDOW_GROWTH * scales[1])
    assert drift_law(observe(x, scale=8.0, scales=scales)).scale == 8.0
    # with a memory twice as long it covers twice the steps
    given = {"momentum_memory": 30, "spans": np.full(W + 1, 10.0), "step": 200}
    twice = drift_law(observe(x, scale=10.5, scales=scales, **given))
    assert twice.scale == pytest.approx(2 * WINDOW_GROWTH * scales[1])


def test_coherent_motion_grows_faster_and_before_the_window_is_full():
    x = updates(6.0)
    seen = drift(x[1:] @ x[1:].T, np.full(W, SPAN), 15)
    last = newest(x @ x.T, np.full(W + 1, SPAN), 15)
    coherence = min(seen.mean - seen.doubt, last.persistence, last.alignment)
    assert coherence > 0.9
    decision = drift_law(observe(x))
    assert decision.scale == pytest.approx(0.5 + coherence)
    assert "coherent" in decision.why
    assert drift_law(observe(updates(6.0, n=4))).scale > 1.3
    assert drift_law(observe(updates(6.0, n=3))).scale == 1.0
    # closer together: the first and the last have to begin a third of the memory apart
    assert drift_law(observe(updates(6.0, n=4), spans=np.full(4, 2.0), step=8)).scale > 1.0
    assert drift_law(observe(updates(6.0, n=4), spans=np.full(4, 1.5), step=6)).scale == 1.0
    # with a pull, too
    assert drift_law(observe(updates(6.0, n=4), pull=0.1)).scale > 1.3


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("wider", [1, 1.5])
def test_what_momentum_alone_makes_alike_is_no_drift(beta, wider):
    """Steps of an exponential average of noise, at the first snapshots and at some farther apart."""
    memory, fewest, least = round(1.5 / (1 - beta)), FEWEST, SOONEST
    span = round(wider * interval_for(memory, step=0))
    random = np.random.default_rng(0)
    average = random.normal(size=20_000) * np.sqrt((1 - beta) / (1 + beta))
    x = np.zeros((fewest, average.size))
    for step in range(fewest * span):
        average = beta * average + (1 - beta) * random.normal(size=average.size)
        x[step // span] += average
    spans = np.full(fewest, float(span))
    assert drift(x @ x.T, spans, memory) is None
    # what is left is about what passes for forgotten, e^-1.5, and a little for the width of the updates
    seen = drift(x @ x.T, spans, memory, least)
    cosine = x[0] @ x[-1] / (np.linalg.norm(x[0]) * np.linalg.norm(x[-1]))
    assert cosine > 0.4
    assert abs(seen.mean) < EARLY
    assert abs(newest(x @ x.T, spans, memory, least).persistence) < EARLY
    # opposite ways stay opposite
    opposite = np.outer(steps := np.linspace(1, -1, 4), steps)
    assert drift(opposite, np.full(4, float(span)), memory, least).mean == pytest.approx(-1.0)
    constant, spans = np.ones((4, 4)), np.full(4, float(span))
    assert drift(constant, spans, memory, least).mean == pytest.approx(1.0)
    # beyond the memory nothing is taken off
    far = np.full(fewest, float(memory))
    assert drift(x @ x.T, far, memory, least) == drift(x @ x.T, far, memory)


def test_newest_equals_its_definition():
    x, spans = updates(0.5), np.full(W + 1, SPAN)
    seen = newest(x @ x.T, spans, 15)
    lengths = np.linalg.norm(x, axis=1)
    assert seen.growth == pytest.approx(lengths[-1] / np.median(lengths[:-1]))
    cosines = x[:-3] @ x[-1] / (lengths[:-3] * lengths[-1])
    assert seen.persistence == pytest.approx(cosines.mean())
    rest = x[:-1].sum(0)
    assert seen.alignment == pytest.approx(x[-1] @ rest / (lengths[-1] * np.linalg.norm(rest)))


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
    decision = drift_law(observe(updates(0.7, n=W)))
    assert decision.scale == 1.0
    assert "filling" in decision.why


def test_warming_up_does_not_grow_but_may_shrink():
    lrs = np.linspace(1e-4, 1e-3, W + 1)
    x = updates(2.0) * lrs[:, None]
    decision = drift_law(observe(x, lrs=lrs))
    assert decision.scale == 1.0
    assert "warms up" in decision.why
    assert drift_law(observe(updates(0.0) * lrs[:, None], lrs=lrs, scale=4.0)).scale < 4.0


def test_a_warm_up_is_over_once_momentum_has_forgotten_it():
    # four updates of 5 steps at the peak; momentum remembers 15, so three begin where the first one ends
    lrs = np.concatenate((np.linspace(1e-4, 1e-3, W - 2)[:-1], np.full(4, 1e-3)))
    x = updates(2.0) * lrs[:, None]
    assert drift_law(observe(x, lrs=lrs)).scale > 1
    early = lrs.copy()
    early[-4] *= 0.95
    assert "warms up" in drift_law(observe(x, lrs=early)).why
    assert "warms up" in drift_law(observe(x, lrs=lrs, momentum_memory=30)).why
    # spans that do not add up to the memory: the whole window counts
    assert "warms up" in drift_law(observe(x, lrs=lrs, spans=np.ones(W + 1), momentum_memory=9)).why


def test_after_a_warm_up_the_factor_leaves_1_only_with_more_drift():
    """Who takes that care has chosen the learning rate with some."""
    lrs = np.linspace(1e-4, 1e-3, W + 1)
    x, more = updates(0.45), updates(0.7)
    assert not drift_law(observe(x)).memory["warmed_up"]
    warming = drift_law(observe(x * lrs[:, None], lrs=lrs))
    memory = drift_law(observe(x, memory=warming.memory)).memory
    for seen, leaves in ((x, False), (more, True)):
        alone = drift_law(observe(seen)).scale
        assert alone > 1
        assert drift_law(observe(seen, memory=memory)).scale == (alone if leaves else 1.0)
    # once it has left, nothing else is asked for
    higher = {"scale": 1.5, "scales": np.full(W + 1, 1.5)}
    alone = drift_law(observe(x, **higher)).scale
    assert drift_law(observe(x, memory=memory, **higher)).scale == alone > 1.5


@pytest.mark.parametrize(("down", "grows"), [(0.8, True), (0.7, False)])
def test_a_schedule_that_comes_down_has_its_way(down, grows):
    memory = {"highest_lr": 1e-3 / down}
    assert (drift_law(observe(updates(0.7), memory=memory)).scale > 1) == grows
    # until it is half way down a factor may still come down with it
    assert drift_law(observe(updates(0.0), scale=8.0, memory=memory)).scale < 8.0


def test_losses_from_before_the_first_decision_tell_how_well_it_does():
    """With a learning rate that is right most is gained before there are updates enough."""
    early = observe(updates(2.0)[:FEWEST], step=8, loss=0.67)
    assert drift_law(early).scale > 1
    fell = drift_law(replace(early, earlier_losses=(0.97, 0.95, 0.7)))
    assert fell.scale == 1
    assert "falls well" in fell.why
    # at the pace of a quarter in a dozen snapshots, as far as the few there are can tell
    slow, fast = (0.7, 0.7, 0.675), (0.74, 0.72, 0.7)
    assert drift_law(replace(early, earlier_losses=slow)).scale > 1
    assert drift_law(replace(early, earlier_losses=fast)).scale == 1
    spoilt = drift_law(replace(early, earlier_losses=(np.nan, 0.97, 0.95, np.inf, 0.7)))
    assert spoilt.memory == fell.memory
    # where it stands is seen from here, since the first steps of a run are no plateau
    assert fell.memory["trend"]["means"] == fell.memory["trend"]["recent"] == [0.67]


def test_losses_that_the_law_was_not_asked_about_later_are_among_the_last():
    begun = Trend().recalling([0.9, 0.8]).after(0.7)
    assert (begun.earlier, begun.recent) == ((0.9, 0.8), (0.7,))
    missed = begun.recalling([0.6, 0.5]).after(0.4)
    assert (missed.earlier, missed.recent) == ((0.9, 0.8), (0.7, 0.6, 0.5, 0.4))
    assert Trend.from_memory(plain(missed.to_memory())) == missed


def test_cooling_down_holds_whatever_is_seen():
    for x in (updates(2.0), updates(0.0)):
        decision = drift_law(observe(x, scale=4.0, memory={"highest_lr": 3e-3}))
        assert decision.scale == 4.0
        assert "cools down" in decision.why
        assert decision.memory == {"highest_lr": 3e-3, "push": 0.0, "rest": 0, "straight": 0}


def test_a_peak_before_the_first_step_seen_counts_but_not_in_a_warm_up():
    x = updates(2.0)
    assert drift_law(observe(x)).scale > 1
    assert drift_law(observe(x, peak_lr=1.3e-3)).scale > 1
    decision = drift_law(observe(x, peak_lr=3e-3))
    assert decision.scale == 1.0
    assert "cools down" in decision.why
    # the peak is not kept: the schedule may never reach it
    assert decision.memory == {"highest_lr": 1e-3, "push": 0.0, "rest": 1, "straight": 0}

    lrs = np.linspace(1e-5, 1e-4, W + 1)
    warming = {"lrs": lrs, "peak_lr": 1e-3, "scale": 4.0}
    assert "warms up" in drift_law(observe(x * lrs[:, None], **warming)).why
    assert drift_law(observe(updates(0.0) * lrs[:, None], **warming)).scale < 4.0


def test_a_turning_spectrum_vetoes_growth():
    # a weak common direction, seen clearly over many parameters, in updates whose size jumps
    x = updates(1.0) * np.where(np.arange(W + 1) % 2, 0.7, 1.3)[:, None]
    decision = drift_law(observe(x))
    assert 2 < adiabaticity(x @ x.T) < 3
    assert decision.scale == 1.0
    assert "turns" in decision.why


def test_the_schedule_is_not_read_as_a_change_of_the_spectrum():
    """Updates that shrink with the schedule alone give the decision of updates that do not."""
    lrs = np.linspace(1e-3, 8e-4, W + 1)
    x = updates(2.0)
    scheduled = drift_law(observe(x * lrs[:, None], lrs=lrs))
    constant = drift_law(observe(x))
    assert scheduled.scale == pytest.approx(constant.scale)


def spike():
    """Coherent updates, and a newest one ten times as long that goes elsewhere."""
    x = updates(2.0)
    x[-1] = 10 * np.random.default_rng(5).normal(size=P)
    return x


def test_a_spike_takes_the_factor_to_its_root_and_caps_it():
    scales = np.linspace(4.0, 9.0, W + 1)
    jumped = drift_law(observe(spike(), scale=9.0, scales=np.full(W + 1, 9.0)))
    assert jumped.scale == 3.0
    assert "jump and turn" in jumped.why
    assert jumped.memory["spikes"] == 1
    # of the largest factor in the window, wherever it is by now
    shrunk = drift_law(observe(spike() * scales[:, None], scale=5.0, scales=scales))
    assert shrunk.scale == 3.0
    # while it stays in the window it is the same spike
    same = drift_law(observe(spike(), scale=3.0, memory=jumped.memory, step=105))
    assert same.memory["spikes"] == 1
    assert same.scale <= 3.0 * (1 + RECOVERY / 2) ** 2
    # afterwards the factor stays below a ceiling that rises slowly, more slowly after each spike
    again = drift_law(observe(updates(6.0), scale=3.0, memory=jumped.memory, step=200))
    assert again.scale == pytest.approx(3.0 * (1 + RECOVERY / 2))
    # a small factor is halved
    second = drift_law(observe(spike(), scale=3.0, memory=jumped.memory, step=200))
    assert (second.memory["spikes"], second.scale) == (2, 1.5)
    third = drift_law(observe(updates(6.0), scale=1.5, memory=second.memory, step=300))
    assert third.scale == pytest.approx(1.5 * (1 + RECOVERY / 4))


def test_a_jump_without_a_factor_is_the_runs_own():
    decision = drift_law(observe(spike()))
    assert decision.memory["spikes"] == 0
    assert decision.memory["ceiling"] == 64.0


def test_longer_updates_in_the_same_direction_are_no_spike():
    x = updates(6.0) * (1.6 ** np.arange(W + 1))[:, None]
    decision = drift_law(observe(x, scale=4.0))
    assert decision.memory["spikes"] == 0
    assert decision.scale >= 4.0


def test_a_step_moves_the_weights_by_a_share_of_their_norm_at_most():
    x = updates(2.0)
    step = np.linalg.norm(x[-1]) / SPAN
    free = drift_law(observe(x, scale=2.0, weight_norm=100 * step))
    assert free.scale > 2.0
    held = drift_law(observe(x, scale=2.0, weight_norm=1.05 * step / STRIDE))
    assert held.scale == pytest.approx(2.1)
    taken_down = drift_law(observe(x, scale=2.0, weight_norm=0.75 * step / STRIDE))
    assert taken_down.scale == pytest.approx(1.5)
    assert "as large as the weights allow" in taken_down.why


def test_a_step_may_be_longer_while_nothing_was_gained():
    """A small initialization: its step is a large share of the norm, and the loss has not moved."""
    x = updates(2.0)
    step = np.linalg.norm(x[-1]) / SPAN
    weights = {"weight_norm": 1.05 * step / FIRST_STRIDE, "loss": 0.5}
    unmoved = drift_law(observe(x, scale=2.0, memory=trend(*[0.5] * 20), **weights))
    assert unmoved.scale == pytest.approx(2.1)
    assert "as large as the weights allow" in unmoved.why
    fallen = trend(*np.linspace(0.6, 0.5, 20))
    moved = drift_law(observe(x, scale=2.0, memory=fallen, **weights))
    assert moved.scale == pytest.approx(2.1 * STRIDE / FIRST_STRIDE)
    # but not where it is noise that moves them
    noise = updates(0.0)
    step = np.linalg.norm(noise[-1]) / SPAN
    weights = {"weight_norm": 0.75 * step / STRIDE, "loss": 0.5}
    wandering = drift_law(observe(noise, scale=2.0, memory=trend(*[0.5] * 20), **weights))
    assert wandering.scale == pytest.approx(1.5)


def trend(*losses):
    seen = Trend()
    for loss in losses:
        seen = seen.after(loss)
    return {"trend": seen.to_memory()}


def trial(*losses, **more):
    """The memory of a trial for which the weights were kept after these losses."""
    kept = Trend.from_memory(trend(*losses)["trend"]) if losses else None
    return {"trial": Trial(kept=kept, **more).to_memory()}


NOISE = 0.002 * np.random.default_rng(3).normal(size=200)


def test_a_loss_that_stands_still_lets_noise_grow():
    """What a plateau looks like under mini-batch noise: no drift to be seen, and no progress."""
    # it fell a little in the beginning, so that there is something to lose
    flat = trend(*np.linspace(2.42, 2.3, 150), *(2.3 + NOISE))
    decision = drift_law(observe(updates(0.0), loss=2.3, memory=flat))
    assert decision.scale == pytest.approx(PROBING)
    assert "stands still" in decision.why
    far = drift_law(observe(updates(0.0), loss=2.3, memory=flat, scale=FAR - 1))
    assert far.scale == pytest.approx(FAR)
    further = {**flat, **trial(near=NEAR + 1)}
    on = drift_law(observe(updates(0.0), loss=2.3, memory=further, scale=FAR))
    assert on.scale == pytest.approx(FAR * PROBING)
    # 6 % below where the run began it may be the end of one that does well
    left = trend(*np.linspace(2.5, 2.3, 150), *(2.3 + NOISE))
    assert Trend.from_memory(left["trend"]).flat
    assert drift_law(observe(updates(0.0), loss=2.3, memory=left, scale=8.0)).scale < 8.0
    # what is no longer logged counts no longer
    assert drift_law(observe(updates(0.0), memory=flat)).scale <= 1
    # not in a warm-up, nor when the schedule cools down
    lrs = np.linspace(1e-4, 1e-3, W + 1)
    warming = observe(updates(0.0) * lrs[:, None], lrs=lrs, loss=2.3, memory=flat)
    assert drift_law(warming).scale == 1.0
    cooling = {**flat, "highest_lr": 3e-3}
    assert drift_law(observe(updates(0.0), loss=2.3, memory=cooling)).scale == 1.0


def decide_at_rest(scale=64.0, *, still=0.0, kept=True, **more):
    """The decision on a plateau, where weights were kept 100 snapshots ago."""
    begun = trial(*(0.69 + NOISE[:100]), still=still)
    described = {
        "updates": updates(0.0),
        "loss": 0.69,
        "memory": {**trend(*(0.69 + NOISE)), **begun},
    }
    return drift_law(observe(**{**described, "scale": scale, "kept": kept, **more}))


def test_where_nothing_comes_of_a_factor_the_weights_go_back():
    enough = STILL * 64.0
    assert not decide_at_rest(still=enough - 64.0).back
    seen = decide_at_rest(still=enough, push=1.5)
    assert (seen.scale, seen.back, seen.keep) == (AGAIN * 64.0, True, True)
    assert "nothing comes of it, back" in seen.why
    begun = trend(*(0.69 + NOISE[:100]))["trend"]
    assert seen.memory["trial"] == Trial(kept=Trend.from_memory(begun)).to_memory()
    # it stays below that for a while
    assert (seen.memory["ceiling"], seen.memory["spikes"], seen.memory["push"]) == (16.0, 1, 0.0)
    later = drift_law(observe(updates(6.0), scale=16.0, loss=0.69, memory=seen.memory))
    assert later.scale == pytest.approx(16.0 * (1 + RECOVERY / 2))
    # from a plateau a factor that is hardly one is given up, and the copy with it
    least = SMALL / AGAIN
    assert decide_at_rest(least, still=enough).scale == SMALL
    given_up = decide_at_rest(least - 1, still=enough)
    assert (given_up.scale, given_up.back, given_up.keep) == (1.0, True, False)
    assert given_up.memory["trial"]["kept"] is None


@pytest.mark.parametrize(
    ("largest", "fell", "back"), [(SMALL, 0.03, True), (4.9, 0.03, False), (SMALL, 0.1, False)]
)
def test_a_trial_that_ends_on_the_first_plateau_is_undone(largest, fell, back):
    """Weights that a large factor has spoilt would be all that is left of it."""
    level = (1 - fell) * 2.0
    memory = trend(*(2.0 + NOISE), *(level + NOISE[:100]))
    begun = trial(*(2.0 + NOISE[:100]), largest=largest)
    ending = observe(updates(0.0), scale=1.02, loss=level, kept=True, memory=memory | begun)
    decision = drift_law(ending)
    assert decision.scale <= 1
    assert decision.back == back
    assert not drift_law(replace(ending, scale=2.0)).back


def test_the_loss_goes_back_with_the_weights():
    begun, now = trend(*(0.69 + NOISE[:100])), trend(*(0.69 + NOISE), 0.69)
    assert decide_at_rest(still=STILL * 64.0).memory["trend"] == begun["trend"]
    alone = decide_at_rest(still=STILL * 64.0, kept=False)
    assert (alone.scale, alone.memory["trend"]) == (16.0, now["trend"])


def test_where_the_loss_is_above_that_of_the_weights_kept_they_go_back():
    begun = trial(*(2.0 + NOISE[:20]))

    def decide(level, scale=8.0, **more):
        memory = {**trend(*(2.0 + NOISE[:20]), *(level + NOISE[:5])), **begun, "longest": 3.0}
        return drift_law(observe(updates(0.4), scale=scale, loss=level, memory=memory, **more))

    assert not decide(2.1).back
    spoilt = decide(2.2)
    # the weights kept may be spoilt themselves, and the factor is less than is tried on a plateau
    assert (spoilt.scale, spoilt.back, spoilt.keep) == (2.0, True, False)
    assert "above that of the weights kept, back" in spoilt.why
    assert spoilt.memory["trial"] == Trial().to_memory()
    small = decide(2.2, scale=4.0)
    assert (small.scale, small.back) == (pytest.approx(4.0 * RETREAT), False)
    # what no factor did is the run's own, but one that was taken off a moment ago
    assert not decide(2.2, scale=1.0).back
    begun = trial(*(2.0 + NOISE[:20]), largest=SMALL)
    assert decide(2.2, scale=1.0, scales=np.linspace(SMALL, 1.0, W + 1)).back


def test_a_jump_ends_a_trial_but_for_the_first_one_off_a_saddle():
    jumped = decide_at_rest(updates=spike())
    assert (jumped.scale, jumped.back) == (16.0, True)
    unmoved, begun = trend(*(0.69 + NOISE)), trial(*(0.69 + NOISE[:100]))

    def leaving(longest, memory):
        return decide_at_rest(updates=spike(), memory={**unmoved, **memory, "longest": longest})

    assert leaving(0.99 * LEAVING, begun).back
    off = leaving(LEAVING, begun)
    assert (off.scale, off.back) == (8.0, False)
    assert "jump and turn" in off.why
    assert leaving(LEAVING, {**begun, "spikes": 1}).back
    # without a loss nobody knows what came of it
    assert not decide_at_rest(updates=spike(), loss=None, memory={}).back
    # nor is there a reason where it has fallen
    gained = {**trend(*(0.69 + NOISE), *(0.6 + NOISE[:12])), **begun}
    assert not decide_at_rest(updates=spike(), loss=0.6, memory=gained).back


def test_a_saddle_that_is_left_shows_before_the_jump_has_left_the_window():
    """Otherwise it was none, and what the largest factor made of the weights would stay."""
    flat, begun = trend(*(0.69 + NOISE)), trial(*(0.69 + NOISE[:100]))
    off = decide_at_rest(updates=spike(), memory={**flat, **begun, "longest": LEAVING})
    known = int(off.memory["known_until"])

    def after(step, memory, **more):
        return decide_at_rest(8.0, memory=memory, step=step, **more)

    assert not after(known - 1, off.memory).back
    over = after(known, off.memory)
    # nothing smaller has been tried from these weights
    assert (over.scale, over.back, over.memory["doubted"]) == (AGAIN * 64.0, True, False)
    # above what they had it was harm, and a factor as it is goes down
    risen = {**off.memory, **trend(*(0.69 + NOISE), *(0.8 + NOISE[:12]))}
    assert (after(known, risen, loss=0.8).scale, after(known, risen, loss=0.8).back) == (2.0, True)
    # a loss that has fallen meanwhile is the saddle's, also if it stands still on the next one
    fallen = {**off.memory, **trend(*(0.69 + NOISE), *(0.6 + NOISE[:12]))}
    left = after(known - 1, fallen, loss=0.6)
    assert not left.memory["doubted"]
    assert not after(known, {**left.memory, **flat}).back
    # nor is a later factor to blame for the jump of one that is gone
    gone = decide_at_rest(1.0, memory=off.memory, step=known)
    assert not decide_at_rest(memory={**gone.memory, **begun}, step=known + 60).back


def test_weights_are_kept_where_the_factor_leaves_1_and_then_where_it_did_good():
    first = drift_law(observe(updates(0.7), loss=2.0, memory=trend(2.1)))
    assert first.keep
    begun = Trial.from_memory(first.memory["trial"])
    assert (begun.kept, begun.age) == (Trend.from_memory(trend(2.1, 2.0)["trend"]), 0)
    assert not drift_law(observe(updates(0.0))).keep

    def decide(level, age, **more):
        memory = {**trend(*(2.0 + NOISE[:20]), *(level + NOISE[:12])), "longest": 3.0}
        memory |= trial(*(2.0 + NOISE[:20]), age=age)
        return drift_law(observe(updates(0.7), scale=2.0, loss=level, memory=memory, **more))

    assert [decide(1.8, age).keep for age in (W // 2 - 1, W // 2)] == [False, True]
    assert decide(1.8, W).memory["trial"]["age"] == 0
    assert not decide(2.0, W).keep
    assert decide(2.0, W).memory["trial"]["age"] == W + 1
    # where the loss is not known, as long as updates do not lengthen
    longer = updates(0.7)
    longer[-1] *= 1.1 * LENGTHENING
    old = trial(age=W)
    assert drift_law(observe(updates(0.7), scale=2.0, memory=old)).keep
    assert not drift_law(observe(longer, scale=2.0, memory=old)).keep


def test_steps_that_lengthen_off_a_saddle_leave_room_until_they_are_seen():
    """Nothing bounds the steps of SGD: what a snapshot shows is late by an interval and by momentum."""
    unmoved = trend(*(2.6 + NOISE[:40]))

    def decide(growth, **more):
        x = np.ones((W + 1, 1)) * updates(0.0, 1)
        x *= growth ** np.arange(W + 1)[:, None]
        # a step without regard to what comes may move the weights by half of their norm
        norm = np.linalg.norm(x[-1]) / SPAN / more.pop("share")
        described = {"loss": 2.6, "memory": unmoved, "weight_norm": norm, "scale": 8.0}
        return drift_law(observe(x, **{**described, **more})).scale / 8.0

    # steps that keep their length may grow to a tenth of the norm each, half of it an update
    lengthened = {**unmoved, "longest": 1.2}
    assert decide(1.0, share=0.09, memory=lengthened) == pytest.approx(1 / 0.9)
    assert decide(1.0, share=0.2, memory=lengthened) == pytest.approx(0.5)
    # where they do not lengthen at all the optimizer bounds them, and there is more room
    assert decide(1.0, share=0.2) > 1
    # those that lengthen are too long four updates later
    assert decide(1.2, share=0.04) == pytest.approx(0.1 / 0.04 / 1.2**4)
    assert decide(1.6, share=0.04) == 0.5
    # a snapshot at every step is not late
    every_step = {"spans": np.ones(W + 1), "interval": 1, "momentum_memory": 2}
    assert decide(1.2, share=0.01, **every_step) > 1
    # nor is there a first plateau once the loss has moved
    moved = trend(*np.linspace(2.6, 2.0, 40))
    assert decide(1.2, share=0.12, loss=2.0, memory=moved) >= 1
    # who logs no loss is careful all along
    assert decide(1.2, share=0.06, loss=None, memory={}) == pytest.approx(0.1 / 0.06 / 1.2**4)


def test_sgd_survives_the_end_of_a_deep_saddle():
    """Without room for steps that lengthen eleven of twelve such runs ended in NaN."""
    for seed in range(4):
        torch.manual_seed(seed)
        target = torch.randn(16, 2) @ torch.randn(2, 16)
        factors = [torch.nn.Parameter(0.03 * torch.randn(16, 16)) for _ in range(3)]
        optimizer = GapAware(torch.optim.SGD(factors, lr=0.1, momentum=0.9))
        losses = []
        for _ in range(400):
            optimizer.zero_grad()
            loss = (torch.linalg.multi_dot(factors) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.log(loss=loss)
            losses.append(loss.item())
        assert max(record["scale"] for record in optimizer.history) > 4
        assert losses[-1] < 0.1 * losses[0]


def test_under_a_pull_little_drift_takes_nothing_away():
    """Fine-tuning follows the balance of gradient and pull, where drift ends and learning does not."""
    assert drift_law(observe(updates(0.0), scale=8.0)).scale < 8.0
    held = drift_law(observe(updates(0.0), scale=8.0, pull=0.005))
    assert held.scale == 8.0
    assert "under the pull" in held.why
    # a loss that rises does, as ever
    rising = trend(*np.linspace(0.5, 0.9, 30))
    assert (
        drift_law(observe(updates(0.0), scale=8.0, pull=0.005, loss=0.9, memory=rising)).scale < 8.0
    )


def test_as_long_as_nothing_was_gained_the_factor_leaps():
    """Parity: a loss at log 2 from the first step on, and updates that show nothing."""
    unmoved = trend(*(0.69 + NOISE))
    decision = drift_law(observe(updates(0.0), loss=0.69, memory=unmoved))
    assert decision.scale == pytest.approx(LEAP)
    assert "nothing gained yet" in decision.why
    # it need not wait for a window, but for a loss that is known
    filling = observe(updates(0.0)[:8], loss=0.69, memory=unmoved, step=30)
    assert drift_law(filling).scale == pytest.approx(LEAP)
    unknown = observe(updates(0.0)[:8], loss=0.69, memory=trend(*(0.69 + NOISE[:10])), step=30)
    assert drift_law(unknown).scale == 1.0
    pulled = observe(updates(0.0), loss=0.69, memory=unmoved, pull=0.01)
    assert drift_law(pulled).scale == 1.0
    # that the loss stands still is not enough to go further
    for scale, reached in ((10.0, FAR), (FAR, FAR), (40.0, 40.0)):
        far = drift_law(observe(updates(0.0), loss=0.69, memory=unmoved, scale=scale))
        assert far.scale == pytest.approx(reached)
    # but that nothing came of it there for a while
    for near, scale, reached in ((NEAR - 1, FAR, FAR), (NEAR, FAR, 32.0), (NEAR + 1, 40.0, 64.0)):
        tried = {**unmoved, **trial(near=near)}
        far = drift_law(observe(updates(0.0), loss=0.69, memory=tried, scale=scale))
        assert far.scale == pytest.approx(reached)
    # a little above the plateau it stays, and shrinks neither for noise nor for the rise
    lifted = trend(*(0.69 + NOISE), *np.linspace(0.69, 0.72, 12))
    held = drift_law(observe(updates(0.0), scale=16.0, loss=0.72, memory=lifted))
    assert held.scale == 16.0


def test_coherent_motion_leaps_where_little_can_be_lost():
    """A small learning rate: all updates go one way, and the loss has hardly fallen."""
    begun, fallen = trend(*np.linspace(3.7, 3.2, 8)), trend(*np.linspace(3.7, 3.0, 8))

    def scale(x, memory, **more):
        loss = memory["trend"]["recent"][-1]
        return drift_law(observe(x, loss=loss, memory=memory, step=40, **more)).scale

    certain = updates(2.0)[:8]
    assert scale(certain, begun) == pytest.approx(COHERENT_LEAP)
    assert 1.3 <= scale(certain, fallen) < 1.5
    assert 1.3 <= scale(certain, begun, pull=0.01) < 1.5
    lengthening = certain * np.linspace(1.0, 1.5, 8)[:, None]
    assert 1.3 <= scale(lengthening, begun) < 1.5
    # cosines of 1/2 and of 0.6 and the doubt about them: by less
    assert scale(updates(1.15)[:8], begun) < COHERENT_LEAP
    # without the loss nobody knows that little can be lost
    assert 1.3 <= drift_law(observe(certain, step=40)).scale < 1.5


def test_under_a_pull_coherent_motion_leaps_once_the_schedule_comes_down():
    """A short fine-tuning run at a small learning rate is a quarter over before its window is full."""
    begun, fallen = trend(*np.linspace(3.7, 3.2, 8)), trend(*np.linspace(3.7, 3.0, 8))
    certain, coming_down = updates(2.0)[:8], np.linspace(1e-3, 7e-4, 8)

    def decide(x, memory, **more):
        loss = memory["trend"]["recent"][-1]
        described = {"lrs": coming_down, "pull": 0.01, "step": 40, **more}
        as_long = x * described["lrs"][:, None]  # for their learning rate
        return drift_law(observe(as_long, loss=loss, memory=memory, **described))

    assert decide(certain, begun).scale == pytest.approx(COHERENT_LEAP)
    # where something can be lost as fast as before it came down, and not for steady drift
    assert 1.3 <= decide(certain, fallen).scale < 1.5
    held = decide(updates(0.8)[:8], begun)
    assert (held.scale, "comes down" in held.why) == (1.0, True)
    # neither once it is below half, nor without a pull, where it is the user's way to end a run
    for more in ({"lrs": np.linspace(1e-3, 4e-4, 8)}, {"pull": 0.0}):
        assert decide(certain, begun, **more).scale == 1.0


def test_steady_drift_need_not_wait_for_a_window_where_little_can_be_lost():
    begun, fallen = trend(*np.linspace(3.7, 3.2, 8)), trend(*np.linspace(3.7, 3.0, 8))

    def decide(x, memory, **more):
        loss = memory["trend"]["recent"][-1]
        return drift_law(observe(x, loss=loss, memory=memory, step=40, **more))

    steady = updates(0.8)[:8]
    assert decide(steady, begun).scale == pytest.approx(GROWTH)
    assert "steady drift" in decide(steady, begun).why
    assert decide(steady, fallen).scale == 1.0
    assert decide(steady, begun, pull=0.01).scale == 1.0
    assert decide(updates(0.65)[:8], begun).scale == 1.0  # a drift of 0.3
    assert decide(steady * np.linspace(1.0, 1.5, 8)[:, None], begun).scale == 1.0
    # three pairs at least, since one has no doubt: of eight updates two steps apart the last and the first
    spans = np.full(9, 15 / 8)
    assert decide(updates(0.8, n=9), begun, spans=spans).scale == 1.0
    assert decide(updates(0.8, n=10), begun, spans=np.full(10, 15 / 8)).scale > 1.0
    # nor below a target that is higher; without any it does not shrink yet
    assert decide(steady, begun, target=0.5, scale=2.0).scale == 2.0
    assert decide(updates(0.0)[:8], begun, scale=2.0).scale == 2.0


def test_close_snapshots_at_first_and_no_drift_from_a_window_that_spans_too_little():
    early = observe(updates(0.5), spans=np.full(W + 1, 2.0), step=22)
    assert drift_law(early).interval == 2
    assert drift_law(early).scale == 1.0
    later = observe(updates(0.5), spans=np.full(W + 1, 2.0), step=60)
    assert drift_law(later).interval == 5
    assert drift_law(later).scale > 1.0


def test_snapshots_are_further_apart_where_nothing_has_happened_for_long():
    calm = observe(updates(0.0))

    def interval(observation, rest):
        return drift_law(replace(observation, memory={"rest": rest})).interval

    assert [interval(calm, rest) for rest in (0, REST * W - 1, REST * W)] == [5, 5, 10]
    assert drift_law(calm).memory["rest"] == 1
    muon = replace(calm, momentum_memory=30, spans=np.full(W + 1, 10.0), step=1000)
    assert interval(muon, REST * W) == 20
    # not where f is raised or grows, nor while it comes down, nor in a warm-up
    warming = replace(calm, lrs=np.linspace(1e-4, 1e-3, W + 1))
    for other in (
        replace(calm, scale=2.0),
        observe(updates(0.7)),
        replace(calm, min_scale=0.1),
        warming,
    ):
        assert interval(other, 1000) == 5
        assert drift_law(replace(other, memory={"rest": 1000})).memory["rest"] == 0
    # and it counts from the first snapshot on, while the window fills
    assert drift_law(observe(updates(0.0)[:3])).memory["rest"] == 1


def test_where_the_loss_falls_well_the_factor_does_not_grow():
    """By a quarter in a dozen snapshots, whatever else is seen."""
    little, well = trend(*np.linspace(3.0, 2.2, 12)), trend(*np.linspace(3.0, 1.8, 12))
    for x in (updates(0.7), updates(2.0)):
        assert drift_law(observe(x, scale=2.0, loss=2.2, memory=little)).scale > 2.0
        held = drift_law(observe(x, scale=8.0, loss=1.8, memory=well))
        assert (held.scale, "falls well" in held.why) == (8.0, True)
    # what is taken away is taken all the same
    step = np.linalg.norm(updates(2.0)[-1]) / SPAN
    less = observe(updates(2.0), scale=8.0, loss=1.8, memory=well, weight_norm=0.75 * step / STRIDE)
    assert drift_law(less).scale == pytest.approx(6.0)


def test_where_the_loss_falls_well_a_small_factor_shrinks():
    """It is hardly what makes it fall, and may be older than the first losses."""
    well = trend(*np.linspace(3.0, 1.8, 12))
    none, some = np.zeros((W + 1, W + 1)), np.eye(W + 1)
    for x, decay_gram in itertools.product(
        (updates(0.0), updates(0.7), updates(2.0)), (None, some)
    ):
        small = observe(x, scale=2.0, loss=1.8, memory=well, decay_gram=decay_gram)
        shrunk = drift_law(small)
        assert shrunk.scale == pytest.approx(2.0 * SHRINKAGE)
        assert "falls well without it, shrink" in shrunk.why
        assert drift_law(replace(small, scale=SMALL)).scale == SMALL
        # the learning rate that was chosen is left alone
        assert drift_law(replace(small, scale=1.0, min_scale=0.1)).scale == 1.0
    # while the window fills, too
    few = observe(updates(2.0)[:FEWEST], scale=2.0, step=8, loss=0.67)
    assert drift_law(replace(few, earlier_losses=(0.97, 0.95, 0.7))).scale < 2.0
    # where nothing takes weights back the way down has rules of its own
    bare = observe(updates(2.0), scale=2.0, loss=1.8, memory=well, decay_gram=none)
    assert drift_law(bare).scale == 2.0


def test_under_a_pull_the_loss_may_fall_well_and_a_factor_grow():
    """It falls well from the first step on, with a learning rate that is too small for the pull, too."""
    well = trend(*np.linspace(3.0, 1.8, 12))
    pulled = observe(updates(2.0), scale=2.0, loss=1.8, memory=well, pull=0.01)
    assert drift_law(pulled).scale > 2.0
    assert drift_law(replace(pulled, pull=0.0)).scale < 2.0
    # nor does one shrink without drift
    assert (
        drift_law(observe(updates(0.0), scale=2.0, loss=1.8, memory=well, pull=0.01)).scale == 2.0
    )


def test_a_loss_that_had_fallen_and_came_back_is_not_the_first_plateau():
    back = Trend.from_memory(trend(*(2.0 + NOISE), *(1.0 + NOISE), *(2.0 + NOISE[:20]))["trend"])
    assert not back.unmoved
    assert not back.lifted


def test_a_plateau_that_came_soon_is_not_the_first_one():
    soon = Trend.from_memory(trend(*np.linspace(2.6, 2.3, 10), *(2.3 + NOISE))["trend"])
    assert soon.flat
    assert not soon.unmoved
    assert not soon.lifted


def test_a_loss_that_falls_keeps_a_factor_from_shrinking():
    falling = trend(*(2.3 * 0.97 ** np.arange(40)))
    decision = drift_law(observe(updates(0.0), scale=8.0, loss=0.66, memory=falling))
    assert decision.scale == 8.0
    assert "the loss falls" in decision.why


def test_a_loss_that_falls_fast_takes_a_factor_down_where_nothing_takes_weights_back():
    moving, falling = updates(2.0), trend(*(2.3 * 0.85 ** np.arange(40)))
    none, some = np.zeros((W + 1, W + 1)), np.eye(W + 1)
    loss = 2.3 * 0.85**40
    assert drift_law(observe(moving, scale=8.0)).scale > 8
    down = drift_law(observe(moving, scale=8.0, loss=loss, memory=falling, decay_gram=none))
    assert down.scale == pytest.approx(8.0 * BRAKE)
    assert "falls fast, back" in down.why
    held = drift_law(observe(moving, loss=loss, memory=falling, decay_gram=none, min_scale=0.1))
    assert held.scale == 1.0
    assert "falls fast, hold" in held.why
    for decay_gram in (some, None):
        left = drift_law(
            observe(moving, scale=8.0, loss=loss, memory=falling, decay_gram=decay_gram)
        )
        assert (left.scale, "falls well" in left.why) == (8.0, True)
    pulled = observe(moving, scale=8.0, loss=loss, memory=falling, decay_gram=none, pull=0.01)
    assert drift_law(pulled).scale > 8.0
    # by 8 % a snapshot it need not
    loss = 2.3 * 0.92**40
    gently = trend(*(2.3 * 0.92 ** np.arange(40)))
    held = drift_law(observe(moving, scale=8.0, loss=loss, memory=gently, decay_gram=none))
    assert held.scale == 8.0
    # by 2 % it may go on growing, slowly, and so where a fall may be noise
    slowly = trend(*(2.3 * 0.98 ** np.arange(40)))
    loss = 2.3 * 0.98**40
    grown = drift_law(observe(moving, scale=8.0, loss=loss, memory=slowly, decay_gram=none))
    assert grown.scale == pytest.approx(8.0 * DESCENT)
    bounded = drift_law(observe(moving, scale=8.0, loss=loss, memory=slowly, decay_gram=some))
    assert bounded.scale > 8.0 * GROWTH
    # nor is it slow as long as the plateau may still go on
    near = trend(*np.linspace(2.3, 2.0, 40))
    early = drift_law(observe(moving, scale=8.0, loss=2.0, memory=near, decay_gram=none))
    assert early.scale > 8.0 * GROWTH
    noisy = trend(*np.tile([2.0, 1.7], 20), 2.0)
    assert drift_law(observe(moving, scale=8.0, loss=1.7, memory=noisy, decay_gram=none)).scale > 8


def test_a_loss_that_rises_takes_a_factor_down():
    rising = trend(*(2.3 * 1.03 ** np.arange(40)))
    decision = drift_law(observe(updates(2.0), scale=8.0, loss=7.6, memory=rising))
    assert decision.scale == pytest.approx(8.0 * RETREAT)
    assert "the loss rises" in decision.why
    assert drift_law(observe(updates(2.0), scale=1.0, loss=7.6, memory=rising)).scale > 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_counted(loss):
    before = trend(2.0, 2.1)
    after = drift_law(observe(updates(0.0), loss=loss, memory=before)).memory
    assert after["trend"] == before["trend"]


def test_a_trend_is_kept_in_a_bounded_memory():
    seen = Trend()
    for step in range(100_000):
        seen = seen.after(float(step))
    assert len(seen.means) <= 64
    assert seen.recent == tuple(map(float, range(99_988, 100_000)))
    # means of equally long stretches, all of the run among them
    whole = sum(seen.means) * seen.width + seen.total
    assert whole == pytest.approx(sum(range(100_000)))
    assert len(seen.means) * seen.width + seen.count == 100_000
    assert Trend.from_memory(seen.to_memory()) == seen


def test_noise_alone_is_neither_a_rise_nor_a_fall():
    random = np.random.default_rng(0)
    said = {"falls": 0, "rises": 0}
    for _ in range(300):
        seen = Trend()
        for loss in 2.0 + 0.1 * random.normal(size=12):
            seen = seen.after(float(loss))
        said["falls"] += seen.falls
        said["rises"] += seen.rises
        assert not seen.flat
    # one and two standard errors, a tail each; the error itself is estimated
    assert said["falls"] < 75
    assert said["rises"] < 25


def pushing(x=None, *, scale=64.0, **more):
    """The decision where every update has gone the same way at the largest factor."""
    return drift_law(observe(updates(2.0) if x is None else x, scale=scale, **more))


def test_coherent_motion_at_a_large_factor_is_pushed():
    assert pushing(scale=33.0).push > 0
    first = pushing()
    assert first.scale == 64.0
    assert first.why.endswith(", and push")
    assert first.push == pytest.approx(2.0)  # an update spans a third of the memory
    # as the push grows Adam's momentum comes down
    assert first.momentum_scale == pytest.approx(64.0**MOMENTUM_EXPONENT)
    slower = pushing(spans=np.full(W + 1, 2.5))
    assert slower.push == pytest.approx(1.0)
    assert slower.momentum_scale == pytest.approx(64.0 ** (MOMENTUM_EXPONENT / 2))
    assert pushing(push=2.0).push == 2.0
    assert pushing(max_push=0.5).push == 0.5
    without = pushing(max_push=0.0)
    assert (without.push, without.momentum_scale) == (0.0, 1.0)


@pytest.mark.parametrize(
    "unlike",
    [
        {"scale": 31.0},
        # it leapt to 64 within half a window: second moments lag behind
        {"scales": np.repeat([1.0, 64.0], [6, 5])},
        {"pull": 0.1},
        {"x": updates(0.0)},
        {"x": updates(2.0) * (-1.0) ** np.arange(W + 1)[:, None]},
        # the schedule cools down
        {"lrs": np.linspace(1e-3, 4e-4, W + 1)},
        # nothing to grow
        {"scale": 1.0, "max_scale": 1.0},
    ],
)
def test_nothing_else_is_pushed(unlike):
    decision = pushing(**{"push": 2.0, **unlike})
    assert (decision.push, decision.momentum_scale) == (0.0, 1.0)


def test_a_push_stays_until_coherence_is_lost():
    some = updates(0.45)
    seen = pushing(some)
    assert seen.push == 0.0
    assert pushing(some, push=1.5).push == 1.5
    assert pushing(updates(0.35), push=1.5).push == 0.0
    assert pushing(updates(0.6)).push == 2.0


def test_a_push_takes_steps_no_further_than_the_weights_allow():
    x = updates(2.0)
    step = np.linalg.norm(x[-1]) / SPAN
    assert pushing(x, weight_norm=2.5 * step / STRIDE).push == pytest.approx(1.5)
    assert pushing(x, weight_norm=0.5 * step / STRIDE).push == 0.0
    # a push of today was not in what was seen, that of the decision before was
    unseen = pushing(x, weight_norm=1.5 * step / STRIDE, push=1.5)
    assert unseen.push == pytest.approx(0.5)
    later = pushing(x, weight_norm=step / STRIDE, push=1.5, memory=unseen.memory)
    assert later.push == pytest.approx(1.5)
    assert later.scale == 64.0
    # the push gives way before the factor does
    less = pushing(x, weight_norm=0.5 * step / STRIDE, push=1.5, memory=unseen.memory)
    assert (less.scale, less.push) == (64.0, pytest.approx(0.25))


def test_wandering_weights_are_averaged():
    """Where the factor was raised and what is left of the drift is noise."""
    wandering = drift_law(observe(updates(0.0), scale=8.0))
    assert wandering.average
    seen = observe(updates(0.3), scale=8.0)
    assert drift(seen.gram[1:, 1:], seen.spans[1:], 15).mean == pytest.approx(WANDERING, abs=0.03)
    there_and_back = updates(2.0) * (-1.0) ** np.arange(W + 1)[:, None]
    assert drift_law(observe(there_and_back, scale=8.0)).average


@pytest.mark.parametrize(
    "unlike",
    [
        {"scale": 1.0},
        {"updates": updates(0.7)},
        {"pull": 0.1},
        {"updates": updates(2.0), "scale": 64.0},  # pushed
        {"lrs": np.linspace(1e-3, 4e-4, W + 1)},  # the schedule cools down
    ],
)
def test_nothing_else_is_averaged(unlike):
    assert not drift_law(observe(**{"updates": updates(0.0), "scale": 8.0, **unlike})).average


def test_retain_law_gives_way_adiabatically():
    """|dρ/dt| = 𝒜*·ρ²: the rate of change over the gap squared is the target, at any step."""
    given = {"target": RETAIN_TARGET, "max_scale": 1.0}
    seen = [observe(updates(1.0), step=step, **given) for step in (0, 1, 500, 501)]
    pulls = [retain_law(observation).pull for observation in seen]
    assert pulls[0] == pytest.approx(FIRST_PULL)
    for before, after in (pulls[:2], pulls[2:]):
        assert (before - after) / (before * after) == pytest.approx(RETAIN_TARGET)
    assert all(retain_law(observation).scale == 1.0 for observation in seen)


def test_retain_law_raises_a_learning_rate_that_may_grow():
    """The factor and its memory are the drift law's at its own target, the pull is what it was."""
    allowed = observe(updates(1.0), target=RETAIN_TARGET, step=200)
    decision, alone = retain_law(allowed), drift_law(observe(updates(1.0), step=200))
    assert decision.scale == alone.scale > 1
    assert decision.memory == alone.memory
    assert decision.interval == alone.interval == 5
    assert decision.pull == pytest.approx(1 / (1 / FIRST_PULL + RETAIN_TARGET * 200))


def trained_where_it_has_converged(wrap, lr=1e-3, steps=800):
    """Targets of pure noise, from their best fit on: there is nothing to gain."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(200))
    optimizer = wrap(torch.optim.AdamW([weights], lr=lr, weight_decay=0.0))
    losses = []
    for _ in range(steps):
        loss = (torch.randn(1024, 200) @ weights - 0.5 * torch.randn(1024)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if isinstance(optimizer, GapAware):
            optimizer.log(loss=loss)
    return optimizer, losses


def test_a_converged_run_is_tried_out_and_left_alone():
    optimizer, ours = trained_where_it_has_converged(GapAware)
    _, alone = trained_where_it_has_converged(lambda base: base)
    scales = [record["scale"] for record in optimizer.history]
    assert max(scales) > 2
    # each try ends, and most of the time there is none
    assert all(1.0 in scales[at : at + 30] for at in range(len(scales) - 29))
    assert scales.count(1.0) > 0.75 * len(scales)
    assert sum(ours) < 1.02 * sum(alone)
    assert sum(ours[-200:]) < 1.01 * sum(alone[-200:])


def test_a_loss_that_is_logged_now_and_then_counts_until_the_next():
    """What it told last holds and ends a trial, but moves nothing a second time."""
    well = trend(*np.linspace(3.0, 1.8, 12))
    held = drift_law(observe(updates(0.7), scale=8.0, memory=well))
    assert (held.scale, held.why.endswith("the loss falls well, hold")) == (8.0, True)
    still = trend(*(2.3 + NOISE[:40]))
    assert drift_law(observe(updates(0.0), loss=2.3, memory=still)).scale == LEAP
    silent = drift_law(observe(updates(0.0), memory=still))
    assert silent.scale == 1.0
    assert silent.memory["trend"] == still["trend"]
    # nor does it take anything away a second time
    rising = trend(*np.linspace(2.0, 3.0, 40))
    assert drift_law(observe(updates(0.0), scale=4.0, loss=3.0, memory=rising)).scale < 4.0
    assert drift_law(observe(updates(0.4), scale=4.0, memory=rising)).scale >= 4.0
    assert drift_law(observe(updates(0.7), scale=2.0, memory=well)).scale == 2.0
    # and what was known when the weights were kept is not forgotten
    begun = drift_law(observe(updates(0.7), memory=still))
    assert begun.keep
    assert Trend.from_memory(begun.memory["trial"]["kept"]) == Trend.from_memory(still["trend"])


def test_where_the_loss_falls_well_in_a_straight_line_for_long_the_factor_grows():
    """Training is fine, and the learning rate too small all the same."""
    well = trend(*np.linspace(3.0, 1.8, 12))
    for x, straight in ((updates(2.0), True), (updates(0.7), False)):
        counted = drift_law(observe(x, loss=1.8, memory=well)).memory["straight"]
        assert counted == straight
        for before, grows in ((LASTING * W - 1, False), (LASTING * W, straight)):
            seen = observe(x, scale=2.0, loss=1.8, memory={**well, "straight": before})
            assert (drift_law(seen).scale > 2.0) == grows
    # not after a pause
    turned = drift_law(observe(updates(0.0), loss=1.8, memory={**well, "straight": 100}))
    assert turned.memory["straight"] == 0
    few = observe(updates(2.0)[:FEWEST], loss=1.8, memory={**well, "straight": 100}, step=8)
    assert drift_law(few).memory["straight"] == 0
