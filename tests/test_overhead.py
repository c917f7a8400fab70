"""The overhead benchmark: its statistics and bars, and one tiny run of everything that it times."""

import json
import math

import pytest
import torch

from benchmarks import costs, overhead
from benchmarks.costs import refuse_faults, settle_down, step_with_gapaware, step_with_rival
from benchmarks.gpt2 import SHAPES, Trainee
from benchmarks.memory import weigh
from benchmarks.overhead_report import bars
from benchmarks.timing import LEAST_ROUNDS, exponent, interleaved, ratio
from gapaware import Decision, GapAware

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_the_exponent_of_a_power_law_is_found(power):
    sizes = [1e6, 2e6, 4e6, 8e6]
    assert exponent(sizes, [3e-9 * size**power for size in sizes]) == pytest.approx(power)


def test_what_slows_both_down_alike_cancels():
    slowness = [1.0, 3.0, 1.5, 8.0, 1.1, 2.0]
    found = ratio([(s, 1.02 * s) for s in slowness])
    assert found.median == pytest.approx(1.02)
    assert found.low == pytest.approx(1.02)
    assert found.high == pytest.approx(1.02)
    assert found.rounds == 6


def test_the_interval_holds_the_median_and_one_outlier_moves_neither():
    found = ratio([(1.0, r) for r in (1.00, 1.01, 1.02, 1.03, 1.04, 1.05, 9.0)])
    assert found.low <= found.median == 1.03 <= found.high < 9.0


def test_one_round_has_no_interval():
    assert math.isnan(ratio([(1.0, 2.0)]).low)


def test_calls_alternate_and_each_has_its_preparation():
    calls = []
    rounds = interleaved(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        CPU,
        repeats=1,
        budget=0.0,
        before=lambda: calls.append("."),
    )
    assert len(rounds) == LEAST_ROUNDS == 3
    assert "".join(calls) == ".A.B.B.A.A.B"


def rows(step=1.005, busy=1.006, every_step=1.04, over_read=2.0, held=6e6, power=1.0, rival=1.05):
    """Measurements of one device, by default such that every bar holds."""
    here = {"model": "10M", "base": "AdamW"}
    step_row = {**here, "measure": "step", "step_seconds": 0.1, "inside_seconds": 1e-4}
    read = 1e-3
    return [
        {
            **step_row,
            "method": "gapaware",
            "interval": 10.0,
            "defaults": True,
            "rounds": [(1.0, step)],
        },
        {
            **step_row,
            "method": "gapaware",
            "interval": 5,
            "defaults": False,
            "rounds": [(1.0, busy)],
        },
        {
            **step_row,
            "method": "gapaware",
            "interval": 1,
            "defaults": False,
            "rounds": [(1.0, every_step)],
        },
        {**step_row, "method": "grokfast", "rounds": [(1.0, rival)]},
        {
            **here,
            "measure": "snapshot",
            "numbers": 10_000_000,
            "tensors": 124,
            "rounds": [(read, over_read * read)],
            "snapshot_seconds": over_read * read,
        },
        {
            **here,
            "measure": "memory",
            "parameter_bytes": 40_000_000,
            "tensor_bytes": held,
            "history_bytes": 1_000_000,
            "peak_alone": 1,
            "peak_wrapped": 2,
        },
        *(
            {
                "measure": "snapshot",
                "varied": "P",
                "value": factor,
                "numbers": factor * 1_000_000,
                "tensors": 64,
                "rounds": [(factor * read, factor * read)],
                "snapshot_seconds": read * factor**power,
            }
            for factor in (1, 2, 4, 8)
        ),
    ]


def failing(**figures):
    return [question for question, _, holds in bars(rows(**figures)) if not holds]


def test_every_bar_is_asked_and_can_hold():
    assert len(bars(rows())) == 7
    assert failing() == []


@pytest.mark.parametrize(
    ("figures", "question"),
    [
        ({"step": 1.011, "rival": 2.0}, "step at defaults"),
        ({"busy": 1.011}, "step at interval=5 <= 1.01"),
        ({"every_step": 1.051}, "step at interval=1"),
        ({"over_read": 2.51}, "over a read"),
        ({"held": 7.05e6}, "memory <= 8.04 MB"),
        ({"power": 1.06}, "P^x"),
        ({"power": 0.94}, "P^x"),
        ({"rival": 1.004}, "cheaper than grokfast"),
    ],
)
def test_a_bar_that_is_missed_fails_alone(figures, question):
    failed = failing(**figures)
    assert len(failed) == 1
    assert question in failed[0]


def test_cuda_has_bars_of_its_own():
    measured = [
        {**row, "half_copy_seconds": 1e-3} if row["measure"] == "snapshot" else row
        for row in rows(step=1.006, every_step=1.021, over_read=1.31)
    ]
    failed = [question for question, _, holds in bars(measured) if not holds]
    assert len(failed) == 5
    assert "snapshot over half a copy <= 1.3" in failed[-1]


def test_a_fault_is_no_measurement():
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = GapAware(torch.optim.SGD([parameter], lr=0.1), interval=1, sketch_dim=64)
    optimizer.step()
    refuse_faults(optimizer)
    with torch.no_grad():
        parameter.fill_(math.nan)
    optimizer.step()
    with pytest.warns(UserWarning, match="took its factors off"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="NaN"):
        refuse_faults(optimizer)


@pytest.mark.parametrize("interval", ["auto", 5, 1])
def test_steps_are_timed_over_whole_periods_with_their_snapshots(interval):
    row = step_with_gapaware(Trainee(SHAPES["50k"], CPU), "AdamW", interval, budget=0.0)
    assert row["interval"] == {"auto": 10}.get(interval, interval)
    assert row["defaults"] is (interval == "auto")
    assert len(row["rounds"]) == LEAST_ROUNDS
    assert 0 < row["inside_seconds"] < row["step_seconds"] * 10
    assert all(math.isfinite(t) and t > 0 for pair in row["rounds"] for t in pair)


def test_defaults_that_do_not_come_to_rest_are_no_measurement():
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = GapAware(torch.optim.SGD([parameter], lr=0.1), mode="observe", sketch_dim=64)
    with pytest.raises(RuntimeError, match="snapshots stay 1 steps apart"):
        settle_down(optimizer, [parameter])


@pytest.mark.parametrize("extra", ["pushing", "averaging"])
def test_what_copies_the_weights_has_a_row_of_its_own_and_is_judged_by_no_bar(extra):
    row = step_with_gapaware(Trainee(SHAPES["50k"], CPU), "AdamW", "auto", budget=0.0, extra=extra)
    assert row["method"] == f"gapaware-{extra}"
    model = {"model": "10M", "rounds": [(1.0, 1.9)]}
    assert bars([*rows(), {**row, **model}]) == bars(rows())


@pytest.mark.parametrize("extra", ["pushing", None])
def test_a_push_that_was_not_wanted_or_did_not_come_is_no_measurement(monkeypatch, extra):
    def other(trainee, base, interval, **_):
        push = 0.0 if extra else 2.0
        optimizer = torch.optim.AdamW(trainee.parameters, lr=1e-5)
        return GapAware(optimizer, controller=lambda _: Decision(1.0, push=push))

    monkeypatch.setattr(costs, "wrapped", other)
    with pytest.raises(RuntimeError, match="push during it"):
        step_with_gapaware(Trainee(SHAPES["50k"], CPU), "AdamW", 5, budget=0.0, extra=extra)


@pytest.mark.parametrize("name", ["grokfast", "schedule-free", "prodigy"])
def test_rivals_are_timed_on_the_same_step(name):
    row = step_with_rival(Trainee(SHAPES["50k"], CPU), name, budget=0.0)
    assert row["method"] == name
    assert len(row["rounds"]) == LEAST_ROUNDS


def test_memory_is_that_of_the_state_and_of_a_full_history():
    row = weigh("50k", "AdamW", CPU)
    ring = 11 * 16_384 * 4
    assert ring < row["tensor_bytes"] < 8 * ring
    assert 2e5 < row["history_bytes"] < 5e6
    assert row["parameter_bytes"] < 1e6


def test_a_run_is_kept_and_can_be_judged_again(tmp_path, monkeypatch, capsys):
    tiny = overhead.Plan((), 0.0, 0.0, numbers=100_000, growth={"P": (1, 2), "window": (5,)})
    monkeypatch.setattr(overhead, "plan", lambda device, quick: tiny)
    kept, verdicts = tmp_path / "kept.jsonl", tmp_path / "verdicts.json"
    overhead.main(["--device", "cpu", "--results", str(kept), "--json", str(verdicts)])
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["numbers"] for row in written] == [98_304, 196_608, 98_304]
    assert all(row["device"] in printed for row in written)
    judged = json.loads(verdicts.read_text())
    assert [question.split(" as ")[0] for _, question, _, _ in judged] == ["cost grows"]
    overhead.main(["--from-results", str(kept)])
    assert printed.endswith(capsys.readouterr().out.lstrip("\n"))


def test_asking_for_results_that_are_not_there_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit):
        overhead.main(["--from-results", str(tmp_path)])
