"""`gapaware.consolidate` at the end of a Hugging Face Trainer's training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import nn

from gapaware import arguments
from gapaware.caution import caution
from gapaware.consolidate import Consolidation, Evaluate, checked, consolidate
from gapaware.distributed import alone
from gapaware.line import AnchorWeights, matched, starting_weights

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError(
        "gapaware.consolidate_callback needs transformers and accelerate: "
        "pip install 'gapaware[transformers]'"
    ) from error


class ConsolidateCallback(TrainerCallback):
    """Takes the weights back towards the start at the end of training.

    The Trainer's validation loss, the `eval_loss` that it would log, decides how far. That happens after
    ``load_best_model_at_end`` has put the best weights in place; checkpoints hold the weights as
    trained, so that training resumes from them as ever, and `save_model` after training saves what
    is consolidated. The Trainer's logs get ``consolidate/share``, ``consolidate/kept``,
    ``consolidate/loss``, ``consolidate/start_loss`` and ``consolidate/end_loss``.

    Args:
        trainer: any Trainer with an eval_dataset; several of them count alike.
        keep: share of the gain to keep, in (0, 1].
        anchor: what the training started from. By default the weights at the beginning of training, and
            in a run that resumes those that the Trainer was built with. Of what trains then: pass the
            pretrained state dict where more is unfrozen later.
        anchor_device: where the default anchor lies during training.
        evaluate: a loss of the model to decide by instead.
        **options: for `gapaware.consolidate`: ``fresh`` (the new head!), ``start_loss``,
            ``evaluations``, ...

    Attributes:
        result: the `gapaware.Consolidation`, after training; None where that failed.

    Raises:
        TypeError, ValueError: there is no eval_dataset, an option is wrong, or the anchor does not fit the
            model; all before training.

    Warns:
        UserWarning: after training there was no loss to decide by, or to get it failed. The model stays as
            trained.

    Example:
        >>> args = TrainingArguments("run", use_cpu=True, report_to="none")
        >>> trainer = Trainer(nn.Linear(2, 1), args, eval_dataset=[{"input": [0.0, 1.0]}])
        >>> trainer.add_callback(ConsolidateCallback(trainer, keep=0.95))
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        keep: float = 0.95,
        anchor: AnchorWeights | None = None,
        anchor_device: torch.device | str = "cpu",
        evaluate: Evaluate | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer={type(trainer).__name__}: not a transformers.Trainer; pass the Trainer itself"
            )
        if evaluate is None and not _has_examples(trainer.eval_dataset):
            raise ValueError(
                "trainer: it has no eval_dataset, or an empty one, so nothing tells how far the weights "
                "may go back; give it one, or pass evaluate=, a function of the model that returns a "
                "validation loss"
            )
        self.result: Consolidation | None = None
        if evaluate is None:
            evaluate = self._validation_loss
        self._trainer, self._evaluate = trainer, evaluate
        self._anchor_device = arguments.device(
            "anchor_device", anchor_device, why="where the starting weights lie"
        )
        self._given = anchor is not None
        self._anchor: AnchorWeights | None = anchor
        # replicas have to decide alike
        group = None if alone() else torch.distributed.group.WORLD
        self._options = {"keep": keep, "process_group": group, **options}
        # an error now, not after the training that it would cost
        call = inspect.signature(consolidate).bind(trainer.model, anchor, evaluate, **self._options)
        call.apply_defaults()
        checked(**call.arguments)
        if anchor is None and trainer.model is not None:
            self._anchor = starting_weights(trainer.model, self._anchor_device)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the anchor, unless weights of a checkpoint are loaded by now."""
        model: nn.Module = kwargs["model"]
        if not self._given and state.global_step == 0:
            self._anchor = None  # to be freed first
            self._anchor = starting_weights(model, self._anchor_device)
        if self._anchor is None:
            raise ValueError(
                "anchor=None: the training resumes from a checkpoint and the Trainer was built with "
                "model_init, so the starting weights are not known; pass anchor=, their state dict"
            )
        matched(model, self._anchor, self._options.get("fresh", ()))  # an error now, not in the end

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Consolidate and log; an error leaves the model as trained, which is not to be lost."""
        assert self._anchor is not None
        if hasattr(kwargs["optimizer"], "eval"):
            # one that trains at other weights than it hands out would exchange them in mid-search
            kwargs["optimizer"].eval()
        self.result = None
        try:
            self.result = consolidate(
                kwargs["model"], self._anchor, self._evaluate, **self._options
            )
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            caution(f"ConsolidateCallback: the model stays as trained; {why}")
            return
        names = ("share", "kept", "loss", "start_loss", "end_loss")
        self._trainer.log({f"consolidate/{name}": getattr(self.result, name) for name in names})

    def _validation_loss(self, _: nn.Module) -> float:
        return validation_loss(self._trainer)


def _has_examples(dataset: Any) -> bool:
    """Whether there is something to evaluate on, as far as it tells its length."""
    parts = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    present = [
        part is not None and (not isinstance(part, Sized) or len(part) > 0) for part in parts
    ]
    return bool(present) and all(present)


def validation_loss(trainer: Trainer) -> float:
    """A Trainer's eval_loss, without its logs, metrics, progress bars and other callbacks.

    Raises:
        ValueError: the model computes no loss on the eval_dataset.
    """
    sets = trainer.eval_dataset
    names = list(sets) if isinstance(sets, Mapping) else [None]
    handler = trainer.callback_handler
    callbacks, handler.callbacks = handler.callbacks, []
    # as in training: what is not would cast the model for bf16_full_eval
    in_train, trainer.is_in_train = trainer.is_in_train, True
    losses: list[float] = []
    try:
        for name in names:
            output = trainer.evaluation_loop(
                trainer.get_eval_dataloader(name),
                description="Consolidation",
                prediction_loss_only=True,
            )
            metrics = output.metrics or {}
            if "eval_loss" not in metrics:
                raise ValueError(
                    "eval_dataset: the model computes no loss on it, which needs labels; add them, or "
                    "pass evaluate=, a function of the model that returns a validation loss"
                )
            losses.append(metrics["eval_loss"])
    finally:
        handler.callbacks, trainer.is_in_train = callbacks, in_train
    return sum(losses) / len(losses)
