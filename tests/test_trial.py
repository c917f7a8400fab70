"""A trial of a raised factor counts what it says, and knows what came of it."""

import json
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from gapaware.trend import Trend
from gapaware.trial import FAR, NEAR, SMALL, STILL, Trial

NOISE = 0.002 * np.random.default_rng(3).normal(size=40)


def trend(*losses):
    seen = Trend()
    for loss in losses:
        seen = seen.after(float(loss))
    return seen


FLAT = trend(*(2.0 + NOISE))
FALLING = trend(*np.linspace(2.0, 1.0, 40))
# left after a while, and flat since: losses beyond the first plateau
BEYOND = trend(*np.linspace(2.0, 1.5, 60), *np.tile(1.5 + NOISE, 5))


def moved(kept, level):
    """The trend after five more losses at this level."""
    for loss in level + NOISE[:5]:
        kept = kept.after(float(loss))
    return kept


def test_what_stands_still_adds_up_until_the_loss_moves_or_the_factor_is_1():
    once = Trial().after(8.0, FLAT)
    twice = once.after(3.0, FLAT)
    assert (once.still, twice.still) == (8.0, 11.0)
    assert (once.age, twice.age) == (1, 2)
    for scale, seen in ((3.0, FALLING), (1.0, FLAT)):
        assert twice.after(scale, seen) == replace(twice, age=3, still=0.0)


def test_a_snapshot_without_a_loss_tells_nothing():
    trial = Trial(kept=FLAT, still=STILL * 64.0 - 1).after(8.0, Trend())
    assert (trial.still, trial.age) == (STILL * 64.0 - 1, 1)
    assert trial.largest == 8.0
    spent = Trial(kept=FLAT, still=STILL * 64.0 + 1, largest=64.0)
    assert spent.idle(FLAT, 64.0)
    assert not spent.idle(Trend(), 64.0, ends=True)


def test_a_plateau_beyond_the_first_one_stands_still_too():
    assert (BEYOND.flat, BEYOND.lifted) == (True, False)
    seen = Trial().after(FAR, BEYOND)
    assert (seen.still, seen.near) == (FAR, 0)
    # nor need the first one be flat
    lifted = trend(*FLAT.means, *np.linspace(2.0, 2.1, 12))
    assert (lifted.flat, lifted.lifted) == (False, True)
    assert Trial().after(8.0, lifted).still == 8.0


@pytest.mark.parametrize(
    ("scale", "counts"), [(14.0, 0), (14.4, 1), (FAR, 1), (23.9, 1), (24.0, 0)]
)
def test_a_guess_by_the_loss_alone_goes_on_once_it_has_been_near_for_long(scale, counts):
    trial = Trial(near=NEAR).after(scale, FLAT)
    assert trial.near == NEAR + counts
    assert trial.reach == (inf if counts else FAR)
    assert Trial(near=NEAR).after(scale, FALLING).near == NEAR


def test_a_trial_begins_where_the_weights_are_kept():
    old = Trial(kept=FALLING, age=7, still=3.0, near=2, largest=8.0)
    assert old.begun(FLAT) == replace(old, kept=FLAT, age=0, largest=1.0)
    # without a loss nothing is known of it
    assert old.begun(Trend()).kept is None


@pytest.mark.parametrize(("keeps", "kept"), [(True, FLAT), (False, None)])
def test_after_a_return_it_begins_anew(keeps, kept):
    begun = Trial(kept=FLAT, age=7, still=3.0, near=2, largest=8.0)
    ended = begun.given_up(keeps=keeps)
    assert ended == Trial(kept=kept, near=2)


@pytest.mark.parametrize(
    ("level", "spoilt"), [(1.5, False), (2.0, False), (2.1, False), (2.15, True)]
)
def test_spoilt_where_the_loss_is_6_percent_above_what_it_was(level, spoilt):
    now = moved(FLAT, level)
    assert Trial(kept=FLAT, largest=SMALL).spoilt(now) == spoilt
    # neither what a small factor did, which the run may do by itself, nor where nothing was kept
    assert not Trial(kept=FLAT, largest=0.99 * SMALL).spoilt(now)
    assert not Trial(largest=SMALL).spoilt(now)


def test_noise_spoils_nothing_and_gains_nothing():
    random = np.random.default_rng(0)
    noisy = trend(*(2.0 + 0.3 * random.normal(size=40)))
    # 8 % up and down of losses that scatter by 15 %
    for change in (1.08, 0.92):
        level = change * noisy.level
        now = noisy.after(level - 0.3).after(level + 0.4).after(level - 0.1)
        assert now.level == pytest.approx(level)
        assert not Trial(kept=noisy, largest=SMALL).spoilt(now)
        assert not Trial(kept=noisy).gained(now)


@pytest.mark.parametrize(
    ("kept", "share", "gained"),
    [(FLAT, 0.96, False), (FLAT, 0.92, True), (BEYOND, 0.99, False), (BEYOND, 0.97, True)],
)
def test_less_is_a_gain_beyond_the_first_plateau(kept, share, gained):
    assert kept.left == (kept is BEYOND)
    now = moved(kept, share * kept.level)
    assert Trial(kept=kept).gained(now) == gained
    assert not Trial().gained(now)


def test_idle_where_nothing_came_of_it_for_long_or_until_its_end():
    spent = Trial(kept=FLAT, still=STILL * 64.0 + 1, largest=SMALL)
    assert spent.idle(FLAT, 64.0)
    assert not replace(spent, still=STILL * 64.0).idle(FLAT, 64.0)
    assert not spent.idle(FLAT, 65.0)
    ended = replace(spent, still=0.0)
    assert not ended.idle(FLAT, 64.0)
    assert ended.idle(FLAT, 64.0, ends=True)
    # neither where the loss has fallen, nor where nothing was kept, nor where factors were small
    for ends in (True, False):
        assert not spent.idle(moved(FLAT, 1.5), 64.0, ends=ends)
        assert not replace(spent, kept=None).idle(FLAT, 64.0, ends=ends)
        assert not replace(spent, largest=0.99 * SMALL).idle(FLAT, 64.0, ends=ends)


def test_early_on_the_first_plateau_only():
    assert [Trial(kept=kept).early for kept in (FLAT, BEYOND, None)] == [True, False, False]


@pytest.mark.parametrize("kept", [FLAT, None])
def test_a_checkpoint_holds_a_trial(kept):
    trial = Trial(kept=kept).after(FAR, FLAT)
    assert (trial.near, trial.still) == (1, FAR)
    assert Trial.from_memory(json.loads(json.dumps(trial.to_memory()))) == trial
    assert Trial.from_memory(None) == Trial()
