"""Fine-tune a pretrained MiniLM on tweets and see what is left of what it knew about the news.

    python -m recipes.finetune_minilm

A sentence encoder (all-MiniLM-L6-v2, 22.7M parameters) first learns to sort BBC News by topic: the
skill to keep. Then it is fine-tuned on the sentiment of tweets, from the same weights, on the same
batches in the same order, at the same settings: once with AdamW alone, once with AdamW at a tenth of
the learning rate, which is the obvious way to forget less, and once per GapAware mode with GapAware
around the first AdamW; with the mode "retain" also while its answers about topics are held on the tweets.
Both stages run in the Hugging Face Trainer. What AdamW and the mode "retain" came to is then consolidated:
taken back towards the start as far as validation on other tweets allows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from gapaware import Distillation, consolidate
from gapaware.huggingface import GapAwareTrainer, gapaware_of, optimizer_cls_and_kwargs
from recipes.assets import Classification, classification, minilm
from recipes.table import table

OLD, NEW = "old", "new"
NEW_HEAD = "heads.1."
ADAMW, ADAMW_SMALL, RETAIN = "AdamW", "AdamW, lr / 10", "GapAware (retain)"
HELD = ", old answers held"
CONSOLIDATED = ", consolidated"
COLORS = {
    ADAMW: "0.75",
    ADAMW_SMALL: "0.35",
    "GapAware (auto)": "tab:blue",
    RETAIN: "tab:orange",
    RETAIN + HELD: "tab:red",
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, the same for all methods but for the small learning rate."""

    old_steps: int = 40
    old_lr: float = 5e-5
    steps: int = 50
    lr: float = 3e-4
    weight_decay: float = 0.01
    batch_size: int = 16
    length: int = 32
    held_out: int = 400
    validation: int = 200
    keep: float = 0.95
    score_every: int = 25


@dataclass
class Result:
    """What one optimizer made of the second task, from one seed.

    ``idle`` says why GapAware's factor never left its first value, and is None where it did.
    """

    method: str
    seed: int
    steps: int
    old_before: float
    old_after: float
    new_after: float
    seconds: float
    gapaware_seconds: float
    scores: list[dict[str, float]] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    log: str | None = None
    idle: str | None = None


class Skills(nn.Module):
    """One pretrained encoder, one linear head per task; a batch says which head it is for."""

    def __init__(self, encoder: nn.Module, classes: Sequence[int]):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, n) for n in classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, task: Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Classify a batch of one task, as the Trainer calls it.

        Args:
            input_ids: token ids, (batch, length).
            attention_mask: 1 where there is a token, (batch, length).
            task: index of the head, the same for the whole batch, (batch,).
            labels: classes, (batch,); ``None`` where only the answers are wanted.

        Returns:
            ``logits`` (batch, classes of the task), and ``loss`` (scalar) where there are labels.
        """
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        sentence = (tokens * mask).sum(1) / mask.sum(1)
        logits = self.heads[int(task[0])](sentence)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Tokenized(torch.utils.data.Dataset[dict[str, Any]]):
    """A corpus as rows of token ids, padded to one length."""

    def __init__(
        self, corpus: Classification, task: int, tokenizer: PreTrainedTokenizerBase, length: int
    ):
        self.task, self.labels = task, corpus.labels
        self.tokens = tokenizer(
            corpus.texts,
            truncation=True,
            padding="max_length",
            max_length=length,
            return_token_type_ids=False,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        tokens = {name: values[row] for name, values in self.tokens.items()}
        return {**tokens, "task": self.task, "labels": self.labels[row]}


class Progress(ProgressCallback):
    """Trainer's progress bar with the run's name in front and the latest logs at its end."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(*args, **kwargs)
        self.training_bar.set_description(self.title)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show loss, learning rate and regime beside the bar instead of a line for each log."""
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        lr = logs.get("effective_learning_rate", logs["learning_rate"])
        shown = {"loss": f"{logs['loss']:.2f}", "lr": f"{lr:.0e}"}
        if "gapaware/regime" in logs:
            shown["regime"] = logs["gapaware/regime"]
        self.training_bar.set_postfix(shown, refresh=False)


class Stopwatch(TrainerCallback):
    """Seconds inside training steps; scoring on held-out texts does not count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop and add up."""
        self.seconds += time.perf_counter() - self._started


def old_answers(model: Skills, batch: dict[str, Tensor]) -> Tensor:
    """What the first task's head says of a batch of the second's, (batch, classes of the first)."""
    asked = {**batch, "task": torch.zeros_like(batch["task"]), "labels": None}
    return model(**asked)["logits"]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers, in percent."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": 100 * float(right.mean())}


def train(
    model: Skills,
    data: Tokenized,
    held_out: dict[str, Tokenized],
    settings: Settings,
    *,
    title: str,
    steps: int,
    lr: float,
    seed: int,
    output: Path,
    gapaware: dict[str, Any] | None = None,
    hold: bool = False,
    score_every: int | None = None,
) -> tuple[Trainer, float]:
    """Train ``model`` in place with AdamW, and GapAware around it where ``gapaware`` has options.

    With ``hold`` its answers to the first task are held to those that it gives now, on the second's texts.

    Returns:
        The Trainer, with its log and its optimizer, and the seconds that its steps took.
    """
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        learning_rate=lr,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=50,
        eval_strategy="steps" if score_every else "no",
        eval_steps=score_every,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )
    stopwatch = Stopwatch()
    trainer = GapAwareTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        compute_metrics=accuracy,
        callbacks=[stopwatch],
        optimizer_cls_and_kwargs=(
            None if gapaware is None else optimizer_cls_and_kwargs(args, **gapaware)
        ),
        distillation=Distillation(model, old_answers) if hold else None,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(title))
    trainer.train()
    return trainer, stopwatch.seconds


def compare(
    old: Classification,
    new: Classification,
    modes: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    settings: Settings,
    model: str | None = None,
) -> list[Result]:
    """Teach the old skill once per seed, then the new one with AdamW, twice, and with GapAware.

    Args:
        old: the task whose skill should stay.
        new: the task to fine-tune on.
        modes: GapAware modes to run beside AdamW alone, at the learning rate and at a tenth of it.
        seeds: seeds of heads, batches and dropout; the held-out texts are always the same.
        output: folder for the logs.
        settings: what all runs have in common.
        model: hub name or path of an encoder; the packaged MiniLM if ``None``.
    """
    source = model or str(minilm())
    tokenizer = AutoTokenizer.from_pretrained(source)
    output.mkdir(parents=True, exist_ok=True)

    unseen = {0: settings.held_out, 1: settings.held_out + settings.validation}

    def rows(corpus: Classification, task: int) -> Tokenized:
        return Tokenized(corpus, task, tokenizer, settings.length)

    def lessons(corpus: Classification, task: int, steps: int, seed: int) -> Tokenized:
        return rows(corpus.sample(steps * settings.batch_size, seed, unseen[task]), task)

    held_out = {
        OLD: rows(old.held_out(settings.held_out), 0),
        NEW: rows(new.held_out(settings.held_out), 1),
    }
    left = Classification(
        new.name, new.texts[settings.held_out :], new.labels[settings.held_out :], new.classes
    )
    validation = rows(left.held_out(settings.validation), 1)
    plans: list[tuple[str, float, str | None]] = [
        (ADAMW, settings.lr, None),
        (ADAMW_SMALL, settings.lr / 10, None),
        *((f"GapAware ({mode})", settings.lr, mode) for mode in modes),
        *((RETAIN + HELD, settings.lr, mode) for mode in modes if mode == "retain"),
    ]
    results = []
    for seed in seeds:
        set_seed(seed)
        pretrained = Skills(AutoModel.from_pretrained(source), [len(old.classes), len(new.classes)])
        teacher, _ = train(
            pretrained,
            lessons(old, 0, settings.old_steps, seed),
            held_out,
            settings,
            title=f"seed {seed}: {old.name} with AdamW",
            steps=settings.old_steps,
            lr=settings.old_lr,
            seed=seed,
            output=output,
        )
        start = teacher.evaluate()
        for method, lr, mode in plans:
            hold = method.endswith(HELD)
            held = "-held" if hold else ""
            log = output / f"{mode}{held}-seed{seed}.jsonl" if mode else None
            if log:
                log.unlink(missing_ok=True)
            student = deepcopy(pretrained)
            anchor = {n: p for n, p in student.named_parameters() if not n.startswith(NEW_HEAD)}
            trainer, seconds = train(
                student,
                lessons(new, 1, settings.steps, seed),
                held_out,
                settings,
                title=f"seed {seed}: {new.name} with {method}",
                steps=settings.steps,
                lr=lr,
                seed=seed,
                output=output,
                gapaware=(
                    {
                        "mode": mode,
                        "log_to": log,
                        **({"anchor": anchor} if mode == "retain" else {}),
                    }
                    if mode
                    else None
                ),
                hold=hold,
                score_every=settings.score_every,
            )
            results.append(result(method, seed, start, trainer, seconds, log))
            if method in (ADAMW, RETAIN):
                results.append(
                    taken_back(results[-1], trainer, student, pretrained, validation, settings)
                )
    return results


def taken_back(
    trained: Result,
    trainer: Trainer,
    student: Skills,
    pretrained: Skills,
    validation: Tokenized,
    settings: Settings,
) -> Result:
    """What is left of both skills after `gapaware.consolidate`, which sees the new task alone."""
    begun = time.perf_counter()

    def loss(_: nn.Module) -> float:
        return trainer.predict(validation).metrics["test_loss"]

    done = consolidate(
        student, pretrained, loss, settings.keep, fresh=[NEW_HEAD], evaluations=8, progress=False
    )
    seconds = time.perf_counter() - begun
    print(f"{trained.method}, seed {trained.seed}, consolidated: {done}")
    after = trainer.evaluate()
    return replace(
        trained,
        method=trained.method + CONSOLIDATED,
        old_after=after[f"eval_{OLD}_accuracy"],
        new_after=after[f"eval_{NEW}_accuracy"],
        seconds=trained.seconds + seconds,
        scores=[],
        learning_rates=[],
        log=None,
        idle=None,
    )


def result(
    method: str,
    seed: int,
    start: dict[str, float],
    trainer: Trainer,
    seconds: float,
    log: Path | None,
) -> Result:
    """Read a run's scores and learning rates out of the Trainer's log; ``start`` scored step 0."""
    history = trainer.state.log_history

    def scores(task: str) -> dict[int, float]:
        key = f"eval_{task}_accuracy"
        later = {int(entry["step"]): entry[key] for entry in history if key in entry}
        return {0: start[key], **later}

    old, new = scores(OLD), scores(NEW)
    last = max(old)
    wrapper = gapaware_of(trainer.optimizer)
    factors = {entry["gapaware/scale"] for entry in history if "gapaware/scale" in entry}
    idle = None
    pulls = bool(wrapper and wrapper.history and "pull" in wrapper.history[-1])
    if wrapper and len(factors) == 1 and not pulls:
        why = wrapper.history[-1]["why"] if wrapper.history else "too short for a first look"
        idle = f"the factor stayed at {factors.pop():g} ({why})"
    return Result(
        method=method,
        seed=seed,
        steps=trainer.state.global_step,
        old_before=old[0],
        old_after=old[last],
        new_after=new[last],
        seconds=seconds,
        gapaware_seconds=wrapper.seconds if wrapper else 0.0,
        scores=[{"step": step, "old": old[step], "new": new[step]} for step in sorted(old)],
        learning_rates=[
            entry.get("effective_learning_rate", entry["learning_rate"])
            for entry in history
            if "learning_rate" in entry
        ],
        log=str(log) if log else None,
        idle=idle,
    )


def summary(results: Sequence[Result], old: str, new: str) -> str:
    """The table, one row per method, means over the seeds; then the runs whose factor never moved."""
    rows = []
    for name in dict.fromkeys(run.method for run in results):
        runs = [run for run in results if run.method == name]
        seconds = sum(run.seconds for run in runs)
        share = sum(run.gapaware_seconds for run in runs) / seconds
        rows.append(
            [
                name,
                f"{fmean(run.new_after for run in runs):.1f} %",
                f"{fmean(run.old_after for run in runs):.1f} %",
                f"{fmean(run.old_after - run.old_before for run in runs):+.1f}",
                str(runs[0].steps),
                f"{seconds / len(runs):.1f}",
                f"{share:.1%}" if runs[0].log else "-",
            ]
        )
    header = ["method", f"new: {new}", f"old: {old}", "change", "steps", "seconds", "in gapaware"]
    idle = [f"{run.method}, seed {run.seed}: {run.idle}" for run in results if run.idle]
    return "\n".join([table(header, rows), *idle])


def draw(results: Sequence[Result], old: str, new: str, path: Path) -> None:
    """Scores on both tasks and the learning rate over the steps, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    for name in dict.fromkeys(run.method for run in results if run.scores):
        runs = [run for run in results if run.method == name]
        steps = [point["step"] for point in runs[0].scores]
        # AdamW lies under the others, wide enough to be seen where GapAware leaves it alone.
        width = 6 if name == ADAMW else 2
        style = {"color": COLORS.get(name, "tab:purple"), "linewidth": width, "label": name}
        for axes, task in ((left, "old"), (middle, "new")):
            curves = np.array([[point[task] for point in run.scores] for run in runs])
            axes.plot(steps, curves.mean(0), marker="o", markersize=4, **style)
            if len(runs) > 1:
                axes.fill_between(
                    steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.12, lw=0
                )
        rates = np.array([run.learning_rates for run in runs]).mean(0)
        right.plot(range(1, len(rates) + 1), rates, **style)
    left.set_title(f"Old skill: {old}", loc="left", fontweight="bold")
    left.set_ylabel("held-out accuracy, %")
    middle.set_title(f"New skill: {new}", loc="left", fontweight="bold")
    middle.set_ylabel("held-out accuracy, %")
    right.set_title("Learning rate in effect", loc="left", fontweight="bold")
    right.set_yscale("log")
    for axes in (left, middle, right):
        axes.set_xlabel("fine-tuning step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    left.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the comparison, print the table, write the figure and the raw results."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m recipes.finetune_minilm",
        description="Fine-tune a pretrained encoder on a second task: AdamW, AdamW at lr / 10, GapAware.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        default=["auto", "retain"],
        choices=["auto", "escape", "retain", "observe"],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=defaults.steps, help="on the new task")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="on the new task")
    parser.add_argument(
        "--held-out", type=int, default=defaults.held_out, help="texts per task to score on"
    )
    parser.add_argument("--model", help="encoder, hub name or path (default: the packaged MiniLM)")
    parser.add_argument("--dataset", default="tweets", help="new task: packaged or hub name, path")
    parser.add_argument("--keep-dataset", default="bbc-news", help="old task, likewise")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune-minilm"))
    options = parser.parse_args(argv)

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    settings = replace(
        defaults,
        steps=options.steps,
        lr=options.lr,
        held_out=options.held_out,
        score_every=min(defaults.score_every, options.steps),
    )
    old, new = classification(options.keep_dataset), classification(options.dataset)
    results = compare(
        old, new, options.mode, options.seeds, options.output, settings, options.model
    )
    figure, raw = options.output / "scores.png", options.output / "results.json"
    draw(results, old.name, new.name, figure)
    raw.write_text(
        json.dumps(
            {
                "settings": asdict(settings),
                "model": options.model or minilm().parent.name,
                "dataset": new.name,
                "keep_dataset": old.name,
                "versions": {"torch": torch.__version__, "transformers": transformers_version},
                "results": [asdict(run) for run in results],
            },
            indent=1,
        )
    )
    before = fmean(run.old_before for run in results)
    error = 50 / settings.held_out**0.5
    print(f"\n{old.name} before fine-tuning on {new.name}: {before:.1f} %. Afterwards:\n")
    print(summary(results, old.name, new.name))
    print(
        f"\nAccuracy on {settings.held_out} held-out texts per task (standard error of one run at "
        f"most {error:.1f} points), mean of {len(options.seeds)} seed(s); seconds are those of "
        "training steps, and of consolidating.\n"
        f"The whole took {time.perf_counter() - started:.0f} s.\n"
        f"Figure:  {figure}\n"
        f"Results: {raw}"
    )
    return results


if __name__ == "__main__":
    main()
