import builtins
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.colors
import numpy as np
import pytest

from gapaware.cli import main
from gapaware.figure import draw
from gapaware.history import History
from gapaware.panels import RED
from gapaware.report import statistics, summarize, titles, write_figure, write_report
from gapaware.spectrum import REGIME_BOUNDS

HEADER = {"gapaware": "0.1.0", "schema": 1, "settings": {"mode": "auto", "target": None}}
PANELS = ["loss", "singular values", "adiabaticity", "scale", "risk", "lr"]


def snapshot(step, scale=1.0, lr=(1e-3,), a=0.5, gap_position=1, sigma=(4.0, 2.0, 1.0), **more):
    regime = next((name for name, (low, high) in REGIME_BOUNDS.items() if low <= a < high), None)
    return {
        "step": step,
        "seconds": step / 10,
        "gapaware_seconds": step / 1000,
        "interval": 10,
        "lr": list(lr),
        "lr_scaled": [scale * value for value in lr],
        "scale": scale,
        "weight_decay_scale": 1.0,
        "regime": regime,
        "decision": "hold",
        "why": "",
        "spectrum": {
            "sigma": list(sigma),
            "gap_position": gap_position,
            "gap_position_thesis": 2,
            "gap_ratio": 2.0,
            "adiabaticity": a,
            "decay_share": None,
        },
        **more,
    }


def fault(step, why="non-finite update"):
    return {
        "step": step,
        "interval": 10,
        "scale": 1.0,
        "regime": "undetermined",
        "decision": "fault",
        "why": why,
        "spectrum": None,
    }


def a_run(count=40, measured=True):
    rng = np.random.default_rng(0)
    return [
        snapshot(
            10 * (i + 1),
            scale=2.0 ** (i % 4),
            a=float(np.exp(rng.normal())),
            gap_position=int(rng.integers(1, 3)),
            sigma=np.sort(rng.random(5))[::-1] + 1e-3,
            **({"loss": 2.0 / (i + 1), "risk": 1e-4 * (i + 1)} if measured else {}),
        )
        for i in range(count)
    ]


def write_log(path, records):
    history = History(log_to=path, header=HEADER["settings"])
    for record in records:
        history.append(record)
    history.close()
    return path


def panels(figure):
    return {ax.get_label(): ax for ax in figure.axes}


def texts(ax):
    return [text.get_text() for text in ax.texts]


# -- numbers -------------------------------------------------------------------------------------


def known_run():
    return [
        snapshot(10, a=0.05, loss=3.0),
        snapshot(20, a=0.05, decision="raise", scale=2.0, risk=0.02),
        fault(25),
        snapshot(30, a=0.5, decision="raise", scale=8.0, gap_position=2, lr=(1e-3, 5e-4), push=1.5),
        snapshot(40, a=5.0, decision="lower", scale=4.0, loss=0.5, risk=0.01, average=True)
        | {"back_to": 20},
    ]


def test_statistics_of_a_run_worked_out_by_hand():
    found = statistics(HEADER, known_run())
    assert found["regimes"] == {"plateau": 0.5, "steady": 0.25, "transition": 0.25}
    assert found["decisions"] == {"hold": 1, "raise": 2, "fault": 1, "lower": 1}
    assert found["raised"] == [20, 30]
    assert found["lowered"] == [40, 40]
    assert found["scale"] == {"min": 1.0, "max": 8.0, "median": 2.0}
    assert found["push"] == {"first": 30, "last": 30, "max": 1.5}
    assert found["average"] == [40, 40]
    assert found["lr"] == {"min": 5e-4, "max": 1e-3}
    assert found["lr_scaled"] == {"min": 1e-3, "max": 8e-3}
    assert found["gap_position"] == {"mode": 1, "share": 0.75}
    assert found["gap_position_thesis"] == {"mode": 2, "share": 1.0}
    assert found["adiabaticity"] == pytest.approx(0.275)
    assert found["snapshots"] == 4
    assert found["seconds"] == pytest.approx(4.0)
    assert found["gapaware_share"] == pytest.approx(0.01)
    assert found["loss"] == {"first": 3.0, "last": 0.5, "lowest": 0.5}
    assert found["risk"] == {"last": 0.01, "largest": 0.02}
    assert found["faults"] == [{"step": 25, "why": "non-finite update"}]
    assert found["returns"] == [{"step": 40, "back_to": 20}]
    json.dumps(found, allow_nan=False)


def test_a_regimes_share_counts_steps_not_snapshots():
    records = [snapshot(100, a=0.01, interval=90), snapshot(110, a=0.5, interval=10)]
    assert statistics({}, records)["regimes"] == {"plateau": 0.9, "steady": 0.1}


def test_a_resumed_runs_clock_starts_again():
    clocks = [(5.0, 1.0), (10.0, 2.0), (1.0, 2.5), (6.0, 3.5)]
    records = [
        snapshot(i, seconds=seconds, gapaware_seconds=inside)
        for i, (seconds, inside) in enumerate(clocks)
    ]
    found = statistics({}, records)
    assert found["seconds"] == 16.0
    assert found["gapaware_share"] == pytest.approx(2 / 10)


def test_summary_reads_as_a_table():
    lines = dict(line.split(None, 1) for line in summarize(HEADER, known_run()).splitlines())
    assert lines == {
        "settings": "mode auto",
        "steps": "10 - 40, 4 snapshots, 4.0 s (1.0% of it in gapaware)",
        "regime": "plateau 50%, steady 25%, transition 25%",
        "decision": "raise 2 (steps 20 - 30), hold 1, lower 1 (steps 40 - 40)",
        "scale": "1 - 8, median 2",
        "push": "up to 1.5 times the recent steps (steps 30 - 30)",
        "average": "of the weights, for eval() (steps 40 - 40)",
        "lr": "0.0005 - 0.001 scheduled, 0.001 - 0.008 applied",
        "gap": "after mode 1 in 75% of snapshots (thesis: 2 in 100%), ratio R 2",
        "a": "median 0.28",
        "loss": "3 -> 0.5, lowest 0.5",
        "risk": "of forgetting: 0.01 at the end, largest 0.02 (squared distance from the start, relative)",
        "returns": "1: from step 40 to 20",
        "faults": "1: step 25 (non-finite update)",
    }


def test_summary_of_faults_only_and_of_nothing():
    text = summarize({}, [fault(step) for step in range(6)])
    assert "6: step 0 (non-finite update), step 1" in text
    assert "3 more" in text
    assert "0 snapshots" in text
    with pytest.raises(ValueError, match="has not reached its first snapshot"):
        summarize({}, [])


def test_a_run_that_was_left_alone_says_so():
    assert "scale       1 throughout" in summarize({}, [snapshot(1), snapshot(2)])


# -- figure --------------------------------------------------------------------------------------


def test_figure_has_a_panel_for_everything_on_the_right_axes():
    figure = draw(a_run(), names=["run"])
    axes = panels(figure)
    assert list(axes) == PANELS
    assert axes["singular values"].get_yscale() == "log"
    assert axes["adiabaticity"].get_yscale() == "log"
    assert axes["scale"].yaxis.get_transform().base == 2
    assert axes["lr"].get_xlabel() == "optimizer step"
    assert axes["loss"].get_xlim() == axes["lr"].get_xlim()
    assert "run" in texts(axes["loss"])
    assert texts(axes["adiabaticity"]) == list(REGIME_BOUNDS)
    assert {"applied", "scheduled"} <= set(texts(axes["lr"]))


def test_the_regimes_are_shaded_where_their_bounds_are():
    ax = panels(draw(a_run()))["adiabaticity"]
    bands = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
    for band, (low, high) in zip(bands, REGIME_BOUNDS.values(), strict=True):
        assert low == 0 or band.y0 == pytest.approx(low)
        assert math.isinf(high) or band.y1 == pytest.approx(high)
    shown = ax.get_ylim()
    assert shown[0] < 0.1
    assert shown[1] > 10


def test_modes_above_the_gap_differ_from_those_below():
    records = [snapshot(step, gap_position=2) for step in range(40)]
    ax = panels(draw(records))["singular values"]
    lines = [c for c in ax.collections if type(c).__name__ == "LineCollection"]
    colours = [line.get_colors()[0].tolist() for line in lines]
    assert len(lines) == 3
    assert colours[0] == colours[1] != colours[2]
    shaded = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert {shaded.min(), shaded.max()} == {1.0, 2.0}
    assert "gap, mostly\nafter mode 2" in texts(ax)


def test_loss_and_risk_are_left_out_where_they_were_not_recorded():
    shown = [name for name in PANELS if name not in ("loss", "risk")]
    assert list(panels(draw(a_run(measured=False)))) == shown


def test_the_scale_line_shows_the_scale():
    records = a_run()
    lines = panels(draw(records))["scale"].get_lines()
    drawn = [line.get_ydata() for line in lines]
    wanted = [record["scale"] for record in records]
    assert any(len(ys) == len(wanted) and np.array_equal(ys, wanted) for ys in drawn)


def test_a_push_is_shown_where_there_was_one():
    def strips(records):
        ax = panels(draw(records))["scale"]
        red = mpl.colors.to_rgba(RED)
        return [area for area in ax.collections if np.array_equal(area.get_facecolor(), [red])]

    records = a_run()
    assert not strips(records)
    for record in records[10:20]:
        record["push"] = 2.0
    (strip,) = strips(records)
    (path,) = strip.get_paths()
    steps = [record["step"] for record in records]
    assert path.vertices[:, 0].min() == steps[10]
    assert steps[19] <= path.vertices[:, 0].max() <= steps[20]


def test_several_runs_stand_side_by_side_on_the_same_axes():
    figure = draw([a_run(), a_run(measured=False)], names=["one", "two"])
    assert len(figure.axes) == 2 * len(PANELS)
    first, second = [ax for ax in figure.axes if ax.get_label() == "adiabaticity"]
    assert first.get_ylim() == second.get_ylim()


def hard_runs():
    nothing = {"sigma": [None] * 5, "gap_position": None, "adiabaticity": None}
    groups = [snapshot(i, lr=(1e-3, 1e-4), scales={"a": 0.5, "b": 2.0}) for i in range(1, 90)]
    return {
        "one record": a_run(1),
        "three records": a_run(3),
        "faults only": [fault(step) for step in range(30)],
        "faults between": [*a_run(5), fault(55), *a_run(90)[5:]],
        "returns": [{**snapshot(i), "back_to": max(0, i - 3)} for i in range(30)],
        "null spectra": [{**snapshot(i, loss=None), "spectrum": nothing} for i in range(5)],
        "NaN in memory": [snapshot(i, a=math.nan, loss=math.nan) for i in range(5)],
        "low rank": [snapshot(i, sigma=(1.0, 0.0, 0.0)) for i in range(5)],
        "grows": [snapshot(i, sigma=[1.0] * min(i, 6)) for i in range(3, 20)],
        "groups and blocks": groups,
        "lr 0": [snapshot(i, lr=(0.0,)) for i in range(5)],
        "decay": [snapshot(i, weight_decay_scale=0.5) for i in range(5)],
        "steps only": [{"step": i} for i in range(5)],
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", hard_runs())
def test_hard_runs_are_drawn_without_a_warning(name):
    figure = draw(hard_runs()[name], subtitles=["a b " * 90])
    figure.draw_without_rendering()
    assert {"singular values", "adiabaticity", "scale", "lr"} <= panels(figure).keys()


def test_returns_and_faults_are_marked_and_counted():
    returned = {**snapshot(50), "back_to": 40}
    for between, said in (
        ([], ""),
        ([returned], "1 return"),
        ([returned, returned, fault(55)], "2 returns, 1 fault"),
    ):
        axes = draw([*a_run(4), *between]).axes
        assert [ax.get_title(loc="right") for ax in axes] == [said] + [""] * (len(axes) - 1)
        marks = [event for marks in axes[-1].collections for event in marks.get_segments()]
        assert sorted(mark[0, 0] for mark in marks) == [event["step"] for event in between]
        assert all(mark[:, 1].tolist() == [0, 1] for mark in marks)


def test_many_events_are_one_piece_per_panel():
    """One artist for each took minutes in a run that had diverged."""
    axes = panels(draw([*a_run(4), *map(fault, range(50, 90))]))["lr"]
    (marks,) = axes.collections
    assert len(marks.get_segments()) == 40
    assert all(mark[:, 1].tolist() == [0, 0.07] for mark in marks.get_segments())
    without = panels(draw([*a_run(4), snapshot(89)]))["lr"]
    assert axes.get_xlim() == without.get_xlim()


def test_blocks_and_groups_are_told_apart():
    axes = panels(draw(hard_runs()["groups and blocks"]))
    assert {"fastest block", "slowest block", "first block"} <= set(texts(axes["scale"]))
    assert {"applied 0", "applied 1"} <= set(texts(axes["lr"]))


def test_ten_thousand_records_are_thinned_out_and_keep_their_spikes(tmp_path):
    records = [snapshot(i, a=0.5 + 0.1 * (i % 7), loss=1.0) for i in range(10_000)]
    records[7001]["spectrum"]["adiabaticity"] = 5e4
    figure = draw(records)
    drawn = [line.get_ydata() for line in panels(figure)["adiabaticity"].get_lines()]
    assert max(map(len, drawn)) < 2000
    assert max(ys.max() for ys in drawn) == 5e4


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_the_ending_is_the_format(tmp_path, ending, start):
    path = write_figure(a_run(), tmp_path / f"run.{ending}")
    assert path.read_bytes().startswith(start)


def test_figure_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"run\.doc.*use \.png, \.svg or \.pdf"):
        write_figure(a_run(3), tmp_path / "run.doc")
    with pytest.raises(ValueError, match="no format"):
        write_figure(a_run(3), tmp_path / "run")
    for nothing in ([], [[]], [a_run(3), []]):
        with pytest.raises(ValueError, match="no records to draw"):
            write_figure(nothing, tmp_path / "run.png")
    for what in ("names", "subtitles"):
        with pytest.raises(ValueError, match=f"{what}: 1 of them for 2 run"):
            write_figure([a_run(3), a_run(3)], tmp_path / "run.png", **{what: ["a"]})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install gapaware\[plot\]"):
        write_figure(a_run(3), tmp_path / "run.png")


def test_the_figure_stays_away_from_pyplots_global_state(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    before = mpl.rcParams.copy()
    draw(a_run()).draw_without_rendering()
    assert mpl.rcParams.copy() == before


def test_a_history_is_drawn_as_it_is():
    history = History()
    for record in a_run():
        history.append(record)
    assert list(panels(draw(history))) == PANELS


# -- report and command line ---------------------------------------------------------------------


def test_report_of_several_logs_names_them(tmp_path):
    logs = [write_log(tmp_path / f"{name}.jsonl", a_run(3)) for name in ("a", "b")]
    text = write_report(logs, figure=tmp_path / "both.svg")
    assert text.startswith(f"{logs[0]}\nsettings    mode auto\n")
    assert f"\n\n{logs[1]}\n" in text
    assert (tmp_path / "both.svg").exists()


def test_report_wants_a_list_of_paths(tmp_path):
    with pytest.raises(TypeError, match=r"paths='run\.jsonl': .*such as \['run\.jsonl'\]"):
        write_report("run.jsonl")
    with pytest.raises(TypeError, match="pass a list of paths"):
        write_report(tmp_path / "run.jsonl")


def test_titles_tell_logs_of_one_name_apart():
    paths = [Path("long/a/run.jsonl"), Path("long/b/run.jsonl"), Path("long/b/other.jsonl")]
    assert titles(paths) == ["a/run", "b/run", "b/other"]
    assert titles(paths[1:]) == ["run", "other"]
    assert titles([paths[0], paths[0]]) == ["run", "run"]


def test_a_name_that_is_no_text_is_drawn_all_the_same(tmp_path, capsys):
    log = write_log(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), a_run())
    assert main(["report", str(log), "--figure", str(tmp_path / "x.png")]) == 0
    assert titles([log]) == ["caf\N{REPLACEMENT CHARACTER}"]
    assert capsys.readouterr().err == ""


def test_command_prints_and_draws_beside_the_log(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", a_run())
    assert main(["report", str(log)]) == 0
    out = capsys.readouterr().out
    assert "steps       10 - 400, 40 snapshots" in out
    assert out.endswith(f"figure      {tmp_path / 'run.png'}\n")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_command_draws_where_it_is_told_or_not_at_all(tmp_path):
    log = str(write_log(tmp_path / "run.jsonl", [fault(1)]))
    assert main(["report", log, "--no-figure"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    assert main(["report", log, "--figure", str(tmp_path / "x.svg")]) == 0
    assert main(["report", log, log]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.jsonl", "x.svg", "run-compared.png"}


def test_command_prints_json_alone(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", known_run())
    assert main(["report", str(log), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["log"] == str(log)
    assert found["scale"]["max"] == 8.0
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("step,loss\n", "not a gapaware log; pass a file written through log_to="),
        ("", "has not reached its first snapshot"),
        ('{"gapaware": "0.1.0", "schema": 1}\n', "has not reached its first snapshot"),
        (
            '{"gapaware": "0.1.0", "schema": 1, "settings": [1]}\n{"step": 1}\n',
            "not a gapaware log, a value is of another kind",
        ),
        (
            '{"gapaware": "0.1.0", "schema": 1}\n{"step": 1, "loss": {"a": 1}}\n',
            "not a gapaware log, a value is of another kind",
        ),
        (
            '{"gapaware": "0.1.0", "schema": 1}\n{"step": 1, "scale": "abc"}\n',
            "not a gapaware log, a value is of another kind (scale: could not convert",
        ),
        (
            '{"gapaware": "0.1.0", "schema": 1}\n{"step": 1, "scale": 1%s}\n' % ("0" * 400),
            "not a gapaware log, a value is of another kind",
        ),
    ],
)
def test_command_errors_go_to_stderr_with_code_2(tmp_path, capsys, content, message):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "run.jsonl" in captured.err


def test_command_with_a_figure_that_cannot_be_written(tmp_path, capsys):
    log = str(write_log(tmp_path / "run.jsonl", a_run(3)))
    (tmp_path / "taken").touch()
    assert main(["report", log, "--figure", str(tmp_path / "taken" / "x.png")]) == 2
    assert "taken" in capsys.readouterr().err
    for ending in ("doc", "pgf", "raw"):
        assert main(["report", log, "--figure", f"x.{ending}"]) == 2
        assert "use .png, .svg or .pdf" in capsys.readouterr().err
    assert main(["report", log, "--figure", str(tmp_path / "new" / "x.svg")]) == 0
    assert (tmp_path / "new" / "x.svg").stat().st_size > 0


def test_command_without_matplotlib_still_prints_the_summary(tmp_path, capsys, monkeypatch):
    log = str(write_log(tmp_path / "run.jsonl", a_run(3)))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", log, "--no-figure"]) == 0
    assert main(["report", log]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("steps       10 - 30") == 2
    assert "pip install gapaware[plot]" in captured.err
    assert "--no-figure" in captured.err


def test_command_mentions_damaged_lines(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", a_run(3))
    log.write_text(log.read_text() + "{broken\n" + '{"step": 99}\n')
    assert main(["report", str(log), "--no-figure"]) == 0
    assert "1 damaged line(s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["report"], ["nonsense"], ["report", "x", "--figure", "y", "--no-figure"]]
)
def test_wrong_arguments_leave_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: gapaware" in capsys.readouterr().err


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "gapaware", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("gapaware ")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    log = tmp_path / "run.jsonl"
    write_log(log, a_run())
    command = [sys.executable, "-m", "gapaware", "report", "--json", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_name_with_dollars_is_no_formula(tmp_path):
    log = write_log(tmp_path / "cost $x^$ y.jsonl", a_run(3))
    assert main(["report", str(log)]) == 0
    write_figure(a_run(3), tmp_path / "x.png", names=["$x^$"], subtitles=["base $x^$"])


def test_no_logs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"paths=\[\]: no logs"):
        write_report([], figure=tmp_path / "x.png")


def test_what_was_noticed_is_told_though_the_command_fails(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", a_run(3))
    with log.open("ab") as lines:
        lines.write(b"damaged\n")
    assert main(["report", str(log), "--figure", "x.doc"]) == 2
    told = capsys.readouterr().err
    assert "1 damaged line" in told
    assert "use .png" in told
