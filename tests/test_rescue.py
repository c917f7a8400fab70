"""A raised factor that takes SGD's weights to infinity does not cost the run."""

import copy
import itertools
import math
import warnings

import pytest
import torch

from gapaware import Decision, GapAware
from gapaware.rescue import Rescue


def problem(seed=0, curvature=1.0):
    torch.manual_seed(seed)
    weights = torch.nn.Parameter(torch.full((8,), 3.0))
    return weights, lambda: 0.5 * curvature * weights.square().sum()


def diverging(observation):
    """A controller that goes far beyond what is stable, and remembers where it was sound."""
    sound = observation.scale <= 1
    return Decision(min(50.0, observation.max_scale), "too far", keep=sound)


def train(optimizer, loss_of, steps, log=True):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        if log:
            optimizer.log(loss=loss)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("log", [True, False])
def test_a_run_that_overflows_goes_back_and_on(log):
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    optimizer = GapAware(base, controller=diverging, interval=2, max_scale=64)
    with pytest.warns(UserWarning, match="weights and state are those of step"):
        losses = train(optimizer, loss_of, 800, log)
    assert not all(map(math.isfinite, losses))
    assert losses[-1] < 1e-6
    faults = [record for record in optimizer.history if record["decision"] == "fault"]
    assert faults
    assert all(fault["back_to"] < fault["step"] for fault in faults)
    # the root of what was too much, as often as that overflows too
    assert max(record["scale"] for record in list(optimizer.history)[-20:]) <= 50**0.5 + 1e-9


def test_without_a_copy_such_a_run_is_lost():
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    optimizer = GapAware(base, controller=lambda _: 50.0, interval=2, max_scale=64)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        losses = train(optimizer, loss_of, 300)
    assert not math.isfinite(losses[-1])


def test_weights_and_momentum_are_those_of_the_step():
    weights, loss_of = problem()
    sgd = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    train(GapAware(sgd, mode="observe"), loss_of, 5)
    rescue = Rescue()
    rescue.keep(sgd, step=5)
    expected = train(GapAware(sgd, mode="observe"), loss_of, 5)
    with torch.no_grad():
        weights.fill_(math.nan)
        sgd.state[weights]["momentum_buffer"].fill_(math.inf)
    assert rescue.put_back(sgd) == 5
    assert not rescue.holds
    assert train(GapAware(sgd, mode="observe"), loss_of, 5) == expected


def test_a_momentum_that_there_was_not_begins_anew():
    weights, loss_of = problem()
    sgd = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    rescue = Rescue()
    rescue.keep(sgd, step=0)
    expected = train(GapAware(sgd, mode="observe"), loss_of, 3)
    rescue.put_back(sgd)
    assert not sgd.state
    assert train(GapAware(sgd, mode="observe"), loss_of, 3) == expected


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_state_of_any_optimizer_goes_back(make):
    weights, loss_of = problem()
    optimizer = make([weights], lr=0.1)
    train(GapAware(optimizer, mode="observe"), loss_of, 5)
    rescue = Rescue()
    rescue.keep(optimizer, step=5)
    expected = train(GapAware(optimizer, mode="observe"), loss_of, 5)
    assert rescue.put_back(optimizer) == 5
    assert train(GapAware(optimizer, mode="observe"), loss_of, 5) == expected


def test_a_view_is_copied_without_what_is_behind_it():
    weights, _ = problem()
    sgd = torch.optim.SGD([weights], lr=0.1)
    sgd.state[weights] = {"nested": [torch.zeros(1000)[:8], {"flag": True}]}
    rescue = Rescue()
    rescue.keep(sgd, step=0)
    sgd.state[weights]["nested"][0].fill_(1.0)
    rescue.put_back(sgd)
    buffer, rest = sgd.state[weights]["nested"]
    assert buffer.untyped_storage().nbytes() == 32
    assert (buffer.sum().item(), rest) == (0.0, {"flag": True})


def test_none_is_copied_where_that_is_not_wanted():
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=1e-3)
    optimizer = GapAware(
        base, controller=lambda _: Decision(2.0, keep=True), interval=1, way_back=False
    )
    train(optimizer, loss_of, 20)
    assert optimizer.scales == [2.0]
    assert not optimizer._copies.rescue.holds
    restored = GapAware(
        torch.optim.SGD([torch.nn.Parameter(weights.detach().clone())], lr=1e-3),
        controller=lambda _: Decision(2.0, keep=True),
        interval=1,
        way_back=False,
    )
    restored.load_state_dict(optimizer.state_dict())
    assert not restored._copies.rescue._allowed


@pytest.mark.parametrize("push", [0.0, 1.0])
def test_a_controller_may_go_back_again_and_again(push):
    """What goes back is not taken for weights that somebody else has written, and a push begins anew."""
    weights, loss_of = problem()
    base = torch.optim.AdamW([weights], lr=1e-3)
    seen = []

    def undecided(observation):
        seen.append(observation.kept)
        n = len(seen)
        return Decision(2.0, "no", push=push, keep=n in (1, 5, 9), back=n in (5, 9))

    optimizer = GapAware(base, controller=undecided, interval=1, max_push=2.0)
    start, backs = None, 0
    for _ in range(40):
        train(optimizer, loss_of, 1)
        if len(seen) == 1 and start is None:
            start = weights.detach().clone()
        before, backs = backs, sum("back_to" in r for r in optimizer.history)
        if backs > before:
            assert torch.equal(weights, start)
    assert backs == 2
    assert seen[:9] == [False, *[True] * 8]
    assert all(record["decision"] != "fault" for record in optimizer.history)


def test_rows_that_decide_apart_do_not_go_back():
    weights, loss_of = problem()
    other, _ = problem()
    groups = [{"params": [weights]}, {"params": [other]}]
    base = torch.optim.SGD(groups, lr=1e-3)
    kept = []

    def back(observation):
        kept.append(observation.kept)
        return Decision(2.0, keep=True, back=True)

    optimizer = GapAware(base, controller=back, interval=1, granularity="group")
    train(optimizer, lambda: loss_of() + other.square().sum(), 20)
    assert kept
    assert not any(kept)
    assert not any("back_to" in record for record in optimizer.history)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_without_memory_for_a_copy_the_factor_rises_all_the_same(error, monkeypatch):
    def no_room(parameters):
        raise error("none")

    monkeypatch.setattr("gapaware.rescue.check_room", no_room)
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=1e-3)
    optimizer = GapAware(base, controller=lambda _: Decision(2.0, keep=True), interval=1)
    train(optimizer, loss_of, 20)
    assert not optimizer._copies.rescue.holds
    assert optimizer.scales == [2.0]
    assert all(record["decision"] != "fault" for record in optimizer.history)


def test_a_copy_outlasts_the_factor_by_a_window():
    """What a factor began may overflow after it was taken off."""
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=1e-3)
    raised = lambda seen: Decision(2.0 if seen.step < 20 else 1.0, keep=seen.step == 10)  # noqa: E731
    optimizer = GapAware(base, controller=raised, interval=1)
    held = []
    for _ in range(50):
        train(optimizer, loss_of, 1)
        held.append(optimizer._copies.rescue.holds)
    assert held.index(True) == 10
    assert 10 <= (len(held) - held[::-1].index(True)) - 20 <= 13


def test_nothing_is_pushed_after_a_loss():
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    pushing = lambda seen: Decision(seen.max_scale, push=1.0, keep=seen.scale <= 1)  # noqa: E731
    optimizer = GapAware(base, controller=pushing, interval=2, max_scale=50)
    with pytest.warns(UserWarning, match="weights and state are those of step"):
        train(optimizer, loss_of, 400)
    lost = next(n for n, r in enumerate(optimizer.history) if r["decision"] == "fault")
    pushes = [record.get("push", 0.0) for record in optimizer.history]
    assert max(pushes[: lost + 1]) == 1.0
    assert max(pushes[lost + 1 :]) == 0.0


def running_with_a_copy(steps=20, base=torch.optim.SGD, *, average=False):
    """The copy is of step 2, and whoever asks goes back to it three steps on."""
    weights, loss_of = problem()
    asked = []

    def once(observation):
        back = bool(asked) and bool(asked.pop())
        return Decision(2.0, keep=not observation.kept, back=back, average=average)

    optimizer = GapAware(base([weights], lr=1e-3), controller=once, interval=1)
    optimizer.train()  # from now on there may be an average
    train(optimizer, loss_of, steps)
    assert optimizer._copies.rescue.holds

    def back_to():
        asked.append(True)
        train(optimizer, loss_of, 1)
        return optimizer.history[-1]["back_to"]

    return weights, loss_of, optimizer, back_to


def test_weights_that_others_load_are_what_a_run_goes_back_to():
    """Not those of before: a best model that is loaded in mid-run is where it begins anew."""
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    torch.nn.init.constant_(weights, 7.0)
    train(optimizer, loss_of, 5)
    assert back_to() == 20
    assert torch.equal(weights, torch.full((8,), 7.0))


@torch.no_grad()
def swap_in_and_out(weights):
    trained = weights.detach().clone()
    weights.fill_(5.0)
    weights.copy_(trained)


def test_an_average_that_is_swapped_in_and_out_leaves_the_copy():
    """As people evaluate an average of their own, at every other step, say."""
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    for _ in range(3):
        swap_in_and_out(weights)
        train(optimizer, loss_of, 2)
    assert back_to() < 20


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda optimizer: optimizer.state_dict(),
        copy.deepcopy,
        lambda optimizer: (optimizer.eval(), optimizer.train()),
    ],
)
def test_what_is_done_while_an_average_is_swapped_in_leaves_the_copy(meanwhile):
    """Of several ranks the first alone saves then: if that let go of its copy, replicas would part."""
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    trained = weights.detach().clone()
    torch.nn.init.constant_(weights, 5.0)
    meanwhile(optimizer)
    with torch.no_grad():
        weights.copy_(trained)
    train(optimizer, loss_of, 2)
    assert back_to() < 20


@pytest.mark.parametrize("loaded", [False, True])
def test_an_evaluation_at_the_average_leaves_the_copy_unless_weights_are_loaded(loaded):
    weights, loss_of, optimizer, back_to = running_with_a_copy(average=True)
    trained = weights.detach().clone()
    for _ in range(2):
        optimizer.eval()
        optimizer.state_dict()
        assert not torch.equal(weights, trained)
    if loaded:
        torch.nn.init.constant_(weights, 7.0)
    optimizer.train()
    assert torch.equal(weights, torch.full((8,), 7.0) if loaded else trained)
    train(optimizer, loss_of, 3)
    assert (back_to() == 20) == loaded


def test_who_writes_after_each_step_takes_part_in_training():
    """A largest norm: its first write makes a new copy, which is then left alone."""
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    for _ in range(6):
        with torch.no_grad():
            weights.mul_(0.99)
        train(optimizer, loss_of, 1)
    assert back_to() == 20


@pytest.mark.parametrize("copied", [lambda optimizer: optimizer.state_dict(), copy.deepcopy])
def test_a_checkpoint_between_two_writes_changes_nothing(copied):
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    for _ in range(6):
        with torch.no_grad():
            weights.mul_(0.99)
        copied(optimizer)
        train(optimizer, loss_of, 1)
    assert back_to() == 20


def test_a_swap_at_the_step_before_hides_no_weights_that_are_loaded():
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    for _ in range(3):
        swap_in_and_out(weights)
        train(optimizer, loss_of, 1)
    torch.nn.init.constant_(weights, 7.0)
    train(optimizer, loss_of, 5)
    assert back_to() == 23
    assert torch.equal(weights, torch.full((8,), 7.0))


class Exchanging(torch.optim.SGD):
    """As Schedule-Free: other weights for an evaluation, and not the same to the bit afterwards."""

    def eval(self):
        self.move(1.1)

    def train(self):
        self.move(1 / 1.1 + 1e-6)

    @torch.no_grad()
    def move(self, by):
        for group in self.param_groups:
            for weights in group["params"]:
                weights.mul_(by)


def test_who_exchanges_weights_for_an_evaluation_has_written_none():
    _, loss_of, optimizer, back_to = running_with_a_copy(base=Exchanging)
    for _ in range(3):
        optimizer.eval()
        optimizer.train()
        train(optimizer, loss_of, 2)
    assert back_to() < 20


class Holder:
    """As Lightning's and Fabric's: its class is made of this and that of the optimizer it holds."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Held", (type(self), type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_what_is_done_through_an_object_that_holds_it_is_done_to_it():
    weights, loss_of, optimizer, back_to = running_with_a_copy()
    held, saved = Holder(optimizer), copy.deepcopy(optimizer.state_dict())
    held.eval()
    torch.nn.init.constant_(weights, 7.0)
    held.train()
    held.state_dict()
    train(optimizer, loss_of, 5)
    assert back_to() == 20
    assert torch.equal(weights, torch.full((8,), 7.0))
    held.load_state_dict(saved)
    assert optimizer._steps == 20


def test_not_what_a_jump_has_left_of_a_factor_is_blamed():
    weights, loss_of = problem()
    factors = iter([Decision(50.0, keep=True), *[50.0] * 2, *[4.0] * 100])
    base = torch.optim.SGD([weights], lr=1e-3)
    optimizer = GapAware(base, controller=lambda _: next(factors), interval=1, max_scale=64)
    train(optimizer, loss_of, 10)
    assert optimizer.scales == [4.0]
    with pytest.warns(UserWarning, match="weights and state are those of step"):
        train(optimizer, lambda: math.nan * loss_of(), 2)
    assert optimizer._steering.max_scale == 50**0.5


def test_the_bound_that_is_left_is_saved():
    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    optimizer = GapAware(base, controller=diverging, interval=2, max_scale=64)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        train(optimizer, loss_of, 300)
    twin, _ = problem()
    resumed = GapAware(
        torch.optim.SGD([twin], lr=0.1, momentum=0.9),
        controller=diverging,
        interval=2,
        max_scale=64,
    )
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed._steering.max_scale == optimizer._steering.max_scale < 64
    state = optimizer.state_dict()
    state["gapaware"]["steering"]["survived"] = 0.5
    with pytest.raises(ValueError, match="survived"):
        resumed.load_state_dict(state)


def test_the_law_keeps_where_a_factor_leaves_one_and_where_it_does_well():
    """On a plateau that a small learning rate makes, all the way down."""
    weights, loss_of = problem(curvature=1e-3)
    optimizer = GapAware(torch.optim.SGD([weights], lr=0.05))
    kept = []
    keep = optimizer._copies.rescue.keep
    optimizer._copies.rescue.keep = lambda base, step: (kept.append(step), keep(base, step))
    train(optimizer, loss_of, 120)
    first = next(record["step"] for record in optimizer.history if record["scale"] > 1)
    assert first - 2 <= kept[0] <= first
    assert len(kept) > 3
    assert all(after - before > 5 for before, after in itertools.pairwise(kept))


@pytest.mark.parametrize("every", [1, 10])
def test_the_law_goes_back_from_a_plateau_that_its_factor_makes(every):
    """At 64 times the learning rate the network dies, and the loss stands still as it did before."""
    torch.manual_seed(0)
    inputs = torch.rand(256, 2) * 2 - 1
    answers = ((inputs * 3).floor().sum(1) % 2).unsqueeze(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 1),
    )
    optimizer = GapAware(torch.optim.AdamW(model.parameters(), lr=3e-3))
    loss_of = lambda: torch.nn.functional.binary_cross_entropy_with_logits(model(inputs), answers)  # noqa: E731
    losses = []
    for step in range(800):
        losses += train(optimizer, loss_of, 1, log=step % every == 0)
    back = [record for record in optimizer.history if "back_to" in record]
    assert back
    assert back[0]["next_scale"] <= back[0]["scale"] / 4 + 1e-9
    # without a way back it ends at 0.63, without GapAware at 0.11
    assert losses[-1] < 0.1


def test_a_run_that_resumes_goes_back_to_where_it_resumed():
    def undecided(observation):
        return Decision(
            2.0, keep=observation.scale <= 1, back=observation.step == 30 and observation.kept
        )

    def new():
        weights, loss_of = problem()
        adamw = torch.optim.AdamW([weights], lr=1e-3)
        return weights, GapAware(adamw, controller=undecided, interval=1), loss_of

    weights, optimizer, loss_of = new()
    train(optimizer, loss_of, 20)
    assert optimizer._copies.rescue.holds
    twin, resumed, loss_of_twin = new()
    with torch.no_grad():
        twin.copy_(weights)
    resumed.load_state_dict(optimizer.state_dict())
    # as often as it is saved before the next step
    again = resumed.state_dict()
    resumed.load_state_dict(again)
    train(resumed, loss_of_twin, 10)
    assert resumed._copies.rescue.holds
    assert not torch.equal(twin, weights)
    train(resumed, loss_of_twin, 1)
    assert [r["back_to"] for r in resumed.history if "back_to" in r] == [20]
    assert torch.equal(twin, weights)


def test_a_state_goes_back_in_the_tensors_that_the_optimizer_knows():
    class Apart(torch.optim.SGD):
        """Has its momentum in a place of its own, too."""

        def step(self, closure=None):
            super().step(closure)
            self.mine = [state["momentum_buffer"] for state in self.state.values()]

    weights, loss_of = problem()
    base = Apart([weights], lr=0.1, momentum=0.9)
    train(GapAware(base, mode="observe"), loss_of, 5)
    rescue = Rescue()
    rescue.keep(base, step=5)
    before = base.mine[0].clone()
    train(GapAware(base, mode="observe"), loss_of, 5)
    known = base.mine[0]
    rescue.put_back(base)
    assert base.state[weights]["momentum_buffer"] is known
    assert torch.equal(known, before)


@pytest.mark.parametrize(
    ("bad", "goes_back"), [((30,), False), ((30, 31), False), ((30, 31, 32), True)]
)
def test_a_loss_that_is_not_finite_once_is_nothing_to_go_back_for(bad, goes_back):
    """A batch without labels, or a step that a gradient scaler leaves out: the weights are sound."""
    weights, loss_of = problem()
    base = torch.optim.AdamW([weights], lr=1e-3)
    rising = lambda seen: Decision(2.0, keep=seen.scale <= 1)  # noqa: E731
    optimizer = GapAware(base, controller=rising, interval=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(60):
            train(optimizer, loss_of, 1, log=False)
            optimizer.log(loss=math.nan if step in bad else 1.0)
    assert any("back_to" in record for record in optimizer.history) == goes_back
    assert bool(said) == goes_back
    assert (optimizer._steering.max_scale < 2) == goes_back


@pytest.mark.parametrize("log", [True, False])
def test_weights_that_have_overflowed_since_the_snapshot_are_not_kept(log):
    """What is decided is about a snapshot; the weights that are kept are an interval younger."""

    def always(observation):
        return Decision(2.0, "go on", keep=True)

    def run(bad):
        weights, loss_of = problem()
        base = torch.optim.SGD([weights], lr=0.01)
        optimizer = GapAware(base, controller=always, interval=5, sketch_dim=None)
        for step in range(1, bad + 25):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            if step == bad:
                weights.grad.fill_(math.nan)
            optimizer.step()
            if log:
                optimizer.log(loss=loss)
        return weights

    for bad in range(41, 61):
        with pytest.warns(UserWarning, match="weights and state are those of step"):
            weights = run(bad)
        assert weights.isfinite().all(), bad


def test_a_factor_of_one_interval_has_a_way_back():
    """It is in force after the last snapshot that is decided on, and was never seen in one."""

    def once(observation):
        first = not observation.memory
        return Decision(2.0 if first else 1.0, "once", keep=first, memory={"asked": 1})

    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=0.01)
    optimizer = GapAware(base, controller=once, interval=5, sketch_dim=None)
    while optimizer.scales[0] < 2:
        train(optimizer, loss_of, 1)

    def overflow_and_go_on():
        train(optimizer, loss_of, 3)
        weights.grad.fill_(math.nan)
        optimizer.step()
        train(optimizer, loss_of, 30)

    with pytest.warns(UserWarning, match="weights and state are those of step"):
        overflow_and_go_on()
    assert weights.isfinite().all()


@pytest.mark.parametrize("resumed", [False, True])
def test_the_factor_in_force_is_blamed_before_a_snapshot_has_seen_it(resumed):
    def leaps(observation):
        first = not observation.memory
        return Decision(
            64.0 if first else 8.0, "leap", keep=observation.scale <= 1, memory={"asked": 1}
        )

    def made():
        weights, loss_of = problem()
        base = torch.optim.SGD([weights], lr=1e-4)
        return loss_of, GapAware(base, controller=leaps, interval=5, max_scale=64)

    loss_of, optimizer = made()
    while optimizer.scales[0] < 64:
        train(optimizer, loss_of, 1)
    if resumed:
        state = copy.deepcopy(optimizer.state_dict())
        loss_of, optimizer = made()
        optimizer.load_state_dict(state)

    def overflow():
        for _ in range(4):
            optimizer.log(loss=math.nan)
            train(optimizer, loss_of, 1, log=False)

    with pytest.warns(UserWarning, match="no factor goes above 8 from here on"):
        overflow()
    assert optimizer._steering.max_scale == 8.0


def test_the_losses_of_weights_that_are_gone_do_not_count():
    def goes_back(observation):
        asked = observation.memory.get("asked", 0) + 1
        return Decision(
            4.0 if asked < 3 else 1.0,
            "try",
            keep=asked == 1,
            back=asked == 3,
            memory={"asked": asked},
        )

    weights, loss_of = problem()
    base = torch.optim.SGD([weights], lr=1e-3)
    optimizer = GapAware(base, controller=goes_back, interval=5)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.log(loss=100.0 if optimizer.scales[0] > 1 else 1.0)
        optimizer.step()
    records = list(optimizer.history)
    back = next(n for n, record in enumerate(records) if "back_to" in record)
    assert records[back]["loss"] == 100.0
    assert {record["loss"] for record in records[back + 1 :]} == {1.0}


def test_what_is_frozen_is_not_copied():
    frozen, free = (torch.nn.Parameter(torch.ones(1000)) for _ in range(2))
    frozen.requires_grad_(False)
    sgd = torch.optim.SGD([frozen, free], lr=0.1)
    rescue = Rescue()
    rescue.keep(sgd, step=0)
    assert [kept.numel() for kept, _ in rescue._kept.values()] == [1000]
    with torch.no_grad():
        frozen.fill_(2.0)
        free.fill_(3.0)
    rescue.put_back(sgd)
    assert (frozen == 2.0).all()
    assert (free == 1.0).all()


def test_a_run_that_resumes_knows_who_takes_part_in_training():
    """A constraint after each step; a copy of the run and one from a checkpoint go on as it does."""

    def made(weights):
        base = torch.optim.AdamW([weights], lr=1e-2)
        return GapAware(
            base, controller=lambda _: Decision(2.0, "push", push=1.0, keep=True), interval=1
        )

    def constrain(weights):
        with torch.no_grad():
            weights.mul_(0.999)

    def step(weights, optimizer):
        weights.grad = weights.detach() + torch.linspace(-1, 1, len(weights))
        optimizer.step()

    for between in (False, True):
        weights = torch.nn.Parameter(torch.full((8,), 3.0))
        optimizer = made(weights)
        for _ in range(29):
            step(weights, optimizer)
            constrain(weights)
        step(weights, optimizer)
        if not between:
            constrain(weights)
        state = copy.deepcopy(optimizer.state_dict())
        twin = torch.nn.Parameter(weights.detach().clone())
        other = made(twin)
        other.load_state_dict(state)
        for each, its in ((weights, optimizer), (twin, other)):
            if between:
                constrain(each)
            for _ in range(10):
                step(each, its)
                constrain(each)
        assert torch.equal(weights, twin), between
