"""Several optimizers as one, and Muon with AdamW made from a model."""

import copy

import pytest
import torch
from gradients import assert_equal, base_state, parameters, run
from models import mlp, same_parameters, train
from torch import nn

from gapaware import Composite, GapAware, muon


def build(params):
    return Composite(
        torch.optim.Muon(params[:2], lr=1e-2),
        torch.optim.SGD([{"params": params[2:3], "lr": 3e-2}, {"params": params[3:]}], lr=1e-2),
    )


def test_groups_are_those_of_the_optimizers_in_their_order():
    params = parameters()
    composite = build(params)
    first, second = composite.optimizers
    assert composite.param_groups == [*first.param_groups, *second.param_groups]
    composite.param_groups[1]["lr"] = 0.5
    assert second.param_groups[0]["lr"] == 0.5
    run(composite, params, 2)
    assert set(composite.state) == set(params[:2])  # SGD without momentum has none
    assert composite.leaves() == [first, second]
    composite.zero_grad()
    assert all(p.grad is None for p in params)


def test_nested_composites():
    params = parameters()
    inner = Composite(torch.optim.SGD(params[:1], lr=0.1), torch.optim.Adam(params[1:2]))
    outer = Composite(inner, torch.optim.AdamW(params[2:]))
    run(outer, params, 5)
    saved = copy.deepcopy(outer.state_dict())
    assert list(saved["state"]) == [1, 2, 3]
    again = copy.deepcopy((outer, params))
    run(outer, params, range(5, 10))
    outer_again, params_again = again
    outer_again.load_state_dict(saved)
    run(outer_again, params_again, range(5, 10))
    assert_equal(params, params_again)


@pytest.mark.parametrize(
    ("optimizers", "error", "says"),
    [
        (lambda p: [], ValueError, "pass at least one optimizer"),
        (lambda p: [torch.optim.SGD(p), torch.optim.Adam(p[:1])], ValueError, "1 parameters"),
        (lambda p: [GapAware(torch.optim.SGD(p))], TypeError, r"GapAware\(Composite"),
        (lambda p: [torch.optim.SGD(p[1:]), torch.optim.LBFGS(p[:1])], ValueError, "LBFGS alone"),
        (lambda p: [nn.Linear(1, 1)], TypeError, "not a torch.optim.Optimizer"),
    ],
)
def test_refused(optimizers, error, says):
    with pytest.raises(error, match=says):
        Composite(*optimizers(parameters()))


def test_a_state_loads_whole_or_not_at_all():
    params = parameters()
    composite = build(params)
    run(composite, params, 5)
    good = copy.deepcopy(composite.state_dict())
    run(composite, params, range(5, 9))
    before = copy.deepcopy(composite.state_dict())
    for damage in (
        lambda s: s.pop("state"),
        lambda s: s.pop("param_groups"),
        lambda s: s["param_groups"].pop(),
        lambda s: s["param_groups"][-1].pop("params"),
        lambda s: s["param_groups"][-1].update(lr="x"),
        lambda s: s["param_groups"][-1]["params"].append(99),
        lambda s: s.update(state=[1, 2]),
        lambda s: s.update(param_groups=None),
    ):
        damaged = copy.deepcopy(good)
        damage(damaged)
        with pytest.raises(ValueError, match=r"."):
            composite.load_state_dict(damaged)
        assert_equal(before, composite.state_dict())
    composite.load_state_dict(good)
    assert_equal(good, composite.state_dict())


def test_new_groups_go_to_the_last_optimizer():
    params = parameters()
    composite = build(params)
    more = parameters(((2, 2, 2),))
    composite.add_param_group({"params": more, "lr": 0.7})
    assert composite.optimizers[1].param_groups[-1]["lr"] == 0.7
    run(composite, [*params, *more], 3)
    assert list(composite.state_dict()["param_groups"][-1]["params"]) == [4]


def test_a_new_group_takes_nothing_from_another_optimizer():
    params = parameters()
    composite = build(params)
    groups = len(composite.param_groups)
    with pytest.raises(ValueError, match="1 of its parameters belong to another optimizer"):
        composite.add_param_group({"params": [*parameters(((2, 2, 2),)), params[0]]})
    assert len(composite.param_groups) == groups


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(13, 8)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.lm_head = nn.Linear(8, 13, bias=False)


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in group["params"]]


def test_muon_shares_the_parameters_out():
    model = Language()
    optimizer = muon(model, weight_decay=0.2, adamw_weight_decay=0.05, mode="observe")
    hidden, matrices, vectors = optimizer.param_groups
    assert names_of(model, hidden) == ["block.0.weight", "block.2.weight"]
    assert names_of(model, matrices) == ["wte.weight", "conv.weight", "lm_head.weight"]
    assert (hidden["weight_decay"], matrices["weight_decay"], vectors["weight_decay"]) == (
        0.2, 0.05, 0.0,
    )  # fmt: skip
    assert len(vectors["params"]) == 5
    assert hidden["param_names"] == names_of(model, hidden)
    assert muon(model).param_groups[1]["weight_decay"] == 0.1


def test_muon_takes_patterns_not_one_string():
    with pytest.raises(TypeError, match=r"adamw_parameters='lm_head': pass a sequence of names"):
        muon(Language(), adamw_parameters="lm_head")


def test_muon_ties_and_choices():
    model = Language()
    model.lm_head.weight = model.wte.weight
    groups = muon(model).param_groups
    assert names_of(model, groups[1]) == ["wte.weight", "conv.weight"]
    everything = muon(Language(), adamw_parameters=())
    assert len(everything.param_groups[0]["params"]) == 3  # the head too, embeddings never
    only = nn.Sequential(nn.Linear(3, 3, bias=False))
    assert len(muon(only).param_groups) == 1
    with pytest.raises(ValueError, match="nothing for Muon to do"):
        muon(nn.LayerNorm(3))
    with pytest.raises(TypeError, match=r"model=generator: .*pass the model itself"):
        muon(only.parameters())


def test_muon_trains_as_its_parts_and_its_checkpoint_loads_into_them():
    together, apart = mlp(), mlp()
    optimizer = muon(together, lr=1e-2, adamw_lr=3e-3, interval=2, mode="observe")
    parts = [
        torch.optim.Muon([p for p in apart.parameters() if p.ndim == 2], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(
            [p for p in apart.parameters() if p.ndim == 1],
            lr=3e-3,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]

    class Both:
        def zero_grad(self):
            for part in parts:
                part.zero_grad()

        def step(self):
            for part in parts:
                part.step()

    assert train(together, optimizer, 20) == train(apart, Both(), 20)
    assert same_parameters(together, apart)
    saved = base_state(optimizer)
    parts[0].load_state_dict(
        {
            "state": {k: v for k, v in saved["state"].items() if k < 3},
            "param_groups": saved["param_groups"][:1],
        }
    )
    assert train(together, optimizer, range(20, 30)) == train(apart, Both(), range(20, 30))
