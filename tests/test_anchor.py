"""The starting weights and the pull towards them."""

import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from gapaware import Decision, GapAware
from gapaware.anchor import Anchor
from gapaware.log import read_log
from gapaware.retain_law import FIRST_PULL, RETAIN_TARGET
from gapaware.scaling import Scales


def model_and_start(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, copy.deepcopy(model.state_dict())


def train(model, optimizer, steps, scheduler=None):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :2] - 3).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def way(model, start):
    """How far from the start, by parameter name."""
    return {name: (p.detach() - start[name]).norm().item() for name, p in model.named_parameters()}


def still(p):
    """An optimizer that moves nothing."""
    return torch.optim.SGD([p] if isinstance(p, nn.Parameter) else p, lr=0.0)


@pytest.mark.parametrize(
    ("max_scale", "intervals"), [(None, [5, 5, 5]), (1.0, [5, 5, 5]), (64.0, [2, 2, 5])]
)
def test_snapshots_are_closer_at_first_where_the_learning_rate_may_grow(max_scale, intervals):
    """So that the first pull, which lasts until there is a spectrum, does not last for long."""
    theta = torch.nn.Parameter(torch.ones(100))
    base = torch.optim.AdamW([theta], lr=1e-3)
    optimizer = GapAware(base, mode="retain", max_scale=max_scale)
    seen = []
    for step in range(60):
        if step in (0, 12, 40):
            seen.append(optimizer.interval)
        theta.grad = torch.randn(100, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert seen == intervals
    first = next(record for record in optimizer.history if record["spectrum"])
    assert first["step"] == 4 * intervals[0]


def test_the_pull_by_hand():
    """θ ← θ + ρ (θ_0 − θ) after each step of the base, ρ = 1/(1/ρ_0 + 𝒜* t) at the last decision."""
    theta = nn.Parameter(torch.zeros(3))
    alone = torch.zeros(3)
    optimizer = GapAware(torch.optim.SGD([theta], lr=1.0), mode="retain", interval=1)
    for step in range(12):
        theta.grad = -torch.ones(3)
        optimizer.step()
        # a snapshot at each step, decided on one later, and the first that has a spectrum is step 4's
        seen = step - 1
        pull = FIRST_PULL if seen < 4 else 1 / (1 / FIRST_PULL + RETAIN_TARGET * seen)
        alone = (alone + 1) * (1 - pull)
        assert theta.tolist() == pytest.approx(alone.tolist()), step
    assert optimizer.history[-1]["pull"] == pytest.approx(1 / (1 / FIRST_PULL + RETAIN_TARGET * 11))


@pytest.mark.parametrize("granularity", ["global", "block"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_the_pull_moves_is_no_update(granularity, given, device):
    """Gradient and pull balance each other, the weights stand still, and the gradient still pushes."""
    pulled, free = nn.Parameter(torch.full((3,), 5.0)), nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [("pulled", pulled)]},
        {"params": [("free", free)], "anchor": False},
    ]
    grams, moved = [], []

    def watch(observation):
        grams.append((observation.row, observation.gram))
        return Decision(1.0, pull=0.05)

    base = torch.optim.SGD(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0 if step < 90 else 0.5)
    optimizer = GapAware(
        base,
        controller=watch,
        interval=3,
        window=5,
        sketch_dim=None,
        granularity=granularity,
        anchor={"pulled": torch.full((3,), -2.0)} if given else "init",
        anchor_device=device,
    )
    for _ in range(150):
        before = pulled[0].item()
        pulled.grad, free.grad = -torch.ones(3), -torch.ones(2)
        optimizer.step()
        schedule.step()
        moved.append(pulled[0].item() - before)
    assert moved[0] == pytest.approx(1.0)
    assert abs(moved[80]) < 0.02
    assert optimizer.history[-1]["decision"] != "fault"
    seen = {row: gram for row, gram in grams if len(gram) == 6}
    sizes = {"all": 5} if granularity == "global" else {"group 0: pulled": 3, "group 1: free": 2}
    assert seen.keys() == sizes.keys()
    for row, size in sizes.items():
        # three steps of half a unit, in the end
        np.testing.assert_allclose(seen[row], np.full((6, 6), 1.5**2 * size), rtol=0.06)


def test_the_pull_follows_the_schedule():
    theta = nn.Parameter(torch.ones(3))
    anchor = Anchor("init")
    group = {"params": [theta], "lr": 0.4}
    anchor.start([group])
    with torch.no_grad():
        theta.add_(1.0)
    anchor.pull([group], [Scales(pull=0.5)])
    assert theta.tolist() == [1.5] * 3
    group["lr"] = 0.1
    anchor.pull([group], [Scales(pull=0.5)])
    assert theta.tolist() == pytest.approx([1.4375] * 3)
    group["lr"] = 0.0
    anchor.pull([group], [Scales(pull=0.5)])
    assert theta.tolist() == pytest.approx([1.4375] * 3)


@pytest.mark.parametrize("granularity", ["global", "group", "block"])
def test_it_stays_nearer_to_the_start_than_the_base_alone(granularity):
    model, start = model_and_start()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 60)
    alone = way(model, start)
    model, start = model_and_start()
    optimizer = GapAware(
        torch.optim.AdamW(model.named_parameters(), lr=1e-2),
        mode="retain",
        granularity=granularity,
    )
    train(model, optimizer, 60)
    pulled = way(model, start)
    assert all(0 < pulled[name] < 0.8 * alone[name] for name in alone)
    assert optimizer.scales == [1.0] * len(optimizer.scales)


def test_a_new_head_is_left_alone():
    """By a state dict that lacks it, or by a group that says so: both the same run."""
    ends = []
    for by_group in (False, True):
        model, start = model_and_start()
        named = list(model.named_parameters())
        trunk = {name: value for name, value in start.items() if name.startswith("0.")}
        groups = [{"params": named[:2]}, {"params": named[2:], "anchor": not by_group}]
        base = torch.optim.SGD(groups, lr=0.05)
        anchor = "init" if by_group else trunk
        train(model, GapAware(base, mode="retain", anchor=anchor), 1)
        expected, _ = model_and_start()
        train(expected, torch.optim.SGD(expected.parameters(), lr=0.05), 1)
        assert torch.equal(model[2].weight, expected[2].weight)
        assert not torch.equal(model[0].weight, expected[0].weight)
        ends.append(model[0].weight.detach())
    assert torch.equal(*ends)


def test_the_anchor_may_be_other_weights_than_the_first():
    theta = nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([("theta", theta)], lr=0.1)
    optimizer = GapAware(base, mode="retain", anchor={"theta": torch.ones(2)})
    theta.grad = torch.zeros(2)
    optimizer.step()
    assert theta.tolist() == pytest.approx([FIRST_PULL] * 2)


def test_the_anchor_may_be_a_module():
    ends = []
    for as_module in (False, True):
        model, start = model_and_start()
        pretrained, _ = model_and_start(seed=1)
        base = torch.optim.SGD(model.named_parameters(), lr=0.05)
        anchor = pretrained if as_module else pretrained.state_dict()
        train(model, GapAware(base, mode="retain", anchor=anchor), 3)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


def gone(given, name):
    """Whether nobody else holds on to a weight that was given."""
    seen = weakref.ref(given.pop(name))
    return seen() is None


def test_what_was_given_is_freed_once_it_is_copied():
    model, given = model_and_start()
    base = torch.optim.SGD(model[0].named_parameters(prefix="0"), lr=0.05)
    optimizer = GapAware(base, mode="retain", anchor=given)
    start = copy.deepcopy(given)
    train(model, optimizer, 3)
    assert gone(given, "0.weight")
    # a parameter that is added later finds its start all the same
    optimizer.add_param_group({"params": list(model[2].named_parameters(prefix="2"))})
    train(model, optimizer, 1)
    assert torch.equal(optimizer.starting_weights()["1.0"], start["2.weight"])
    assert gone(given, "2.weight")
    # and so does a run that begins anew
    optimizer.load_state_dict(optimizer.base.state_dict())
    train(model, optimizer, 1)
    assert torch.equal(optimizer.starting_weights()["0.0"], start["0.weight"])
    saved = copy.deepcopy(optimizer.state_dict())

    model, given = model_and_start()
    groups = [
        {"params": list(model[number].named_parameters(prefix=str(number)))} for number in (0, 2)
    ]
    resumed = GapAware(torch.optim.SGD(groups, lr=0.05), mode="retain", anchor=given)
    resumed.load_state_dict(saved)
    assert gone(given, "0.weight")


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        ({"other": torch.ones(2)}, ValueError, "it has 'other', the optimizer 'theta'"),
        (
            {"theta": torch.ones(3)},
            ValueError,
            r"anchor\['theta'\] has the shape \(3,\), the model's \(2,\)",
        ),
        ({"theta": np.ones(2)}, TypeError, r"anchor\['theta'\] is a ndarray: pass a tensor"),
        ({"theta": 1.0}, TypeError, r"anchor\['theta'\] is a float: pass a tensor"),
        (
            {"theta": torch.ones(2, dtype=torch.int8)},
            TypeError,
            r"of torch\.int8, no floating-point",
        ),
        ({"theta": torch.ones(2, device="meta")}, ValueError, "on the meta device"),
        ({"theta": torch.tensor([1.0, np.nan])}, ValueError, "'theta' has NaN or infinity"),
        ({"theta": torch.tensor([-np.inf, 1.0])}, ValueError, "'theta' has NaN or infinity"),
        ("start", ValueError, "choose one of 'init'"),
        (True, TypeError, "anchor=bool: .* pass a state dict or a module"),
        ([torch.ones(2)], TypeError, "anchor=list: .* pass a state dict or a module"),
    ],
)
def test_an_anchor_that_does_not_fit_is_refused_at_once(anchor, error, message):
    base = torch.optim.SGD([("theta", nn.Parameter(torch.zeros(2)))], lr=0.1)
    with pytest.raises(error, match=message):
        GapAware(base, mode="retain", anchor=anchor)


@pytest.mark.parametrize("anchor", ["init", {"theta": torch.tensor([-1e5, 1.0])}])
def test_an_anchor_that_would_overflow_is_refused(anchor):
    """The weights were infinite after one step."""
    theta = nn.Parameter(torch.tensor([1e5, np.nan]))
    base = torch.optim.SGD([("theta", theta)], lr=0.1)
    with pytest.raises(ValueError, match=r"anchor_dtype=torch\.float16: theta .*torch\.bfloat16"):
        GapAware(base, mode="retain", anchor=anchor, anchor_dtype=torch.float16)
    optimizer = GapAware(base, mode="retain", anchor=anchor, anchor_dtype=torch.bfloat16)
    theta.data.fill_(1e5)
    theta.grad = torch.zeros(2)
    for _ in range(3):
        optimizer.step()
    assert theta.isfinite().all()


def test_an_anchor_that_overflows_later_is_cut_off():
    theta = nn.Parameter(torch.zeros(2))
    optimizer = GapAware(still(theta), mode="retain", anchor_dtype=torch.float16)
    theta.data.fill_(-1e5)  # as a checkpoint that is loaded after the optimizer was built
    theta.grad = torch.zeros(2)
    optimizer.step()
    assert theta.isfinite().all()


def test_an_anchor_of_single_bytes_is_refused():
    """Every snapshot failed at it, and nothing was pulled."""
    with pytest.raises(
        TypeError, match=r"anchor_dtype=torch\.float8_e5m2: .* 2 bytes each or more"
    ):
        GapAware(still(nn.Parameter(torch.ones(2))), mode="retain", anchor_dtype=torch.float8_e5m2)


def test_an_anchor_needs_the_names_that_the_optimizer_has():
    model = nn.Linear(2, 1)
    start, named = model.state_dict(), torch.compile(model).named_parameters()
    with pytest.raises(ValueError, match=r"'_orig_mod\.weight'.*torch\.compile: model\._orig_mod"):
        GapAware(torch.optim.SGD(named, lr=0.1), anchor=start)
    with pytest.raises(ValueError, match=r"build that with model\.named_parameters\(\)"):
        GapAware(torch.optim.SGD(model.parameters(), lr=0.1), anchor=start)


@pytest.mark.parametrize("mode", ["escape", "observe"])
def test_an_anchor_without_a_pull_is_refused(mode):
    with pytest.raises(ValueError, match=f'mode="{mode}" pulls to nothing'):
        GapAware(still(nn.Parameter(torch.ones(2))), mode=mode, anchor="init")


@pytest.mark.parametrize("anchor", ["init", None, "a state dict"])
def test_auto_retains_where_an_anchor_is_given(anchor, tmp_path):
    ends = {}
    for mode in ("auto", "escape" if anchor is None else "retain"):
        model, start = model_and_start()
        base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        to = start if anchor == "a state dict" else anchor
        optimizer = GapAware(base, mode=mode, anchor=to, log_to=tmp_path / f"{mode}.jsonl")
        train(model, optimizer, 30)
        ends[mode] = (model.state_dict(), list(optimizer.scales), optimizer.history[-1].get("pull"))
        assert read_log(tmp_path / f"{mode}.jsonl")[0]["settings"]["mode"] != "auto"
    (weights, scales, pull), (expected, *rest) = ends.values()
    assert [scales, pull] == rest
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert bool(pull) == (anchor is not None)


def test_a_controller_may_pull():
    model, start = model_and_start()
    ends = {}
    for pull in (0.0, 0.5):
        model.load_state_dict(start)
        optimizer = GapAware(
            torch.optim.SGD(model.parameters(), lr=0.05),
            anchor="init",
            interval=1,
            controller=lambda seen, pull=pull: Decision(1.0, pull=pull),
        )
        train(model, optimizer, 30)
        ends[pull] = sum(way(model, start).values())
    assert ends[0.5] < 0.5 * ends[0.0]


def test_a_controller_that_pulls_to_nothing_is_a_fault_and_no_history_tells_of_a_pull():
    model, _ = model_and_start()
    optimizer = GapAware(
        torch.optim.SGD(model.parameters(), lr=0.05),
        interval=1,
        controller=lambda seen: Decision(1.0, pull=0.5 if seen.step > 10 else 0.0),
    )
    train(model, optimizer, 8)
    assert {record["decision"] for record in optimizer.history} == {"hold"}
    with pytest.warns(
        UserWarning, match=r"pull=0\.5: there is nothing to pull to; pass anchor='init'"
    ):
        train(model, optimizer, 10)
    assert optimizer.history[-1]["decision"] == "fault"
    assert not any("pull" in record for record in optimizer.history)


def test_the_mode_retain_has_its_anchor_beside_a_controller_too():
    model, start = model_and_start()
    optimizer = GapAware(
        torch.optim.SGD(model.parameters(), lr=0.05),
        mode="retain",
        interval=1,
        controller=lambda seen: Decision(1.0, pull=1.0),
    )
    train(model, optimizer, 10)
    assert optimizer.history[-1]["pull"] == 1.0
    assert all(value == 0 for value in way(model, start).values())


@pytest.mark.parametrize("pull", [-0.1, 1.5, float("nan")])
def test_a_pull_is_a_share(pull):
    model, _ = model_and_start()
    optimizer = GapAware(
        torch.optim.SGD(model.parameters(), lr=0.05),
        anchor="init",
        interval=1,
        controller=lambda seen: Decision(1.0, pull=pull),
    )
    with pytest.warns(UserWarning, match="return a share within"):
        train(model, optimizer, 8)


def test_kept_in_bfloat16_and_elsewhere():
    theta = nn.Parameter(torch.full((4,), 1 / 3))
    anchor = Anchor("init", device="cpu", dtype=torch.bfloat16)
    group = {"params": [theta], "lr": 1.0}
    anchor.start([group])
    assert {w.dtype for w in anchor.state_dict()["weights"].values()} == {torch.bfloat16}
    with torch.no_grad():
        theta.zero_()
    anchor.pull([group], [Scales(pull=1.0)])
    assert theta.tolist() == torch.full((4,), 1 / 3, dtype=torch.bfloat16).tolist()
    assert theta.dtype == torch.float32


def test_weights_given_in_another_dtype_are_kept_in_the_parameters_own():
    theta = nn.Parameter(torch.zeros(2))
    groups = [{"params": [theta], "param_names": ["theta"], "lr": 1.0}]
    anchor = Anchor({"theta": torch.ones(2, dtype=torch.float64)})
    anchor.start(groups)
    saved = anchor.state_dict()
    assert saved["weights"]["0.0"].dtype == torch.float32
    saved["weights"]["0.0"] = saved["weights"]["0.0"].bfloat16()
    anchor.load_state_dict(saved, groups)
    assert anchor.state_dict()["weights"]["0.0"].dtype == torch.float32


def test_complex_parameters_keep_their_imaginary_part():
    theta = nn.Parameter(torch.full((2,), 1 + 2j))
    anchor = Anchor("init", dtype=torch.bfloat16)
    group = {"params": [theta], "lr": 1.0}
    anchor.start([group])
    with torch.no_grad():
        theta.zero_()
    anchor.pull([group], [Scales(pull=1.0)])
    assert theta.tolist() == [1 + 2j] * 2


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("anchor_dtype", torch.int8, TypeError),
        ("anchor_dtype", torch.bool, TypeError),
        ("anchor_dtype", torch.complex64, TypeError),
        ("anchor_dtype", "bfloat16", TypeError),
        ("anchor_device", "gpu", ValueError),
        ("anchor_device", "meta", ValueError),
        ("anchor_device", 0.5, ValueError),
        pytest.param(
            "anchor_device",
            "cuda",
            ValueError,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has it"),
        ),
    ],
)
def test_where_and_how_it_cannot_be_kept_is_refused_at_once(argument, value, error):
    with pytest.raises(error, match=f"{argument}={value!r}: how to keep .*; pass a "):
        GapAware(still(nn.Parameter(torch.ones(2))), mode="retain", **{argument: value})


@pytest.mark.parametrize("given", [{"anchor_device": "cpu"}, {"anchor_dtype": torch.bfloat16}])
@pytest.mark.parametrize("mode", ["auto", "escape", "observe"])
def test_how_to_keep_an_anchor_is_refused_where_there_is_none(mode, given):
    with pytest.raises(ValueError, match='keeps no starting weights; pass mode="retain"'):
        GapAware(still(nn.Parameter(torch.ones(2))), mode=mode, **given)


def test_frozen_later_and_added_parameters():
    model, _ = model_and_start()
    optimizer = GapAware(torch.optim.SGD(model[0].parameters(), lr=0.05), mode="retain")
    train(model, optimizer, 10)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    added = copy.deepcopy(model[2].state_dict())
    model[0].bias.requires_grad_(False)
    train(model, optimizer, 40)
    assert (model[2].weight - added["weight"]).norm() > 0
    assert len(optimizer.starting_weights()) == 4
    assert torch.equal(optimizer.starting_weights()["1.0"], added["weight"])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("saved", [None, "frozen", "as in 0.1.0", "trainable"])
def test_what_is_unfrozen_later_is_pulled(given, saved):
    model, start = model_and_start()
    model[0].requires_grad_(False)

    def wrapped():
        base = torch.optim.SGD(model.named_parameters(), lr=0.05)
        return GapAware(base, mode="retain", anchor=start if given else "init")

    optimizer = wrapped()
    train(model, optimizer, 2)
    assert optimizer.starting_weights().keys() == {"0.2", "0.3"}
    state = copy.deepcopy(optimizer.state_dict())
    if saved == "trainable":
        model[0].requires_grad_(True)
    if saved == "as in 0.1.0":
        del state["gapaware"]["anchor"]["waiting"]
    if saved:
        optimizer = wrapped()
        optimizer.load_state_dict(state)
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    assert len(optimizer.starting_weights()) == 4
    assert torch.equal(optimizer.starting_weights()["0.0"], start["0.weight"])
    before = way(model, start)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = way(model, start)
    assert all(after[name] < before[name] for name in after)


def test_what_is_frozen_may_be_all_that_an_anchor_has():
    """A new head is trained first, then the rest with it."""
    model, start = model_and_start()
    model[0].requires_grad_(False)
    trunk = {name: weights for name, weights in start.items() if name.startswith("0.")}
    base = torch.optim.SGD(model.named_parameters(), lr=0.05)
    optimizer = GapAware(base, mode="retain", anchor=trunk)
    train(model, optimizer, 2)
    model[0].requires_grad_(True)
    train(model, optimizer, 1)
    assert optimizer.starting_weights().keys() == {"0.0", "0.1"}
    wrong = {**trunk, "0.weight": torch.ones(3)}
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"anchor\['0\.weight'\] has the shape \(3,\)"):
        GapAware(base, mode="retain", anchor=wrong)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_by_its_other_name_is_noticed():
    """Files keep one of its names, and not always that which the optimizer has."""
    model = Tied()
    anchor = copy.deepcopy(dict(model.state_dict()))
    del anchor["embedding.weight"]

    def wrapped():
        base = torch.optim.SGD(model.named_parameters(), lr=0.05)
        return GapAware(base, mode="retain", anchor=anchor)

    with pytest.warns(
        UserWarning, match=r"lacks 'embedding\.weight'.*name 'head\.weight'"
    ) as caught:
        wrapped()
    assert len(caught) == 1
    anchor["embedding.weight"] = anchor["head.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped()
        # an ordinary new head, in the place of an old one of the same shape
        del anchor["embedding.weight"]
        nn.init.normal_(model.embedding.weight)
        wrapped()


def test_saved_after_a_parameter_was_frozen_it_loads():
    model, _ = model_and_start()
    optimizer = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    train(model, optimizer, 10)
    model[0].bias.requires_grad_(False)
    train(model, optimizer, 3)
    resumed = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    resumed.load_state_dict(optimizer.state_dict())
    starts, restored = optimizer.starting_weights(), resumed.starting_weights()
    assert starts.keys() == restored.keys()
    assert all(torch.equal(starts[name], restored[name]) for name in starts)


def test_a_state_of_the_base_alone_is_a_new_start():
    model, start = model_and_start()
    optimizer = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    train(model, optimizer, 10)
    assert torch.equal(optimizer.starting_weights()["0.0"], start["0.weight"])
    optimizer.load_state_dict(optimizer.base.state_dict())
    now = model[0].weight.detach().clone()
    train(model, optimizer, 10)
    assert torch.equal(optimizer.starting_weights()["0.0"], now)


def test_loaded_before_the_model_the_start_is_what_was_saved():
    """accelerate saves and loads the state before the first step; a resumed run loads it after."""
    model, _ = model_and_start()
    optimizer = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _, other_start = model_and_start(seed=1)
    model.load_state_dict(other_start)
    train(model, optimizer, 1)
    assert torch.equal(optimizer.starting_weights()["0.0"], other_start["0.weight"])

    saved = copy.deepcopy(optimizer.state_dict())
    resumed = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    resumed.load_state_dict(saved)
    train(model, resumed, 5)
    assert torch.equal(resumed.starting_weights()["0.0"], other_start["0.weight"])


def test_a_fault_in_the_pull_never_costs_the_run(monkeypatch):
    def broken(*args):
        raise MemoryError("out of memory")

    monkeypatch.setattr(Anchor, "pull", broken)
    model, _ = model_and_start()
    optimizer = GapAware(torch.optim.SGD(model.parameters(), lr=0.05), mode="retain")
    with pytest.warns(UserWarning, match="the pull towards the start: MemoryError"):
        train(model, optimizer, 20)
    alone, _ = model_and_start()
    train(alone, torch.optim.SGD(alone.parameters(), lr=0.05), 20)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_a_plain_checkpoint_leaves_a_new_head_alone():
    model, _ = model_and_start()

    def base(**head):
        body = {"params": list(model[0].named_parameters())}
        return torch.optim.AdamW([body, {"params": list(model[2].named_parameters()), **head}])

    plain = base()
    train(model, plain, 2)
    optimizer = GapAware(base(anchor=False), mode="retain")
    optimizer.load_state_dict(plain.state_dict())
    assert [group.get("anchor") for group in optimizer.param_groups] == [None, False]


def test_what_has_no_gradient_is_not_pulled():
    one, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = GapAware(torch.optim.SGD([one, other], lr=1e-2), mode="retain")
    for _ in range(3):
        one.grad, other.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
    before, there = other.detach().clone(), one.detach().clone()
    one.grad, other.grad = torch.zeros(4), None
    optimizer.step()
    assert torch.equal(other, before)
    assert (one > there).all()
