"""The forgetting risk: what it is, what it survives, where it is told."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from bases import BASES
from gradients import parameters, run
from models import mlp, train
from torch import nn

from benchmarks import risk as study
from gapaware import GapAware
from gapaware.history import read_log
from gapaware.report import statistics, summarize

SMALL = {"mode": "observe", "interval": 2, "sketch_dim": 512}


def build(model, groups=None, **arguments):
    base = torch.optim.AdamW(groups or model.parameters(), lr=1e-2)
    return GapAware(base, **{**SMALL, **arguments})


def flat(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters])


def exact(parameters, start):
    return float((flat(parameters) - start).square().sum() / start.square().sum())


def watched(model, optimizer, steps, parameters=None):
    """Train, and return by step what the history says and what the formula gives."""
    parameters = list(model.parameters()) if parameters is None else parameters
    start, formula = flat(parameters), {}
    for step in range(steps):
        train(model, optimizer, range(step, step + 1))
        formula[step + 1] = exact(parameters, start)
    told = {record["step"]: record["risk"] for record in optimizer.history}
    return told, formula


def test_exact_sketch_gives_the_formula():
    model = mlp()
    told, formula = watched(model, build(model, sketch_dim=None), 21)
    assert list(told) == list(range(2, 20, 2))
    for step, risk in told.items():
        assert risk == pytest.approx(formula[step], rel=1e-9)


def test_of_several_rows_the_mean_without_those_that_started_at_zero():
    model = mlp()
    biases = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
    starts = [flat([p]) for p in model.parameters()]
    with torch.no_grad():
        biases[1].zero_()
    optimizer = build(model, sketch_dim=None, granularity="block")
    train(model, optimizer, 10)
    rows = zip(model.parameters(), starts, strict=True)
    shares = [exact([p], start) for p, start in rows if p is not biases[1]]
    train(model, optimizer, range(10, 13))
    record = next(record for record in optimizer.history if record["step"] == 10)
    assert record["risk"] == pytest.approx(sum(shares) / len(shares), rel=1e-9)


def test_sketch_is_within_its_error():
    """A squared norm is within √(2/dim), and a risk is a ratio of two."""
    model, dim = nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 2)), 4096
    told, formula = watched(model, build(model, sketch_dim=dim), 21)
    for step, risk in told.items():
        assert risk == pytest.approx(formula[step], rel=4 * 2 * (2 / dim) ** 0.5)


def test_a_new_head_is_left_out():
    model = mlp()
    head = list(model[-1].parameters())
    trunk = [p for p in model.parameters() if not any(p is h for h in head)]
    groups = [{"params": trunk}, {"params": head, "anchor": False}]
    told, formula = watched(model, build(model, groups, sketch_dim=None), 21, trunk)
    assert told[18] == pytest.approx(formula[18], rel=1e-9)
    alone = build(model, [{"params": head, "anchor": False}])
    train(model, alone, 20)
    assert len(alone.history) == 9
    assert not any("risk" in record for record in alone.history)


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("sketch_dim", [512, None])
def test_resumed_bit_for_bit(tmp_path, sketch_dim):
    model = mlp()
    optimizer = build(model, sketch_dim=sketch_dim)
    train(model, optimizer, 15)
    again = copy.deepcopy(model)
    resumed = build(again, sketch_dim=sketch_dim)
    resumed.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "state.pt"))
    for one, other in ((model, optimizer), (again, resumed)):
        train(one, other, range(15, 40))
    risks = optimizer.history.column("risk")
    assert len(risks) == 19
    assert resumed.history.column("risk") == risks


def test_old_states_load_and_their_start_stays_unknown():
    saved = torch.load(Path(__file__).parent / "data" / "state-version-1.pt", weights_only=True)
    arguments = {"window": 4, "interval": 2, "sketch_dim": 64, "mode": "observe"}
    model = mlp()
    optimizer = GapAware(BASES["adamw"](model), **arguments)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(31, 51))
    state = optimizer.state_dict()
    optimizer = GapAware(BASES["adamw"](model), **arguments)
    optimizer.load_state_dict(state)
    # a window that starts anew begins no start in the middle of a run
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    train(model, optimizer, range(51, 71))
    assert optimizer.history[-1]["step"] > 60
    assert not any("risk" in record for record in optimizer.history)


def test_other_settings_leave_the_start_unknown():
    model = mlp()
    optimizer = build(model)
    train(model, optimizer, 20)
    other = build(model, window=5)
    with pytest.warns(UserWarning, match="the window starts empty"):
        other.load_state_dict(optimizer.state_dict())
    train(model, other, range(20, 40))
    assert max(record["step"] for record in other.history if "risk" in record) < 20


@pytest.mark.parametrize("sketch_dim", [512, None])
def test_the_start_outlasts_a_new_group(sketch_dim):
    """Rows that were there keep their start, the new one begins where it came."""
    model = mlp()
    late = nn.Parameter(torch.ones(1000))
    optimizer = build(model, sketch_dim=sketch_dim)
    start = flat(model.parameters())
    train(model, optimizer, 11)
    optimizer.add_param_group({"params": [late], "lr": 0.0})
    train(model, optimizer, range(11, 14))
    formula = exact(model.parameters(), start) / 2  # the mean with that of the new group
    train(model, optimizer, range(14, 17))
    record = next(record for record in optimizer.history if record["step"] == 14)
    assert record["risk"] == pytest.approx(formula, rel=0.3 if sketch_dim else 1e-9)
    assert record["risk"] > 0


def test_the_start_outlasts_nan():
    params = parameters()
    start = flat(params)
    optimizer = GapAware(torch.optim.SGD(params, lr=0.1), **{**SMALL, "sketch_dim": None})
    run(optimizer, params, 10)
    whole = copy.deepcopy(params)
    params[0].data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN or infinity"):
        run(optimizer, params, range(10, 15))
    for parameter, sound in zip(params, whole, strict=True):
        parameter.data.copy_(sound.data)
    formula = {}
    for step in range(15, 30):
        run(optimizer, params, range(step, step + 1))
        formula[step + 1] = exact(params, start)
    told = {r["step"]: r["risk"] for r in optimizer.history if r["step"] > 15 and "risk" in r}
    assert len(told) > 3
    for step, risk in told.items():
        assert risk == pytest.approx(formula[step], rel=1e-9)


def test_a_start_at_zero_has_no_risk():
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = build(model)
    train(model, optimizer, 20)
    assert len(optimizer.history) == 9
    assert not any("risk" in record for record in optimizer.history)


@pytest.mark.parametrize(
    "damage",
    [
        lambda start: start.update(sketch=start["sketch"][:, 1:]),
        lambda start: start.update(sketch="x"),
        lambda start: start.update(rows=[]),
        lambda start: start["rows"][0].pop(),
        lambda start: start["rows"].append(["group 1", 1, 1]),
        lambda start: start["rows"][0].__setitem__(0, "group 7"),
        lambda start: start.pop("rows"),
    ],
)
def test_a_damaged_start_is_refused(damage):
    model = mlp()
    optimizer = build(model)
    train(model, optimizer, 15)
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["gapaware"]["observer"]["start"])
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.load_state_dict(saved)


# -- where it is told ------------------------------------------------------------------------------


def test_warned_of_once_at_the_first_snapshot_above_the_limit():
    model = mlp()
    optimizer = build(model, risk_limit=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 60)
    (warning,) = caught
    first = next(record for record in optimizer.history if record["risk"] > 0.02)
    assert first["step"] > 2
    assert f"risk of forgetting {first['risk']:.3g} at step {first['step']}" in str(warning.message)
    assert Path(warning.filename).name == "models.py"  # the line that called step()


def test_no_warning_below_the_limit_or_without_one():
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, build(model, risk_limit=1e6), 30)
        train(model, build(model), 30)


def test_a_warning_that_is_an_error_leaves_the_window_alone():
    model = mlp()
    optimizer = build(model, risk_limit=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="risk of forgetting"):
            train(model, optimizer, 30)
        train(model, optimizer, range(30, 50))
    assert "fault" not in optimizer.history.column("decision")
    assert len(optimizer.history.column("risk")) > 8


@pytest.mark.parametrize(
    ("limit", "error"), [(0.0, ValueError), (-1.0, ValueError), ("x", TypeError), (True, TypeError)]
)
def test_a_wrong_limit_is_refused(limit, error):
    with pytest.raises(error, match="risk_limit"):
        build(mlp(), risk_limit=limit)


def test_log_and_report(tmp_path):
    path = tmp_path / "run.jsonl"
    model = mlp()
    optimizer = build(model, log_to=path)
    train(model, optimizer, 40)
    risks = optimizer.history.column("risk")
    assert [json.loads(line)["risk"] for line in path.read_text().splitlines()[1:]] == risks
    header, records = read_log(path)
    assert statistics(header, records)["risk"] == {"last": risks[-1], "largest": max(risks)}
    (line,) = [line for line in summarize(header, records).splitlines() if line.startswith("risk")]
    assert f"{risks[-1]:.3g} at the end" in line


# -- the study --------------------------------------------------------------------------------------


def a_row(task="digits", value=1.0, curve=((0, 0, 1, 0.9), (1, 0.1, 1, 0.9), (4, 0.5, 3, 0.8))):
    return {"task": task, "value": value, "steps": 4, "curve": [list(point) for point in curve]}


def test_the_study_ranks_the_points_of_all_runs():
    turned = a_row(curve=[(0, 0, 2, 0.9), (2, 0.2, 3, 0.7), (4, 0.4, 5, 0.6)])
    rows = [a_row(), turned]
    assert [study.rise(row).tolist() for row in rows] == [[0, 2], [1, 3]]
    # risks .1 .5 .2 .4 rank 1 4 2 3, rises 0 2 1 3 rank 1 3 2 4: 1 - 6 (1 + 1) / (4 (16 - 1))
    assert study.correlation(rows, study.risk) == pytest.approx(0.8)
    assert study.sum_of_lrs(a_row(value=3.0)).tolist() == [3.0, 3 * (1 + 0.75 + 0.5 + 0.25)]
    low, high = study.interval(rows, study.risk)
    assert low <= 0.8 <= high


def test_an_alarm_comes_before_the_loss_or_not():
    row = a_row()
    assert study.alarm(row, 0.05) == (1.0, 4.0)
    assert study.alarm(row, 0.6) == (None, 4.0)
    kept = a_row(curve=[(0, 0, 1, 0.9), (1, 0.9, 1, 0.86)])
    assert study.alarm(kept, 0.5) == (1.0, None)
    # eleven of these twelve lose the old skill at a risk of at least .2
    lost = [
        a_row(curve=[(0, 0, 1, 0.9), (1, n / 10, 1, 0.5), (2, 5, 1, 0.4)]) for n in range(1, 13)
    ]
    assert study.threshold([*lost, kept]) == pytest.approx(0.2)
    rows = [row | {"seed": 0}, *(dict(r, task="other", seed=n // 6) for n, r in enumerate(lost))]
    first, other = study.alarms(rows, same_task=False).splitlines()[2:]
    assert first.split("  ")[0] == "digits"
    assert "1 of 1" in first
    # .5, the level of the one run, is too high for .1 to .4
    assert "8 of 12" in other
