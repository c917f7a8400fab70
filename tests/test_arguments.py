"""Wrong arguments: the message names the argument, its value and the way out."""

import numpy as np
import pytest
import torch
from gradients import parameters

from gapaware import GapAware, arguments


def build(**given):
    return GapAware(torch.optim.SGD(parameters(), lr=0.1), **given)


@pytest.mark.parametrize(
    ("argument", "value", "error", "way_out"),
    [
        ("mode", "fast", ValueError, "choose one of 'auto', 'escape', 'retain', 'observe'"),
        ("mode", None, ValueError, "choose one of"),
        ("granularity", "layer", ValueError, "choose one of 'global', 'group', 'block'"),
        ("window", 1, ValueError, "pass window >= "),
        ("window", 10.0, TypeError, "pass an integer"),
        ("window", True, TypeError, "pass an integer"),
        ("window", "10", TypeError, "pass an integer"),
        ("interval", 0, ValueError, "pass interval >= 1"),
        ("interval", -3, ValueError, "pass interval >= 1"),
        ("interval", 2.5, TypeError, "pass an integer"),
        ("interval", "often", ValueError, 'pass "auto", or how many optimizer steps'),
        ("interval", None, TypeError, "pass an integer"),
        ("sketch_dim", 8, ValueError, "pass sketch_dim >= 64"),
        ("sketch_dim", 10**9, ValueError, "pass sketch_dim <= "),
        ("sketch_dim", "big", TypeError, "pass an integer"),
        ("target", 0, ValueError, "0 < target < inf"),
        ("target", float("nan"), ValueError, "0 < target < inf"),
        ("target", float("inf"), ValueError, "0 < target < inf"),
        ("target", "one", TypeError, "pass a number"),
        ("max_scale", 0.5, ValueError, "1.0 <= max_scale < inf"),
        ("max_scale", True, TypeError, "pass a number"),
        ("min_scale", 0.0, ValueError, "0 < min_scale <= 1.0"),
        ("min_scale", 1.5, ValueError, "0 < min_scale <= 1.0"),
        ("min_scale", -1, ValueError, "0 < min_scale <= 1.0"),
        ("max_push", -1, ValueError, "0 <= max_push < inf"),
        ("max_push", float("nan"), ValueError, "0 <= max_push < inf"),
        ("max_push", float("inf"), ValueError, "0 <= max_push < inf"),
        ("max_push", "far", TypeError, "pass a number"),
        ("history_size", 0, ValueError, "pass history_size >= 1"),
        ("seed", -1, ValueError, "pass seed >= 0"),
        ("seed", 0.5, TypeError, "pass an integer"),
        ("controller", 3.0, TypeError, "pass a function of an Observation"),
        ("log_to", 3, TypeError, "path of a file"),
    ],
)
def test_wrong_arguments(argument, value, error, way_out):
    with pytest.raises(error) as raised:
        build(**{argument: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}={value!r}: ")
    assert way_out in message


@pytest.mark.parametrize(
    "given",
    [
        {"window": np.int64(7), "seed": np.int32(3)},
        {"interval": np.int64(3)},
        {"interval": "auto"},
        {"target": 1, "max_scale": np.float32(4), "min_scale": 1, "max_push": 0},
        {"target": np.float64(0.5), "min_scale": 1e-3},
        {"sketch_dim": None},
        {"sketch_dim": 64, "history_size": 1},
    ],
)
def test_right_arguments_of_unusual_types(given):
    optimizer = build(**given)
    torch.save(optimizer.state_dict(), "/dev/null")
    assert type(optimizer.interval) is int


@pytest.mark.parametrize(
    ("mode", "argument"),
    [("observe", "max_scale"), ("observe", "max_push"), ("retain", "max_push")],
)
def test_what_a_mode_never_does_is_refused_with_the_mode_that_does(mode, argument):
    with pytest.raises(ValueError, match=f'{argument}=2: mode="{mode}" never .*mode="escape"'):
        build(mode=mode, **{argument: 2})


def test_only_the_base_is_positional():
    with pytest.raises(TypeError, match="positional argument"):
        GapAware(torch.optim.SGD(parameters(), lr=0.1), "observe")
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        build(windows=3)


def test_names_are_several_strings():
    for right in ([], ("a",), {"a", "b"}):
        assert arguments.names("fresh", right) is right
    for wrong in (None, "a", [1], 3, {"a": 1}):
        with pytest.raises(TypeError, match="pass a sequence of names, such as fresh="):
            arguments.names("fresh", wrong)


def test_bounds_are_in():
    assert arguments.integer("n", 3, low=3, high=3, why="") == 3
    assert arguments.positive("x", 1.0, low=1.0, high=1.0, why="") == 1.0
    with pytest.raises(ValueError, match="pass n <= 3"):
        arguments.integer("n", 4, low=3, high=3, why="")
