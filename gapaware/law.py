"""The law of mode="escape": faster where motion is persistent or the loss stands still.

What was tried on the way to it is in benchmarks/LOG.md.
"""

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from gapaware.controller import Decision, Observation
from gapaware.drift import Drift, Newest, drift, newest, per_learning_rate
from gapaware.momentum import interval_for
from gapaware.spectrum import adiabaticity
from gapaware.trend import Trend
from gapaware.trial import SMALL, Trial

DRIFT_TARGET = 0.06
TUNED = 3.0

# all rates are per third of the momentum's memory, as far as that is not a long one
LONG_MEMORY = 15
FASTEST_PACE = 2.0
# by drift
GAIN = 0.1
EARLY, EARLY_PAIRS = 1 / 3, 3
GROWTH = 1.16
SHRINKAGE = 0.9
LEAST_DRIFT = 0.2
WINDOW_GROWTH = 4.0
SPAN = 3
# by coherence
COHERENT = 0.5
LEAST_COHERENT_GROWTH = 1.3
# how soon: updates, and the share of the momentum's memory between the first and the last
FEWEST, SOONEST = 4, 1 / 3
# where little can be lost
COHERENT_LEAP = 6.0
CERTAIN = 0.6
# windows in which every update went the same way while the loss fell well, until that could be faster
LASTING = 3
LENGTHENING = 1.1
LEAVING = 1.5
# by the loss
PROBING = 1.16
RETREAT = 0.9
LEAP = 2.0
BRAKE = 0.78
DESCENT = 1.12
# back to the weights that were kept: what is left of the factor there
AGAIN = 0.25
# what holds growth
QUIET = 2.0
COOLING, ANNEALED = 0.75, 0.5
STRIDE, FIRST_STRIDE = 0.15, 0.5
AHEAD = 4
# where nothing happens: windows of it until snapshots are further apart, and by how much
REST, RESTING = 4, 2
# after a spike
SPIKE_GROWTH = 2.0
SPIKE_ALIGNMENT = 0.5
SETBACK = 0.5
RECOVERY = 0.03
# beside the factor on the learning rate
MOMENTUM_EXPONENT = -1 / 6
PUSHED_AT, PUSHED_FROM, PUSHED_TO = 0.5, 0.2, 0.1
WANDERING = 0.1


def drift_law(observation: Observation) -> Decision:
    """Grow on plateaus, shrink where nothing is gained by it, hold where training is fine.

    The drift c ± s of the window (see `gapaware.drift`), its adiabaticity a per learning rate, the target
    c*, the newest update's persistence and alignment, and the trend of the loss, where it is logged, move
    the factor f. With n the thirds of the momentum's memory, or of 15 steps where it is longer, that an
    update spans (1 at most, 2 with a memory of 30 steps or more, such as Muon's):

        f · min(((c − s)/c*)^gain, growth)^n    where c − s > c*: steady drift; 4-fold in a window at
                                                most, 8-fold with such a memory
        f · max(1/2 + q, 1.3)^n                 where q > 1/2, q the least of c − s, persistence and
                                                alignment: every update goes the same way
        f · 6^n                                 from q = 0.6 on, by less from 1/2 on, where the loss is
                                                within 15 % of where the run began, and no update has
                                                lengthened yet: steps seem to be bounded by the optimizer
        f · leap^n                              where the loss is still where the run began, as is known
                                                to 1.5 %
        f · probing^n                           where it has stood still for half of the run within 6 % of
                                                there
        f · max(c/c*, 1/5)^(gain·n)             where c < c*, and not while the loss falls or with a pull
        f · shrinkage^n at most                 where c − s < 0: drift that may be noise; likewise
        f · retreat^n at most                   where the loss rises
        f                                       otherwise

    Where the loss falls well, by a quarter in the last dozen snapshots or at that pace in fewer, and there
    is no pull, training is fine: f does not grow, and one below 5, which is hardly what makes it fall,
    shrinks. Only where it has fallen so for three windows, with c − s > 0.6 all the while, is the learning
    rate too small all the same, and f grows on. Nor does f grow once the schedule has come down by a
    quarter of its peak, but with a pull where q > 1/2. c* is for a momentum such as AdamW's; with one that
    makes updates twice as long it is twice as large, since noise adds up more slowly than drift does. After
    a warm-up f leaves 1 only where c − s > 3·c* or the loss stands still: who takes that care has chosen
    the learning rate with some.

    As long as the loss has not fallen, nor risen by more than 6 %, there is nothing to lose, and f does not
    shrink. With a pull towards the starting weights nothing leaps until the schedule has come down by a
    quarter: what has hardly learned by then is a short run. That the loss stands still is no more than a
    guess at what f may be: by it alone f goes to 16, and on after 15 snapshots there. Where a loss is
    logged now and then, what it told moves f once, and holds it until the next.

    A raised f is a trial, see `gapaware.trial`. The weights are kept where f leaves 1, and then twice a
    window at most, where the loss has fallen since (where it is not known: where updates have not
    lengthened). If f has been 5 or more since, they go back, and f comes down to a quarter, where the loss
    rises above what it was then, or where nothing has come of it: after 30 snapshots' way at the largest f,
    when an update jumps, or on the first plateau when f is 1 again; then to 1 if a quarter is below 5. That
    needs a loss; where there is no copy the weights stay. A jump after updates that had lengthened may be a
    saddle that is left: for the first one of a run they go back only where nothing has come of it once it
    has left the window, and f to a quarter of the largest since they were kept.

    Before the window is full, spans more than the momentum's memory, and the run has lasted for W + 1 such
    thirds, drift does nothing but, where f would grow sixfold if motion were coherent, let it grow if
    c − s > 1/3, which is more than momentum leaves of noise. All else acts from four updates on, the first
    and the last a third of the memory apart, less what momentum alone makes alike.

    f does not grow where a > 2, unless the loss stands still; nor while the schedule warms up, as far back
    as momentum remembers; nor so far that a step moves the weights by more than 15 % of their norm, or by
    half of it while the loss is where the run began and every update goes the same way; and it stays once
    the schedule has come down below half of its peak. If updates have lengthened by more than f explains
    (SGD, not Adam), steps follow the gradient, and off a saddle that grows faster than snapshots show it:
    then half of the norm is for a whole update, and for the fourth one from now if they go on to lengthen
    like that; f comes down by half at most at a time for it.

    Where neither weight decay nor a pull takes back what larger steps add to the weights, the way down from
    the plateau is taken with care, so that the run ends near the solution that it would have found alone:
    where the loss falls by more than 10 % a snapshot f comes down, by 22 % each time, and once it is 15 %
    below where the run began f grows by 12 % a third at most.

    Where the newest update is twice as long as the others, and turns, f was too large: it goes to the root
    of the largest factor in the window, half of it at most, and stays below that ceiling, which rises by
    1.5 % at a time after the first such spike, by half of that after the second, and so on.

    Where f is half of `max_scale` or more, and has been for half of what the window holds, and q > 0.2, the
    weights are pushed along their recent steps, ever more up to `max_push` and until q < 0.1. As the push
    grows Adam's momentum comes down, as in 1cycle (Smith, arXiv 1803.09820), to f^(1/6) times fewer steps.
    Neither with a pull.

    Where f > 1 and c < 0.1 the weights wander about a place more than they leave it: there an evaluation is
    better at their average. Where they drift it would lag behind.

    Snapshots are closer together at first, see `interval_for`, and twice as far apart where f has not left
    1 for four windows, a warm-up not counted. By more than that they would be too short beside those before
    once f grows again: noise adds up like the root of their steps.
    """
    decision = _decide(observation)
    interval = interval_for(observation.momentum_memory, observation.step)
    stays = max(decision.scale, observation.min_scale) == observation.scale <= 1
    at_rest = stays and not _warms_up(observation)
    rest = int(observation.memory.get("rest", 0)) + 1 if at_rest else 0
    if rest > REST * observation.window:
        interval *= RESTING
    return replace(decision, interval=interval, memory={**decision.memory, "rest": rest})


def _decide(observation: Observation) -> Decision:
    highest = max(float(observation.memory.get("highest_lr", 0.0)), float(observation.lrs[-1]))
    memory = {**observation.memory, "highest_lr": highest, "push": observation.push, "straight": 0}
    # where a loss is logged now and then, what the last one told counts until the next
    trend = Trend.from_memory(memory.get("trend"))
    told = observation.loss is not None and isfinite(observation.loss)
    if observation.loss is not None and told:
        earlier = filter(isfinite, observation.earlier_losses)
        trend = trend.recalling(earlier).after(observation.loss)
        memory["trend"] = trend.to_memory()
    motion, why = _motion(observation)
    if motion is None:
        return Decision(observation.scale, why, memory=memory)
    figures = f"drift {motion.drift.mean:.2f} ± {motion.drift.doubt:.2f}, a per lr {motion.a:.2g}"
    warms_up = _warms_up(observation)
    # a warm-up has its peak before it
    peak = highest if warms_up else max(highest, observation.peak_lr)
    if observation.lrs[-1] < ANNEALED * peak:
        why = f"{figures}: the schedule cools down, hold"
        return Decision(observation.scale, why, memory=memory)
    trial = Trial.from_memory(memory.get("trial")).after(observation.scale, trend)
    # by more than a learning rate explains: nothing bounds the steps of this optimizer
    longest = float(memory.get("longest", 0.0))
    lengthened = max(longest, motion.newest.growth) >= LENGTHENING
    ceiling = _ceiling(observation, motion.newest)
    spikes = int(memory.get("spikes", 0))
    jumps = ceiling["spikes"] > spikes
    if observation.scales.max() > 1:
        spoilt = trial.spoilt(trend)
        # after updates that had lengthened it may be a saddle that is left, if this is the first time;
        # the loss shows that before the jump has left the window
        doubted = bool(memory.get("doubted"))
        over = doubted and observation.step >= float(memory.get("known_until", 0.0))
        ends = over or (jumps and (longest < LEAVING or spikes > 0))
        if spoilt or trial.idle(trend, observation.max_scale, ends=ends):
            # from the weights that were kept no smaller one than the largest has been tried
            tried = trial.largest if over and not spoilt else observation.scale
            return _back(observation, memory, trial, figures, tried=tried, spoilt=spoilt)
        memory["doubted"] = (jumps or doubted) and not (ends or trial.gained(trend))
    else:
        # the next factor is another trial
        memory.pop("doubted", None)
    memory["longest"] = max(longest, motion.newest.growth)
    warmed_up = warms_up or bool(memory.get("warmed_up"))
    memory["warmed_up"] = warmed_up
    # over longer updates noise adds up to less of them
    observation = replace(observation, target=observation.target * _pace(observation))
    late = observation.lrs[-1] < COOLING * peak
    # a leap under a pull costs old answers; a short run without one ends before it has learned
    hurry = told and trend.close and not lengthened and (late or not observation.pull)
    coherent = motion.coherence > COHERENT
    factor, why = _wanted(observation, motion, trend, trial.reach, hurry=hurry, told=told)
    certain = trend.unmoved and coherent
    limit = _limit(observation, FIRST_STRIDE if certain else STRIDE)
    if lengthened and coherent and (certain or trend.unknown):
        limit = min(limit, _limit_ahead(observation))
    if factor > 1 and warms_up:
        factor, why = 1.0, "the schedule warms up, hold"
    little = motion.drift.certain < TUNED * observation.target and not trend.flat
    if factor > 1 >= observation.scale and warmed_up and little:
        factor, why = 1.0, "too little drift for one who warms up, hold"
    if factor > 1 and late and not (observation.pull and coherent):
        factor, why = 1.0, "the schedule comes down, hold"
    if trend.fine and motion.full and motion.drift.certain > CERTAIN:
        memory["straight"] = int(observation.memory.get("straight", 0)) + 1
    faster = factor > 1 and memory["straight"] > LASTING * observation.window
    # under a pull all is fine from the first step on, and a learning rate that is too small stays so
    if trend.fine and factor > 1 and not (faster or observation.pull):
        factor, why = 1.0, "the loss falls well, hold"
    # where nothing takes weights back the way down has rules of its own, and under a pull f stays
    small = 1 < observation.scale < SMALL and not (observation.pull or _unbounded(observation))
    slower = SHRINKAGE ** _thirds(observation)
    if told and trend.fine and small and slower < factor and not faster:
        factor, why = slower, "the loss falls well without it, shrink"
    if factor > limit:
        factor, why = limit, "steps as large as the weights allow"
    if jumps:
        why = "updates jump and turn, back"
    memory |= ceiling
    scale = min(observation.scale * factor, ceiling["ceiling"])
    ends = observation.scale > 1 >= scale and trial.early
    if ends and trial.idle(trend, observation.max_scale, ends=True):
        return _back(observation, memory, trial, figures, tried=observation.scale, spoilt=False)
    push = _push(observation, motion, scale)
    if push:
        why = f"{why}, and push"
    # where f leaves 1, and then twice a window where it did some good, or nothing tells that it did not
    good = trial.kept is None or trial.gained(trend)
    if trend.unknown:
        good = motion.newest.growth < LENGTHENING
    keep = observation.scale <= 1 < scale or (
        scale > 1 and 2 * trial.age > observation.window and good
    )
    memory["trial"] = (trial.begun(trend) if keep else trial).to_memory()
    return Decision(
        scale,
        f"{figures}: {why}",
        momentum_scale=scale ** (MOMENTUM_EXPONENT * push / observation.max_push) if push else 1.0,
        push=push,
        keep=keep,
        average=scale > 1 and motion.drift.mean < WANDERING and not (push or observation.pull),
        memory=memory,
    )


def _back(
    observation: Observation,
    memory: dict[str, Any],
    trial: Trial,
    figures: str,
    *,
    tried: float,
    spoilt: bool,
) -> Decision:
    """Back to the weights that were kept with a quarter of a factor, from a plateau to 1 at last."""
    least = min(1.0, observation.scale)
    scale = max(least, AGAIN * tried)
    if not spoilt and scale < SMALL:
        scale = least
    # kept weights are an interval later than the loss they were kept for, and may be spoilt themselves
    keep = not spoilt and scale > 1
    if observation.kept and trial.kept is not None:
        memory["trend"] = trial.kept.to_memory()
    else:
        # the window goes on, and what is in it is known
        memory["known_until"] = observation.step + float(observation.spans.sum())
    memory |= {
        "trial": trial.given_up(keeps=keep).to_memory(),
        "ceiling": scale,
        "spikes": int(memory.get("spikes", 0)) + 1,
        "doubted": False,
        "push": 0.0,
    }
    why = "the loss is above that of the weights kept" if spoilt else "nothing comes of it"
    return Decision(scale, f"{figures}: {why}, back", keep=keep, back=True, memory=memory)


def _warms_up(observation: Observation) -> bool:
    """Whether the schedule raises the learning rate, or momentum remembers a smaller one."""
    since = np.cumsum(observation.spans[::-1])
    remembered = int(np.searchsorted(since, observation.momentum_memory)) + 1
    before = observation.lrs[max(0, len(observation.lrs) - 1 - remembered)]
    return bool(observation.lrs[-1] > 1.0001 * before)


def _unbounded(observation: Observation) -> bool:
    """Whether neither weight decay nor a pull takes weights back that have become too large."""
    decay = observation.decay_gram
    return observation.pull == 0 and decay is not None and not np.diag(decay).any()


@dataclass(frozen=True)
class _Motion:
    """What the law reads off the window.

    Attributes:
        full: whether there are W + 1 updates, and time enough for them; a is 0 before.
        drift: of the last W updates, of all while there are fewer.
        newest: update against the older ones.
        a: adiabaticity per learning rate.
    """

    full: bool
    drift: Drift
    newest: Newest
    a: float

    @property
    def coherence(self) -> float:
        """The least of certain drift, persistence and alignment: how far every update goes the same way."""
        seen, last = self.drift, self.newest
        return min(seen.certain, last.persistence, last.alignment)


def _motion(observation: Observation) -> tuple[_Motion | None, str]:
    """What moves, or None and the reason why that cannot be told."""
    distances = observation.lrs * observation.scales * observation.spans
    moved = (np.diag(observation.gram) > 0) & (distances > 0)
    updates = observation.window + 1
    # close snapshots at first fill a window before it spans enough
    full = len(moved) >= updates and SPAN * observation.step >= updates * _unit(observation)
    full = full and observation.spans[1:-1].sum() >= observation.momentum_memory
    if not moved.all() or len(moved) < FEWEST:
        return None, "the window is filling"
    gram, spans = per_learning_rate(observation.gram, distances), observation.spans
    memory, first = observation.momentum_memory, 1 if full else 0
    seen = drift(gram[first:, first:], spans[first:], memory, 1.0 if full else SOONEST)
    if seen is None:
        return None, "the window is filling"
    a = adiabaticity(gram) if full else 0.0
    return _Motion(full, seen, newest(gram, spans, memory, SOONEST), a), ""


def _wanted(
    observation: Observation,
    motion: _Motion,
    trend: Trend,
    reach: float,
    *,
    hurry: bool,
    told: bool,
) -> tuple[float, str]:
    """The factor on f that drift, coherence and loss ask for.

    What the loss `told` moves it once; until the next it only holds.
    """
    thirds = _thirds(observation)
    factor, why = 1.0, "the window is filling"
    early = motion.drift.pairs >= EARLY_PAIRS and motion.drift.certain > max(
        EARLY, observation.target
    )
    if motion.full or (hurry and early):
        factor, why = _by_drift(observation, motion.drift)
    fast = _fast(motion.coherence, hurry=hurry) ** thirds
    if motion.coherence > COHERENT and fast > factor:
        factor, why = fast, "coherent motion, grow fast"
    if trend.behind and _unbounded(observation):
        factor = min(factor, DESCENT**thirds)
    if factor < 1 and trend.falls:
        factor, why = 1.0, "the loss falls, hold"
    if factor < 1 and observation.pull:
        # weights that follow the balance of gradient and pull drift no further, and still learn
        factor, why = 1.0, "little drift under the pull, hold"
    if factor > 1 and motion.a > QUIET:
        factor, why = 1.0, "drift, but the spectrum turns, hold"
    if told and _unbounded(observation) and trend.plunges:
        if observation.scale > 1:
            return min(factor, BRAKE**thirds), "the loss falls fast, back"
        return min(factor, 1.0), "the loss falls fast, hold"
    room = max(1.0, reach / observation.scale)
    if trend.lifted:
        leap = min(LEAP**thirds, room) if told and not observation.pull else 1.0
        return _on_the_first_plateau(trend, leap, factor, why)
    if told and trend.rises and observation.scale > 1:
        return min(factor, RETREAT**thirds), "the loss rises, shrink"
    probes = told and motion.full and trend.flat and not trend.left
    if probes and factor < PROBING**thirds:
        return min(PROBING**thirds, room), "the loss stands still, grow"
    return factor, why


def _fast(coherence: float, *, hurry: bool) -> float:
    """The factor on f a third of the momentum's memory where every update goes the same way."""
    factor = max(0.5 + coherence, LEAST_COHERENT_GROWTH)
    share = np.clip((coherence - COHERENT) / (CERTAIN - COHERENT), 0.0, 1.0)
    return max(factor, float(COHERENT_LEAP**share)) if hurry else factor


def _on_the_first_plateau(trend: Trend, leap: float, factor: float, why: str) -> tuple[float, str]:
    """The factor on f while nothing has been gained yet that could be lost."""
    if trend.unmoved and factor < leap:
        return leap, "nothing gained yet, grow fast"
    if factor < 1 or trend.rises:
        return 1.0, "nothing gained yet that could be lost, hold"
    return factor, why


def _by_drift(observation: Observation, seen: Drift) -> tuple[float, str]:
    thirds = _thirds(observation)
    if seen.certain > observation.target:
        factor = min((seen.certain / observation.target) ** GAIN, GROWTH) ** thirds
        # a window sees late what a factor does
        room = WINDOW_GROWTH * _pace(observation) * float(observation.scales[1]) / observation.scale
        return max(1.0, min(factor, room)), "steady drift, grow"
    factor, why = 1.0, "drift near its target, hold"
    if seen.mean < observation.target:
        factor = max(seen.mean / observation.target, LEAST_DRIFT) ** (GAIN * thirds)
        why = "little drift, shrink"
    if seen.certain < 0:
        factor, why = min(factor, SHRINKAGE**thirds), "drift not above noise, shrink"
    return factor, why


def _limit(observation: Observation, stride: float) -> float:
    """The factor on f at which a step without a push moves the weights by this share of their norm."""
    step = float(np.sqrt(observation.gram[-1, -1]) / observation.spans[-1])
    # the push in force during the newest update is the one before today's
    step /= 1 + float(observation.memory.get("push", 0.0))
    factor_then = float(observation.scales[-1])
    return stride * observation.weight_norm / step * factor_then / observation.scale


def _limit_ahead(observation: Observation) -> float:
    """The factor on f that leaves room for updates that lengthen until they are seen.

    A decision acts an interval after its snapshot, and with momentum the updates show late what gradients
    do; where each step is a snapshot, without momentum, neither is late.
    """
    span = float(max(observation.spans[-1], observation.interval))
    limit = _limit(observation, FIRST_STRIDE / span)
    if span == 1:
        return limit
    return min(limit, max(limit / _lengthening(observation) ** AHEAD, SETBACK))


def _lengthening(observation: Observation) -> float:
    """The newest update's length over the longest other's, per step and learning rate; at least 1."""
    distances = observation.lrs * observation.scales * observation.spans
    *others, newest = np.sqrt(np.diag(observation.gram)) / distances
    return max(1.0, float(newest / max(others)))


def _push(observation: Observation, motion: _Motion, scale: float) -> float:
    """The push along the recent steps, which a large learning rate lets grow."""
    # for half a window: second moments lag behind a factor that leaps
    raised = min(scale, float(observation.scales[len(observation.scales) // 2]))
    as_large = raised > 1 and raised >= PUSHED_AT * observation.max_scale
    if observation.pull or not as_large or motion.coherence < PUSHED_TO:
        return 0.0
    room = _limit(observation, STRIDE) * observation.scale / scale - 1
    push = observation.push
    if motion.coherence > PUSHED_FROM:
        push += observation.max_push * _thirds(observation)
    return max(0.0, min(push, observation.max_push, room))


def _ceiling(observation: Observation, seen: Newest) -> dict[str, float]:
    """The largest factor for now, and how many spikes have lowered it."""
    memory = observation.memory
    ceiling = float(memory.get("ceiling", observation.max_scale))
    spikes, known_until = int(memory.get("spikes", 0)), float(memory.get("known_until", 0.0))
    jumps = seen.growth > SPIKE_GROWTH and seen.alignment < SPIKE_ALIGNMENT
    if jumps and observation.scale > 1 and observation.step >= known_until:
        top = float(observation.scales.max())
        ceiling = max(1.0, min(SETBACK * top, top**0.5))
        # the same spike stays in the window
        known_until, spikes = observation.step + float(observation.spans.sum()), spikes + 1
    else:
        recovery = 1 + RECOVERY * 0.5**spikes
        ceiling = min(ceiling * recovery ** _thirds(observation), observation.max_scale)
    return {"ceiling": ceiling, "spikes": spikes, "known_until": known_until}


def _unit(observation: Observation) -> float:
    """Steps in whose thirds the rates are: the momentum's memory, up to 15."""
    return min(observation.momentum_memory, LONG_MEMORY)


def _thirds(observation: Observation) -> float:
    """Thirds of the unit in the newest update: 1 at most, up to 2 where momentum remembers for longer."""
    return min(_pace(observation), 3 * float(observation.spans[-1]) / _unit(observation))


def _pace(observation: Observation) -> float:
    """Units in the momentum's memory, 2 at most: with a long one snapshots are far apart."""
    return min(observation.momentum_memory / _unit(observation), FASTEST_PACE)
