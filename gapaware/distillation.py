"""Learning without Forgetting (Li and Hoiem, arXiv 1606.09282), beside the pull of mode="retain".

The pull holds the weights; the old answers can be held as well: what they depend on is then told apart
from what is free to move. Where the old task has a head of its own, the new task's inputs serve to ask.
With one head for both they contradict the new answers, and inputs of neither task serve: scrambles of the
new ones, or what the model itself wrote before (pseudorehearsal, see `gapaware.scrambled`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gapaware import arguments
from gapaware.line import may_change

_WAY_OUT = "pass its state_dict() from before fine-tuning, or leave `weights` out to copy it now"


class Distillation:
    """A loss that holds a model to its old answers while it learns something new.

    strength · T² · KL(answers before ‖ answers now), both softened by the temperature T, mean over
    everything but the classes. Needs no old data. It is of this very module, and holds what becomes of it
    in training; a copy of it that trains is not held. With one head for both tasks, the old answers to new
    inputs contradict the new ones: pass `inputs`.

    Its forward passes are not those of DistributedDataParallel: pass the model inside, and wrap that with
    find_unused_parameters=False. With True, DDP takes an old head for unused after the new task's forward
    pass, and fails at its gradient. `gapaware.huggingface.GapAwareTrainer` sees to that.

    Without `inputs` the pass at the weights of now is as in training: BatchNorm counts such a batch twice.
    With `inputs` both passes are in evaluation mode. A model that checkpoints activations in that mode too
    recomputes them in training mode, with dropout and other statistics: the backward pass fails or gives
    wrong gradients. Those of Hugging Face checkpoint in training mode alone.

    Args:
        model: before fine-tuning; it is called at each step with the weights of now and of then.
        answers: `answers(model, batch)`, the old task's logits on a batch of the new one's inputs,
            (..., classes). Reaches everything through the model that it is given.
        inputs: `inputs(batch)`, what to ask about instead of the batch itself, in evaluation mode so that
            running statistics stay those of the new task: `gapaware.scrambled`; for a language model a
            function that returns texts drawn from it before fine-tuning; with a head for each task
            `lambda x: torch.cat([x, gapaware.scrambled(x)])`.
        weights: of the start, a state dict or a module; None copies the model's own now. Names that the
            model does not have are left out, buffers that a state dict does not save, and what training
            cannot change (`starting_weights` has neither), are its own now, and of tied weights any name
            will do.
        strength: of the loss beside the new task's.
        temperature: T. Above 1 unlikely classes count too.

    Raises:
        TypeError: `model` is no module, `answers` or `inputs` no function, or `weights` has no tensors.
        ValueError: strength or temperature is not positive, or `weights` lacks some or has other shapes.

    Example:
        >>> trunk, old_head, new_head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3), torch.nn.Linear(8, 2)
        >>> model = torch.nn.ModuleDict({"trunk": trunk, "old": old_head, "new": new_head})
        >>> held = Distillation(model, lambda model, x: model["old"](model["trunk"](x)))
        >>> x = torch.randn(5, 4)
        >>> round(held(x).item(), 6)
        0.0
        >>> with torch.no_grad():
        ...     _ = trunk.weight.mul_(2)
        >>> held(x).item() > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        answers: Callable[[Any, Any], Tensor],
        *,
        inputs: Callable[[Any], Any] | None = None,
        weights: Mapping[str, Tensor] | nn.Module | None = None,
        strength: float = 2.0,
        temperature: float = 2.0,
    ) -> None:
        arguments.module("model", model)
        if not callable(answers):
            raise TypeError(
                f"answers={type(answers).__name__}: not callable; pass a function of model and batch, "
                "such as lambda model, x: model(x)"
            )
        if not (inputs is None or callable(inputs)):
            raise TypeError(
                f"inputs={type(inputs).__name__}: not callable; pass a function of the batch, such as "
                "gapaware.scrambled"
            )
        self.strength = arguments.positive("strength", strength, why="how much old answers count")
        self.temperature = arguments.positive("temperature", temperature, why="how soft they are")
        self._asked = _Asked(model, answers)
        self._inputs = inputs
        own = dict(_named(model))
        given = own if weights is None else arguments.state_dict("weights", weights)
        saved = dict(model.named_parameters()).keys() | model.state_dict().keys()
        missing = []
        self.weights: dict[str, Tensor] = {}
        for names in _names_of_each(own):
            name = next((name for name in names if name in given), names[0])
            # what training cannot change, `starting_weights` leaves out
            if name not in given and not saved.isdisjoint(names) and may_change(own[name]):
                missing.append(name)
                continue
            start, like = given.get(name, own[name]), own[name]
            start = arguments.weight(f"weights[{name!r}]", start, like, instead=_WAY_OUT)
            self.weights[names[0]] = start.detach().clone()
        if missing:
            raise ValueError(f"weights: lacks {arguments.some(missing)} of the model; {_WAY_OUT}")

    def __call__(self, batch: Any) -> Tensor:
        """The loss on a batch, to be added to the new task's: a scalar that gradients flow through.

        It is 0 where there are no answers, such as those at a mask without a place.

        Raises:
            TypeError: the answers are no tensor.
            ValueError: they are single numbers, which have no distribution over classes; or the model has
                lost weights of the start, as where adapters have wrapped its layers.
        """
        if self._inputs is not None:
            batch = self._inputs(batch)
        with torch.no_grad(), _evaluating(self._asked.model):
            then = self._softened(self._answers_then(batch))
        with nullcontext() if self._inputs is None else _evaluating(self._asked.model):
            now = self._softened(self._asked(batch))
        apart = F.kl_div(now, then, log_target=True, reduction="sum") / max(len(now), 1)
        return self.strength * self.temperature**2 * apart

    def is_of(self, model: nn.Module) -> bool:
        """Whether any parameter of a model is one of those that are held to their old answers."""
        held = {id(parameter) for parameter in self._asked.model.parameters()}
        return any(id(parameter) in held for parameter in model.parameters())

    def _answers_then(self, batch: Any) -> Any:
        now = dict(_named(self._asked.model))
        # functional_call would ignore them, and the model would be held to itself
        if gone := [name for name in self.weights if name not in now]:
            raise ValueError(
                f"model: no longer has {arguments.some(gone)}; build Distillation after adding adapters or "
                "wrapping layers, and if training has begun by then, with weights= from before it under "
                "the new names"
            )
        for name, start in self.weights.items():
            # only where the model has moved since: a Trainer moves it after this was built
            self.weights[name] = start.to(now[name].device, now[name].dtype)
        weights = {f"model.{name}": tensor for name, tensor in self.weights.items()}
        return functional_call(self._asked, weights, (batch,))

    def _softened(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"answers: gave a {type(logits).__name__}; return the logits, a tensor: of a Hugging Face "
                "model `model(**batch).logits`"
            )
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise ValueError(
                f"answers: gave logits of shape {tuple(logits.shape)}; return (..., classes) with at "
                "least two, for a single number per example torch.stack((z, 0 * z), -1)"
            )
        softened = F.log_softmax(logits.flatten(0, -2).float() / self.temperature, -1)
        # masked classes have -inf, and their share 0 · (inf - inf) would be NaN
        return softened.clamp_min(-1e30)


class _Asked(nn.Module):
    """The answers as a module, whose weights can be replaced for a call."""

    def __init__(self, model: nn.Module, answers: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.answers = answers

    def forward(self, batch: Any) -> Tensor:
        return self.answers(self.model, batch)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers; tied ones under each of their names."""
    return chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )


def _names_of_each(named: Mapping[str, Tensor]) -> list[list[str]]:
    """All names of each tensor: a file may have kept any one of tied ones."""
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and with fixed statistics, each module back in its mode afterwards."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
