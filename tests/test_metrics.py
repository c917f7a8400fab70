"""What is logged between two snapshots reaches the history as a mean, and survives a checkpoint."""

import io
import math
import warnings

import pytest
import torch

from gapaware import GapAware
from gapaware.metrics import Means, arrived


def test_means_of_numbers_and_tensors():
    means = Means()
    loss = torch.tensor([3.0], requires_grad=True)
    for value in (1.0, loss, torch.tensor(5, dtype=torch.int64)):
        means.add("loss", value)
    means.add("accuracy", 0.5)
    assert arrived(means.take()) == {"loss": 3.0, "accuracy": 0.5}
    assert means.take() == {}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, r"log\(loss=None\): pass a number"),
        ("low", TypeError, r"log\(loss='low'\): pass a number"),
        (torch.tensor(1j), TypeError, r"log\(loss=tensor\(0\.\+1\.j\)\): pass a real number"),
        (torch.ones(3), ValueError, r"log\(loss=tensor of shape \(3,\)\): pass one"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value, error, message):
    optimizer = GapAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(error, match=message):
        optimizer.log(loss=value)


def test_a_loss_that_is_changed_in_place_afterwards_counts_as_it_was():
    means, loss = Means(), torch.tensor(2.0)
    means.add("loss", loss)
    loss.zero_()
    assert arrived(means.take()) == {"loss": 2.0}


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_mean_saved_halfway_is_the_same_number(kind):
    values = (0.1 * torch.arange(7.0)).exp().tolist()
    whole, first = Means(), Means()
    for value in values:
        whole.add("loss", kind(value))
    for value in values[:4]:
        first.add("loss", kind(value))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Means.from_state_dict(torch.load(file, weights_only=True))
    for value in values[4:]:
        second.add("loss", kind(value))
    assert arrived(second.take()) == arrived(whole.take())


def test_three_values_in_a_row_that_are_not_finite_are_no_accident():
    """They may be in several means, and in a run that resumes."""
    means = Means()
    for value in (math.nan, torch.tensor(math.inf), 1.0, math.nan, -math.inf):
        means.add("loss", value)
    assert not means.overflows("loss")
    assert math.isnan(arrived(means.take())["loss"])
    file = io.BytesIO()
    torch.save(means.state_dict(), file)
    file.seek(0)
    for held in (means, Means.from_state_dict(torch.load(file, weights_only=True))):
        assert held.take() == {}
        held.add("other", math.nan)
        assert not held.overflows("loss")
        held.add("loss", math.nan)
        assert held.overflows("loss")
        held.add("loss", 1.0)
        assert not held.overflows("loss")


def test_states_of_before_there_were_means_hold_one_value():
    means = Means.from_state_dict({"loss": 2.0})
    means.add("loss", 4.0)
    assert arrived(means.take()) == {"loss": 3.0}


def test_the_mean_of_no_values_is_refused():
    with pytest.raises(ValueError, match="mean of 0 values"):
        Means.from_state_dict({"loss": [1.0, 0]})


def test_the_history_and_the_controller_see_the_mean_since_the_snapshot_before():
    seen = []

    def controller(observation):
        seen.append((observation.step, observation.loss))
        return 1.0

    p = torch.nn.Parameter(torch.randn(50))
    optimizer = GapAware(torch.optim.SGD([p], lr=0.1), interval=3, controller=controller)
    for step in range(30):
        p.grad = torch.randn(50)
        optimizer.log(loss=torch.tensor(float(step)))
        optimizer.step()
    # logged before the steps 1, 2, 3: losses 0, 1, 2; and so on
    expected = {step: float(step - 2) for step in range(3, 30, 3)}
    assert {record["step"]: record["loss"] for record in optimizer.history} == expected
    assert seen == [item for item in expected.items() if item[0] >= seen[0][0]]
    assert len(seen) > 3


def test_the_controller_sees_the_norm_of_the_weights():
    norms = []

    def controller(observation):
        norms.append((observation.row, observation.weight_norm))
        return 1.0

    groups = [torch.nn.Parameter(torch.full((n,), 2.0)) for n in (9, 16)]
    optimizer = GapAware(
        torch.optim.SGD([{"params": [p]} for p in groups], lr=1e-3),
        interval=1,
        granularity="group",
        sketch_dim=None,
        controller=controller,
    )
    for _ in range(8):
        before = [p.norm().item() for p in groups]
        for p in groups:
            p.grad = torch.randn_like(p)
        optimizer.step()
    # decided a snapshot later: at the last step, on the weights before it
    assert [norm for _, norm in norms[-2:]] == pytest.approx(before)
    assert len({row for row, _ in norms}) == 2


def test_steps_that_go_round_it_do_not_go_unsaid():
    """As SAM's do, whose two halves the wrapped optimizer answers."""
    optimizer = GapAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    for _ in range(999):
        optimizer.log(loss=1.0)
    with pytest.warns(UserWarning, match="1000 times and step.. not once"):
        optimizer.log(loss=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.log(loss=1.0)


@pytest.mark.parametrize("value", ["0.5", b"1", True])
def test_what_python_takes_for_a_number_is_refused_all_the_same(value):
    with pytest.raises(TypeError, match=r"log\(loss=.*pass a number"):
        Means().add("loss", value)
