"""The forgetting risk: what it is, what it survives, where it is told."""

import copy
import json
import warnings
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from bases import BASES
from gradients import parameters, run
from models import batch, mlp, train
from torch import nn

from benchmarks import risk as study
from gapaware import GapAware
from gapaware.blocks import WIDTH
from gapaware.history import read_log
from gapaware.layout import MOST_BLOCKS, grouped
from gapaware.report import statistics, summarize
from gapaware.sketch import CountSketch

SMALL = {"mode": "observe", "interval": 2, "sketch_dim": 512}


def build(model, groups=None, **arguments):
    base = torch.optim.AdamW(groups or model.parameters(), lr=1e-2)
    return GapAware(base, **{**SMALL, **arguments})


def flat(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters])


def tensors(model):
    """The blocks of an optimizer that was not told names."""
    return [[parameter] for parameter in model.parameters()]


def exact(blocks, starts):
    """The formula, as the mean over the blocks that did not start at zero."""
    pairs = [(flat(block), start) for block, start in zip(blocks, starts, strict=True)]
    ratios = [
        (now - start).square().sum() / start.square().sum() for now, start in pairs if start.any()
    ]
    return float(sum(ratios) / len(ratios))


def watched(model, optimizer, steps, blocks=None):
    """Train, and return by step what the history says and what the formula gives."""
    blocks = tensors(model) if blocks is None else blocks
    starts, formula = [flat(block) for block in blocks], {}
    for step in range(steps):
        train(model, optimizer, range(step, step + 1))
        formula[step + 1] = exact(blocks, starts)
    told = {record["step"]: record["risk"] for record in optimizer.history}
    return told, formula


def assert_told(optimizer, formula, after, more_than):
    """The risks in the history are those that the formula gives by step."""
    told = {r["step"]: r["risk"] for r in optimizer.history if r["step"] > after and "risk" in r}
    assert len(told) > more_than
    for step, risk in told.items():
        assert risk == pytest.approx(formula[step], rel=1e-9)


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
def test_exact_sketch_gives_the_formula(granularity):
    model = mlp()
    told, formula = watched(model, build(model, sketch_dim=None, granularity=granularity), 21)
    assert list(told) == list(range(2, 20, 2))
    for step, risk in told.items():
        assert risk == pytest.approx(formula[step], rel=1e-9)


def deep():
    """Six layers of 300 to 30,000 numbers; by name two blocks of two layers each, and two of one."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(300, 100),
            "h": nn.ModuleList(
                nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100)) for _ in range(2)
            ),
            "norm": nn.LayerNorm(100),
            "head": nn.Linear(100, 3),
        }
    )


def named_blocks(model):
    body = [[*block.parameters()] for block in model["h"]]
    rest = [[p] for name in ("norm", "head") for p in model[name].parameters()]
    return [[model["embedding"].weight], *body, *rest]


def together(units):
    """As a row has them: a few blocks of neighbours."""
    numbers = grouped([len(flat(unit)) for unit in units], MOST_BLOCKS)
    blocks = [[] for _ in range(numbers[-1] + 1)]
    for number, unit in zip(numbers, units, strict=True):
        blocks[number] += unit
    return blocks


def steps_of(model, optimizer, steps):
    """Train on random tokens, and yield after each step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(300, (32,), generator=generator)
        hidden = model["embedding"](tokens)
        for block in model["h"]:
            hidden = hidden + block(hidden)
        loss = nn.functional.cross_entropy(model["head"](model["norm"](hidden)), tokens % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("named", [True, False])
def test_the_mean_over_blocks_whatever_the_rows(granularity, named):
    """Within the error of the short sketches: √(2/WIDTH) of each squared norm, less by the mean."""
    model = deep()
    base = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=1e-2)
    optimizer = GapAware(base, **{**SMALL, "granularity": granularity})
    blocks = named_blocks(model) if named else tensors(model)
    if granularity == "global":
        blocks = together(blocks)
    starts = [flat(block) for block in blocks]
    formula = [exact(blocks, starts) for _ in steps_of(model, optimizer, 41)]
    assert len(optimizer.history) == 19
    sigma = (2 * 2 / WIDTH / len(blocks)) ** 0.5
    for record in optimizer.history:
        assert record["risk"] == pytest.approx(formula[record["step"] - 1], rel=3 * sigma)


def test_many_tensors_are_taken_together_even_with_some_that_start_at_zero():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)])
    for layer in model[:-1]:
        nn.init.zeros_(layer.bias)
    parameters = list(model.parameters())
    base = torch.optim.AdamW(
        [{"params": parameters[:-2]}, {"params": parameters[-2:], "anchor": False}], lr=1e-2
    )
    optimizer = GapAware(base, **{**SMALL, "sketch_dim": None})
    blocks = together([[p] for p in parameters[:-2]])
    assert 1 < len(blocks) <= MOST_BLOCKS
    starts, x, formula = [flat(block) for block in blocks], torch.randn(32, 3), []
    for _ in range(21):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        formula.append(exact(blocks, starts))
    assert len(optimizer.history) == 9
    for record in optimizer.history:
        assert record["risk"] == pytest.approx(formula[record["step"] - 1], rel=1e-9)


def test_rows_of_whole_groups_do_not_change_what_the_law_sees():
    """Blocks are only looked at: decisions follow from the long sketches, whose bits stay."""
    x = [torch.randn(n) for n in (5, 300, 70_000, 12, 200_000)]
    ends = list(accumulate(len(part) for part in x))
    pieces = [(part, end - len(part)) for part, end in zip(x, ends, strict=True)]
    sketch, cpu = CountSketch(1000, seed=0), torch.device("cpu")
    whole, _ = sketch.rows([pieces], cpu)
    parted, shares = sketch.rows(
        [pieces], cpu, stretches=[list(zip(ends, (0, 1, 2, 0, 3), strict=True))]
    )
    assert torch.equal(whole, parted)
    assert shares.shape == (4 * WIDTH,)


def test_a_block_that_started_at_zero_is_left_out():
    model = mlp()
    with torch.no_grad():
        model[2].bias.zero_()
    told, formula = watched(model, build(model, sketch_dim=None), 21)
    assert told[18] == pytest.approx(formula[18], rel=1e-9)


def test_a_new_head_is_left_out():
    model = mlp()
    head = list(model[-1].parameters())
    trunk = [p for p in model.parameters() if not any(p is h for h in head)]
    groups = [{"params": trunk}, {"params": head, "anchor": False}]
    optimizer = build(model, groups, sketch_dim=None)
    told, formula = watched(model, optimizer, 21, [[p] for p in trunk])
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
    """Rows that were there keep their start, the new one has none."""
    model = mlp()
    late = nn.Parameter(torch.ones(1000))
    optimizer = build(model, sketch_dim=sketch_dim)
    starts = [flat(block) for block in tensors(model)]
    train(model, optimizer, 11)
    optimizer.add_param_group({"params": [late], "lr": 0.0})
    train(model, optimizer, range(11, 14))
    formula = exact(tensors(model), starts)
    train(model, optimizer, range(14, 17))
    record = next(record for record in optimizer.history if record["step"] == 14)
    assert record["risk"] == pytest.approx(formula, rel=0.3 if sketch_dim else 1e-9)
    assert record["risk"] > 0


@pytest.mark.parametrize("named", [True, False])
def test_what_begins_at_zero_in_mid_run_is_no_risk(named):
    """Its first snapshot is some steps after its first step, when it is no longer zero."""
    torch.manual_seed(0)
    models = nn.ModuleDict({"body": mlp(), "head": nn.Linear(6, 2)})
    for parameter in models["head"].parameters():
        nn.init.zeros_(parameter)
    body = models["body"]
    blocks = [[*layer.parameters()] for layer in body if list(layer.parameters())]
    blocks = blocks if named else tensors(body)
    starts = [flat(block) for block in blocks]

    def of(name):
        found = models[name]
        return list(found.named_parameters(prefix=name)) if named else list(found.parameters())

    base = torch.optim.AdamW(of("body"), lr=1e-2)
    optimizer = GapAware(base, **{**SMALL, "sketch_dim": None, "interval": 5, "risk_limit": 10.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(103):
            train(body, optimizer, range(step, step + 1))
        optimizer.add_param_group({"params": of("head")})
        formula = {}
        for step in range(103, 200):
            x, y = batch(step)
            loss = (body(x) + models["head"](x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            formula[step + 1] = exact(blocks, starts)
    assert_told(optimizer, formula, after=103, more_than=10)


def test_layers_that_are_thawed_are_left_out():
    """And so are those behind them, whose place in the group is another one."""
    model = deep()
    for parameter in model["h"][1].parameters():
        parameter.requires_grad_(False)
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    optimizer = GapAware(base, **{**SMALL, "sketch_dim": None})
    blocks = named_blocks(model)
    starts = [flat(block) for block in blocks]
    assert len(list(steps_of(model, optimizer, 12))) == 12
    for parameter in model["h"][1].parameters():
        parameter.requires_grad_(True)
    assert len(list(steps_of(model, optimizer, 2))) == 2
    *_, formula = [exact(blocks[:2], starts[:2]) for _ in steps_of(model, optimizer, 2)]
    assert len(list(steps_of(model, optimizer, 2))) == 2
    record = next(record for record in optimizer.history if record["step"] == 16)
    assert record["risk"] == pytest.approx(formula, rel=1e-9)


def test_the_start_outlasts_nan():
    params = parameters()
    blocks = [[parameter] for parameter in params]
    starts = [flat(block) for block in blocks]
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
        formula[step + 1] = exact(blocks, starts)
    assert_told(optimizer, formula, after=15, more_than=3)


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
        lambda start: start.update(shares=start["shares"][1:]),
        lambda start: start.update(shares="x"),
        lambda start: start.update(blocks=[]),
        lambda start: start["blocks"][0].pop(),
        lambda start: start["blocks"].append(["group 1: tensor 0", 1, 1, 0]),
        lambda start: start["blocks"][0].__setitem__(0, "group 7: tensor 0"),
        lambda start: start["blocks"][0].__setitem__(2, 7),
        lambda start: start.pop("blocks"),
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


def test_a_start_of_rows_is_refused_with_its_reason():
    """As states had it while risks were means over the rows of the sketch."""
    model = mlp()
    optimizer = build(model)
    train(model, optimizer, 15)
    saved = copy.deepcopy(optimizer.state_dict())
    rows = {"rows": [["group 0", 6, 1000]], "sketch": torch.zeros(1, 512)}
    saved["gapaware"]["observer"]["start"] = rows
    with pytest.raises(ValueError, match="the start of rows"):
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
