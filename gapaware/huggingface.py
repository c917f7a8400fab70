"""GapAware inside the Hugging Face Trainer.

Two doors, each useful without the other: `optimizer_cls_and_kwargs` gives the Trainer a wrapped
optimizer, and `GapAwareTrainerMixin` puts what it did into the Trainer's logs.

    from gapaware.huggingface import GapAwareTrainer, optimizer_cls_and_kwargs

    args = TrainingArguments(output_dir="run", learning_rate=3e-4, weight_decay=0.01)
    trainer = GapAwareTrainer(
        model=model,
        args=args,
        train_dataset=data,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(
            args, mode="retain", log_to="run.jsonl"
        ),
    )
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gapaware import Distillation, GapAware, muon
from gapaware.distributed import alone

try:
    import transformers
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(
        "gapaware.huggingface needs transformers and accelerate: "
        "pip install 'gapaware[transformers]'"
    ) from error

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"transformers {transformers.__version__}: its Trainer cannot build an optimizer from a "
        "factory; gapaware.huggingface needs transformers >= 5: "
        "pip install 'gapaware[transformers]'"
    )

if TYPE_CHECKING:
    TrainerToMixInto = Trainer
else:
    TrainerToMixInto = object

Base = str | Callable[[nn.Module], torch.optim.Optimizer] | None


def optimizer_cls_and_kwargs(
    args: TrainingArguments, *, base: Base = None, **options: Any
) -> tuple[type[Factory], dict[str, Any]]:
    """Make the Trainer wrap its optimizer in GapAware.

    A plain Trainer tells an optimizer nothing of the loss: the law then goes by the updates alone, and
    leaves plateaus later. `GapAwareTrainer` logs the loss of each step.

    Args:
        args: the Trainer's own arguments. ``optim``, ``learning_rate``, ``weight_decay``, the
            betas and epsilon keep their meaning, and so does its schedule: GapAware scales on top
            of it.
        base: the optimizer to wrap.

            - ``None``: the one that ``args.optim`` names, with the grouping of a plain Trainer (no
              decay on biases and norms); a subclass that groups in another way passes a function.
            - ``"adamw"``: ``torch.optim.AdamW`` with that grouping, whatever ``args.optim`` says.
            - ``"muon"``: `gapaware.muon`: Muon on hidden matrices, AdamW on the rest, both at
              ``args.learning_rate``, which Muon then matches to AdamW's step size.
            - a function of the model that returns an optimizer. That may be a GapAware already, to
              which the function gives the ``process_group`` where there are several processes.
        **options: for `GapAware`: ``mode``, ``window``, ``log_to``, ...

    Returns:
        What the Trainer takes under the same name.

    Raises:
        TypeError: if ``args`` is no TrainingArguments, or an option is not one of GapAware's.
        ValueError: if ``base`` is not one of the above, or ``args`` asks for DeepSpeed.

    Example:
        >>> args = TrainingArguments(output_dir="run", learning_rate=3e-4, use_cpu=True)
        >>> model = nn.Linear(4, 2)
        >>> trainer = Trainer(
        ...     model=model,
        ...     args=args,
        ...     optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, mode="observe"),
        ... )
        >>> type(trainer.create_optimizer()).__name__
        'GapAware'
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args={args!r}: not a transformers.TrainingArguments; pass those that the Trainer gets"
        )
    known = inspect.signature(GapAware).parameters.keys() - {"base"}
    if unknown := options.keys() - known:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no option of GapAware; it has {', '.join(sorted(known))}"
        )
    if not (base is None or base in ("adamw", "muon") or _builds_from_a_model(base)):
        raise ValueError(
            f"base={base!r:.60}: pass None (the optimizer that args.optim names), 'adamw', 'muon', or "
            "a function of the model, such as "
            "base=lambda model: torch.optim.SGD(model.parameters(), lr=1e-2)"
        )
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "args.deepspeed: DeepSpeed partitions the parameters away from the optimizer, so there "
            "are no updates to watch; use FSDP (args.fsdp) or a single device"
        )
    return Factory, {"args": args, "base": base, **options}


class Factory:
    """What the Trainer makes and calls: ``Factory()(model, args=..., base=..., **options)``."""

    def __call__(
        self, model: nn.Module, *, args: TrainingArguments, base: Base = None, **options: Any
    ) -> GapAware:
        """Build the base optimizer for ``model`` and wrap it; arguments as above.

        Raises:
            TypeError: ``base`` returned no optimizer.
            ValueError: it returned a GapAware and there are options for another one.
        """
        # the Trainer steps on all ranks together, so they can agree on every snapshot
        together = {"process_group": None if alone() else torch.distributed.group.WORLD, **options}
        if callable(base):
            built = base(model)
            if not isinstance(built, torch.optim.Optimizer):
                raise TypeError(
                    f"base returned {type(built).__name__}: return an optimizer, such as "
                    "torch.optim.SGD(model.parameters(), lr=1e-2)"
                )
            if not isinstance(built, GapAware):
                return GapAware(_named(built, model), **together)
            if options:
                raise ValueError(
                    f"{', '.join(options)}: base returned a GapAware, which has its options "
                    "already; give them there, or let base return the optimizer inside"
                )
            return built
        if base == "muon":
            return muon(
                model,
                lr=args.learning_rate,
                adamw_lr=args.learning_rate,
                weight_decay=args.weight_decay,
                adamw_betas=(args.adam_beta1, args.adam_beta2),
                adjust_lr_fn="match_rms_adamw",
                **together,
            )
        if base == "adamw":
            args = copy.copy(args)
            args.optim = "adamw_torch"
        return GapAware(_named(_trainers_own_optimizer(model, args), model), **together)


class GapAwareTrainerMixin(TrainerToMixInto):
    """Put what GapAware does into a Trainer's logs, and the training loss into GapAware's history.

    Mix it in front of any Trainer: ``class MyTrainer(GapAwareTrainerMixin, SFTTrainer): ...``. Each
    time the Trainer logs a learning rate, these stand beside it in every logging backend:

    - ``effective_learning_rate``: ``learning_rate``, which stays the schedule's, times the scale;
    - ``gapaware/scale``: GapAware's factor in the step just made, that of the first group or
      block with a finer ``granularity``; then ``gapaware/scale_min`` and ``gapaware/scale_max``
      stand beside it;
    - ``gapaware/regime``: the name of the regime (text, which some backends leave out);
    - ``gapaware/risk``: of forgetting, the squared distance from the weights at the first step relative to
      them (see ``risk_limit`` of `GapAware`), at the last snapshot known. Callbacks see it in ``on_log``.

    With an optimizer that is not wrapped in GapAware it changes nothing in them.

    Args:
        distillation: a loss on a batch (a dict, as the Trainer has it) that is added in training:
            a `gapaware.Distillation`. All other arguments are the Trainer's. With it
            ``args.ddp_find_unused_parameters`` becomes False where it is None, as DDP would take an old
            head for unused; pass True where one head serves both tasks and some weights serve neither.

    Raises:
        TypeError: ``distillation`` is no function.
        ValueError: when training begins, it is a `gapaware.Distillation` of another model.
    """

    _loss_of_step: float | Tensor = 0.0
    _scales_of_step: list[float] | None = None

    def __init__(
        self, *args: Any, distillation: Callable[[Any], Tensor] | None = None, **kwargs: Any
    ) -> None:
        if not (distillation is None or callable(distillation)):
            raise TypeError(
                f"distillation={distillation!r}: not callable; pass a gapaware.Distillation, or another "
                "function of the batch that returns a loss"
            )
        self.distillation = distillation
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does, which reads the settings of DDP here."""
        if self.distillation is not None and self.args.ddp_find_unused_parameters is None:
            # DDP does not see the forward pass in which an old head answers
            self.args.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss and, in training, the distillation's."""
        # a Trainer may take the labels out of its own
        batch = dict(inputs) if isinstance(inputs, Mapping) else inputs
        computed: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self.distillation is None or not model.training:
            return computed
        loss, outputs = computed if return_outputs else (computed, None)
        held = self.distillation(batch)
        if self._is_scaled_for_accumulation(num_items_in_batch):
            held = held / self.current_gradient_accumulation_steps
        return (loss + held, outputs) if return_outputs else loss + held

    def _is_scaled_for_accumulation(self, items: Any) -> bool:
        """Whether the Trainer takes the loss for a share of the step's already, and divides it no more."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        by_model = self.model_accepts_loss_kwargs and items is not None
        return bool(by_model or self.compute_loss_func is not None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer does when a run begins: a step that another one left unfinished is forgotten."""
        self._loss_of_step, self._scales_of_step = 0.0, None
        held = self.distillation
        if isinstance(held, Distillation) and self.model is not None and not held.is_of(self.model):
            raise ValueError(
                "distillation: is of another model than the Trainer trains, and would hold nothing; build "
                "it of the very module that is passed as model= (model_init= makes a new one)"
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch; this process's loss of a whole step goes into GapAware's history."""
        loss: Tensor = super().training_step(*args, **kwargs)
        wrapper = gapaware_of(self.optimizer)
        if wrapper is not None:
            self._loss_of_step = self._loss_of_step + loss
            if self.accelerator.sync_gradients:
                wrapper.log(loss=self._loss_of_step)
                self._loss_of_step = 0.0
                # The step to come may end in a decision, and the logs are about the step.
                self._scales_of_step = wrapper.scales
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log ``logs`` and, beside a learning rate, what GapAware made of it."""
        wrapper = gapaware_of(self.optimizer)
        if wrapper is not None and "learning_rate" in logs:
            # Before its first step GapAware knows no rows yet.
            scales = self._scales_of_step or wrapper.scales or [1.0]
            logs["effective_learning_rate"] = logs["learning_rate"] * scales[0]
            logs["gapaware/scale"] = scales[0]
            if min(scales) != max(scales):
                logs["gapaware/scale_min"] = min(scales)
                logs["gapaware/scale_max"] = max(scales)
            if wrapper.history:
                last = wrapper.history[-1]
                logs["gapaware/regime"] = last["regime"]
                if "risk" in last:
                    logs["gapaware/risk"] = last["risk"]
        super().log(logs, start_time)


class GapAwareTrainer(GapAwareTrainerMixin, Trainer):
    """The Hugging Face Trainer with what GapAware does in its logs."""


def gapaware_of(optimizer: Any) -> GapAware | None:
    """The GapAware inside an optimizer as the Trainer holds it, wrapped by accelerate or not.

    >>> gapaware_of(torch.optim.SGD([nn.Parameter(torch.zeros(1))])) is None
    True
    """
    while optimizer is not None and not isinstance(optimizer, GapAware):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _builds_from_a_model(base: Any) -> bool:
    return callable(base) and not isinstance(base, type)


def _named(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Give the parameter groups their names, as `named_parameters()` would have.

    The Trainer builds groups without: then nobody could say which layer is a block, or what to pull to.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    members = [parameter for group in groups for parameter in group["params"]]
    if all(id(p) in names for p in members) and not any("param_names" in g for g in groups):
        for group in groups:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
    return optimizer


def _trainers_own_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that the Trainer would build from ``args``, with its groups and special cases.

    A Trainer's full construction would move the model and start logging backends, and all that
    ``create_optimizer`` reads are these four attributes.
    """
    trainer = object.__new__(Trainer)
    trainer.args, trainer.model = args, model
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    return optimizer
