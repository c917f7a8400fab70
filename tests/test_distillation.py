"""Distillation holds a model to its old answers, computed from the starting weights."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gapaware import Distillation, scrambled, starting_weights


def two_heads(dropout=0.0):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
    return nn.ModuleDict({"trunk": trunk, "old": nn.Linear(16, 3), "new": nn.Linear(16, 2)})


def old_answers(model, x):
    return model["old"](model["trunk"](x))


def disturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


def test_it_is_the_divergence_from_a_copy_in_evaluation_mode():
    model = two_heads(dropout=0.5).train()
    teacher = copy.deepcopy(model).eval()
    held = Distillation(model, old_answers, strength=3.0, temperature=1.5)
    disturb(model)
    model["trunk"][3].p = 0.0  # so that the student's answers are no matter of chance
    x = torch.randn(20, 6)
    loss = held(x)
    with torch.no_grad():
        then = F.softmax(old_answers(teacher, x) / 1.5, -1)
        now = F.log_softmax(old_answers(model, x) / 1.5, -1)
    expected = 3.0 * 1.5**2 * (then * (then.log() - now)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(module.training for module in model.modules())


def test_gradients_reach_what_answers_and_nothing_else():
    model = two_heads()
    held = Distillation(model, old_answers)
    disturb(model)
    held(torch.randn(8, 6)).backward()
    assert model["trunk"][0].weight.grad.abs().sum() > 0
    assert model["old"].weight.grad.abs().sum() > 0
    assert model["new"].weight.grad is None
    assert not any(tensor.requires_grad for tensor in held.weights.values())


def test_the_teacher_leaves_running_statistics_alone():
    model = two_heads().train()
    held = Distillation(model, old_answers)
    before = {name: b.clone() for name, b in held.weights.items()}
    held(torch.randn(8, 6))
    norm = model["trunk"][1]
    assert norm.num_batches_tracked == 1  # the student's own pass
    assert all(torch.equal(before[name], tensor) for name, tensor in held.weights.items())


def test_training_with_it_forgets_less():
    torch.manual_seed(1)
    x = torch.randn(400, 6)
    old, new = (x[:, :3].argmax(1), (x[:, 3] * x[:, 0] > 0).long())
    pretrained = two_heads()

    def train(model, loss_of, steps=150):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    def old_loss(model):
        with torch.no_grad():
            return F.cross_entropy(old_answers(model.eval(), x), old).item()

    train(pretrained, lambda m: F.cross_entropy(old_answers(m, x), old))
    start, rises, learnt = old_loss(pretrained), [], []
    for held in (False, True):
        model = copy.deepcopy(pretrained).train()
        distillation = Distillation(model, old_answers)

        def loss(m, held=held, distillation=distillation):
            task = F.cross_entropy(m["new"](m["trunk"](x)), new)
            return task + distillation(x) if held else task

        train(model, loss)
        rises.append(old_loss(model) - start)
        with torch.no_grad():
            learnt.append(F.cross_entropy(model["new"](model["trunk"](x)), new).item())
    assert rises[1] < 0.3 * rises[0]
    assert learnt[1] < 0.5


def test_other_inputs_are_asked_about_instead_and_once():
    model, asked = two_heads().eval(), []

    def inputs(x):
        asked.append(torch.randn_like(x))
        return asked[-1]

    held = Distillation(model, old_answers, inputs=inputs)
    plain = Distillation(model, old_answers)
    disturb(model)
    loss = held(torch.randn(8, 6))
    assert len(asked) == 1
    assert loss.item() == pytest.approx(plain(asked[0]).item(), rel=1e-6)
    assert loss.requires_grad


def test_other_inputs_leave_running_statistics_and_modes_alone():
    model = two_heads(dropout=0.5).train()
    held = Distillation(model, old_answers, inputs=scrambled)
    before = model["trunk"][1].running_mean.clone()
    assert held(torch.randn(8, 6)).item() == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(model["trunk"][1].running_mean, before)
    assert all(module.training for module in model.modules())


def test_one_head_forgets_less_where_scrambles_ask_for_its_answers():
    """The new task turns the order of the inputs around, so that old answers on its inputs are wrong."""
    torch.manual_seed(2)
    x = torch.rand(400, 6) * torch.linspace(0, 1, 6)
    labels, turned = (x[:, 4] > x[:, 5]).long(), x.flip(1)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))

    def train(model, loss_of, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    def loss_on(inputs, model):
        return F.cross_entropy(model(inputs), labels)

    train(model, lambda m: loss_on(x, m), 200)
    old, new = [], []
    for inputs in (None, scrambled):
        tuned = copy.deepcopy(model)
        held = Distillation(tuned, lambda m, x: m(x), inputs=inputs or scrambled)

        def loss(m, held=held, hold=inputs is not None):
            return loss_on(turned, m) + (held(turned) if hold else 0)

        train(tuned, loss, 300)
        old.append(loss_on(x, tuned).item())
        new.append(loss_on(turned, tuned).item())
    assert old[1] < 0.5 * old[0]
    assert new[1] < 0.35


def test_weights_given_by_name_are_the_start():
    model = two_heads()
    start = {name: w.clone() for name, w in model.state_dict().items()}
    disturb(model)
    x = torch.randn(4, 6)
    assert Distillation(model.eval(), old_answers)(x).item() == pytest.approx(0.0, abs=1e-6)
    assert Distillation(model, old_answers, weights=start)(x).item() > 1e-3


def test_a_state_dict_may_have_more_names_than_the_model_and_lack_what_it_does_not_save():
    model = two_heads()
    model["more"] = nn.Linear(16, 3)
    model["more"].weight = model["old"].weight  # tied: two names of one parameter
    model.register_buffer("places", torch.arange(3), persistent=False)
    start = {name: w.clone() for name, w in model.state_dict().items()}
    held = Distillation(model, old_answers, weights={**start, "other": torch.ones(1)})
    assert held.weights.keys() == {*start, "places"} - {"more.weight"}


def test_starting_weights_are_enough():
    """They lack what training cannot change: frozen parameters, and counts of batches."""
    model = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 3))
    start = starting_weights(model)
    assert not start.keys() & {"0.weight", "1.num_batches_tracked"}
    held = Distillation(model, lambda model, x: model(x), weights=start, inputs=lambda x: x)
    x = torch.randn(5, 6)
    assert held(x).item() == pytest.approx(0.0, abs=1e-6)
    disturb(model[2])
    assert held(x).item() > 1e-3


def test_of_tied_weights_any_name_will_do():
    """A safetensors file has but one of them, and not always the first."""
    model = two_heads().eval()
    model["more"] = nn.Linear(16, 3)
    model["more"].weight = model["old"].weight
    start = {name: w.clone() for name, w in model.state_dict().items()}
    disturb(model)
    x = torch.randn(4, 6)
    whole = Distillation(model, old_answers, weights=start)(x).item()
    assert whole > 1e-3
    del start["old.weight"]
    assert Distillation(model, old_answers, weights=start)(x).item() == whole
    del start["more.weight"], start["old.bias"]
    with pytest.raises(
        ValueError, match=r"^weights: lacks 'old\.weight', 'old\.bias' of the model"
    ):
        Distillation(model, old_answers, weights=start)


class Adapted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.more(x)


def test_layers_wrapped_later_are_refused_and_added_ones_are_not():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    held = Distillation(model, lambda m, x: m[1](m[0](x)))
    model.append(nn.Linear(8, 2))
    assert held(torch.randn(5, 4)).item() == pytest.approx(0.0, abs=1e-6)
    model[0] = Adapted(model[0])
    with pytest.raises(
        ValueError,
        match=r"model: no longer has '0\.weight', '0\.bias'; build Distillation after .*weights=",
    ):
        held(torch.randn(5, 4))


def test_a_module_is_the_start_too():
    model = two_heads().eval()
    start = copy.deepcopy(model)
    disturb(model)
    held = Distillation(model, old_answers, weights=start)
    assert torch.equal(held.weights["old.weight"], start["old"].weight)
    assert held(torch.randn(4, 6)).item() > 1e-3


@pytest.mark.parametrize("moved", [{"device": "meta"}, {"dtype": torch.float64}])
def test_the_start_follows_a_model_that_moves_once(moved):
    model = two_heads()
    held = Distillation(model, old_answers)
    model.to(**moved)
    loss = held(torch.randn(4, 6).to(**moved))
    assert loss.device == next(model.parameters()).device
    first = dict(held.weights)
    held(torch.randn(4, 6).to(**moved))
    assert all(held.weights[name] is tensor for name, tensor in first.items())
    assert held.weights["trunk.1.num_batches_tracked"].dtype == torch.int64


def test_longer_answers_count_each_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    held = Distillation(model, lambda m, tokens: m(tokens))
    disturb(model)
    tokens = torch.randint(9, (3, 5))
    whole = held(tokens)
    parts = [held(tokens[i : i + 1]) for i in range(3)]
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_masked_classes_count_nothing():
    def found(fill):
        torch.manual_seed(0)
        model, real = nn.Linear(4, 5), torch.tensor([True, True, True, False, False])
        held = Distillation(model, lambda m, x: m(x).masked_fill(~real, fill))
        disturb(model)
        loss = held(torch.randn(8, 4))
        loss.backward()
        return loss.item(), model.weight.grad

    loss, gradient = found(float("-inf"))
    expected, same = found(-1e9)
    assert loss == expected > 1e-3
    assert torch.equal(gradient, same)


def test_a_mask_without_a_place_gives_zero():
    model = nn.Linear(4, 5)
    loss = Distillation(model, lambda m, x: m(x)[:0])(torch.randn(8, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(model.weight.grad, torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": 0.0}, ValueError, "strength=0.0"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"weights": {}}, ValueError, "weights: lacks"),
        ({"weights": [torch.ones(1)]}, TypeError, "weights=list: .*pass a state dict or a module"),
        (
            {"weights": {**two_heads().state_dict(), "old.bias": torch.ones(4)}},
            ValueError,
            r"weights\['old.bias'\] has the shape \(4,\), the model's \(3,\); pass its state_dict",
        ),
        (
            {"weights": {**two_heads().state_dict(), "old.bias": [0.0, 0.0, 0.0]}},
            TypeError,
            r"weights\['old.bias'\] is a list: pass a tensor",
        ),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments, error, message):
    with pytest.raises(error, match=message):
        Distillation(two_heads(), old_answers, **arguments)


def test_a_model_and_functions_are_asked_for_at_once():
    with pytest.raises(TypeError, match=r"model=function: .*pass the model itself"):
        Distillation(lambda x: x, old_answers)
    with pytest.raises(
        TypeError, match=r"answers=int: not callable; pass a function of model and batch"
    ):
        Distillation(two_heads(), 3)
    with pytest.raises(TypeError, match=r"inputs=Tensor: not callable; .*gapaware\.scrambled"):
        Distillation(two_heads(), old_answers, inputs=torch.ones(2, 2))


def test_single_numbers_are_refused():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"shape \(4, 1\)"):
        Distillation(model, lambda m, x: m(x))(torch.randn(4, 3))


def test_an_output_with_logits_in_it_is_refused():
    model = nn.Linear(3, 2)
    output = namedtuple("Output", "logits")
    with pytest.raises(TypeError, match=r"answers: gave a Output; return the logits.*\.logits"):
        Distillation(model, lambda m, x: output(m(x)))(torch.randn(4, 3))


def test_scrambles_are_of_the_same_elements_in_other_orders():
    torch.manual_seed(0)
    examples = torch.arange(3 * 4 * 5).view(3, 4, 5)
    shuffled = scrambled(examples)
    assert shuffled.shape == examples.shape
    assert shuffled.dtype == examples.dtype
    assert torch.equal(shuffled.flatten(1).sort().values, examples.flatten(1))
    places = shuffled.flatten(1) - examples.flatten(1)[:, :1]
    assert not torch.equal(places[0], places[1])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        scrambled(torch.ones(3))


def test_a_batch_as_a_dict_says_which_part_to_shuffle():
    with pytest.raises(TypeError, match="examples: is a dict; pass a tensor"):
        scrambled({"pixel_values": torch.ones(2, 3)})
