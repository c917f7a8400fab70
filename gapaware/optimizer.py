"""GapAware: an optimizer around an optimizer, which watches the spectrum of its updates."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gapaware import arguments, layout
from gapaware.anchor import Anchor
from gapaware.caution import caution
from gapaware.controller import Controller
from gapaware.copies import Copies
from gapaware.delegation import is_number
from gapaware.distributed import Sharing, Unsupported, alone, is_first, ranks_of, sharing
from gapaware.dry_run import is_dry_run
from gapaware.evaluation import Evaluating
from gapaware.history import History
from gapaware.lr import first_lr, is_remote
from gapaware.metrics import Means, arrived
from gapaware.momentum import memory_steps
from gapaware.observer import NotFinite, Observer, RankFault
from gapaware.record import fault_record, record
from gapaware.refusals import refuse_base, refuse_capture, refuse_factors
from gapaware.scaling import Scales, as_they_are, scaled
from gapaware.settings import settle
from gapaware.sighting import Sighting
from gapaware.steering import ControllerFault, Outcome, Steering

# values logged before the first step that are more than anybody accumulates gradients of
UNSEEN = 1000


class GapAware(Evaluating):
    """Wrap an optimizer: watch the spectrum of its updates and scale its learning rate.

    Every `interval` steps the parameters are sketched; the last `window` differences between sketches
    give a Gram matrix, its spectrum the gap g and the adiabaticity a = ‖ΔG‖_F/g², and the controller
    turns these into a factor on the learning rate, one snapshot later. While the factor is 1 the
    trajectory is bit for bit that of `base`. A fault in here (NaN in the window, an exception in a
    controller) takes the factor off, is noted in `history`, warned of once, and never reaches training.
    Where a factor of 5 or more makes the loss worse or brings nothing for long, or any above 1 ends in NaN,
    the weights and the state of `base` go back to a copy from before. Several processes do so together, by
    the mean of their losses: shards (FSDP2), and replicas that have a `process_group`.

    Args:
        base: any `torch.optim.Optimizer`, or a `Composite` of several.
        mode: "escape", up on plateaus, never below the given learning rate; "retain", for fine-tuning
            without forgetting: a pull towards the starting weights that gives way slowly; "auto", "retain"
            where an `anchor` is given and "escape" otherwise; "observe", never touches anything.
        window: W, number of updates in a spectrum.
        interval: optimizer steps between snapshots. "auto" is a third of the steps that the wrapped
            optimizer's momentum remembers (5 for AdamW), unless the controller chooses: where the built-in
            law may raise the factor snapshots are closer in the first two memories (every 2nd of 30 steps
            for AdamW), and half as many where it has stayed at 1 for four windows.
        sketch_dim: length of the sketch of a parameter group (or block); more than four of them share the
            length of four, with 1024 each at least. The relative error of a singular value is about
            √(1/(2·sketch_dim)). None computes with the exact updates, which takes
            2·(window + 1) float64 copies of the parameters: for small models.
        target: what the built-in law steers to: with mode="escape" the drift c* = 0.06, the
            mean cosine of updates that momentum does not connect; with mode="retain" how fast the pull
            gives way, 𝒜* = 0.25: a smaller one forgets less and learns more slowly. Larger is more careful
            with the first and bolder with the second.
        max_scale: largest factor on the learning rate; 64, and 1 with mode="retain", where a larger one
            lets a learning rate grow that is too small for the pull: for where old answers are held too.
            Pass a smaller one, such as 16, where the learning rate cannot be as far off as that.
        min_scale: smallest factor; 1, and 0.001 with a controller of yours.
        max_push: how many times the average of the recent steps may follow each step, with mode="escape"
            where the factor is at half of `max_scale` or above; 2. While it does, that takes a copy of the
            weights, and Adam's momentum is shorter; 0 does without. No limit for a controller of yours.
        average: whether `eval()` may put the average of the last weights into the model.
        way_back: whether the weights may go back to where they were before a raised factor did harm. While
            a factor is above 1 that takes a copy of them and of the wrapped optimizer's state, made twice
            a window at most, for which a GPU is waited for.
        anchor: the weights to pull to, with mode="retain" or a controller that pulls: "init" for those at
            the first step, or a module or state dict by parameter name, as it is at that step, which
            needs a `base` made from `named_parameters()`; parameters that it lacks, such as a new head,
            are not pulled, nor are those of a group with `"anchor": False`. Costs a copy of the weights.
        anchor_device: where to keep that copy, such as "cpu"; None for the parameters' own device.
        anchor_dtype: to keep it in, such as `torch.bfloat16`; None for the parameters' own. The pull is to
            what they are in it. Both only where there is an anchor.
        granularity: "global" for one factor, "group" for one a parameter group, "block" for one a layer
            that `named_parameters()` number, such as "blocks.3", else a tensor, where `base` is one of
            torch's.
        controller: a callable that decides instead of the built-in law; see `gapaware.controller`.
        risk_limit: warn once when the risk of forgetting passes it, `history[-1]["risk"]`: the squared
            distance from the weights at the first step relative to them, ‖θ − θ_0‖²/‖θ_0‖², the mean over
            such layers or tensors (see `granularity`). Groups with `"anchor": False`, such as a new
            head, are left out, and so is what begins to train in mid-run.
            What is too far depends on the task: find the limit on runs of which you know what they forgot.
            None for no warning.
        log_to: a file that gets one line of JSON for each snapshot; `gapaware report` reads it.
        history_size: number of records that `history` keeps in memory.
        seed: of the sketch.
        process_group: the ranks that train replicas of the model together, as with
            DistributedDataParallel: `torch.distributed.group.WORLD`. They decide on the same sketch and on
            the mean of their losses, one all-reduce a snapshot, so that a fault on one rank is one of all.
            All of them have to step as often: uneven inputs under `DDP.join()` end in an error there.
            Without it equal replicas decide alike, but by the updates alone and without a way back, and a
            rank that runs out of memory in here takes its factors off alone. Sharded models (FSDP2) need no
            group, unless there are replicas of them that their mesh does not show.

    Attributes:
        base: the wrapped optimizer. `param_groups`, `state` and `defaults` are its own.
        history: a sequence of records, one for each snapshot.
        seconds: time spent in here, without the steps of `base`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what to pass.
        Unsupported: DeepSpeed ZeRO, FSDP1, `ZeroRedundancyOptimizer`; in a step a CUDA graph, or parameters
            on MPS, which has no float64.

    Example:
        A learning rate that is much too small:

        >>> model = torch.nn.Linear(8, 1)
        >>> optimizer = GapAware(torch.optim.AdamW(model.parameters(), lr=1e-6))
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     loss = (model(torch.ones(4, 8)) - 10).square().mean()
        ...     loss.backward()
        ...     _ = optimizer.step()
        >>> optimizer.scales[0] > 10
        True
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *,
        mode: str = "auto",
        window: int = 10,
        interval: int | str = "auto",
        sketch_dim: int | None = 16_384,
        target: float | None = None,
        max_scale: float | None = None,
        min_scale: float | None = None,
        max_push: float | None = None,
        average: bool = True,
        way_back: bool = True,
        granularity: str = "global",
        anchor: str | Mapping[str, Tensor] | nn.Module | None = None,
        anchor_device: torch.device | str | None = None,
        anchor_dtype: torch.dtype | None = None,
        controller: Controller | None = None,
        risk_limit: float | None = None,
        log_to: str | PathLike[str] | None = None,
        history_size: int = 1000,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(base, GapAware):
            raise TypeError("base: is a GapAware already; pass the optimizer inside it, base.base")
        refuse_base(base)
        settled = settle(
            base.param_groups,
            mode=mode,
            window=window,
            interval=interval,
            sketch_dim=sketch_dim,
            target=target,
            max_scale=max_scale,
            min_scale=min_scale,
            max_push=max_push,
            granularity=granularity,
            anchor=anchor,
            anchor_device=anchor_device,
            anchor_dtype=anchor_dtype,
            controller=controller,
            history_size=history_size,
            seed=seed,
        )
        if settled.controller is not None:
            refuse_factors(base, granularity)
        arguments.boolean("average", average, why="whether eval() may put an average in")
        arguments.boolean("way_back", way_back, why="whether weights may go back to a copy")
        if risk_limit is not None:
            arguments.positive("risk_limit", risk_limit, why="the risk of forgetting to warn of")
        self._anchor = None
        if settled.anchor is not None:
            self._anchor = Anchor(settled.anchor, anchor_device, anchor_dtype)
            self._anchor.check(base.param_groups)

        self.base = base
        self._interval_is_auto = interval == "auto"
        self._interval = self._first_interval = settled.interval
        self._steps = 0
        self._fresh = True
        self._midway = False
        self._next_snapshot = self._interval
        self._observer = Observer(
            settled.window,
            settled.sketch_dim,
            granularity,
            settled.seed,
            ranks_of(process_group),
        )
        self._steering = Steering(
            settled.controller,
            low=settled.min_scale,
            high=settled.max_scale,
            max_push=settled.max_push,
            start=Scales(pull=settled.pull),
            target=settled.target,
            window=settled.window,
            together=granularity == "global",
        )
        self._copies = Copies(average=average, way_back=way_back)
        self._pending = self._returning = None
        self._given = self._entrusted = None
        self._metrics = Means()
        self._risk_limit = risk_limit
        self._warned: set[str] = set()
        self._started = time.time()
        self.seconds = 0.0
        self.history = History(
            limit=settled.history_size,
            log_to=log_to if is_first() else None,
            header={
                "base": type(base).__name__,
                "mode": settled.mode,
                "interval": interval,
                "target": settled.target,
                "min_scale": settled.min_scale,
                "max_scale": settled.max_scale,
                "max_push": settled.max_push,
                "average": average,
                "way_back": way_back,
                **self._observer.settings,
            },
        )
        super().__init__()

    # -- one step ---------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> float | None:
        """Perform one step of the wrapped optimizer, with the factors in force.

        Args:
            closure: re-evaluates the model and returns the loss, as for any torch optimizer.
            kwargs: what else the wrapped optimizer's step takes, such as the `hessian` of SophiaH.

        Returns:
            What the wrapped optimizer returns: the closure's loss, or None.
        """
        refuse_capture()
        if closure is None and is_dry_run(self.base):
            loss: float | None = self.base.step(**kwargs)
            return loss
        factors = self._begin()
        self._given = as_they_are(self.base, *factors)
        try:
            with scaled(self.base, *factors, given=self._given):
                # some optimizers know of no closure
                loss = self.base.step(*(() if closure is None else (closure,)), **kwargs)
        finally:
            self._given = None
        self._move(*factors)
        self._finish(loss)
        return loss

    def _begin(self) -> tuple[list[Scales], dict[int, Scales] | None]:
        if self._copies.average.evaluating:
            self._train_after_all()
        if self._anchor is not None:
            # apart: a rank that fails here has to meet the others in the snapshot all the same
            with self._guarded("the starting weights"):
                self._anchor.start(self.base.param_groups)
        if self._copies.hold:
            with self._guarded("weights that others wrote"):
                self._copies.notice(self.base.param_groups, self._steps)
        if self._copies.rescue.owed:
            with self._guarded("weights to go back to"):
                self._copies.keep(self.base, self._steps)
        with self._guarded("the first snapshot"):
            if self._fresh:
                if self._steps == 0:
                    self._midway = bool(self.base.state)
                self._fresh = False
                # a state of other settings was loaded: where training began is not known
                self._observer.start(self.base, begins=self._steps == 0)
            return self._factors()
        return [Scales()] * len(self.base.param_groups), None

    def _factors(self) -> tuple[list[Scales], dict[int, Scales] | None]:
        """The factors in force: by group, and by parameter when a group has several rows."""
        groups = self.base.param_groups
        if self._observer.settings["granularity"] != "block":
            # by name, so that a group added since the last snapshot has its factor too
            return [self._steering.scales(layout.group_name(i)) for i in range(len(groups))], None
        neutral = [Scales()] * len(groups)
        if all(self._steering.scales(name).neutral for name in self._row_names()):
            return neutral, None
        rows = layout.rows(groups, "block")
        return neutral, {
            id(p): self._steering.scales(row.name) for row in rows for p in row.parameters
        }

    def _row_names(self) -> list[str]:
        if self._observer.names:
            return self._observer.names
        rows = layout.rows(self.base.param_groups, self._observer.settings["granularity"])
        return [row.name for row in rows]

    def _move(self, by_group: list[Scales], by_parameter: dict[int, Scales] | None = None) -> None:
        """What moves the weights beside the wrapped optimizer: nothing, at most steps."""
        neutral = by_parameter is None and all(scales.neutral for scales in by_group)
        if neutral and self._anchor is None and not self._copies.hold:
            return
        groups = self.base.param_groups
        if self._anchor is not None:
            with self._guarded("the pull towards the start"):
                self._anchor.pull(groups, by_group, by_parameter)
        with self._guarded("the push along the recent steps"):
            self._copies.push(groups, by_group, by_parameter, shared=self._is_shared)
        with self._guarded("the average of the weights"):
            self._copies.follow(groups, self._steps, by_group, by_parameter)
        with self._guarded("weights that others write"):
            self._copies.note(groups)

    def _finish(self, loss: Any) -> None:
        self._steps += 1
        if self._entrusted is not None and not self._is_idle():
            self._entrusted = None
        interval, keeps = self._interval, False
        scales = [self._steering.scales(name) for name in self._observer.names]
        with self._guarded("a snapshot"):
            due = self._steps >= self._next_snapshot
            # of several processes one alone may see that; the weights will tell all of them
            if self._copies.rescue.holds and alone() and self._metrics.overflows("loss"):
                raise NotFinite("NaN or infinity in the loss")
            if due:
                self._observer.check()
                self._copies.push.seen()
            if is_number(loss):
                self.log(loss=loss)
            groups = self.base.param_groups
            shares = [] if self._anchor is None else self._anchor.shares(groups)
            self._observer.account(self.base, scales, shares)
            if due:
                keeps = self._decide()
        if self._steps >= self._next_snapshot:
            # ranks that share a sketch have to meet again even if only some of them could decide
            pause = interval if self._is_shared() else self._interval
            self._next_snapshot = self._steps + pause
            with self._guarded("a snapshot"):
                self._look(scales)
                # waits for the snapshot: weights that have overflowed since the last one are no way back
                if keeps and self._observer.is_finite:
                    self._copies.keep(self.base, self._steps)
        if due and self._risk_limit is not None:
            self._warn_of_risk(self._risk_limit)

    def _look(self, scales: list[Scales]) -> None:
        """Take a snapshot; what it shows is decided on at the next one, when it is on the host."""
        if self._is_idle():
            return
        groups = self.base.param_groups
        anchor = None if self._anchor is None else self._anchor.weights(groups)
        kept = self._copies.rescue.holds
        sighting = self._observer.look(
            self.base,
            self._steps,
            scales,
            anchor,
            loss=self._metrics.mean("loss"),
            kept=kept,
            back=kept and self._returning is not None,
        )
        if sighting is not None:
            self._pending = (sighting, self._metrics.take())
        elif self._observer.begins_anew:
            if changed := self._steering.restarted(self._steps):
                self.history.append(fault_record(self._steps, self._interval, "") | changed)
            if self._steering.restarts > 2:
                # no factor was on it for a while, and none has spoilt what came since the copy
                self._copies.rescue.forget()

    def _is_idle(self) -> bool:
        """Whether nothing can move; a learning rate that the host would have to wait for may be any."""
        lrs = [group["lr"] for group in self.base.param_groups]
        return not any(is_remote(lr) or float(lr) != 0.0 for lr in lrs)

    def _decide(self) -> bool:
        """Decide on the last snapshot; whether the weights of now are to be kept."""
        if self._pending is None:
            return False
        (sighting, waiting), self._pending = self._pending, None
        metrics, interval = arrived(waiting), self._interval
        shared, said = self._is_shared(), sighting.said
        if said is not None and said.loss is not None:
            metrics["loss"] = said.loss
        before = [self._steering.scales(name).lr for name in sighting.names]
        agreed, self._returning = self._returning, None
        if agreed is not None and said is not None and said.back:
            outcome, goes = agreed, self._copies.rescue.holds
        else:
            outcome = self._ask(sighting, metrics, shared=shared)
            goes = outcome.back and not shared
            if outcome.back and shared:
                # not before the others have said that they can, or replicas would part
                self._returning = outcome
        clock = {
            "seconds": time.time() - self._started,
            "gapaware_seconds": self.seconds,
            "interval": interval,
        }
        after = [self._steering.scales(name) for name in sighting.names]
        back_to = None
        if goes:
            back_to = self._copies.put_back(self.base)
            self._observer.restart()
            self._metrics = Means()  # of the weights that are gone
            outcome = replace(outcome, why=f"{outcome.why} to the weights of step {back_to}")
        raised = [factor for seen in sighting.conditions for factor in seen.scales]
        if max([*raised, *before, *(scales.lr for scales in after)]) <= 1:
            # not before a window without one: what a factor began may overflow after it was taken off
            self._copies.rescue.forget()
        self.history.append(record(sighting, outcome, after, metrics, clock, back_to))
        return outcome.keep and self._returning is None and (shared or alone())

    def _ask(self, sighting: Sighting, metrics: dict[str, float], *, shared: bool) -> Outcome:
        """What the controller decides, from what all ranks know that share the sketch."""
        groups = [self.base.param_groups[number] for number in sighting.groups]
        # where the host would have to wait for today's, the last one that has arrived
        last = sighting.conditions[-1].lrs
        lrs = [last[row] if is_remote(g["lr"]) else float(g["lr"]) for row, g in enumerate(groups)]
        said = sighting.said
        outcome = self._steering.decide(
            sighting,
            lrs=lrs,
            first_lrs=[first_lr(group) if self._midway else 0.0 for group in groups],
            interval=self._interval,
            momentum_memory=memory_steps(self.base.param_groups),
            loss=metrics.get("loss") if alone() or (said and self._ranks().all_told) else None,
            kept=self._copies.rescue.holds if not shared else said is not None and said.kept,
        )
        if self._interval_is_auto and outcome.interval is not None:
            self._interval = outcome.interval
        return outcome

    def _all_keep(self) -> bool:
        """Whether there is a copy of the weights, on every rank that shares them; waits for the answers."""
        devices = (p.device for group in self.base.param_groups for p in group["params"])
        device = next(devices, torch.device("cpu"))
        return self._ranks().everywhere(self._copies.rescue.holds, device)

    def _warn_of_risk(self, limit: float) -> None:
        if "risk" in self._warned or not self.history or not is_first():
            return
        last = self.history[-1]
        if last.get("risk", 0.0) <= limit:
            return
        self._warned.add("risk")
        caution(
            f"risk of forgetting {last['risk']:.3g} at step {last['step']}, risk_limit={limit:g}: this far "
            "have the weights moved from the start (squared distance, relative). Where an old skill has to "
            'stay, end training here, lower the learning rate, or use mode="retain" (said once)'
        )

    # -- what a person sees ------------------------------------------------------------------------

    def log(self, **metrics: float | Tensor) -> None:
        """Attach values such as the loss to the next record of `history`: their means since the last one.

        Call it at every step. The mode "escape" sees a plateau in the loss that noise hides in the
        updates, does not touch a factor under which the loss falls, and takes it down where it rises. A
        closure's loss is attached by itself, as is that of a `GapAwareTrainer`. Tensors are read a snapshot
        later, so that a GPU does not have to wait.

        Raises:
            TypeError, ValueError: a value is no number, or a tensor of several.

        Example:
            >>> optimizer = GapAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
            >>> optimizer.log(loss=torch.tensor(0.5), accuracy=0.9)
        """
        for name, value in metrics.items():
            self._metrics.add(name, value)
        # once there was a step, snapshots take them
        if self._steps == 0 and self._metrics.most >= UNSEEN and "log" not in self._warned:
            self._warned.add("log")
            caution(
                f"log() was called {UNSEEN} times and step() not once: steps that the wrapped optimizer "
                "makes in another way, such as SAM's first_step() and second_step(), go unseen; call it"
            )

    @property
    def scales(self) -> list[float]:
        """The factor on the learning rate of each row: a parameter group, or a block."""
        return [self._steering.scales(name).lr for name in self._row_names()]

    @property
    def interval(self) -> int:
        """Optimizer steps between snapshots now."""
        return self._interval

    def __repr__(self) -> str:
        inner = repr(self.base).replace("\n", "\n  ")
        return f"GapAware(\n  {inner}\n)"

    # -- faults ------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """Time what happens inside, and keep its exceptions from training."""
        begun = time.perf_counter()
        try:
            with torch.no_grad():
                yield
        except Unsupported:
            raise
        except Exception as error:
            if self._is_shared() and not isinstance(error, NotFinite):
                # to go on alone would leave the other ranks waiting at the next snapshot
                self._observer.spoil(error)
            else:
                self._fault(doing, error)
        finally:
            self.seconds += time.perf_counter() - begun

    def _is_shared(self) -> bool:
        return bool(self._ranks().ranks)

    def _ranks(self) -> Sharing:
        parameters = (p for group in self.base.param_groups for p in group["params"])
        trainable = (p for p in parameters if p.requires_grad)
        return sharing(trainable, self._observer.replicas)

    def _fault(self, doing: str, error: Exception) -> None:
        """Go on as the wrapped optimizer alone would, and say so."""
        by_controller = isinstance(error, ControllerFault)
        # a controller that fails twice in a row may do so for what it remembers
        again = by_controller and len(self.history) > 0 and self.history[-1]["decision"] == "fault"
        overflow = isinstance(error, NotFinite) and not isinstance(error, RankFault)
        lost = overflow and self._all_keep()
        why = f"{doing}: {type(error).__name__}: {error}"
        self._steering.release(keep_memory=not again, lost=lost, shared=self._is_shared())
        back_to = self._copies.put_back(self.base) if lost else None
        if lost:
            why += (
                f"; weights and state are those of step {back_to} again, and no factor goes above "
                f"{self._steering.max_scale:.3g} from here on (statistics of BatchNorm may hold NaN: "
                "reset_running_stats())"
            )
        if not by_controller:
            self._observer.restart()
        self._pending = self._returning = None
        self._metrics = Means()
        if self._interval_is_auto:
            self._interval = self._first_interval
        self._next_snapshot = self._steps + self._interval
        self.history.append(fault_record(self._steps, self._interval, why, back_to))
        kind = f"{doing}: {type(error).__name__}"
        if kind not in self._warned:
            self._warned.add(kind)
            caution(
                f"GapAware took its factors off at step {self._steps}, training goes on as with "
                f"{type(self.base).__name__} alone: {why} (said once; later ones are in history)"
            )
