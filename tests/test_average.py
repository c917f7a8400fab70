"""The average of the weights, which `eval()` puts into the model and `train()` takes out."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gapaware import Composite, Decision, GapAware, OwnState, room
from gapaware import average as average_module
from gapaware.average import STEPS, Average, _copy
from gapaware.scaling import Scales


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :2] - 3).square().mean().backward()
        optimizer.step()


def averaged(model, average=True, **more):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    asked = {"controller": lambda seen: Decision(1.5, average=average)}
    return GapAware(base, **{"interval": 2, "sketch_dim": 64, **asked, **more})


def average_always(observation):
    return Decision(1.5, average=True)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(one, other):
    return all(map(torch.equal, one, other))


def kept(optimizer):
    return optimizer.state_dict()["gapaware"]["average"]["weights"]


def test_it_is_the_exponential_average_of_the_weights():
    """By hand, from the first step on."""
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    groups, average, mean = [{"params": [theta]}], Average(), points[0]
    average.train(groups)
    for number, point in enumerate(points):
        with torch.no_grad():
            theta.copy_(point)
        average.follow(groups, [Scales(average=True)])
        mean = mean + (point - mean) / STEPS if number else point
    average.eval(groups)
    assert torch.allclose(theta, mean, rtol=1e-12, atol=1e-12)
    average.train(groups)
    assert torch.equal(theta, points[-1])


def test_it_is_nearer_where_the_weights_wander():
    """Noisy descent of a quadratic from its minimum: the average wanders less far."""
    generator = torch.Generator().manual_seed(0)
    theta = nn.Parameter(torch.zeros(100))
    optimizer = GapAware(
        torch.optim.SGD([theta], lr=0.5), controller=lambda seen: Decision(1.0, average=True)
    )
    optimizer.train()
    for _ in range(100):
        theta.grad = theta.detach() + torch.randn(100, generator=generator)
        optimizer.step()
    far = theta.norm().item()
    optimizer.eval()
    # variances of AR(1), x ← (x − n)/2, and of its exponential average with 1/10
    assert theta.norm().item() < 0.6 * far


def test_training_does_not_see_it():
    model, twin = network(), network()
    optimizer, alone = averaged(model), averaged(twin, average=False)
    for step in range(40):
        train(model, optimizer, [step])
        optimizer.eval()
        optimizer.eval()  # twice is once
        evaluated = weights(model)
        optimizer.train()
        optimizer.train()
        train(twin, alone, [step])
        assert equal(model.parameters(), twin.parameters())
    assert not equal(evaluated, model.parameters())
    assert optimizer.history[-1]["average"] is True
    assert "average" not in alone.history[-1]


def test_nothing_is_kept_before_somebody_evaluates():
    model = network()
    optimizer = averaged(model)
    train(model, optimizer, range(30))
    assert kept(optimizer) == {}
    optimizer.eval()  # there is none yet
    optimizer.train()
    train(model, optimizer, [30])
    assert len(kept(optimizer)) == 4


@pytest.mark.parametrize("without", [{"average": False}, {"controller": lambda seen: 1.5}])
def test_none_is_kept_where_none_is_wanted(without):
    model = network()
    optimizer = averaged(model)
    optimizer = GapAware(optimizer.base, interval=2, sketch_dim=64, **without)
    optimizer.train()
    train(model, optimizer, range(30))
    before = weights(model)
    optimizer.eval()
    assert kept(optimizer) == {}
    assert equal(model.parameters(), before)


def test_it_is_let_go_when_the_decision_changes():
    model = network()
    optimizer = averaged(model, controller=lambda seen: Decision(1.5, average=seen.step < 20))
    optimizer.train()
    train(model, optimizer, range(19))
    assert len(kept(optimizer)) == 4
    train(model, optimizer, range(19, 40))
    assert kept(optimizer) == {}


def test_rows_are_averaged_apart():
    model = network()
    seen = {}

    def one(observation):
        seen[observation.row] = True
        return Decision(1.5, average=observation.row == next(iter(seen)))

    optimizer = averaged(model, granularity="block", controller=one)
    optimizer.train()
    train(model, optimizer, range(40))
    assert list(kept(optimizer)) == ["0.0"]
    before = weights(model)
    optimizer.eval()
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [False, True, True, True]


def test_of_bfloat16_it_is_kept_in_float32():
    model, twin = network().bfloat16(), network().bfloat16()

    def steps(model, optimizer, evaluate):
        for number in range(40):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.01 * (-1) ** number)
            optimizer.step()
            if evaluate:
                optimizer.eval()
                optimizer.train()

    optimizer = averaged(model)
    steps(model, optimizer, evaluate=True)
    steps(twin, averaged(twin), evaluate=False)
    assert {w.dtype for w in kept(optimizer).values()} == {torch.float32}
    assert equal(model.parameters(), twin.parameters())


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(evaluating):
    """From a checkpoint of the average, too, as the Trainer writes it after an evaluation."""
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    if evaluating:
        optimizer.eval()
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    optimizer.train()
    train(model, optimizer, range(25, 50))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = network(seed=1)
    resumed = averaged(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if evaluating:
        resumed.train()  # otherwise it is known that somebody evaluates
    train(other, resumed, range(25, 50))
    assert equal(model.parameters(), other.parameters())
    optimizer.eval()
    resumed.eval()
    assert equal(model.parameters(), other.parameters())


def test_a_sharded_checkpoint_leaves_it_out():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    other = averaged(network())
    OwnState(other).load_state_dict(OwnState(optimizer).state_dict())
    assert len(kept(optimizer)) == 4
    assert kept(other) == {}


def with_the_best_loaded(evaluating):
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    if evaluating:
        optimizer.eval()
    best = network(seed=5).state_dict()
    model.load_state_dict(best)
    return model, optimizer, best


@pytest.mark.parametrize("evaluating", [False, True])
def test_weights_that_are_loaded_stay(evaluating):
    """As the Trainer loads the best model in the end, whether it has evaluated just before or not."""
    model, optimizer, best = with_the_best_loaded(evaluating)
    optimizer.eval()
    assert equal(model.parameters(), best.values())
    optimizer.train()
    assert equal(model.parameters(), best.values())
    train(model, optimizer, range(25, 27))
    assert optimizer.history.column("decision").count("fault") == 0


def test_no_average_of_weights_that_are_put_right_after_each_step():
    """A clamp: the average of what it has yet to see would violate it."""
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    for step in range(40):
        train(model, optimizer, [step])
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
    optimizer.eval()
    assert all(p.abs().max() <= 0.1 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_for_an_evaluation_goes_on_with_what_was_trained(dtype):
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    trained = weights(model)
    optimizer.eval()
    assert not equal(model.parameters(), trained)
    model.to(dtype).to(torch.float32)
    optimizer.train()
    assert equal(model.parameters(), trained)


@pytest.mark.parametrize("evaluating", [False, True])
def test_weights_that_are_loaded_and_saved_stay_in_a_run_that_resumes(evaluating):
    model, optimizer, best = with_the_best_loaded(evaluating)
    saved = copy.deepcopy(optimizer.state_dict())
    other = network(seed=1)
    resumed = averaged(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    resumed.eval()
    assert equal(other.parameters(), best.values())
    resumed.train()
    assert equal(other.parameters(), best.values())


@pytest.mark.parametrize("cut_off_in", ["eval", "train"])
def test_an_exchange_that_is_cut_off_can_be_gone_on_with(cut_off_in, monkeypatch):
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    trained = weights(model)
    if cut_off_in == "train":
        optimizer.eval()
    copies = iter(range(2))

    def fails(weights):
        next(copies)
        return _copy(weights)

    with monkeypatch.context() as patch:
        patch.setattr(average_module, "_copy", fails)
        with pytest.warns(UserWarning, match="the average of the weights"):
            getattr(optimizer, cut_off_in)()
    mixed = [torch.equal(a, b) for a, b in zip(trained, model.parameters(), strict=True)]
    assert sorted(mixed) == [False, False, True, True]
    other = network(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = averaged(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for restored, weights_there in ((optimizer, model), (resumed, other)):
        restored.train()
        assert equal(weights_there.parameters(), trained)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("evaluating", [False, True])
def test_copies_evaluate_and_train_as_the_original(duplicate, evaluating):
    model = network()
    optimizer = averaged(model, controller=average_always)
    optimizer.train()
    train(model, optimizer, range(25))
    trained = weights(model)
    optimizer.eval()
    mean = weights(model)
    if not evaluating:
        optimizer.train()
    other, copied = duplicate((model, optimizer))
    copied.eval()
    assert equal(other.parameters(), mean)
    copied.train()
    assert equal(other.parameters(), trained)


def test_a_table_that_writes_itself_in_a_forward_pass_takes_nothing_from_the_others():
    """`max_norm` does, in evaluation too; where the average of a row is too long even its values change."""
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2))
    optimizer = averaged(model)
    optimizer.train()
    batch = torch.arange(5)
    for _ in range(25):
        optimizer.zero_grad()
        (model(batch) - 3).square().mean().backward()
        optimizer.step()
    trained = weights(model[1])
    optimizer.eval()
    assert not equal(model[1].parameters(), trained)
    model(batch)
    optimizer.train()
    assert equal(model[1].parameters(), trained)


@pytest.mark.parametrize("evaluating", [False, True])
def test_weights_of_another_storage_stay(evaluating):
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    if evaluating:
        optimizer.eval()
    best = nn.utils.parameters_to_vector(network(seed=5).parameters())
    nn.utils.vector_to_parameters(best, model.parameters())
    optimizer.eval()
    optimizer.train()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), best)


def test_an_average_begins_anew_from_weights_that_are_loaded():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    best = network(seed=5)
    model.load_state_dict(best.state_dict())
    optimizer.base.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(25, 28))
    optimizer.eval()
    assert equal(model.parameters(), best.parameters())


def test_under_inference_mode_as_otherwise():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    with torch.inference_mode():
        optimizer.eval()
        optimizer.train()
    train(model, optimizer, range(25, 30))
    assert optimizer.history.column("decision").count("fault") == 0


def test_a_step_without_train_is_warned_of_once_and_goes_on_with_the_trained_weights():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    trained = weights(model)
    optimizer.eval()
    for p in model.parameters():
        p.grad = None  # a step that moves nothing
    with pytest.warns(UserWarning, match=r"step\(\) after eval\(\).*call train\(\)"):
        optimizer.step()
    assert equal(model.parameters(), trained)
    optimizer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_without_train_is_no_matter_where_there_is_no_average():
    model = network()
    optimizer = averaged(model, average=False)
    optimizer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(4))


def test_without_memory_there_is_none_and_training_goes_on(monkeypatch):
    def no_room(parameters, least_itemsize):
        raise MemoryError("1 MiB too little")

    model, twin = network(), network()
    optimizer, alone = averaged(model), averaged(twin)
    optimizer.train()
    monkeypatch.setattr(average_module, "check_room", no_room)
    with pytest.warns(UserWarning, match="keeps no average of the weights.*1 MiB") as warned:
        train(model, optimizer, range(30))
    assert len(warned) == 1
    train(twin, alone, range(30))
    before = weights(model)
    optimizer.eval()
    assert equal(model.parameters(), before)
    assert equal(model.parameters(), twin.parameters())
    assert optimizer.scales == [1.5]


def test_of_bfloat16_there_has_to_be_room_for_float32(monkeypatch):
    monkeypatch.setattr(room, "_room", lambda device: 100)
    with FakeTensorMode():
        weights = nn.Parameter(torch.zeros(30, device="cuda", dtype=torch.bfloat16))
        room.check_room([weights])
        with pytest.raises(MemoryError, match="for a copy of the weights"):
            room.check_room([weights], least_itemsize=4)


@pytest.mark.parametrize("inside_another", [False, True])
def test_an_optimizer_with_an_average_of_its_own_decides_itself(inside_another):
    class Switching(torch.optim.SGD):
        mode = "train"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    model = network()
    base = Switching(model.parameters(), lr=0.05)
    optimizer = GapAware(
        Composite(base) if inside_another else base,
        interval=2,
        sketch_dim=64,
        controller=lambda seen: Decision(1.5, average=True),
    )
    optimizer.train()
    train(model, optimizer, range(20))
    optimizer.eval()
    assert base.mode == "eval"
    assert kept(optimizer) == {}
    optimizer.train()
    assert base.mode == "train"


def test_a_frozen_parameter_and_one_that_was_replaced():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(20))
    model[0].weight.requires_grad_(False)
    train(model, optimizer, range(20, 30))
    assert list(kept(optimizer)) == ["0.1", "0.2", "0.3"]


def test_a_state_that_does_not_fit_changes_nothing():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["gapaware"]["average"]["weights"]["0.0"] = torch.zeros(5)
    before = copy.deepcopy(kept(optimizer))
    with pytest.raises(ValueError, match=r"weight 0\.0 that fits no parameter"):
        optimizer.load_state_dict(damaged)
    assert equal(kept(optimizer).values(), before.values())


def test_a_state_without_one_forgets_it():
    model = network()
    optimizer = averaged(model)
    optimizer.train()
    train(model, optimizer, range(25))
    optimizer.load_state_dict(optimizer.base.state_dict())
    assert kept(optimizer) == {}
    # whoever evaluates still does
    train(model, optimizer, range(25, 50))
    assert len(kept(optimizer)) == 4


def test_the_argument_is_checked():
    with pytest.raises(TypeError, match=r"average=10: .*; pass True or False"):
        GapAware(torch.optim.SGD(network().parameters(), lr=0.1), average=10)
