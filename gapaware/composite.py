"""Several optimizers over one model as one `torch.optim.Optimizer`, and Muon with AdamW as its main use."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gapaware import arguments
from gapaware.delegation import Delegating, all_or_nothing

if TYPE_CHECKING:
    from gapaware.optimizer import GapAware


# embeddings and output heads, as Hugging Face, timm and nanoGPT call them
ADAMW_PARAMETERS = (
    "*embed*",
    "wte",
    "wpe",
    "lm_head",
    "head",
    "heads",
    "classifier",
    "score",
    "fc",
)


class Composite(Delegating):
    """Optimizers that step together; schedulers, clipping and checkpoints see one optimizer.

    The parameter groups are those of the optimizers, one after the other, and each keeps its own
    hyperparameters. A checkpoint is in the layout of `torch.optim.Optimizer`.

    Args:
        optimizers: at least one; no two may share a parameter.

    Raises:
        TypeError: one of them is no optimizer, or a `GapAware`.
        ValueError: no optimizers, a parameter in two of them, or LBFGS.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = Composite(
        ...     torch.optim.Muon([model.weight], lr=0.02), torch.optim.AdamW([model.bias], lr=1e-3)
        ... )
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.02, 0.001]
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        if not optimizers:
            raise ValueError("optimizers=(): nothing to combine; pass at least one optimizer")
        from gapaware.optimizer import GapAware

        owned: set[int] = set()
        for optimizer in optimizers:
            if isinstance(optimizer, GapAware):
                raise TypeError(
                    "optimizers: one is a GapAware; combine the optimizers and wrap the whole, "
                    "GapAware(Composite(...))"
                )
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizers: {optimizer!r:.60} is not a torch.optim.Optimizer; pass optimizers "
                    "that are built"
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "optimizers: LBFGS evaluates the closure itself, several times a step, and here it is "
                    "evaluated once for all; wrap LBFGS alone, GapAware(LBFGS(...))"
                )
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if owned & mine:
                raise ValueError(
                    f"optimizers: {len(owned & mine)} parameters belong to two optimizers; "
                    "give each parameter to one of them"
                )
            owned |= mine
        self.optimizers = list(optimizers)
        super().__init__()

    @property
    def wrapped(self) -> list[torch.optim.Optimizer]:
        """The optimizers."""
        return self.optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The states of all optimizers, by parameter: a view of theirs."""
        return _States(self.optimizers)

    @property
    def defaults(self) -> dict[str, Any]:
        """What all of them have, with the values of the last, which takes new groups.

        Schedulers that cycle momentum look here for its name; where the optimizers do not share one they
        say so, and take `cycle_momentum=False`.
        """
        shared = set.intersection(*(set(optimizer.defaults) for optimizer in self.optimizers))
        return {key: self.optimizers[-1].defaults[key] for key in sorted(shared)}

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        raise AttributeError("defaults of a Composite are those of its optimizers; set them there")

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Step every optimizer once, after one evaluation of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the last optimizer, which for `muon` is AdamW and takes any tensor.

        Raises:
            ValueError: another of the optimizers has one of its parameters.
        """
        last = self.optimizers[-1]
        last.add_param_group(param_group)
        owned = {
            id(p) for other in self.optimizers[:-1] for g in other.param_groups for p in g["params"]
        }
        if again := sum(id(p) in owned for p in last.param_groups[-1]["params"]):
            last.param_groups.pop()
            raise ValueError(
                f"param_group: {again} of its parameters belong to another optimizer here; "
                "give each parameter to one of them"
            )

    def _save(self) -> dict[str, Any]:
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            # their parameters are numbered from 0 in each, here one after the other
            first = sum(len(group["params"]) for group in groups)
            theirs = optimizer.state_dict()
            for key, value in theirs["state"].items():
                state[key + first if isinstance(key, int) else key] = value
            for group in theirs["param_groups"]:
                groups.append({**group, "params": [key + first for key in group["params"]]})
        return {"state": state, "param_groups": groups}

    def _load(self, state_dict: dict[str, Any]) -> None:
        with all_or_nothing(self):
            groups = state_dict["param_groups"]
            ours = [len(group["params"]) for group in self.param_groups]
            theirs = [len(group["params"]) for group in groups]
            if ours != theirs:
                raise ValueError(
                    f"state_dict: parameters per group are {theirs}, this optimizer has {ours}; "
                    "build it as it was built when the state was saved"
                )
            first = 0
            for optimizer in self.optimizers:
                mine = groups[first : first + len(optimizer.param_groups)]
                first += len(mine)
                keys = {key for group in mine for key in group["params"]}
                state = {key: value for key, value in state_dict["state"].items() if key in keys}
                optimizer.load_state_dict({"state": state, "param_groups": mine})


class _States(MutableMapping[Tensor, Any]):
    """The `state` of several optimizers as one, in which every parameter has its own optimizer's."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._states = [optimizer.state for optimizer in optimizers]
        self._home = {
            id(parameter): optimizer.state
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _of(self, key: Any) -> Any:
        if id(key) not in self._home:
            raise KeyError(key)
        return self._home[id(key)]

    def __getitem__(self, key: Tensor) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._home and key in self._home[id(key)]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for state in self._states for parameter in state)

    def __len__(self) -> int:
        return sum(map(len, self._states))


def muon(
    model: nn.Module,
    lr: float = 2e-2,
    adamw_lr: float = 3e-4,
    *,
    weight_decay: float = 0.1,
    adamw_weight_decay: float | None = None,
    momentum: float = 0.95,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adjust_lr_fn: str | None = None,
    adamw_parameters: Iterable[str] = ADAMW_PARAMETERS,
    **gapaware_arguments: Any,
) -> "GapAware":
    """Muon for the hidden matrices, AdamW for everything else, and GapAware around both.

    Args:
        model: its trainable parameters are shared out.
        lr: of Muon.
        adamw_lr: of AdamW.
        weight_decay: decoupled decay of the matrices.
        adamw_weight_decay: of AdamW's matrices, such as embeddings; `weight_decay` when None. Vectors
            (biases, norms) have none.
        momentum: of Muon.
        adamw_betas: of AdamW.
        adjust_lr_fn: of `torch.optim.Muon`; "match_rms_adamw" reuses AdamW's lr.
        adamw_parameters: patterns, with `*`, of a part between the dots of a parameter's name. Matrices
            with such a part, embeddings and output heads, go to AdamW, as Muon's author advises; embedding
            modules are known by their class.
        gapaware_arguments: for `GapAware`, such as `mode`.

    Returns:
        A `GapAware` around a `Composite`.

    Raises:
        TypeError: `model` is no module, or `adamw_parameters` one string.
        ValueError: the model has no trainable matrix for Muon.

    Example:
        >>> model = nn.ModuleDict({"hidden": nn.Linear(4, 8), "head": nn.Linear(8, 2)})
        >>> optimizer = muon(model, lr=2e-2, adamw_lr=3e-4)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        [(1, 0.02, 0.1), (1, 0.0003, 0.1), (2, 0.0003, 0.0)]
    """
    from gapaware.optimizer import GapAware

    arguments.module("model", model)  # names and kinds of layers tell which parameters are Muon's
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    # of one string the letters would be patterns
    named = adamw_parameters if isinstance(adamw_parameters, str) else tuple(adamw_parameters)
    patterns = arguments.names("adamw_parameters", named)
    matrices: list[tuple[str, nn.Parameter]] = []
    other_matrices: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2:
            (vectors if parameter.ndim < 2 else other_matrices).append((name, parameter))
        elif id(parameter) in embeddings or any(
            fnmatchcase(part, pattern) for part in name.split(".") for pattern in patterns
        ):
            other_matrices.append((name, parameter))
        else:
            matrices.append((name, parameter))
    if not matrices:
        raise ValueError(
            "model: no trainable 2-D parameter outside embeddings and heads, nothing for Muon to do; "
            "use GapAware(torch.optim.AdamW(...)) or change adamw_parameters"
        )
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=adjust_lr_fn
        )
    ]
    decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    groups = [
        {"params": parameters, "weight_decay": group_decay}
        for parameters, group_decay in ((other_matrices, decay), (vectors, 0.0))
        if parameters
    ]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=adamw_lr, betas=adamw_betas))
    return GapAware(Composite(*optimizers), **gapaware_arguments)
