"""Whatever the model, the groups, the dtypes, the mode and the faults: what always holds.

`HYPOTHESIS_PROFILE=nightly` tries ten times as many runs; see conftest.
"""

import copy
import io
import itertools
import math
import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gradients import assert_equal, base_state, parameters, set_gradients
from torch import nn

from gapaware import Composite, Decision, GapAware
from gapaware.controller import as_decision
from gapaware.scaling import Scales, scaled

pytest.importorskip("hypothesis")
from hypothesis import event, given
from hypothesis import strategies as st

SHAPES = [(4, 3), (2, 5), (7,), (3,), (), (1,), (0,), (2, 2, 2)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64]

BASES = {
    "sgd": lambda g: torch.optim.SGD(g, lr=1e-2),
    "sgd momentum": lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adam": lambda g: torch.optim.Adam(g, lr=1e-2, weight_decay=0.1),
    "adamw": lambda g: torch.optim.AdamW(g, lr=1e-2),
    "adamw foreach": lambda g: torch.optim.AdamW(g, lr=1e-2, foreach=True),
    "adamw tensor lr": lambda g: torch.optim.AdamW(g, lr=torch.tensor(1e-2)),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=1e-3),
    "composite": lambda g: Composite(
        torch.optim.SGD(g[:1], lr=1e-2, momentum=0.9),
        *([torch.optim.AdamW(g[1:], lr=1e-2)] if g[1:] else []),
    ),
}

# what happens to a run before one of its steps
TROUBLES = [
    "nan gradient", "inf gradient", "zero gradients", "no gradients", "lr 0", "lr back", "lr tiny",
    "blow up", "poison a parameter", "repair", "freeze", "unfreeze", "add a group", "skip the step",
    "step twice", "zero state", "evaluate", "evaluate and forget",
]  # fmt: skip
EVENTS = ["nothing"] * 4 * len(TROUBLES) + TROUBLES

SANE = [
    1.0, 2.0, 0.5, 64.0, 1e9, 0.0, Decision(3.0, interval=1), Decision(2.0, interval=7, memory={"n": 1}),
    Decision(0.1, weight_decay_scale=4.0), Decision(1.0, momentum_scale=0.1, push=2.0), "law", "law", "law",
    Decision(1.5, average=True), Decision(1.0, average=True),
]  # fmt: skip
NONSENSE = [
    -1.0, math.nan, math.inf, None, "x", True, [], 1j, object(), Decision(1.0, interval=0),
    Decision(1.0, weight_decay_scale=math.nan), Decision(1.0, momentum_scale=0),
    Decision(1.0, memory={"x": object()}), Decision("x"), ZeroDivisionError("raised"),
]  # fmt: skip
ANSWERS = SANE * 6 + NONSENSE


@dataclass
class Plan:
    """One random run, which can be made any number of times."""

    shapes: list
    dtypes: list
    cut: int
    base: str
    arguments: dict
    events: list
    answers: list = field(default_factory=list)

    def parameters(self):
        return [
            parameters((shape,), dtype, seed)[0]
            for seed, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=False))
        ]

    def build(self, wrapped=True, **more):
        params = self.parameters()
        groups = [{"params": part} for part in (params[: self.cut], params[self.cut :]) if part]
        base = BASES[self.base](groups)
        if not wrapped:
            return params, base
        return params, GapAware(base, **{"sketch_dim": 64, **self.arguments, **more})

    def controller(self, seen):
        """Answers by the step alone, so that it is the same in a resumed run."""
        answer = self.answers[seen.step % len(self.answers)]
        if isinstance(answer, Exception):
            raise answer
        if answer == "law":
            return Decision(seen.scale * 1.1, memory={"seen": seen.memory.get("seen", 0) + 1})
        return answer


shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)
plans = st.builds(
    Plan,
    shapes=shapes,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    cut=st.integers(0, 5),
    base=st.sampled_from(sorted(BASES)),
    arguments=st.fixed_dictionaries(
        {
            "interval": st.sampled_from([1, 1, 2, 3, "auto"]),
            "window": st.integers(4, 6),
            "granularity": st.sampled_from(["global", "group", "block"]),
            "sketch_dim": st.sampled_from([64, 100, None]),
        }
    ),
    events=st.lists(st.sampled_from(EVENTS), min_size=12, max_size=24),
    answers=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=6),
)


def groups_of(optimizer):
    keys = ("lr", "weight_decay", "momentum", "betas", "k")
    return [
        {k: copy.deepcopy(group[k]) for k in keys if k in group} for group in optimizer.param_groups
    ]


@torch.no_grad()
def play(plan, params, optimizer, steps):
    """Make the steps of a plan; the same for a wrapped and an unwrapped optimizer.

    Returns:
        After each step the hyperparameters of the groups, and the type of what step() raised, if
        anything.
    """
    seen = []
    for step in steps:
        what = plan.events[step]
        set_gradients([p for p in params if p.requires_grad], step)
        for p in params:
            if not p.requires_grad:
                p.grad = None
        first = next((p for p in params if p.grad is not None and p.numel()), None)
        if first is not None and "gradient" in what and what.split()[0] in ("nan", "inf"):
            first.grad.reshape(-1)[0] = float(what.split()[0])
        elif what == "zero gradients":
            for p in params:
                p.grad = None if p.grad is None else torch.zeros_like(p.grad)
        elif what == "no gradients":
            for p in params:
                p.grad = None
        elif what.startswith("lr"):
            for group in optimizer.param_groups:
                lr = {"lr 0": 0.0, "lr back": 1e-2, "lr tiny": 1e-30}[what]
                group["lr"] = torch.tensor(lr) if isinstance(group["lr"], torch.Tensor) else lr
        elif what == "blow up":
            params[0].mul_(1e30)
        elif what == "poison a parameter":
            params[-1].fill_(float("nan"))
        elif what == "repair":
            for p, fresh in zip(params, plan.parameters(), strict=False):
                p.copy_(fresh)
        elif what in ("freeze", "unfreeze"):
            params[0].requires_grad_(what == "unfreeze")
        elif what == "add a group":
            more = nn.Parameter(torch.ones(2, 3))
            params.append(more)
            optimizer.add_param_group({"params": [more], "lr": optimizer.param_groups[0]["lr"]})
        elif what.startswith("evaluate") and isinstance(optimizer, GapAware):
            optimizer.eval()
            if what == "evaluate":
                optimizer.train()
        elif what == "zero state":
            for entry in optimizer.state.values():
                for value in entry.values():
                    if isinstance(value, torch.Tensor) and value.ndim:
                        value.zero_()
        raised = None
        try:
            for _ in range({"skip the step": 0, "step twice": 2}.get(what, 1)):
                optimizer.step()
        except Exception as error:  # foreach refuses some mixtures of dtypes
            raised = type(error)
        seen.append((groups_of(optimizer), raised))
    return seen


def assert_history_is_sound(optimizer):
    steps = optimizer.history.column("step") if len(optimizer.history) else []
    assert all(a < b for a, b in itertools.pairwise(steps)), steps
    assert all(step <= optimizer.state_dict()["gapaware"]["steps"] for step in steps)
    for record in optimizer.history:
        assert record["decision"] in ("raise", "hold", "lower", "fault")
        assert isinstance(record["why"], str)
        assert 0 <= record.get("risk", 0.0) < float("inf")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@given(plan=plans, exact=st.booleans())
def test_observing_changes_not_a_bit(plan, exact):
    more = {"mode": "observe"} if exact else {"controller": lambda seen: 1.0}
    alone, optimizer_alone = plan.build(wrapped=False)
    params, optimizer = plan.build(**more)
    steps = range(len(plan.events))
    assert_equal(play(plan, alone, optimizer_alone, steps), play(plan, params, optimizer, steps))
    assert_equal(alone, params)
    assert_equal(base_state(optimizer_alone), base_state(optimizer))
    assert_history_is_sound(optimizer)
    event("fault seen" if "fault" in [r["decision"] for r in optimizer.history] else "no fault")


@given(plan=plans, mode=st.sampled_from(["auto", "escape", "retain"]), bounds=st.booleans())
def test_whatever_a_controller_answers(plan, mode, bounds):
    """Hyperparameters are always put back, factors stay in bounds, step() raises what the base raises."""
    more = {"mode": mode, "controller": plan.controller}
    low, high = 0.001, {"retain": 1.0}.get(mode, 64.0)
    if bounds:
        low, high = 0.3, min(high, 5.0)
        more |= {"min_scale": low, "max_scale": high}
    alone, optimizer_alone = plan.build(wrapped=False)
    params, optimizer = plan.build(**more)
    in_force = set()
    for step in range(len(plan.events)):
        expected = play(plan, alone, optimizer_alone, range(step, step + 1))
        groups = [id(group) for group in optimizer.param_groups]
        assert_equal(play(plan, params, optimizer, range(step, step + 1)), expected)
        assert [id(group) for group in optimizer.param_groups][: len(groups)] == groups
        assert all(low <= scale <= high for scale in optimizer.scales)
        in_force |= set(optimizer.scales)
    assert_history_is_sound(optimizer)
    event("factors" if in_force - {1.0} else "never a factor")


@given(plan=plans, evaluations=st.sets(st.integers(0, 23)))
def test_evaluating_changes_not_a_bit(plan, evaluations):
    """Of the steps, whatever there is an average of."""
    plan.events = [what for what in plan.events if not what.startswith("evaluate")]
    params, optimizer = plan.build(controller=plan.controller)
    others, evaluated = plan.build(controller=plan.controller)
    averages = 0
    for step in range(len(plan.events)):
        steps = range(step, step + 1)
        assert_equal(play(plan, params, optimizer, steps), play(plan, others, evaluated, steps))
        if step in evaluations:
            evaluated.eval()
            averages += not all(map(torch.equal, params, others))
            evaluated.train()
        assert_equal(params, others)
    assert_equal(base_state(optimizer), base_state(evaluated))
    event("an average" if averages else "no average")


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(
    plan=plans,
    mode=st.sampled_from(["auto", "escape", "retain", "observe"]),
    law=st.booleans(),
    saved_at=st.integers(0, 23),
)
def test_saved_at_any_step_the_run_goes_on_alike(plan, mode, law, saved_at):
    more = {"mode": mode}
    if not law and mode != "observe":
        more["controller"] = plan.controller
    steps = len(plan.events)
    saved_at = min(saved_at, steps)
    params, optimizer = plan.build(**more)
    play(plan, params, optimizer, range(saved_at))
    saved = through_a_file(optimizer.state_dict())

    again, resumed = plan.build(**more)
    for extra in params[len(again) :]:
        again.append(nn.Parameter(torch.ones_like(extra)))
        resumed.add_param_group({"params": [again[-1]]})
    with torch.no_grad():
        for mine, theirs in zip(again, params, strict=True):
            mine.copy_(theirs)
            mine.requires_grad_(theirs.requires_grad)
    resumed.load_state_dict(saved)
    assert_equal(through_a_file(resumed.state_dict()), saved)
    expected = play(plan, params, optimizer, range(saved_at, steps))
    assert_equal(play(plan, again, resumed, range(saved_at, steps)), expected)
    assert_equal(params, again)
    assert resumed.scales == optimizer.scales
    timeless = [without_clock(o.state_dict()) for o in (optimizer, resumed)]
    assert_equal(*timeless)


def without_clock(state):
    ours = {k: v for k, v in state["gapaware"].items() if k not in ("seconds", "history")}
    return {**state, "gapaware": ours}


# -- state is data ----------------------------------------------------------------------------------------

REPLACEMENTS: list[Any] = [
    None, "x", "", -1, 0, 7, 10**30, 1e400, math.nan, -0.5, True, b"bytes", [], [[]], {}, {"x": 1}, (),
    [1, 2, 3], {"all": "big"}, object(), torch.ones(()), torch.ones(3), torch.full((2, 2), math.nan),
    torch.ones(1, 1, 1, 1), torch.ones(2, dtype=torch.int64), torch.empty(0), 1j, "[" * 3000,
    '[{"step": {}}]', "[1]", '{"a": 1}', torch.float32, ["all", [1.0, 2.0]],
]  # fmt: skip


def places(value, path=()):
    """Paths to everything in a nested container."""
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def damage(state, path, how, value):
    *parents, key = path
    container = state
    for parent in parents:
        container = container[parent]
    if isinstance(container, tuple):
        return False
    if how == "delete":
        del container[key]
    elif how == "cut" and isinstance(container[key], str | list):
        container[key] = container[key][: len(container[key]) // 2]
    elif how == "grow" and isinstance(container[key], list):
        container[key] = container[key] * 2 + [value]
    elif how == "reshape" and isinstance(container[key], torch.Tensor):
        container[key] = container[key].reshape(-1)[:1].clone()
    else:
        container[key] = copy.deepcopy(value)
    return True


def trained(base, arguments, steps, log_to=None):
    params = parameters()
    base = BASES[base]([{"params": params[:1]}, {"params": params[1:]}])
    optimizer = GapAware(base, interval=1, window=4, sketch_dim=64, log_to=log_to, **arguments)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


@given(
    seed=st.integers(0, 2**32),
    damages=st.integers(1, 3),
    how=st.sampled_from(["replace", "replace", "delete", "cut", "grow", "reshape"]),
    value=st.sampled_from(REPLACEMENTS),
    ours=st.booleans(),
    base=st.sampled_from(["composite", "adamw"]),
    granularity=st.sampled_from(["global", "block"]),
)
def test_a_damaged_state_is_refused_whole_or_does_no_harm(
    tmp_path_factory, seed, damages, how, value, ours, base, granularity
):
    arguments = {"granularity": granularity, "mode": "escape"}
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    choose = random.Random(seed)
    _, source = trained(base, arguments, 9)
    state = copy.deepcopy(source.state_dict())
    for _ in range(damages):
        everywhere = [p for p in places(state) if (p[0] == "gapaware") == ours]
        if everywhere:
            damage(state, choose.choice(everywhere), how, value)

    params, optimizer = trained(base, arguments, 6, path)
    before = copy.deepcopy(without_clock(optimizer.state_dict()))
    kept = (optimizer.history, list(optimizer.history), path.read_bytes())
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        event("refused")
        assert_equal(before, without_clock(optimizer.state_dict()))
        assert optimizer.history is kept[0]
        assert list(optimizer.history) == kept[1]
        assert path.read_bytes() == kept[2]
        steps_after, harmless = range(6, 20), True
    else:
        event("accepted")
        steps_after, harmless = range(9, 20), base_runs(copy.deepcopy((optimizer.base, params)))
    if harmless:
        for step in steps_after:
            set_gradients(params, step)
            groups = groups_of(optimizer)
            optimizer.step()
            assert_equal(groups, groups_of(optimizer))
        assert all(1 <= scale <= 64 for scale in optimizer.scales)


def base_runs(base_and_params):
    """Whether what was loaded into the base alone lets it step."""
    base, params = base_and_params
    try:
        for step in range(3):
            set_gradients(params, step)
            base.step()
    except Exception:
        return False
    return True


# -- the parts --------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers() | st.none() | st.text()
decisions = st.builds(
    Decision,
    scale=numbers,
    weight_decay_scale=numbers,
    momentum_scale=numbers,
    push=numbers,
    interval=numbers,
    memory=st.dictionaries(st.text(), st.recursive(numbers, st.lists, max_leaves=5)) | numbers,
)


@given(
    answer=decisions | numbers | st.lists(numbers),
    low=st.floats(1e-3, 1),
    high=st.floats(1, 99),
    max_push=st.floats(0, 9) | st.just(math.inf),
)
def test_an_answer_is_sound_or_refused(answer, low, high, max_push):
    try:
        decision = as_decision(answer)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return
    factors = decision.scales(low, high, max_push)
    assert low <= factors.lr <= high
    assert 0 <= factors.weight_decay < math.inf
    assert 0 < factors.momentum < math.inf
    assert 0 <= factors.push <= min(max_push, 1e308)
    assert decision.interval is None or decision.interval >= 1
    assert_equal(through_a_file(decision.memory), decision.memory)


rates = st.floats(0, 1e3) | st.integers(0, 9) | st.floats(0, 1).map(torch.tensor)
groups = st.fixed_dictionaries(
    {"lr": rates, "momentum": st.floats(0, 1)},
    optional={"weight_decay": rates | st.none(), "betas": st.tuples(rates, rates)},
)
factors = st.builds(Scales, st.floats(1e-3, 1e3), st.floats(0, 1e3), momentum=st.floats(1e-3, 1e3))


@given(
    groups=st.lists(groups, min_size=1, max_size=3),
    chosen=st.lists(factors, min_size=6),
    fails=st.booleans(),
    by_parameter=st.booleans(),
    kind=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]),
)
def test_hyperparameters_are_put_back_whatever_happens(groups, chosen, fails, by_parameter, kind):
    params = [parameters(((2,), (3,)), seed=n) for n in range(len(groups))]
    optimizer = kind([{"params": p} for p in params], lr=0.1)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)
    before = [dict(group) for group in optimizer.param_groups]
    flat = [p for part in params for p in part]
    divide = {id(p): s for p, s in zip(flat, chosen, strict=False)} if by_parameter else None
    try:
        with scaled(optimizer, chosen[: len(groups)], divide):
            held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            assert set(held) == {id(p) for p in flat}
            for n, part in enumerate(params):
                for p in part:
                    factor = divide[id(p)] if by_parameter else chosen[n]
                    expected = before[n]["lr"] * factor.lr
                    assert torch.as_tensor(held[id(p)]["lr"] == expected).all()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for group, values in zip(optimizer.param_groups, before, strict=True):
        assert group.keys() == values.keys()
        assert all(group[key] is values[key] for key in values)
