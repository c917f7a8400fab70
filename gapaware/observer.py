"""From parameters to the Gram matrix of the last updates: takes the snapshots and keeps the window.

An update is what the wrapped optimizer did. Where a pull towards the starting weights moved them too, that
is taken off: gradient and pull soon balance each other, and weights that stand still say nothing about how
steadily the gradient pushes.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gapaware import layout
from gapaware.anchor import pulled
from gapaware.blocks import WIDTH
from gapaware.decay import decay_rate
from gapaware.delegation import leaves
from gapaware.distributed import Sharing, Unsupported, is_dtensor, local, refuse, sharing
from gapaware.identity import Identity
from gapaware.risk import Start
from gapaware.scaling import Scales
from gapaware.sighting import Conditions, Said, Sighting, column
from gapaware.sketch import CountSketch
from gapaware.transfer import Transfer, send
from gapaware.window import Window

# rows with a sketch of full length; more share the length of as many, down to a least one
FULL_ROWS, LEAST_DIM = 4, 1024

# others may have no storage of their own
_PLAIN = (Tensor, torch.nn.Parameter)


class NotFinite(ValueError):
    """NaN or infinity in a snapshot; ranks that share a sketch all find it at the same step."""


class RankFault(NotFinite):
    """A rank could not say what it saw, which is no fault of the parameters."""


class Observer:
    """Sketches the parameters at each snapshot and keeps the window of their differences.

    FSDP2 and accelerate swap parameters under the optimizer, so they are looked up at each call, and what
    the sketch keeps of where they lie goes as soon as one has moved. When the set of trainable parameters
    changes the window starts anew, also where another adapter of the same shape takes a turn. That is told
    by places in the groups, which are the same on all ranks.

    Where parameters are sharded, every rank calls `start` and `look` at the same steps, and each call adds
    the ranks' sketches up once, even when a rank could not compute its own: it then adds NaN, and all ranks
    find the same fault at the next snapshot.

    Args:
        window: W.
        sketch_dim: length of a row's sketch, see `_dim`; None for exact updates.
        granularity: see `layout.rows`.
        seed: of the sketch.
        replicas: global ranks that hold the same whole parameters and have to agree on every sketch.
    """

    def __init__(
        self,
        window: int,
        sketch_dim: int | None,
        granularity: str,
        seed: int,
        replicas: tuple[int, ...] = (),
    ) -> None:
        self.replicas = replicas
        self.settings: dict[str, Any] = {
            "window": window,
            "sketch_dim": sketch_dim,
            "granularity": granularity,
            "seed": seed,
        }
        self._size = window
        self._granularity = granularity
        self._sketch: CountSketch | Identity | None = None
        self._start: Start | None = None
        self.restart()

    def restart(self) -> None:
        """Forget everything that was seen, but not where training began: it outlasts a fault."""
        self._sum: Transfer | None = None
        self._said: Said | None = None
        self._trouble = ""
        self._spoilt = False
        self._signature: list[layout.RowSignature] = []
        self._row_groups: list[int] = []
        self._last: Tensor | None = None
        self._window: Window | None = None
        self._conditions: deque[Conditions] = deque(maxlen=self._size + 1)
        # tensors where the learning rate is one on CUDA, which the host cannot read without waiting
        self._rates: list[float | Tensor | None] = []
        self._lr_sums: list[float | Tensor] = []
        self._pulls: list[float | Tensor] = []
        self._origin: Tensor | None = None
        self._span = 0

    @property
    def names(self) -> list[str]:
        """The name of each row, as of the last snapshot."""
        return [name for name, *_ in self._signature]

    @property
    def row_groups(self) -> list[int]:
        """The parameter group of each row, as of the last snapshot."""
        return self._row_groups

    @property
    def begins_anew(self) -> bool:
        """Whether a window has begun, and no step was made since."""
        return self._window is not None and not self._conditions and self._span == 0

    def spoil(self, error: Exception) -> None:
        """Let a fault on this rank alone become one that every rank finds in the next snapshot."""
        self._trouble, self._spoilt = f" after {type(error).__name__}: {error}", True

    @property
    def is_finite(self) -> bool:
        """Whether the last snapshot is; waits for it where it is still on its way."""
        return self._sum is None or isfinite(self._sum.result())

    def check(self) -> None:
        """Look at the last snapshot, which has arrived by now.

        Raises:
            NotFinite: it has NaN or infinity.
            RankFault: because a rank had a fault.
        """
        if self.is_finite:
            return
        if self._said is not None and self._said.fault:
            raise RankFault(f"a rank could not take its snapshot{self._trouble}")
        raise NotFinite("NaN or infinity in the sketch of the parameters")

    def start(self, optimizer: torch.optim.Optimizer, *, begins: bool = True) -> None:
        """Take the first snapshot of a window.

        Args:
            optimizer: the wrapped one.
            begins: training begins here, too. Otherwise the blocks that were there keep their start, others
                have none, and where no start is known there will be none.

        Raises:
            Unsupported: see `distributed.refuse`.
        """
        refuse(optimizer)
        rows = layout.rows(optimizer.param_groups, self._granularity)
        if begins:
            self._start = None
        if not rows:
            return
        self._take_sketch(self._dim(rows))
        # a fault that the other ranks have yet to find outlasts the new start
        trouble, spoilt = self._trouble, self._spoilt
        self.restart()
        self._trouble, self._spoilt = trouble, spoilt
        self._signature = [row.signature() for row in rows]
        self._row_groups = [row.group for row in rows]
        self._last, shares = self._snapshot(rows)
        self._spoilt = False
        dim = self._last.shape[1]
        blocks = _blocks(rows)
        if begins:
            self._start = Start(blocks, self._widths(blocks), shares.to(self._dtype(), copy=True))
        elif self._start is not None:
            self._start = self._start.followed(blocks, self._widths(blocks), shares.device)
        self._window = Window(self._size, len(rows), dim, self._last.device, self._dtype())
        self._begin_update(len(rows))

    def _begin_update(self, rows: int) -> None:
        self._rates, self._lr_sums, self._pulls = [0.0] * rows, [0.0] * rows, [0.0] * rows
        self._span = 0

    def account(
        self,
        optimizer: torch.optim.Optimizer,
        scales: Sequence[Scales],
        pulled_shares: Sequence[float | Tensor] = (),
    ) -> None:
        """Note one step of the optimizer: its learning rates, and how much each row decayed and was pulled.

        Args:
            optimizer: the wrapped one, its groups unscaled.
            scales: that were on each row during the step.
            pulled_shares: the share of `Scales.pull` that acted on each group, see `Anchor.shares`.
        """
        self._span += 1
        groups = [(leaf, group) for leaf in leaves(optimizer) for group in leaf.param_groups]
        for row, number in enumerate(self._row_groups):
            leaf, group = groups[number]
            factor = scales[row]
            lr = group["lr"]
            on_cuda = isinstance(lr, Tensor) and lr.is_cuda
            lr = lr.detach().double().reshape(()) if on_cuda else float(lr)
            self._lr_sums[row] = self._lr_sums[row] + lr
            decay = float(group.get("weight_decay") or 0.0) * factor.weight_decay
            rate, so_far = decay_rate(leaf, group, lr * factor.lr, decay), self._rates[row]
            self._rates[row] = None if rate is None or so_far is None else so_far + rate
            if pulled_shares:
                self._pulls[row] = self._pulls[row] + factor.pull * pulled_shares[number]

    def look(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        scales: Sequence[Scales],
        anchor: Mapping[int, Tensor] | None = None,
        *,
        loss: float | Tensor | None = None,
        kept: bool = False,
        back: bool = False,
    ) -> Sighting | None:
        """Take a snapshot.

        Args:
            optimizer: the wrapped one, its groups unscaled.
            step: optimizer steps made so far.
            scales: that were on each row since the last snapshot.
            anchor: what parameters are pulled to, see `Anchor.weights`; None where nothing can be pulled.
                What it lacks in a row that is pulled, such as a new head, counts as pulled to where it is
                at the window's first snapshot.
            loss: mean of this rank's since the last snapshot, for the others that share the sketch.
            kept: whether it has a copy of the weights, likewise.
            back: whether it will go back to that if all of them do.

        Returns:
            What was seen, or None when the window (re)started here.
        """
        rows = layout.rows(optimizer.param_groups, self._granularity)
        if self._window is None or not self._has_seen(rows):
            self.start(optimizer, begins=False)
            return None
        assert self._last is not None
        if anchor is not None and self._origin is None:
            self._origin, _ = self._snapshot([_at(row, anchor) for row in rows])
        now, shares = self._snapshot(rows, loss=loss, kept=kept, back=back)
        self._spoilt = False
        last = send(self._last, now.device)
        update = now - last
        if self._origin is not None:
            pulls = send(column(self._pulls), now.device)
            update -= pulled(last, now, send(self._origin, now.device), pulls)
        self._window.to(now.device)
        rates = column([0.0 if rate is None else rate for rate in self._rates])
        self._window.push(update, now, send(rates, now.device))
        lrs = Transfer(column([total / max(self._span, 1) for total in self._lr_sums]))
        self._conditions.append(Conditions(lrs, tuple(s.lr for s in scales), self._span))
        separable = tuple(rate is not None for rate in self._rates)
        self._last = now
        self._begin_update(len(rows))
        return Sighting(
            step=step,
            names=tuple(row.name for row in rows),
            groups=tuple(self._row_groups),
            gram=Transfer(self._window.gram()),
            conditions=tuple(self._conditions),
            separable=separable,
            squared_norms=Transfer(self._window.squared_norms()),
            risk=self._risk(rows, shares, optimizer.param_groups),
            said=self._said,
        )

    def _has_seen(self, rows: Sequence[layout.Row]) -> bool:
        """Whether these are the rows and blocks that were seen before."""
        signature, blocks = [row.signature() for row in rows], _blocks(rows)
        start = self._start
        if not layout.agree(self._signature, signature):
            return False
        if start is not None and not layout.agree(start.blocks, blocks):
            return False
        # a state that was loaded may not say which parameters it is of
        self._signature = signature
        self._start = None if start is None else start.told(blocks)
        return True

    def _risk(
        self, rows: Sequence[layout.Row], shares: Tensor, groups: Sequence[dict[str, Any]]
    ) -> Transfer | None:
        if self._start is None:
            return None
        self._start = self._start.to(shares.device)
        counted = [groups[row.group].get("anchor", True) for row in rows for _ in row.blocks]
        risk = self._start.risk(shares, counted)
        return None if risk is None else Transfer(risk)

    def _widths(self, blocks: Iterable[layout.BlockSignature]) -> tuple[int, ...]:
        """How many numbers there are of each block."""
        exact = self.settings["sketch_dim"] is None
        return tuple(size if exact else WIDTH for _, _, size, *_ in blocks)

    def _dim(self, rows: Sequence[layout.Row]) -> int:
        """Numbers in the sketch of each of these rows.

        Of many rows, such as all layers, each has fewer: the window of a small model would be larger than
        the model otherwise.
        """
        longest: int | None = self.settings["sketch_dim"]
        if longest is None:
            return max(row.size for row in rows)
        return min(longest, max(LEAST_DIM, FULL_ROWS * longest // len(rows)))

    def _take_sketch(self, dim: int) -> None:
        if self._sketch is None or self._sketch.dim != dim:
            exact = self.settings["sketch_dim"] is None
            self._sketch = Identity(dim) if exact else CountSketch(dim, self.settings["seed"])

    def _dtype(self) -> torch.dtype:
        """Of the updates that are kept: rounding them to float32 is nothing beside a sketch's own error."""
        return torch.float64 if self.settings["sketch_dim"] is None else torch.float32

    def _snapshot(self, rows: Sequence[layout.Row], **says: Any) -> tuple[Tensor, Tensor]:
        """The sketches of all rows, (rows, dim), and of their blocks, on the first parameter's device.

        Args:
            rows: of parameters.
            says: to the ranks that share the sketch, see `Said.of`.
        """
        assert self._sketch is not None
        among = sharing((p for row in rows for p in row.parameters), self.replicas)
        home = among.home(rows[0].parameters[0].device)
        try:
            sketches, shares = self._sketch_of(rows, home, among)
        except Exception as error:
            if not among.ranks or isinstance(error, Unsupported):
                raise
            self.spoil(error)
            sketches = torch.empty(len(rows), self._sketch.dim, dtype=torch.float64, device=home)
            shares = sketches.new_empty(sum(self._widths(_blocks(rows))))
        if self._spoilt:
            sketches.fill_(float("nan"))
        if among.ranks:
            said = send(Said.of(**says, fault=self._spoilt), home)
            parts = [sketches.view(-1), shares, said]
            together = among.add_up(torch.cat(parts))
            sketches, shares, said = together.split([part.numel() for part in parts])
            sketches = sketches.view(len(rows), -1)
            self._said = Said(Transfer(said))
        # finite where all numbers are, at a fifth of the cost of looking at each
        self._sum = Transfer(sketches.sum())
        return sketches, shares

    def _sketch_of(
        self, rows: Sequence[layout.Row], home: torch.device, among: Sharing
    ) -> tuple[Tensor, Tensor]:
        assert self._sketch is not None
        devices = dict.fromkeys(p.device for row in rows for p in row.parameters)
        key, resident = _whereabouts(rows)
        parts = []
        for device in devices:
            pieces = [row.pieces(device, among) for row in rows]
            stretches = [row.stretches for row in rows]
            found = self._sketch.rows(
                pieces, device, stretches=stretches, resident=resident, key=key
            )
            parts.append([part.to(home) for part in found])
        sketches, shares = zip(*parts, strict=True)
        if len(parts) == 1:
            return sketches[0], shares[0]
        return torch.stack(sketches).sum(0), torch.stack(shares).sum(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next snapshots depend on, as tensors, numbers and lists."""
        return {
            "settings": dict(self.settings),
            "signature": [list(entry[:-1]) for entry in self._signature],
            "members": [entry[-1] for entry in self._signature],
            "row_groups": list(self._row_groups),
            "last": None if self._last is None else self._last.clone(),
            "start": None if self._start is None else self._start.state_dict(),
            "window": None if self._window is None else self._window.state_dict(),
            "conditions": [condition.as_list() for condition in self._conditions],
            "rates": [None if rate is None else float(rate) for rate in self._rates],
            "lr_sums": [float(total) for total in self._lr_sums],
            "pulls": [float(total) for total in self._pulls],
            "origin": None if self._origin is None else self._origin.clone(),
            "span": self._span,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.restart()
        # until 0.1.0 it did not say
        members = state.get("members", [layout.UNTOLD] * len(state["signature"]))
        self._signature = [
            (str(name), int(count), int(size), str(which))
            for (name, count, size), which in zip(state["signature"], members, strict=True)
        ]
        self._row_groups = [int(group) for group in state["row_groups"]]
        self._rates = [None if rate is None else float(rate) for rate in state["rates"]]
        self._lr_sums = [float(total) for total in state["lr_sums"]]
        # until 0.1.0 there was neither
        self._pulls = [float(total) for total in state.get("pulls", [0.0] * len(self._signature))]
        origin = state.get("origin")
        self._origin = None if origin is None else origin.to(torch.float64).clone()
        self._span = int(state["span"])
        self._conditions.extend(map(Conditions.from_list, state["conditions"]))
        start = state.get("start")  # until 0.1.0 there was none
        self._start = None
        if start is not None:
            self._start = Start.from_state_dict(start, self._widths, self._dtype())
        if state["last"] is not None:
            self._last = state["last"].to(torch.float64).clone()
            self._sum = Transfer(self._last.sum())
            self._window = Window.from_state_dict(state["window"], self._last, self._dtype())
            self._take_sketch(self._last.shape[1])
        self._check()

    def _check(self) -> None:
        """Refuse a state whose parts do not fit together, before it spoils a window."""
        rows, size = len(self._signature), self._size + 1
        counts = {len(self._row_groups), len(self._rates), len(self._lr_sums), len(self._pulls)}
        fits = counts == {rows} and self._span >= 0
        fits = fits and all(len(c.lrs) == len(c.scales) == rows for c in self._conditions)
        if self._last is None or self._window is None:
            fits = fits and rows == len(self._conditions) == 0
        else:
            dim = self._last.shape[1]
            longest = max((size for _, _, size, _ in self._signature), default=0)
            fits = fits and self._last.shape[0] == rows
            fits = fits and self._window.shape == (size, rows, dim)
            fits = fits and dim <= (self.settings["sketch_dim"] or longest)
            fits = fits and len(self._conditions) == len(self._window)
            fits = fits and (self._origin is None or self._origin.shape == self._last.shape)
        if self._start is not None:
            fits = fits and self._start.shares.shape == (sum(self._start.widths),)
            fits = fits and _by_group(self._start.blocks) == _by_group(
                self._signature or self._start.blocks
            )
        if not fits:
            raise ValueError("the parts of the observer's state do not fit together")


def _at(row: layout.Row, weights: Mapping[int, Tensor]) -> layout.Row:
    """The same row with other weights."""
    return replace(row, parameters=tuple(weights.get(id(p), p) for p in row.parameters))


def _by_group(entries: Iterable[tuple[Any, ...]]) -> dict[str, tuple[int, int]]:
    """Number of parameters and of numbers in each parameter group, by signatures of rows or of blocks."""
    totals: dict[str, tuple[int, int]] = {}
    for name, count, size, *_ in entries:
        group = name.partition(":")[0]
        so_far = totals.get(group, (0, 0))
        totals[group] = (so_far[0] + count, so_far[1] + size)
    return totals


def _blocks(rows: Sequence[layout.Row]) -> tuple[layout.BlockSignature, ...]:
    """Of all rows, in order."""
    return tuple(block for row in rows for block in row.blocks)


def _whereabouts(rows: Sequence[layout.Row]) -> tuple[Hashable, frozenset[int]]:
    """Where the elements of rows lie.

    Returns:
        What is equal as long as they lie where they did, in memory and in the rows, or None where that
        cannot be told; and the addresses of their storages.
    """
    parameters = [parameter for row in rows for parameter in row.parameters]
    sharded = [p for p in parameters if type(p) not in _PLAIN and is_dtensor(p)]
    everything = [local(p) for p in parameters] if sharded else parameters
    held = [tensor for tensor in everything if type(tensor) in _PLAIN]
    storages = [tensor.untyped_storage() for tensor in held]
    addresses = [storage.data_ptr() for storage in storages]
    key: tuple[Hashable, ...] = (
        *(row.blocks for row in rows),
        *addresses,
        # the storage itself, since where one was freed there may be another
        *[storage._cdata for storage in storages],
        *[(t.dtype, t.storage_offset(), t.shape, t.stride()) for t in held],
        *[(p.shape, p.placements, p.device_mesh) for p in sharded],
    )
    return key if len(held) == len(everything) else None, frozenset(addresses)
