"""What fine-tunes: the base optimizer, its rivals in not forgetting, and GapAware.

Every method has a sweep of seven values, and a run of it is one value and one seed. The base, FINCH,
pseudorehearsal and GapAware sweep the learning rate; a rival with a strength of its own sweeps that, at
the learning rate at which the base alone forgot least (`ForgettingTask.good`). Penalties and pulls leave
the new task's own head alone and replace the weight decay to zero. EWC alone is given old data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gapaware
from benchmarks.forgetting_tasks import OLD, Examples, Point, State, copy_of
from benchmarks.forgetting_tasks.finetune import walk
from benchmarks.forgetting_tasks.low_rank import adapt
from benchmarks.forgetting_tasks.training import Training, scaled
from gapaware import GapAware

LR_FACTORS = (0.01, 1 / 30, 0.1, 1 / 3, 1.0, 3.0, 10.0)
KEEPS = (0.5, 0.8, 0.9, 0.95)
FISHER_EXAMPLES = 300
TEMPERATURE = 2.0  # of distillation, as in Learning without Forgetting
FINCH_CAP = 10.0
REHEARSED_TARGET = 1.0  # how fast the pull gives way beside rehearsal

Curves = dict[str, list[Point]]


def base(run: Training) -> Curves:
    """The optimizer alone; the line back from its end is WiSE-FT."""
    return {"trajectory": run.finetune(run.optimizer()), "line": run.line()}


def retain(run: Training) -> Curves:
    """GapAware's mode "retain" at default settings, and the line back from its end."""
    fresh = run.task.fresh or ("\0",)
    anchor = {name: start for name, start in run.anchor.items() if not name.startswith(fresh)}
    points = run.finetune(GapAware(run.optimizer(), mode="retain", anchor=anchor))
    return {"trajectory": points, "line": run.line()}


def distilled(run: Training) -> Curves:
    """Mode "retain" and, where the old task has a head of its own, `gapaware.Distillation`, at defaults."""
    if not run.task.fresh:
        return retain(run)
    anchor = {n: w for n, w in run.anchor.items() if not n.startswith(run.task.fresh)}

    def old_answers(model: nn.Module, batch: Examples) -> Tensor:
        return run.task.logits(model, Examples(batch.inputs, batch.targets, OLD))

    held = gapaware.Distillation(run.model, old_answers)
    run.held += list(held.weights.values())

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        return run.task.loss(model, batch) + held(batch)

    optimizer = GapAware(run.optimizer(), mode="retain", anchor=anchor)
    return {"trajectory": run.finetune(optimizer, loss=loss), "line": run.line()}


def holding_answers(run: Training) -> Callable[[nn.Module, Examples], Tensor]:
    """The task's loss and `gapaware.Distillation` of old answers on inputs of neither task.

    On new inputs as well where the old task has a head of its own. The same strength for each kind of
    input on every task; needs no old data.
    """
    imagined = run.task.imagined(run.model, run.seed)

    def asked(inputs: Tensor) -> Tensor:
        return torch.cat([inputs, imagined(inputs)]) if run.task.fresh else imagined(inputs)

    def old_answers(model: nn.Module, inputs: Tensor) -> Tensor:
        return run.task.logits(model, Examples(inputs, inputs, OLD))

    strength = 2.0 if run.task.fresh else 1.0  # one for each kind of input
    held = gapaware.Distillation(run.model, old_answers, inputs=asked, strength=strength)
    run.held += list(held.weights.values())

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        return run.task.loss(model, batch) + held(batch.inputs)

    return loss


def rehearsed(run: Training) -> Curves:
    """Old answers held, a pull that gives way four times as fast, a learning rate that may grow."""
    loss = holding_answers(run)
    fresh = run.task.fresh or ("\0",)
    anchor = {name: w for name, w in run.anchor.items() if not name.startswith(fresh)}
    optimizer = GapAware(
        run.optimizer(), mode="retain", anchor=anchor, max_scale=64.0, target=REHEARSED_TARGET
    )

    def step(take: Callable[[], object], loss: float) -> None:
        take()
        optimizer.log(loss=loss)

    points = run.finetune(optimizer, loss=loss, around_step=step)
    return {"trajectory": points, "line": run.line()}


def pseudorehearsal(run: Training) -> Curves:
    """The same old answers held, the optimizer alone, and the line back from its end."""
    points = run.finetune(run.optimizer(), loss=holding_answers(run))
    return {"trajectory": points, "line": run.line()}


def l2_sp(run: Training) -> Curves:
    """Decay to the start: θ ← θ − lr·λ·(θ − θ_0) after each step (L2-SP, decoupled)."""
    optimizer = run.optimizer(weight_decay=0.0)
    lrs = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    pairs = run.pretrained().values()

    def step(take: Callable[[], object], _: float) -> None:
        pulls = [min(1.0, lrs[id(parameter)]["lr"] * run.value) for parameter, _ in pairs]
        take()
        with torch.no_grad():
            for (parameter, start), pull in zip(pairs, pulls, strict=True):
                parameter.lerp_(start, pull)

    return {"trajectory": run.finetune(optimizer, around_step=step)}


def selective_decay(run: Training) -> Curves:
    """Selective projection decay (arXiv 2411.01713).

    Tensors whose gradient points back are pulled back by λ times the share of the distance that the
    step added.
    """
    optimizer = run.optimizer(weight_decay=0.0)
    pairs = run.pretrained().values()

    @torch.no_grad()
    def step(take: Callable[[], object], _: float) -> None:
        before = [parameter - start for parameter, start in pairs]
        take()
        for (parameter, start), was in zip(pairs, before, strict=True):
            if parameter.grad is None or torch.sum(parameter.grad * was) <= 0:
                continue
            distance = torch.dist(parameter, start)
            share = torch.clamp((distance - was.norm()) / distance.clamp_min(1e-12), 0, 1).item()
            parameter.lerp_(start, min(1.0, run.value * share))

    return {"trajectory": run.finetune(optimizer, around_step=step)}


def ewc(run: Training) -> Curves:
    """Elastic weight consolidation: loss + λ/2·Σ F (θ − θ_0)², F the Fisher diagonal on OLD data."""
    pairs = run.pretrained()
    fisher = {name: torch.zeros_like(start) for name, (_, start) in pairs.items()}
    old = run.task.data(run.seed).old_train
    run.model.eval()
    for row in torch.randperm(len(old), generator=torch.Generator().manual_seed(run.seed))[
        :FISHER_EXAMPLES
    ]:
        run.model.zero_grad()
        run.task.loss(run.model, old[row[None]]).backward()
        for name, (parameter, _) in pairs.items():
            if parameter.grad is not None:
                fisher[name] += parameter.grad**2 / FISHER_EXAMPLES
    run.held += list(fisher.values())

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        penalties = [(fisher[name] * (p - start) ** 2).sum() for name, (p, start) in pairs.items()]
        return run.task.loss(model, batch) + run.value / 2 * torch.stack(penalties).sum()

    return {"trajectory": run.finetune(run.optimizer(weight_decay=0.0), loss=loss)}


def distillation(run: Training) -> Curves:
    """Learning without Forgetting: loss + λ·T²·KL(start's old answers, the model's) on NEW inputs."""
    teacher = copy.deepcopy(run.model).eval()
    run.held += list(teacher.parameters())

    def answers(model: nn.Module, batch: Examples) -> Tensor:
        asked = Examples(batch.inputs, batch.targets, OLD)
        return F.log_softmax(run.task.logits(model, asked).flatten(0, -2) / TEMPERATURE, -1)

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        with torch.no_grad():
            before = answers(teacher, batch)
        apart = F.kl_div(answers(model, batch), before, log_target=True, reduction="batchmean")
        return run.task.loss(model, batch) + run.value * TEMPERATURE**2 * apart

    return {"trajectory": run.finetune(run.optimizer(), loss=loss)}


def low_rank(run: Training) -> Curves:
    """LoRA: adapters of a rank, everything pretrained frozen."""
    torch.manual_seed(run.seed)
    adapt(run.model, int(run.value), run.task.fresh)
    return {"trajectory": run.finetune(run.optimizer(weight_decay=0.0))}


def averaged(run: Training) -> Curves:
    """An exponential moving average of the weights, from the start on; it is what is scored."""
    mean = copy_of(run.model)
    run.held += list(mean.values())

    def step(take: Callable[[], object], _: float) -> None:
        take()
        for name, value in run.model.state_dict().items():
            if value.is_floating_point():
                mean[name].lerp_(value, 1 - run.value)

    def measure(at: float) -> Point:
        return walk(run.task, run.model, [(at, mean)], run.seed)[0]

    return {"trajectory": run.finetune(run.optimizer(), around_step=step, measure=measure)}


def finch(run: Training) -> Curves:
    """Lower lr on high-loss batches, higher as the model converges (FINCH, arXiv 2605.20005).

    Read from the abstract, "per-step forgetting is bounded by the product of the learning rate and the
    square root of the current training loss": the product is kept constant,
    lr·min(10, √(first batch's loss / this batch's loss)).
    """
    optimizer = run.optimizer()
    first: list[float] = []

    def step(take: Callable[[], object], loss: float) -> None:
        first.append(loss)
        with scaled(optimizer, min(FINCH_CAP, (first[0] / max(loss, 1e-12)) ** 0.5)):
            take()

    return {"trajectory": run.finetune(optimizer, around_step=step)}


def consolidated(run: Training) -> Curves:
    """Mode "retain", then `gapaware.consolidate` for each share of the gain to keep."""
    points = retain(run)["trajectory"]
    end, validation = copy_of(run.model), run.task.data(run.seed).validation

    def places() -> Iterator[tuple[float, State]]:
        for keep in KEEPS:
            run.model.load_state_dict(end)
            gapaware.consolidate(
                run.model,
                run.anchor,
                lambda model: run.task.score(model, validation).loss,
                keep,
                fresh=run.task.fresh,
                start_loss=math.log(run.task.classes),
                progress=False,
            )
            yield keep, copy_of(run.model)

    return {
        "trajectory": points,
        "consolidated": walk(run.task, run.model, list(places()), run.seed),
    }


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        train: does a run.
        swept: what its values are.
        values: the sweep.
    """

    train: Callable[[Training], Curves]
    swept: str = "lr"
    values: tuple[float, ...] = LR_FACTORS

    def lr_factor(self, value: float, good: float) -> float:
        """The factor on the task's learning rate in the run with a value of the sweep."""
        return value if self.swept == "lr" else good


METHODS: dict[str, Method] = {
    "base": Method(base),
    "gapaware-retain": Method(retain),
    "gapaware-distilled": Method(distilled),
    "gapaware-rehearsed": Method(rehearsed),
    "pseudorehearsal": Method(pseudorehearsal),
    "l2-sp": Method(l2_sp, "λ", (0.3, 1, 3, 10, 30, 100, 300)),
    "spd": Method(selective_decay, "λ", (0.3, 1, 3, 10, 30, 100, 300)),
    "ewc": Method(ewc, "λ", (1, 10, 100, 1e3, 1e4, 1e5, 1e6)),
    "lora": Method(low_rank, "rank", (1, 2, 3, 4, 8, 16, 32)),
    "lwf": Method(distillation, "λ", (0.03, 0.1, 0.3, 1, 3, 10, 30)),
    "ema": Method(averaged, "decay", (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)),
    "finch": Method(finch),
    "gapaware-consolidate": Method(consolidated),
}
