import math

import pytest

from benchmarks.plateau_bars import bars
from benchmarks.runs import METHODS as ALL
from benchmarks.runs import Results

SCHEDULE_FREE = ALL["schedule-free"]
METHODS = ["base", "gapaware", "schedule-free"]


def add(results, method, steps=None, *, task="parity", seeds=5, factor=1.0, loss=0.1, **more):
    for seed in range(seeds):
        results.add(
            {
                "task": task,
                "method": method,
                "lr_factor": factor,
                "seed": seed,
                "steps": steps or 1000,
                "steps_to_target": steps and steps + seed,
                "budget": 10_000,
                "final_loss": loss,
                "cpu_seconds": 1.0,
                "extras": {},
                **more,
            }
        )


def judged(results, *tasks, seeds=5):
    return {bar.question: bar for bar in bars(results, tasks, METHODS, seeds)}


@pytest.mark.parametrize(("ours", "holds"), [(80, True), (120, False)])
def test_ten_times_fewer_steps_than_the_base(tmp_path, ours, holds):
    results = Results(tmp_path / "runs.jsonl")
    add(results, "base", 1000)
    add(results, "gapaware", ours)
    for group in ("all", "AdamW"):
        bar = judged(results, "parity")[f"base alone takes >= 10 times as many steps, {group}"]
        assert bar.holds is holds
        assert bar.reason
        assert (bar.reason in str(bar)) is not holds
    # on no held-out task
    assert not any("held out" in question for question in judged(results, "parity"))


def test_the_best_lr_of_the_sweep_has_to_be_beaten_by_a_tenth(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    for factor in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
        add(results, "base", round(1000 / factor), factor=factor)
    add(results, "gapaware", 15)
    question = "best lr of the sweep takes >= 1.111 times as many steps, AdamW"
    assert not judged(results, "parity")[question].holds
    results.forget("gapaware")
    add(results, "gapaware", 12)
    assert judged(results, "parity")[question].holds


def test_a_rival_is_judged_over_tasks(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    tasks = ["parity", "scan", "modular-add", "modular-multiply", "dyck-depth", "modular-squares"]
    tasks += ["char-lm-lr-10", "linear-attention"]
    for n, task in enumerate(tasks):
        add(results, "base", 1000, task=task)
        add(results, "gapaware", 50, task=task)
        for point in SCHEDULE_FREE.points:
            of_point = {"factor": point} if SCHEDULE_FREE.lr_swept else {"point": point}
            add(results, "schedule-free", 90 + n, task=task, **of_point)
    question = "fewer steps than schedule-free, p < 0.01"
    assert judged(results, *tasks)[question].holds
    assert not judged(results, *tasks[:4])[question].holds  # four tasks cannot show it


def test_without_a_plateau_one_worse_task_is_enough(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    for task, ours in (("digits", 0.0996), ("mnist-cnn", 0.1002)):
        add(results, "base", task=task)
        add(results, "gapaware", task=task, loss=ours)
    assert all(bar.holds for bar in judged(results, "digits", "mnist-cnn").values())
    add(results, "gapaware", task="mnist-cnn", loss=0.1006)
    failed = [bar for bar in judged(results, "digits", "mnist-cnn").values() if not bar.holds]
    assert [bar.answer for bar in failed] == ["+0.60% on mnist-cnn", "+0.10%"]
    add(results, "gapaware", task="digits", loss=math.nan)
    assert not judged(results, "digits")[
        "no plateau: no run diverges that the base's does not"
    ].holds


def test_learning_rates_and_norms(tmp_path):
    results = Results(tmp_path / "runs.jsonl")
    for factor, loss in zip((1.0, 0.3, 0.1, 0.03, 0.01), (1.0, 1.1, 1.2, 1.5, 2.0), strict=True):
        add(results, "base", task="digits", factor=factor, loss=loss)
        add(results, "gapaware", task="digits", factor=factor, loss=1 + 0.1 * (loss - 1))
    for method, norm in (("base", 1.5), ("gapaware", 1.56)):
        add(results, method, 100, task="relu-orthogonal", extras={"norm_over_smallest": norm})
    found = judged(results, "digits", "relu-orthogonal")
    assert (
        found["digits: final loss varies <= 0.2 times as much from lr / 100 to lr"].answer == "0.10"
    )
    assert str(found["relu-orthogonal: squared norm within 2%"]) == (
        "FAILS  relu-orthogonal: squared norm within 2%: +4.00% "
        "(larger steps on the way down from the plateau end further away)"
    )


def test_nothing_is_judged_without_runs(tmp_path):
    assert judged(Results(tmp_path / "runs.jsonl"), "parity", "digits") == {}
