"""The kill test and the soak test, at a size for every day; `python -m benchmarks.*` runs them whole."""

import random

import pytest

from benchmarks import killtest, soak


def test_killed_and_resumed_ends_like_a_run_left_alone(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    jitter = random.Random(0)
    assert killtest.run(alone, 240, [], jitter) == 0
    assert killtest.run(killed, 240, [61, 149], jitter) == 2
    assert killtest.compare(alone, killed) == []


def test_comparison_sees_a_difference(tmp_path):
    for name, steps in (("one", 50), ("other", 75)):
        (tmp_path / name).mkdir()
        killtest.train(tmp_path / name, steps)
    differences = killtest.compare(tmp_path / "one", tmp_path / "other")
    assert any("weights" in difference for difference in differences)
    assert "the logs tell different stories" in differences


@pytest.mark.parametrize("mode", ["auto", "escape"])
def test_white_noise_moves_neither_memory_nor_factor(tmp_path, mode):
    seen = soak.soak(6000, mode, tmp_path / "run.jsonl")
    assert seen["rss_growth_bytes"] < 2**20
    assert seen["records_in_memory"] == soak.HISTORY
    assert seen["smallest_scale"] == seen["largest_scale"] == 1.0
