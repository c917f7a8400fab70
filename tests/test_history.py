import copy
import errno
import io
import json
import math
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gapaware import log as log_module
from gapaware.history import History, column, read_log


def record(step, **more):
    return {"step": step, "scale": 1.0 + step / 100, "spectrum": {"gap": 0.5 * step}, **more}


def fill(history, steps, **more):
    for step in steps:
        history.append(record(step, **more))
    return history


def steps_in(path):
    return [line["step"] for line in read_log(path)[1]]


def strict_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


# -- in memory -----------------------------------------------------------------------------------


def test_is_a_bounded_read_only_sequence():
    history = fill(History(limit=3), range(5))
    assert len(history) == 3
    assert [entry["step"] for entry in history] == [2, 3, 4]
    assert history[-1]["step"] == 4
    assert [entry["step"] for entry in history[:2]] == [2, 3]
    assert history.limit == 3
    assert "3 of at most 3 records, steps 2-4" in repr(history)
    with pytest.raises(IndexError, match=r"history\[3\]: there are 3 records"):
        history[3]
    with pytest.raises(IndexError, match=r"history\[-1\]: there are 0 records"):
        History()[-1]
    with pytest.raises(TypeError):
        history[0] = {}


def test_a_record_is_a_copy_out_of_plain_values():
    sigma = [torch.tensor(2.0, requires_grad=True), np.float64(1.0)]
    history = History()
    history.append(
        {
            "step": np.int64(5),
            "regime": np.str_("steady"),
            "flag": np.bool_(True),
            "spectrum": {"sigma": sigma, "alpha": np.array([0.5, np.nan])},
            "lr": (torch.tensor([0.25, 0.5], dtype=torch.bfloat16),),
            "odd": torch.empty(2, device="meta"),
            "z": np.complex64(1j),
        }
    )
    sigma.clear()
    kept = history[0]
    assert kept["spectrum"]["sigma"] == [2.0, 1.0]
    assert kept["lr"] == [[0.25, 0.5]]
    assert math.isnan(kept["spectrum"]["alpha"][1])
    assert {name: type(kept[name]) for name in ("step", "regime", "flag", "odd", "z")} == {
        "step": int,
        "regime": str,
        "flag": bool,
        "odd": str,
        "z": str,
    }
    assert type(kept["spectrum"]["sigma"][1]) is float


def test_column_goes_into_nested_dicts_and_names_what_is_there():
    history = fill(History(), (2, 4))
    history.append({"step": 6, "decision": "fault", "spectrum": None})
    assert history.column("spectrum.gap") == [1.0, 2.0, None]
    assert history.column("decision") == [None, None, "fault"]
    assert column([], "anything") == []
    with pytest.raises(KeyError, match="'gapp'; there are decision, scale, spectrum, step"):
        history.column("gapp")
    with pytest.raises(KeyError):
        history.column("scale.gap")


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, None])
def test_a_wrong_limit_is_named(limit):
    with pytest.raises(ValueError, match="limit="):
        History(limit=limit)


def test_a_wrong_path_is_named():
    with pytest.raises(TypeError, match="log_to=3"):
        History(log_to=3)


# -- checkpoints ---------------------------------------------------------------------------------


def test_state_survives_weights_only_loading(tmp_path):
    history = fill(History(), range(3), loss=math.nan)
    torch.save(history.state_dict(), tmp_path / "state.pt")
    other = History(limit=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.column("step") == [1, 2]
    assert math.isnan(other[-1]["loss"])


def test_state_has_the_same_keys_and_no_nested_leaves_whatever_the_length():
    empty, full = History().state_dict(), fill(History(), range(3)).state_dict()
    assert empty.keys() == full.keys()
    assert all(isinstance(value, str) for value in full.values())


@pytest.mark.parametrize("state", [{"records": "{"}, {"records": "[1]"}, {"records": 3}, None])
def test_a_damaged_state_is_refused_and_changes_nothing(state):
    history = fill(History(), (1, 2))
    with pytest.raises(ValueError, match="history's state cannot be read"):
        history.load_state_dict(state)
    assert history.column("step") == [1, 2]


def test_a_state_without_records_starts_empty():
    history = fill(History(), (1, 2))
    history.load_state_dict({})
    assert len(history) == 0


# -- the log -------------------------------------------------------------------------------------


def test_log_is_opened_at_the_first_record_and_starts_with_a_header(tmp_path):
    path = tmp_path / "new folder" / "run.jsonl"
    history = History(limit=1, log_to=path, header={"mode": "auto", "target": math.inf})
    assert not path.parent.exists()
    fill(history, (5, 10))
    header, *records = strict_lines(path)
    assert header["schema"] == 1
    assert header["settings"] == {"mode": "auto", "target": None}
    assert next(iter(header)) == "gapaware"
    assert [entry["step"] for entry in records] == [5, 10]
    assert read_log(path) == (header, records)


def test_a_relative_path_stays_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = History(log_to="run.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fill(history, (1,))
    assert steps_in(tmp_path / "run.jsonl") == [1]


def test_what_is_not_finite_is_null_in_the_file_and_kept_in_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(log_to=path)
    fill(history, (1,), loss=math.nan, lr=[math.inf, 0.1], why="σ₁ = ∞ \ud800")
    line = strict_lines(path)[1]
    assert line["loss"] is None
    assert line["lr"] == [None, 0.1]
    assert line["why"] == "σ₁ = ∞ ?"
    assert math.isnan(history[0]["loss"])


def test_every_line_is_one_write_call_and_there_at_once(tmp_path, monkeypatch):
    calls = []

    class Counting(io.FileIO):
        def write(self, data):
            calls.append(bytes(data))
            return super().write(data)

    monkeypatch.setattr(log_module, "FileIO", Counting)
    path = tmp_path / "run.jsonl"
    history = History(log_to=path)
    for step in (1, 2):
        history.append(record(step))
        assert steps_in(path)[-1] == step
    assert len(calls) == 3
    assert all(call.endswith(b"\n") and call.count(b"\n") == 1 for call in calls)


def one_warning(history, steps, match):
    with pytest.warns(RuntimeWarning, match=match) as caught:
        fill(history, steps)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert history.column("step") == list(steps)


def test_a_path_that_cannot_be_written_warns_once(tmp_path):
    (tmp_path / "file").write_text("")
    history = History(log_to=tmp_path / "file" / "run.jsonl")
    one_warning(history, range(4), r"log_to='.*run\.jsonl' cannot be written .* Pass a path")


def test_a_folder_as_path_warns_once(tmp_path):
    one_warning(History(log_to=tmp_path), range(4), "cannot be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_warns_once():
    one_warning(History(log_to="/dev/full"), range(4), "No space left")


@pytest.mark.parametrize("partial", [False, True])
def test_a_disk_that_fills_up_warns_once_and_the_file_stays_readable(
    tmp_path, monkeypatch, partial
):
    class Filling(io.FileIO):
        def write(self, data):
            if b'"step": 2' not in data:
                return super().write(data)
            if partial:
                return super().write(data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log_module, "FileIO", Filling)
    path = tmp_path / "run.jsonl"
    one_warning(History(log_to=path), range(5), "written|No space")
    assert steps_in(path) == [0, 1]


def test_a_file_closed_underneath_warns_once(tmp_path):
    history = fill(History(log_to=tmp_path / "run.jsonl"), (0,))
    history._log._stream.close()
    with pytest.warns(RuntimeWarning, match="closed file"):
        fill(history, (1, 2))
    assert history.column("step") == [0, 1, 2]


def test_a_file_of_another_kind_is_never_touched(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import torch\n")
    one_warning(History(log_to=path), range(3), "not a gapaware log")
    assert path.read_text() == "import torch\n"
    assert os.listdir(tmp_path) == ["train.py"]


def test_no_stream_is_left_open(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        history = fill(History(log_to=tmp_path / "run.jsonl"), range(3))
        stream = history._log._stream
        del history
        assert stream.closed


def test_append_after_close_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "run.jsonl"
    history = fill(History(log_to=path), (1, 2))
    history.close()
    fill(history, (3,))
    assert steps_in(path) == [1, 2, 3]
    assert len(strict_lines(path)) == 4


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_file_that_is_deleted_begins_anew(tmp_path, folder_too):
    path = tmp_path / "logs" / "run.jsonl"
    history = fill(History(log_to=path), (1, 2))
    path.unlink()
    if folder_too:
        path.parent.rmdir()
    fill(history, (3, 4))
    assert steps_in(path) == [3, 4]
    assert len(strict_lines(path)) == 3  # and a header
    path.rename(path.with_name("moved.jsonl"))  # goes on where it is now
    fill(history, (5,))
    assert steps_in(path.with_name("moved.jsonl")) == [3, 4, 5]


# -- a file that is already there ----------------------------------------------------------------


def test_a_new_run_keeps_old_logs_under_other_names(tmp_path):
    path = tmp_path / "run.jsonl"
    for first in (10, 20, 30):
        fill(History(log_to=path), (first, first + 1))
    assert steps_in(path) == [30, 31]
    assert steps_in(tmp_path / "run.1.jsonl") == [10, 11]
    assert steps_in(tmp_path / "run.2.jsonl") == [20, 21]


def test_resume_records_no_step_twice(tmp_path):
    path = tmp_path / "run.jsonl"
    first = fill(History(log_to=path), range(0, 50, 5))
    checkpoint = first.state_dict()
    fill(first, range(50, 80, 5))
    resumed = History(log_to=path)
    resumed.load_state_dict(checkpoint)
    fill(resumed, range(50, 100, 5))
    assert steps_in(path) == list(range(0, 100, 5))
    assert os.listdir(tmp_path) == ["run.jsonl"]
    assert len([line for line in strict_lines(path) if "gapaware" in line]) == 1


def test_resume_before_the_first_record_drops_them_all(tmp_path):
    path = tmp_path / "run.jsonl"
    first = History(log_to=path)
    checkpoint = first.state_dict()
    fill(first, (5, 10))
    resumed = History(log_to=path)
    resumed.load_state_dict(checkpoint)
    fill(resumed, (5, 10, 15))
    assert steps_in(path) == [5, 10, 15]


def test_going_back_in_the_same_process_cuts_the_log_too(tmp_path):
    path = tmp_path / "run.jsonl"
    history = fill(History(log_to=path), (5, 10))
    checkpoint = history.state_dict()
    fill(history, (15, 20))
    history.load_state_dict(checkpoint)
    fill(history, (15,))
    assert steps_in(path) == [5, 10, 15]


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_resume_repairs_a_half_written_last_line(tmp_path, lost):
    path = tmp_path / "run.jsonl"
    first = fill(History(log_to=path), (5, 10, 15))
    checkpoint = first.state_dict()
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    resumed = History(log_to=path)
    resumed.load_state_dict(checkpoint)
    fill(resumed, (20,))
    kept = [5, 10, 15, 20] if lost == 1 else [5, 10, 20]
    assert [line["step"] for line in strict_lines(path)[1:]] == kept


def test_a_half_written_header_is_replaced(tmp_path):
    path = tmp_path / "run.jsonl"
    for begun in ("", '{"gap', '{"gapaware": "0.1.0", "sch'):
        path.write_text(begun)
        fill(History(log_to=path), (5,))
        assert steps_in(path) == [5]
        assert os.listdir(tmp_path) == ["run.jsonl"]
        path.unlink()


def test_a_checkpoint_of_another_run_does_not_cut_this_log(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(History(log_to=path), range(0, 50, 5))
    resumed = History(log_to=path)
    resumed.load_state_dict(fill(History(), (5, 10)).state_dict())
    fill(resumed, (15,))
    assert steps_in(tmp_path / "run.1.jsonl") == list(range(0, 50, 5))
    assert steps_in(path) == [15]


def test_loading_its_own_state_before_the_first_step_keeps_an_old_log(tmp_path):
    # accelerate.prepare saves and loads the state of a new optimizer
    path = tmp_path / "run.jsonl"
    fill(History(log_to=path), (5, 10))
    prepared = History(log_to=path)
    prepared.load_state_dict(prepared.state_dict())
    fill(prepared, (5,))
    assert steps_in(tmp_path / "run.1.jsonl") == [5, 10]
    assert steps_in(path) == [5]


def test_a_pickled_history_goes_on_in_its_log(tmp_path):
    path = tmp_path / "run.jsonl"
    history = fill(History(limit=2, log_to=path, header={"mode": "auto"}), (5, 10, 15))
    pickled = pickle.dumps(history)
    fill(history, (20,))
    history.close()
    restored = pickle.loads(pickled)
    assert restored.column("step") == [10, 15]
    fill(restored, (20, 25))
    assert steps_in(path) == [5, 10, 15, 20, 25]
    assert read_log(path)[0]["settings"] == {"mode": "auto"}


def test_a_deep_copy_keeps_records_and_leaves_the_log_to_the_original(tmp_path):
    path = tmp_path / "run.jsonl"
    history = fill(History(log_to=path), (5, 10))
    copied = copy.deepcopy(history)
    fill(copied, (15, 20))
    copied[0]["spectrum"]["gap"] = "changed"
    fill(history, (15,))
    assert steps_in(path) == [5, 10, 15]
    assert copied.log_to is None
    assert copied.column("step") == [5, 10, 15, 20]
    assert history[0]["spectrum"]["gap"] == 2.5


# -- reading -------------------------------------------------------------------------------------


def test_read_leaves_out_a_half_written_last_line(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(History(log_to=path), (5, 10))
    path.write_bytes(path.read_bytes()[:-9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps_in(path) == [5]


def test_read_warns_of_damage_in_the_middle(tmp_path):
    path = tmp_path / "run.jsonl"
    fill(History(log_to=path), (5, 10, 15))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:8] + b"\0\xff\n"
    path.write_bytes(b"".join(lines))
    with pytest.warns(RuntimeWarning, match=r"1 damaged line\(s\) left out, the first is line 3"):
        assert steps_in(path) == [5, 15]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,loss\n1,2\n", "not a gapaware log; pass a file"),
        (b'{"step": 1}\n', "not a gapaware log"),
        (b"[1, 2]\n", "not a gapaware log"),
        (b"\x89PNG\r\n\x1a\n", "not a gapaware log"),
        (b"", "empty"),
        (b'{"gapaware": "0.1', "empty"),
        (b'{"gapaware": "9.0", "schema": 99}\n', "schema 99 of gapaware 9.0.*that wrote it"),
    ],
)
def test_read_refuses_what_is_not_a_log(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_log(path)


def test_read_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_log(tmp_path / "nowhere")


def test_a_home_folder_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert History(log_to="~/run.jsonl").log_to == str(tmp_path / "run.jsonl")


def test_a_log_of_another_gapaware_is_left_whole_under_another_name(tmp_path):
    path, theirs = tmp_path / "run.jsonl", b'{"gapaware": "9.0", "schema": 99}\n{"step": 1}\n'
    path.write_bytes(theirs)
    History(log_to=path).append({"step": 5})
    assert (tmp_path / "run.1.jsonl").read_bytes() == theirs
    assert [record["step"] for record in read_log(path)[1]] == [5]


def test_a_line_that_is_nested_too_deep_is_a_damaged_one(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"[" * 200_000)
    with pytest.warns(RuntimeWarning, match="not a gapaware log"):
        History(log_to=path).append({"step": 5})
    History(log_to=tmp_path / "other.jsonl").append({"step": 5})
    with (tmp_path / "other.jsonl").open("ab") as log:
        log.write(b"[" * 200_000 + b"\n")
    with pytest.warns(RuntimeWarning, match="1 damaged line"):
        assert len(read_log(tmp_path / "other.jsonl")[1]) == 1
