"""Consolidation: after fine-tuning, back towards the start as far as the new skill allows.

Fine-tuning moves more than the new task needs, and what it moves is what the model forgets. On the
straight line from the starting weights θ_0 to the trained ones θ,

    θ_c = θ_0 + c·(θ − θ_0),

the new task's loss often stays low down to a share c well below 1, while the old skill comes back all the
way (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903). `consolidate` finds the smallest share that keeps
what is asked for, from new-task validation alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gapaware import arguments
from gapaware.caution import caution
from gapaware.distributed import ranks_of, sharing
from gapaware.line import AnchorWeights, Line

Evaluate = Callable[[nn.Module], float | Tensor]

RESOLUTION = 0.01  # of the share: what lies between changes neither skill by much


@dataclass(frozen=True)
class Consolidation:
    """What `consolidate` did.

    Attributes:
        share: c, the share of the way from the start at which the model now is; 1 where it was left
            as trained.
        loss: on the new task there.
        start_loss: from which the gain counts.
        end_loss: with the trained weights.
        kept: share of the gain that is left, (start_loss − loss)/(start_loss − end_loss); more than
            1 where the way back lowered the loss, NaN where nothing was gained.
        evaluations: pairs (share, loss) on the line, in the order in which they were tried.
    """

    share: float
    loss: float
    start_loss: float
    end_loss: float
    kept: float
    evaluations: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        """One line for people.

        >>> print(Consolidation(0.625, 0.31, 2.3, 0.2, 0.948, ((1.0, 0.2), (0.625, 0.31))))
        at 0.625 of the way from the start: 94.8 % of the gain kept, loss 0.31 (start 2.3, end 0.2)
        """
        losses = f"loss {self.loss:.4g} (start {self.start_loss:.4g}, end {self.end_loss:.4g})"
        if math.isnan(self.kept):
            return f"left as trained: no gain to keep, {losses}"
        kept = f"{100 * self.kept:.1f} % of the gain kept"
        return f"at {self.share:.4g} of the way from the start: {kept}, {losses}"


def consolidate(
    model: nn.Module,
    anchor: AnchorWeights,
    evaluate: Evaluate,
    keep: float = 0.95,
    *,
    fresh: Sequence[str] = (),
    start_loss: float | None = None,
    evaluations: int = 10,
    storage_device: torch.device | str | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
) -> Consolidation:
    """Move a fine-tuned model back towards its start, keeping a share of what it gained.

    Goes to the smallest share c of the way θ_0 + c·(θ − θ_0) found with
    evaluate <= start loss − keep·(start loss − end loss), by bisection to 0.01. The model never ends at a
    point that was not evaluated, or that does not keep.

    Floating-point buffers in the state dict, such as the statistics of BatchNorm, go along the same
    line; integers stay as they are. Elements that equal the anchor's up to the anchor's precision are
    left alone, so that an anchor in bfloat16 rounds nothing that training has not moved.

    Args:
        model: the trained model, changed in place.
        anchor: the weights it started from: a copy of its state dict (`starting_weights`), on any
            device and in any floating dtype, or a module. May lack parameters that are frozen.
        evaluate: the new task's validation loss of a model, lower is better; called in eval mode
            without gradients, each time with the same data. A loss that is not finite does not keep.
        keep: share of the gain to keep, in (0, 1].
        fresh: names, or beginnings of names, of parameters and buffers that had no meaning at the
            start, such as a new head. They stay as trained.
        start_loss: a bound on the loss from which the gain counts, which is that of the anchor, its own
            `fresh` weights included if it has them. A start that is confidently wrong is worse than
            guessing and makes any end look like a gain: pass what guessing gives, log(classes).
        evaluations: at most so many calls of `evaluate`, at least 3; nine reach the resolution. One more
            of each where the anchor has weights for `fresh`, since the start is evaluated with them, too.
        storage_device: where the one copy of the trained weights lies meanwhile, such as "cpu"; by
            default where the weights are.
        process_group: ranks with replicas of the model (DDP), which average their losses to decide
            alike. Ranks that share a model in shards do so anyway.
        progress: show a bar in a terminal if tqdm is installed.

    Returns:
        The share, the losses, and all that was evaluated; prints as one line.

    Raises:
        TypeError: an argument is of the wrong kind, or `evaluate` returned no number.
        ValueError: an argument is out of bounds, `anchor` does not fit the model or is no copy, `fresh`
            names nothing, or `evaluate` moved or cast the model.
        Unsupported: FSDP1, DeepSpeed ZeRO-3, parameters on the meta device, or a sharded model with an
            anchor that is not sharded alike.
        BaseException: what `evaluate` raises; the trained weights are back in place then.

    Warns:
        UserWarning: the end is no gain over the start. The model stays as trained.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> anchor = {"weight": torch.tensor([[0.0]])}
        >>> _ = nn.init.constant_(model.weight, 8.0)
        >>> def evaluate(model):
        ...     return (model.weight - 8.0).square().mean()
        >>> result = consolidate(model, anchor, evaluate, keep=0.9, evaluations=20)
        >>> print(result)
        at 0.6875 of the way from the start: 90.2 % of the gain kept, loss 6.25 (start 64, end 0)
        >>> model.weight.item()
        5.5
    """
    keep, start_loss, evaluations = checked(
        evaluate=evaluate,
        keep=keep,
        start_loss=start_loss,
        evaluations=evaluations,
        storage_device=storage_device,
    )
    line = Line(model, anchor, fresh, storage_device)
    if line.has_fresh_start:
        arguments.integer(
            "evaluations", evaluations, low=4, why="`fresh` takes one more than three"
        )
    agreed = _agreed(line, ranks_of(process_group))
    tried: list[tuple[float, float]] = []
    with _bar(progress, evaluations) as tick, _modes_of(model), line:

        def measured() -> float:
            model.eval()
            loss = _number(evaluate(model))
            line.check()
            loss = agreed(loss)
            tick()
            return loss

        def loss_at(share: float) -> float:
            line.go(share)
            tried.append((share, measured()))
            return tried[-1][1]

        end = loss_at(1.0)
        near = loss_at(0.0)
        start = near
        if line.has_fresh_start:
            line.go(0.0, fresh=0.0)
            start = measured()
        bounds = [x for x in (start, start_loss) if x is not None and math.isfinite(x)]
        reference = min(bounds, default=math.nan)
        gain = reference - end
        if not gain > 0 or not math.isfinite(end):
            line.go(1.0)
            at_start = (
                f"{reference:.4g} at the start: no gain to keep"
                if bounds
                else f"{start:.4g} at the start: pass start_loss=, such as log(classes), to count from"
            )
            caution(
                f"consolidate: the new-task loss is {end:.4g} with the trained weights and {at_start}; "
                "the model stays as trained"
            )
            return Consolidation(1.0, end, reference, end, math.nan, tuple(tried))

        def keeps(loss: float) -> bool:
            return math.isfinite(loss) and loss <= reference - keep * gain

        left = evaluations - 2 - line.has_fresh_start
        share = 0.0 if keeps(near) else smallest(lambda c: keeps(loss_at(c)), left)
        line.go(share)
    loss = dict(tried)[share]
    return Consolidation(share, loss, reference, end, (reference - loss) / gain, tuple(tried))


def checked(
    *, evaluate: Any, keep: Any, start_loss: Any, evaluations: Any, storage_device: Any, **_: Any
) -> tuple[float, float | None, int]:
    """The options of `consolidate` that can be checked without a model: keep, start_loss, evaluations.

    Raises:
        TypeError, ValueError: one of them is wrong.
    """
    if not callable(evaluate):
        raise TypeError(
            f"evaluate={evaluate!r}: pass a function of the model that returns a validation loss"
        )
    arguments.device("storage_device", storage_device, why="where the trained weights lie")
    if start_loss is not None:
        start_loss = arguments.number("start_loss", start_loss, why="a bound on the loss")
        if not math.isfinite(start_loss):
            raise ValueError(f"start_loss={start_loss}: a bound on the loss; pass a finite number")
    return (
        arguments.positive("keep", keep, high=1.0, why="the share of the gain to keep"),
        start_loss,
        arguments.integer(
            "evaluations", evaluations, low=3, why="the start, the end and a point between them"
        ),
    )


def smallest(keeps: Callable[[float], bool], evaluations: int) -> float:
    """The smallest number in (0, 1] that was found to keep, where 1 does and 0 does not.

    Bisection, which needs no more than signs: noise and dents cost precision, never the promise.

    Example:
        >>> smallest(lambda c: c > 0.3, evaluations=3)
        0.375
    """
    low, high = 0.0, 1.0
    for _ in range(evaluations):
        if high - low <= RESOLUTION:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _agreed(line: Line, replicas: tuple[int, ...]) -> Callable[[float], float]:
    """The mean of a loss over the ranks that have to decide alike."""
    ranks = sharing(line.parameters, replicas)
    home = ranks.home(torch.device("cpu"))

    def mean(loss: float) -> float:
        total = ranks.add_up(torch.tensor(loss, dtype=torch.float64, device=home))
        return total.item() / max(1, len(ranks.ranks))

    return mean


def _number(loss: Any) -> float:
    single = isinstance(loss, Tensor | np.ndarray) and math.prod(loss.shape) == 1
    value = loss.item() if single else loss
    if not isinstance(value, Real):
        raise TypeError(
            f"evaluate returned {type(loss).__name__}: return one number, the validation loss"
        )
    return float(value)


@contextmanager
def _modes_of(model: nn.Module) -> Iterator[None]:
    """No gradients; and each module, however it was set before, trains or not as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[], object]]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    with tqdm(total=total, desc="consolidate", unit="evaluation", disable=None) as bar:
        yield bar.update
