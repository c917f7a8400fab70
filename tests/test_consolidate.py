"""Consolidation: it keeps what it promises, moves nothing else, and puts things back."""

from __future__ import annotations

import math
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrize

from gapaware import Consolidation, consolidate, starting_weights
from gapaware.consolidate import RESOLUTION
from gapaware.distributed import Unsupported
from gapaware.line import Line, between


def one_weight(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def trained(seed: int = 0) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """A model some way from its start, and the start."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    anchor = starting_weights(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = data()
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, anchor


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.stack([x[:, 0] + 1, x[:, 1] * x[:, 2]], 1)


def error(model: nn.Module) -> float:
    x, y = data()
    return nn.functional.mse_loss(model(x), y).item()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# -- how far -------------------------------------------------------------------------------------


@given(keep=st.floats(0.05, 0.999), end=st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3))
def test_smallest_share_of_a_parabola(keep, end):
    model = one_weight(end)

    def evaluate(model):
        return (model.weight.double() - end).square().sum()

    result = consolidate(model, {"weight": torch.zeros(1, 1)}, evaluate, keep, progress=False)
    exact = 1 - math.sqrt(1 - keep)
    assert exact - 1e-5 <= result.share <= exact + RESOLUTION
    assert result.kept >= keep - 1e-5
    assert model.weight.item() == pytest.approx(result.share * end, rel=1e-6)
    assert len(result.evaluations) <= 10


@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=12, max_size=12),
    keep=st.floats(0.01, 1.0),
    evaluations=st.integers(3, 12),
)
@example(losses=[-math.inf] * 12, keep=0.5, evaluations=12)
def test_never_ends_where_the_gain_is_not_kept(losses, keep, evaluations):
    """The loss is whatever, even NaN; only the end is a gain."""
    model, calls = one_weight(1.0), []

    def evaluate(model):
        calls.append(model.weight.item())
        return 0.0 if len(calls) == 1 else 1.0 if len(calls) == 2 else losses[len(calls) - 3]

    result = consolidate(
        model,
        {"weight": torch.zeros(1, 1)},
        evaluate,
        keep,
        evaluations=evaluations,
        progress=False,
    )
    assert (result.share, result.loss) in result.evaluations
    assert 1 - keep >= result.loss > -math.inf
    assert model.weight.item() == pytest.approx(result.share)
    assert [share for share, _ in result.evaluations] == pytest.approx(calls)
    assert len(calls) <= evaluations


def test_everything_may_be_kept():
    """Where the end is past the valley, going back costs nothing."""
    model = one_weight(1.5)
    result = consolidate(
        model, one_weight(0.0), lambda model: (model.weight.item() - 1) ** 2, keep=1.0
    )
    assert 0.5 <= model.weight.item() <= 0.5 + 1.5 * RESOLUTION
    assert result.kept >= 1


def test_of_a_trained_network_the_promise_holds_afterwards():
    model, anchor = trained()
    end_loss = error(model.eval())
    result = consolidate(model, anchor, error, keep=0.8)
    assert result.end_loss == end_loss
    assert result.loss == error(model) <= result.start_loss - 0.8 * (result.start_loss - end_loss)
    assert 0 < result.share < 1


def test_bound_on_the_start():
    """A start that is confidently wrong makes any end look good."""

    def evaluate(model):
        return 100 * (1 - model.weight.item()) ** 2

    loose = consolidate(one_weight(1.0), one_weight(0.0), evaluate, keep=0.9)
    tight = consolidate(one_weight(1.0), one_weight(0.0), evaluate, keep=0.9, start_loss=1.0)
    assert loose.start_loss == 100
    assert tight.start_loss == 1
    assert tight.loss <= 0.1 < loose.loss


def test_start_without_a_finite_loss_needs_a_bound():
    def evaluate(model):
        return (1 - model.weight.item()) ** 2 if model.weight.item() > 0 else math.nan

    with pytest.warns(UserWarning, match="nan at the start"):
        assert consolidate(one_weight(1.0), one_weight(0.0), evaluate).share == 1
    assert consolidate(one_weight(1.0), one_weight(0.0), evaluate, start_loss=1.0).share < 1


@pytest.mark.parametrize("end", [5.0, 2.0, math.nan, math.inf])
def test_no_gain_leaves_the_model_alone(end):
    model, anchor = trained()
    before = values(model)
    losses = iter([end, 2.0])
    with pytest.warns(UserWarning, match="no gain to keep"):
        result = consolidate(model, anchor, lambda _: next(losses))
    assert same(values(model), before)
    assert result.share == 1
    assert "left as trained" in str(result)


def test_prints_as_one_line():
    result = Consolidation(0.5, 0.3, 2.0, 0.2, 17 / 18, ((1.0, 0.2), (0.0, 2.0), (0.5, 0.3)))
    assert str(result) == (
        "at 0.5 of the way from the start: 94.4 % of the gain kept, loss 0.3 (start 2, end 0.2)"
    )


# -- what moves ----------------------------------------------------------------------------------


def test_everything_floating_is_on_the_line_and_integers_stay():
    model, anchor = trained()
    end = values(model)
    share = consolidate(model, anchor, error, keep=0.8).share
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == end[name] == 60
        else:
            torch.testing.assert_close(value, anchor[name] + share * (end[name] - anchor[name]))
            assert not torch.equal(value, end[name])


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.trunk.weight, 1.0)
        nn.init.constant_(self.head.weight, -1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def distance_from_two(model: nn.Module) -> float:
    return (model(torch.ones(1)).item() - 2) ** 2


def test_limit_counts_the_start_with_its_own_head():
    model = Headed()
    anchor = starting_weights(model)
    nn.init.constant_(model.trunk.weight, 2.0)
    nn.init.constant_(model.head.weight, 1.0)
    calls = []

    def evaluate(model):
        calls.append(None)
        return distance_from_two(model)

    result = consolidate(model, anchor, evaluate, keep=0.99, fresh=["head."], evaluations=5)
    assert len(calls) == 5
    assert result.share == 0.75


@pytest.mark.parametrize("known", [True, False])
def test_a_new_head_stays(known):
    model = Headed()
    anchor = starting_weights(model)
    if not known:
        del anchor["head.weight"]
    nn.init.constant_(model.trunk.weight, 2.0)
    nn.init.constant_(model.head.weight, 1.0)
    result = consolidate(model, anchor, distance_from_two, keep=0.5, fresh=["head."])
    assert model.head.weight.item() == 1
    assert model.trunk.weight.item() == pytest.approx(1 + result.share)
    # from the start's own head, -1, where it is known: there the old trunk keeps enough by itself
    assert result.start_loss == (9 if known else 1)
    assert result.evaluations[:2] == ((1.0, 0.0), (0.0, 1.0))
    assert (result.share == 0) == known


def test_tied_weights_move_once():
    model = nn.ModuleDict({"in": nn.Linear(2, 2, bias=False), "out": nn.Linear(2, 2, bias=False)})
    model["out"].weight = model["in"].weight
    nn.init.zeros_(model["in"].weight)
    anchor = starting_weights(model)
    assert list(anchor) == ["in.weight"]
    nn.init.ones_(model["in"].weight)
    result = consolidate(model, anchor, lambda m: 1 - m["out"].weight.mean().item(), keep=0.5)
    assert model["out"].weight is model["in"].weight
    assert torch.equal(model["in"].weight, torch.full((2, 2), result.share))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(3, 1)), nn.Parameter(torch.ones(1, 3))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def test_adapters_move_and_what_is_frozen_needs_no_anchor():
    model = nn.Linear(3, 3, bias=False).requires_grad_(False)
    parametrize.register_parametrization(model, "weight", LowRank())
    anchor = starting_weights(model)
    assert all("original" not in name for name in anchor)
    frozen = model.parametrizations.weight.original.clone()
    nn.init.ones_(model.parametrizations.weight[0].up)
    target = model.weight.detach().clone()
    result = consolidate(model, anchor, lambda m: (m.weight - target).square().sum(), keep=0.9)
    assert 0.6 < result.share < 0.8
    assert torch.equal(model.parametrizations.weight.original, frozen)
    torch.testing.assert_close(model.weight.detach(), frozen + result.share)


def test_rounded_anchor_rounds_nothing_that_has_not_moved():
    model, exact = trained()
    with torch.no_grad():
        model[3].weight[0] = exact["3.weight"][0]
    untouched = model[3].weight[0].clone()
    anchor = {name: value.bfloat16() for name, value in exact.items()}
    assert consolidate(model, anchor, error, keep=0.7).share < 1
    assert torch.equal(model[3].weight[0], untouched)
    assert model[3].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_between_rounds_once(dtype):
    start, end = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    end[0] = start[0] = math.inf
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = (start.to(wide) + 0.3 * (end.to(wide) - start.to(wide))).to(dtype)
    torch.testing.assert_close(between(start, end, 0.3)[1:], exact[1:], rtol=4e-3, atol=1e-6)
    assert between(start, end, 0.3)[0] == start[0]
    assert torch.equal(between(start, end, 1.0), end)
    assert torch.equal(between(start, end, 0.0), start)


def test_between_of_a_dtype_that_promotes_to_nothing():
    start, end = (torch.tensor(x).to(torch.float8_e4m3fn) for x in ([0.0, 1.0], [2.0, 1.0]))
    assert between(start, end, 0.5).float().tolist() == [1.0, 1.0]


def test_only_what_moved_is_copied_once():
    model, anchor = trained()
    anchor["0.weight"] = model[0].weight.detach().clone()
    line = Line(model, anchor, storage_device="cpu")
    copies = {track.end.data_ptr() for track in line._tracks}
    moved = [n for n, v in anchor.items() if not torch.equal(v, model.state_dict()[n])]
    assert len(copies) == len(line._tracks) == len(moved) == len(anchor) - 1


# -- around evaluate -----------------------------------------------------------------------------


def test_evaluates_in_eval_mode_without_gradients_and_restores_every_module():
    model, anchor = trained()
    model.train()
    model[1].eval()
    seen = []

    def evaluate(model):
        seen.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))
        loss = error(model)
        model.train()
        return loss

    consolidate(model, anchor, evaluate)
    assert set(seen) == {(False, False)}
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_an_exception_puts_the_trained_weights_back(call):
    model, anchor = trained()
    before, calls = values(model), []

    def evaluate(model):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return error(model)

    with pytest.raises(KeyboardInterrupt):
        consolidate(model, anchor, evaluate, fresh=["3."])
    assert same(values(model), before)
    assert model.training


def test_evaluate_has_to_return_a_number():
    model, anchor = trained()
    before = values(model)
    with pytest.raises(TypeError, match=r"model=list: .*pass the model itself"):
        starting_weights([model])
    with pytest.raises(TypeError, match="evaluate returned dict"):
        consolidate(model, anchor, lambda _: {"loss": 1.0})
    with pytest.raises(TypeError, match="evaluate returned Tensor: return one number"):
        consolidate(model, anchor, lambda _: torch.tensor(1j))
    assert same(values(model), before)


def test_starting_weights_have_to_be_there():
    with pytest.raises(Unsupported, match=r"elements of weight are not .*meta device"):
        starting_weights(nn.Linear(2, 2, device="meta"))


# -- refusals ------------------------------------------------------------------------------------

WRONG = [
    ({"keep": 0.0}, ValueError, r"keep=0\.0"),
    ({"keep": 1.1}, ValueError, r"keep=1\.1"),
    ({"evaluations": 2}, ValueError, r"evaluations=2.*>= 3"),
    ({"start_loss": "a"}, TypeError, r"start_loss='a': .*pass a number"),
    ({"storage_device": "gpu"}, ValueError, r"storage_device='gpu': .*such as 'cpu'"),
    ({"storage_device": "meta"}, ValueError, r"storage_device='meta'"),
    ({"evaluate": 0.5}, TypeError, r"evaluate=0\.5: pass a function of the model"),
    ({"foo": 3}, TypeError, "unexpected keyword argument 'foo'"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        *WRONG,
        ({"fresh": ["classifier."]}, ValueError, r"fresh=\['classifier\.'\]"),
        ({"fresh": "3."}, TypeError, r"fresh='3\.': .*such as fresh=\['3\.'\]"),
        ({"fresh": None}, TypeError, r"fresh=None: pass a sequence of names"),
        ({"fresh": [1]}, TypeError, r"fresh=\[1\]: pass a sequence of names"),
    ],
)
def test_wrong_arguments(arguments, kind, message):
    model, anchor = trained()
    with pytest.raises(kind, match=message):
        consolidate(model, anchor, **{"evaluate": error, **arguments})


def test_anchor_that_does_not_fit():
    model, anchor = trained()
    with pytest.raises(ValueError, match=r"lacks '0\.weight'.*has 'module\.0\.weight'"):
        consolidate(model, {f"module.{n}": v for n, v in anchor.items()}, error)
    with pytest.raises(ValueError, match=r"anchor\['3\.bias'\] has the shape \(3,\).*\(2,\)"):
        consolidate(model, {**anchor, "3.bias": torch.zeros(3)}, error)
    with pytest.raises(TypeError, match="anchor=list"):
        consolidate(model, [anchor], error)
    with pytest.raises(TypeError, match=r"anchor\['3\.bias'\] is a ndarray: pass a tensor"):
        consolidate(model, {**anchor, "3.bias": anchor["3.bias"].numpy()}, error)
    with pytest.raises(TypeError, match=r"anchor\['3\.bias'\] is a tensor of torch\.int32"):
        consolidate(model, {**anchor, "3.bias": anchor["3.bias"].int()}, error)
    with pytest.raises(ValueError, match=r"anchor\['3\.bias'\] is on the meta device"):
        consolidate(model, {**anchor, "3.bias": anchor["3.bias"].to("meta")}, error)
    unfrozen = {name: start for name, start in anchor.items() if not name.startswith("0.")}
    with pytest.raises(ValueError, match=r"lacks '0\.weight'.*frozen at starting_weights"):
        consolidate(model, unfrozen, error)
    frozen = nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"it has nothing, .*parameters are frozen"):
        consolidate(frozen, starting_weights(frozen), error)


def test_how_starting_weights_cannot_be_kept():
    with pytest.raises(TypeError, match=r"dtype=torch\.int8: .*pass a floating-point torch\.dtype"):
        starting_weights(nn.Linear(2, 1), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"device='gpu': .*such as 'cpu'"):
        starting_weights(nn.Linear(2, 1), "gpu")
    with_angle = nn.ParameterList([torch.tensor([1j])])
    (kept,) = starting_weights(with_angle, dtype=torch.bfloat16).values()
    assert kept.tolist() == [1j]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_evaluate_may_not_cast_the_model(kind):
    """`model.to` gives parameters other memory, so that the line would be evaluated at one point."""
    model, anchor = trained()
    model[0].register_buffer("mask", torch.full((2,), 0.1), persistent=False)
    before, mask = values(model), model[0].mask
    places = {name: p.data_ptr() for name, p in model.named_parameters()}

    def evaluate(model):
        x, y = data()
        return nn.functional.mse_loss(model.to(kind)(x.to(kind)).float(), y)

    with pytest.raises(ValueError, match=r"evaluate moved or cast the model; do that before"):
        consolidate(model, anchor, evaluate)
    assert same(values(model), before)
    assert model[0].mask is mask
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert 0 < consolidate(model, anchor, error).share < 1


def test_anchor_that_was_not_copied():
    model = one_weight(0.0)
    anchor = model.state_dict()
    nn.init.ones_(model.weight)
    with pytest.raises(ValueError, match=r"own memory.*starting_weights"):
        consolidate(model, anchor, error)


def test_weights_that_are_not_there():
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(Unsupported, match="meta device"):
        consolidate(model, nn.Linear(2, 2), error)


# -- ranks ---------------------------------------------------------------------------------------


def two_layers(shift: float) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2))
    with torch.no_grad():
        model[2].bias += shift * data()[1].mean(0)
    return model


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}

    model = two_layers(0.0)
    fully_shard(model[0])
    fully_shard(model)  # after a forward pass the root keeps what it gathered: the last layer
    assert isinstance(model, FSDPModule)
    anchor = starting_weights(model)
    start = values(model)
    for tensor, end in zip(model.parameters(), two_layers(1.0).parameters(), strict=True):
        full = distribute_tensor(end.detach(), tensor.device_mesh, tensor.placements)
        tensor.detach().copy_(full)
    results["sharded"] = consolidate(model, anchor, error, keep=0.8)
    results["loss"] = error(model)
    results["bias"] = model.state_dict()["2.bias"].full_tensor()
    try:
        consolidate(model, {n: t.full_tensor() for n, t in start.items()}, error)
    except Unsupported as refused:
        results["refused"] = str(refused)

    # replicas with losses of their own
    replica = two_layers(1.0)
    results["replicas"] = consolidate(
        replica,
        two_layers(0.0),
        lambda model: error(model) * (1 + rank) / 1.5,
        keep=0.8,
        process_group=dist.group.WORLD,
    )
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.xdist_group("distributed")
def test_shards_and_replicas_go_where_one_process_goes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (port, tmp_path), 2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    model = two_layers(1.0)
    alone = consolidate(model, two_layers(0.0), error, keep=0.8)
    assert 0 < alone.share < 1
    for of_rank in ranks:
        assert of_rank["sharded"].share == of_rank["replicas"].share == alone.share
        assert of_rank["sharded"].loss == pytest.approx(alone.loss, rel=1e-6)
        assert of_rank["replicas"].loss == pytest.approx(alone.loss, rel=1e-6)
        assert of_rank["loss"] == pytest.approx(of_rank["sharded"].loss, rel=1e-6)
        torch.testing.assert_close(of_rank["bias"], model[2].bias.detach())
        assert "starting_weights" in of_rank["refused"]


# -- in the Trainer ------------------------------------------------------------------------------


@pytest.fixture
def hugging():
    pytest.importorskip("transformers", reason="needs pip install 'gapaware[transformers]'")
    import transformers

    from gapaware import consolidate_callback

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield transformers, consolidate_callback
    torch.set_num_threads(before)


ROWS = [{"input_ids": [(i % 3) * 7 + j for j in range(8)], "labels": i % 3} for i in range(24)]


def trainer_for(transformers, folder, **settings):
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 20,
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        }
    )
    return transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )


def test_callback_consolidates_the_best_model_and_logs(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(
        transformers,
        tmp_path,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
    )
    start = values(trainer.model)
    callback = ours.ConsolidateCallback(trainer, keep=0.8, fresh=["classifier."])
    trainer.add_callback(callback)
    trainer.train()

    result = callback.result
    assert 0 < result.share < 1
    assert result.end_loss == pytest.approx(trainer.state.best_metric)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(result.loss)
    logged = [e for e in trainer.state.log_history if "consolidate/share" in e]
    assert len(logged) == 1
    assert logged[0]["consolidate/share"] == result.share
    assert logged[0]["consolidate/kept"] == result.kept >= 0.8
    # two during training, one by this test: the search is silent
    assert sum("eval_loss" in e for e in trainer.state.log_history) == 3

    # the checkpoint is as trained: on the line's other end
    best = transformers.BertForSequenceClassification.from_pretrained(
        trainer.state.best_model_checkpoint
    )
    for name, end in best.state_dict().items():
        now = trainer.model.state_dict()[name]
        if name.startswith("classifier."):
            assert torch.equal(now, end)
        elif end.is_floating_point():
            expected = start[name] + result.share * (end - start[name])
            torch.testing.assert_close(now, expected)


def test_callback_in_a_resumed_run_knows_the_start(hugging, tmp_path):
    transformers, ours = hugging

    def run(resume):
        trainer = trainer_for(transformers, tmp_path, save_strategy="steps", save_steps=10)
        callback = ours.ConsolidateCallback(trainer, keep=0.8)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return callback.result, values(trainer.model)

    (unbroken, weights), (resumed, again) = run(None), run(str(tmp_path / "checkpoint-10"))
    assert 0 < unbroken.share < 1
    assert unbroken == resumed
    assert same(weights, again)


def test_callback_goes_on_with_the_same_trainer(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path, save_strategy="steps", save_steps=10)
    callback = ours.ConsolidateCallback(trainer, keep=0.8)
    trainer.add_callback(callback)
    trainer.train()
    first = callback.result
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.result == first


@pytest.mark.parametrize("given", [False, True])
def test_callback_needs_the_start_of_what_is_unfrozen(hugging, tmp_path, given):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path, bf16_full_eval=True)
    trainer.model.bert.encoder.requires_grad_(False)
    # the Trainer would leave out what is frozen
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=5e-3)
    start = values(trainer.model.bert.encoder)

    class Unfreeze(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.bert.encoder.requires_grad_(state.global_step >= 5)

    trainer.add_callback(Unfreeze())
    anchor = {n: t.clone() for n, t in trainer.model.state_dict().items()} if given else None
    callback = ours.ConsolidateCallback(trainer, keep=0.8, anchor=anchor)
    trainer.add_callback(callback)
    if not given:
        with pytest.warns(
            UserWarning, match=r"stays as trained; ValueError: anchor: it lacks .*still frozen"
        ):
            trainer.train()
        return
    trainer.train()
    assert 0 < callback.result.share < 1
    # nor has the evaluation cast the model
    assert trainer.model.dtype == torch.float32
    assert not same(values(trainer.model.bert.encoder), start)


def test_callback_without_labels_leaves_the_model_as_trained(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)
    trainer.eval_dataset = [{"input_ids": row["input_ids"]} for row in ROWS]
    callback = ours.ConsolidateCallback(trainer)
    trainer.add_callback(callback)
    with pytest.warns(
        UserWarning, match="stays as trained; ValueError: eval_dataset: .*needs labels"
    ):
        trainer.train()
    assert callback.result is None
    alone = trainer_for(transformers, tmp_path)
    alone.train()
    assert same(values(trainer.model), values(alone.model))


def test_callback_waits_for_optimizers_that_train_elsewhere(hugging, tmp_path):
    """Schedule-free ones exchange the weights in eval(), which the Trainer's evaluation calls."""
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)

    class Elsewhere(torch.optim.AdamW):
        away = 0.0

        def train(self) -> None:
            self.shift(0.1 - self.away)

        def eval(self) -> None:
            self.shift(-self.away)

        @torch.no_grad()
        def shift(self, by: float) -> None:
            self.away += by
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += by

    trainer.optimizer = Elsewhere(trainer.model.parameters(), lr=5e-3)
    start = values(trainer.model)
    callback = ours.ConsolidateCallback(trainer, keep=0.8)
    trainer.add_callback(callback)
    end = {}

    class Keep(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, model, optimizer, **kwargs):
            away = optimizer.optimizer.away
            assert away > 0
            end.update({n: v - away for n, v in values(model).items() if v.is_floating_point()})

    trainer.callback_handler.callbacks.insert(0, Keep())
    trainer.train()
    name = "bert.pooler.dense.weight"
    expected = start[name] + callback.result.share * (end[name] - start[name])
    torch.testing.assert_close(trainer.model.state_dict()[name], expected)


def test_callback_refuses_before_training(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)
    trainer.add_callback(ours.ConsolidateCallback(trainer, fresh=["head."]))
    with pytest.raises(ValueError, match=r"fresh=\['head\.'\]"):
        trainer.train()
    assert trainer.state.global_step == 0

    with pytest.raises(
        TypeError, match="trainer=BertForSequenceClassification: not a transformers"
    ):
        ours.ConsolidateCallback(trainer.model)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no eval_dataset"):
        ours.ConsolidateCallback(trainer)
    ours.ConsolidateCallback(trainer, evaluate=error)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        *WRONG,
        ({"anchor_device": "gpu"}, ValueError, "anchor_device='gpu'"),
        ({"model": None}, TypeError, "multiple values for argument 'model'"),
    ],
)
def test_callback_refuses_wrong_options_at_once(hugging, tmp_path, arguments, kind, message):
    transformers, ours = hugging
    with pytest.raises(kind, match=message):
        ours.ConsolidateCallback(trainer_for(transformers, tmp_path), **arguments)


def test_validation_loss_is_the_eval_loss_of_each_set(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)
    single = trainer.evaluate()["eval_loss"]
    assert ours.validation_loss(trainer) == pytest.approx(single)
    trainer.eval_dataset = {"all": ROWS, "first": ROWS[:1]}
    first = trainer.evaluate(ROWS[:1])["eval_loss"]
    assert ours.validation_loss(trainer) == pytest.approx((single + first) / 2)
    trainer.eval_dataset = [{"input_ids": row["input_ids"]} for row in ROWS]
    with pytest.raises(ValueError, match="computes no loss"):
        ours.validation_loss(trainer)


def test_no_bar_without_a_terminal(capfd):
    model, anchor = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        consolidate(model, anchor, error)
    assert capfd.readouterr() == ("", "")


def test_an_anchor_that_is_in_part_the_models_own_memory_is_refused():
    model, _ = trained()
    anchor = {name: t.clone() for name, t in model.state_dict().items()}
    anchor["3.weight"] = model.state_dict()["3.weight"]
    with pytest.raises(ValueError, match=r"anchor\['3.weight'\] is the model's own memory"):
        consolidate(model, anchor, error)
    # what training cannot change may be
    model[3].weight.requires_grad_(False)
    consolidate(model, anchor, lambda m: float(m[0].weight.square().sum()), progress=False)


def test_what_is_made_for_each_state_dict_is_no_weight():
    class Counting(nn.Linear):
        calls = 0.0

        def get_extra_state(self):
            return torch.tensor(self.calls)

        def set_extra_state(self, state):
            self.calls = float(state)

    model = Counting(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    anchor = starting_weights(model)
    assert list(anchor) == ["weight"]
    nn.init.constant_(model.weight, 8.0)
    model.calls = 3.0

    def evaluate(model):
        return (model.weight - 8.0).square().mean()

    assert consolidate(model, anchor, evaluate, keep=0.9).share == pytest.approx(0.68, abs=0.02)


def test_a_loss_may_be_a_numpy_number():
    model = one_weight(8.0)
    anchor = {"weight": torch.zeros(1, 1)}
    for kind in (np.array, np.float32, lambda x: np.array([x])):
        result = consolidate(
            model, anchor, lambda m, kind=kind: kind(abs(m.weight.item() - 8.0)), keep=0.5
        )
        assert result.share == pytest.approx(0.5, abs=0.02)
        nn.init.constant_(model.weight, 8.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_loss": math.nan}, "start_loss=nan: .*pass a finite number"),
        ({"fresh": [""]}, "fresh=.*nothing would go back"),
        ({"fresh": ["3."], "evaluations": 3}, "evaluations=3: .*pass evaluations >= 4"),
    ],
)
def test_what_could_not_work_is_refused(arguments, message):
    model, anchor = trained()
    with pytest.raises(ValueError, match=message):
        consolidate(model, anchor, error, **arguments)


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, ZeroDivisionError])
def test_callback_whose_evaluation_fails_does_not_cost_the_run(hugging, tmp_path, kind):
    transformers, ours = hugging

    def evaluate(model):
        raise kind("not today")

    trainer = trainer_for(transformers, tmp_path)
    trainer.add_callback(ours.ConsolidateCallback(trainer, evaluate=evaluate))
    with pytest.warns(UserWarning, match=f"stays as trained; {kind.__name__}: .*not today"):
        trainer.train()
    alone = trainer_for(transformers, tmp_path)
    alone.train()
    assert same(values(trainer.model), values(alone.model))


@pytest.mark.parametrize("dataset", [[], {}, {"one": []}])
def test_callback_refuses_an_empty_dataset(hugging, tmp_path, dataset):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)
    trainer.eval_dataset = dataset
    with pytest.raises(ValueError, match="no eval_dataset, or an empty one"):
        ours.ConsolidateCallback(trainer)


def test_callback_refuses_the_models_own_memory_before_training(hugging, tmp_path):
    transformers, ours = hugging
    trainer = trainer_for(transformers, tmp_path)
    trainer.add_callback(ours.ConsolidateCallback(trainer, anchor=trainer.model.state_dict()))
    with pytest.raises(ValueError, match="own memory"):
        trainer.train()
    assert trainer.state.global_step == 0
