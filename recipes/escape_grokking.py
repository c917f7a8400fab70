"""Leave a plateau: grokking modular addition with AdamW alone and with GapAware around it.

    python -m recipes.escape_grokking

A small network learns a + b mod 41 from half of all pairs. With AdamW it knows the training pairs by
heart within a few hundred steps and then stands still for thousands, until it suddenly understands
the rule. GapAware sees that the updates keep drifting the same way, long after the optimizer's momentum
has forgotten, while their spectrum is quiet, and raises the learning rate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from tqdm.auto import tqdm

from gapaware import GapAware
from recipes.table import table

TARGET = 0.95


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, the same for AdamW and GapAware."""

    modulus: int = 41
    width: int = 64
    hidden: int = 128
    lr: float = 1e-3
    weight_decay: float = 1.0
    budget: int = 12_000
    score_every: int = 10


@dataclass
class Result:
    """What one optimizer needed from one seed; ``steps_to_target`` is None if it did not get there."""

    method: str
    seed: int
    steps_to_target: int | None
    seconds: float
    gapaware_seconds: float
    steps: list[int] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    log: str | None = None


class Adder(nn.Module):
    """Embeds two residues with one table and classifies their sum with one hidden layer."""

    def __init__(self, modulus: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(modulus, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.output = nn.Linear(hidden, modulus)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (n, modulus) of pairs of residues (n, 2)."""
        return self.output(relu(self.hidden(self.embedding(pairs).flatten(1))))


def all_sums(modulus: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half of all pairs and their sums for training, the other half held out."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    known, held_out = order.chunk(2)
    sums = pairs.sum(1) % modulus
    return pairs[known], sums[known], pairs[held_out], sums[held_out]


def grok(
    method: str,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    seed: int,
    settings: Settings,
    log: Path | None = None,
) -> Result:
    """Train on the full batch until 95 % of the held-out sums are right, or the budget is spent."""
    known, answers, held_out, held_out_answers = all_sums(settings.modulus, seed)
    torch.manual_seed(seed)
    model = Adder(settings.modulus, settings.width, settings.hidden)
    optimizer = build(model)
    run = Result(method, seed, None, 0.0, 0.0, log=str(log) if log else None)
    with tqdm(total=settings.budget, desc=f"seed {seed}: {method}", unit="step") as bar:
        for step in range(1, settings.budget + 1):
            started = time.perf_counter()
            optimizer.zero_grad()
            logits = model(known)
            loss = cross_entropy(logits, answers)
            loss.backward()
            if isinstance(optimizer, GapAware):
                optimizer.log(loss=loss)
            optimizer.step()
            run.seconds += time.perf_counter() - started
            if step % settings.score_every:
                continue
            with torch.no_grad():
                right = (model(held_out).argmax(1) == held_out_answers).float().mean().item()
            known_right = (logits.argmax(1) == answers).float().mean().item()
            run.steps.append(step)
            run.train_accuracy.append(known_right)
            run.held_out_accuracy.append(right)
            run.scale.append(optimizer.scales[0] if isinstance(optimizer, GapAware) else 1.0)
            bar.update(settings.score_every)
            bar.set_postfix({"held out": f"{right:.0%}", "scale": f"{run.scale[-1]:.1f}"})
            if right >= TARGET:
                run.steps_to_target = step
                break
    if isinstance(optimizer, GapAware):
        run.gapaware_seconds = optimizer.seconds
    return run


def compare(mode: str, seeds: Sequence[int], output: Path, settings: Settings) -> list[Result]:
    """Run AdamW alone and GapAware around the same AdamW, from the same seeds."""
    output.mkdir(parents=True, exist_ok=True)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    results = []
    for seed in seeds:
        results.append(grok("AdamW", adamw, seed, settings))
        log = output / f"{mode}-seed{seed}.jsonl"
        log.unlink(missing_ok=True)
        results.append(
            grok(
                f"GapAware ({mode})",
                lambda model, log=log: GapAware(adamw(model), mode=mode, log_to=log),
                seed,
                settings,
                log,
            )
        )
    return results


def summary(results: Sequence[Result]) -> str:
    """One row per method and seed, and the geometric mean of the speed-up."""
    rows = [
        [
            run.method,
            str(run.seed),
            str(run.steps_to_target or f"> {run.steps[-1]}"),
            f"{run.seconds:.1f}",
            f"{run.gapaware_seconds / run.seconds:.1%}" if run.log else "-",
        ]
        for run in sorted(results, key=lambda run: bool(run.log))
    ]
    text = table(["method", "seed", "steps to 95 %", "seconds", "in gapaware"], rows)
    alone = {run.seed: run.steps_to_target or run.steps[-1] for run in results if not run.log}
    pairs = [(alone[run.seed], run.steps_to_target) for run in results if run.log]
    if pairs and all(steps for _, steps in pairs):
        ratio = geometric_mean(ours / steps for ours, steps in pairs)
        text += f"\n\n{ratio:.1f} times fewer steps with GapAware (geometric mean over the seeds)"
        if any(run.steps_to_target is None for run in results):
            text += ", at least: AdamW ran out of its budget"
    return text


def draw(results: Sequence[Result], modulus: int, path: Path) -> None:
    """Accuracy and GapAware's scale over the steps, the steps on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.4), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for run in results:
        color = "tab:blue" if run.log else "0.5"
        held_out = [100 * share for share in run.held_out_accuracy]
        known = [100 * share for share in run.train_accuracy]
        top.plot(run.steps, held_out, color=color, linewidth=2)
        top.plot(run.steps, known, color=color, linewidth=1, linestyle=":")
        bottom.plot(run.steps, run.scale, color=color, linewidth=2)
    for name in dict.fromkeys(run.method for run in results):
        reached = [r.steps_to_target for r in results if r.method == name and r.steps_to_target]
        if reached:
            middle = geometric_mean(reached)
            top.annotate(
                f"{name}\n{middle:.0f} steps",
                (middle, 100),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontweight="bold",
                color="0.35" if name == "AdamW" else "tab:blue",
            )
    top.plot([], [], color="black", linewidth=2, label="held-out sums")
    top.plot([], [], color="black", linewidth=1, linestyle=":", label="training sums")
    top.legend(frameon=False, fontsize="small", loc="center", bbox_to_anchor=(0.73, 0.55))
    top.set(ylabel="accuracy, %", ylim=(0, 120), yticks=range(0, 101, 20))
    top.set_title(f"Grokking a + b mod {modulus}", loc="left", fontweight="bold")
    bottom.set(ylabel="scale on lr", xlabel="training step", xscale="log", yscale="log")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison, print the table, write the figure and the raw results."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m recipes.escape_grokking",
        description="Grok modular addition with AdamW alone and with GapAware around it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mode", default="auto", choices=["auto", "escape", "retain", "observe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=defaults.budget, help="steps at most")
    parser.add_argument("--output", type=Path, default=Path("runs/escape-grokking"))
    options = parser.parse_args(argv)
    if options.budget < defaults.score_every:
        parser.error(
            f"--budget {options.budget}: the score is taken every {defaults.score_every} steps; pass at "
            f"least {defaults.score_every}"
        )

    # The matrices are too small to share: a second thread wins little alone and loses much when
    # anything else runs.
    torch.set_num_threads(1)
    settings = Settings(budget=options.budget)
    results = compare(options.mode, options.seeds, options.output, settings)
    figure, raw = options.output / "accuracy.png", options.output / "results.json"
    draw(results, settings.modulus, figure)
    raw.write_text(
        json.dumps(
            {
                "settings": asdict(settings),
                "versions": {"torch": torch.__version__},
                "results": [asdict(run) for run in results],
            },
            indent=1,
        )
    )
    print(f"\n{summary(results)}\n\nFigure:  {figure}\nResults: {raw}")
    return results


if __name__ == "__main__":
    main()
