"""The rivals: other ways out of a plateau, each with a sweep of seven points.

Every rival starts from what a task's user has: a base optimizer class, a learning rate that may be too
small, and its other arguments. What a rival needs beside `step()` it offers as methods that a task calls
where they are there: `report(loss)` before each step, `eval()` and `train()` around an evaluation.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from mechanic_pytorch import mechanize
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree, ScheduleFreeWrapper, SGDScheduleFree

from benchmarks.bases import MuonAdamW
from benchmarks.factors import dressed, greedy_lr, random_bumps, reduce_on_plateau
from benchmarks.methods import LR_FACTORS, SWEEP, Base, Method, Occasion, Point, base_alone
from benchmarks.tasks import BuildOptimizer
from gapaware import Composite
from gapaware.average import Average
from gapaware.scaling import Scales

LEAST_DECAY = 1e-3  # what stands for no weight decay when it is raised
GROKFAST = (0.98, 2.0)  # alpha and lambda of its authors' algorithmic tasks


def _decay(kwargs: dict[str, Any], factor: float) -> dict[str, Any]:
    return {**kwargs, "weight_decay": factor * max(kwargs.get("weight_decay", 0.0), LEAST_DECAY)}


def decay_raised(base: Base, point: Point, _: Occasion) -> BuildOptimizer:
    """Weight decay times a factor, nothing else."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return base(params, lr=lr, **_decay(base_kwargs, float(point)))  # type: ignore[call-arg, arg-type]

    return build


class ScheduleFreeMuon(Composite):
    """Schedule-Free Muon for the hidden matrices, Schedule-Free AdamW for the rest.

    The package's wrapper goes around Muon alone: it writes into the state of what it wraps before the
    first step, which AdamW takes for a state that is already there.
    """

    def __init__(self, base: Composite) -> None:
        muon, adamw = base.optimizers
        adamw_free = AdamWScheduleFree(adamw.param_groups)
        super().__init__(muon, adamw_free)
        self.free = (ScheduleFreeWrapper(muon), adamw_free)

    def step(self, closure: Any = None) -> None:
        """One step of both."""
        for optimizer in self.free:
            optimizer.step()

    def train(self) -> None:
        """To the point where gradients are taken."""
        for optimizer in self.free:
            optimizer.train()

    def eval(self) -> None:
        """To the average of the iterates."""
        for optimizer in self.free:
            optimizer.eval()


def schedule_free(base: Base, _: Point, __: Occasion) -> BuildOptimizer:
    """Schedule-Free (arXiv 2405.15682) in the place of AdamW, SGD, or both parts of Muon with AdamW."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        if issubclass(base, MuonAdamW):
            optimizer = ScheduleFreeMuon(base(params, lr=lr, **base_kwargs))
        elif issubclass(base, torch.optim.SGD):
            # its momentum is the interpolation, and has to be above 0
            momentum = base_kwargs.pop("momentum", 0.0) or 0.9
            optimizer = SGDScheduleFree(params, lr=lr, momentum=momentum, **base_kwargs)
        else:
            optimizer = AdamWScheduleFree(params, lr=lr, **base_kwargs)
        optimizer.train()
        return optimizer

    return build


def prodigy(_: Base, point: Point, __: Occasion) -> BuildOptimizer:
    """Prodigy (arXiv 2306.06101) in place of the base; the sweep is over its coefficient d_coef."""

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        with redirect_stdout(io.StringIO()):  # it says which kind of decay it uses
            return Prodigy(
                params, weight_decay=base_kwargs.get("weight_decay", 0.0), d_coef=float(point)
            )

    return build


def mechanic(base: Base, point: Point, _: Occasion) -> BuildOptimizer:
    """Mechanic (arXiv 2306.00144) around the base; the sweep is over its decay s_decay.

    Raises:
        TypeError: it keeps its state in the base's, which several optimizers in one do not have.
    """
    if issubclass(base, MuonAdamW):
        raise TypeError("base: Mechanic tunes one optimizer, and Muon with AdamW is two")
    return base_alone(mechanize(base, s_decay=float(point)))


def averaged(base: Base, _: Point, __: Occasion) -> BuildOptimizer:
    """The base, evaluated at the very average that GapAware keeps where its weights wander."""

    def dress(optimizer: torch.optim.Optimizer) -> None:
        average, groups = Average(), optimizer.param_groups
        always = [Scales(average=True)] * len(groups)
        optimizer.register_step_post_hook(lambda *_: average.follow(groups, always))
        optimizer.eval = lambda: average.eval(groups)  # type: ignore[attr-defined]
        optimizer.train = lambda: average.train(groups)  # type: ignore[attr-defined]
        average.train(groups)

    return dressed(base, dress)


def amplify_slow_gradients(alpha: float, lamb: float) -> Callable[..., None]:
    """A hook before the step that adds the gradients' moving average to them: Grokfast-EMA.

    g ← g + λ·m with m ← α·m + (1 − α)·g, m starting at the first gradient (arXiv 2405.20233).
    """
    slow: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def amplify(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = slow.setdefault(id(p), p.grad.clone())
                    mean.mul_(alpha).add_(p.grad, alpha=1 - alpha)
                    p.grad.add_(mean, alpha=lamb)

    return amplify


def grokfast(base: Base, point: Point, _: Occasion) -> BuildOptimizer:
    """Grokfast-EMA at the base's own weight decay; points are (alpha, lambda)."""

    def dress(optimizer: torch.optim.Optimizer) -> None:
        alpha, lamb = point  # type: ignore[misc]
        optimizer.register_step_pre_hook(amplify_slow_gradients(alpha, lamb))

    return dressed(base, dress)


def grokfast_with_decay(base: Base, point: Point, occasion: Occasion) -> BuildOptimizer:
    """Grokfast-EMA with a raised weight decay, as its authors ran it; points are the decay's factors."""
    build_plain = grokfast(base, GROKFAST, occasion)

    def build(params: Any, lr: float, **base_kwargs: Any) -> torch.optim.Optimizer:
        return build_plain(params, lr, **_decay(base_kwargs, float(point)))  # type: ignore[arg-type]

    return build


DECAY_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
HOLDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
PATIENCES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
D_COEFS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
S_DECAYS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
FILTERS = ((0.8, 0.1), (0.8, 2.0), (0.9, 1.0), (0.95, 5.0), (0.98, 0.5), (0.98, 2.0), (0.98, 5.0))

RIVALS = (
    Method("random-bumps", "intervals a factor is kept", HOLDS, random_bumps, replays=True),
    Method("reduce-on-plateau", "lr", LR_FACTORS, reduce_on_plateau, lr_swept=True),
    Method("averaged", "lr", LR_FACTORS, averaged, lr_swept=True),
    Method("schedule-free", "lr", LR_FACTORS, schedule_free, lr_swept=True),
    Method("prodigy", "d_coef", D_COEFS, prodigy),
    Method("greedy-lr", "patience", PATIENCES, greedy_lr),
    Method("grokfast", "alpha, lambda", FILTERS, grokfast),
    Method("grokfast-decay", "factor on the decay", DECAY_FACTORS, grokfast_with_decay),
    Method("decay-raised", "factor on the decay", DECAY_FACTORS, decay_raised),
    Method("mechanic", "s_decay", S_DECAYS, mechanic),
)
assert all(len(rival.points) == SWEEP for rival in RIVALS)
