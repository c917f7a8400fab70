"""Sharded models in real processes: the same spectrum as in one, the same decisions on every rank."""

import multiprocessing
import os
import socket
import subprocess
import sys
from copy import deepcopy
from itertools import product
from math import prod
from types import ModuleType

import distributed_worker as worker
import pytest
import torch
import torch.multiprocessing
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from gapaware import GapAware
from gapaware.blocks import WIDTH
from gapaware.checkpoint import OwnState
from gapaware.distributed import Unsupported, _pieces_of_part, held_indices, is_first

pytestmark = pytest.mark.xdist_group("distributed")  # the worlds are started once

BLOCK_BYTES = 6 * WIDTH * 8  # of each tensor, float64
SAID_BYTES = 5 * 8  # the loss, and four times yes or no
GROUP_BYTES = 2 * worker.DIM * 8 + BLOCK_BYTES + SAID_BYTES  # two parameter groups
SNAPSHOTS = 1 + worker.STEPS // worker.INTERVAL


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    # forked from a process that has imported everything, instead of importing it six times
    multiprocessing.set_forkserver_preload(
        [
            "gapaware",
            "torch.distributed.checkpoint.state_dict",
            "torch.distributed.fsdp",
            "torch.distributed.optim",
            "torch.distributed.tensor.debug",
            "torch.distributed.tensor.parallel",
        ]
    )
    return tmp_path_factory.mktemp("distributed")


def world(ranks, root):
    folder = root / str(ranks)
    folder.mkdir()
    torch.multiprocessing.start_processes(
        worker.work, args=(ranks, folder), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(root):
    return world(2, root)


@pytest.fixture(scope="module")
def four(two, root):
    return world(4, root)  # after `two`, whose checkpoint it loads


def of(ranks, scenario):
    results = [rank[scenario] for rank in ranks]
    for result in results:
        assert not isinstance(result, str), result
    return results


def single(**arguments):
    return worker.run(lambda model: model, **arguments)


def assert_same_decisions(results):
    """Bit for bit."""
    first = results[0]
    for other in results[1:]:
        for name in ("signature", "steering", "interval", "scales", "sigma", "steps", "risks"):
            assert other[name] == first[name], name
        for name in ("last", "gram"):
            assert torch.equal(other[name], first[name]), name


def errors(result, reference):
    """Relative errors of the Gram matrices, the singular values and the factors."""
    assert result["signature"] == reference["signature"]
    assert result["steps"] == reference["steps"]
    gram, true_gram = result["gram"], reference["gram"]
    sigma = [(s, t) for s, t in zip(result["sigma"], reference["sigma"], strict=True) if t]
    assert len(sigma) >= 3
    risks = list(zip(result["risks"], reference["risks"], strict=True))
    assert len(risks) >= 3
    return {
        "risk": max(abs(a / b - 1) for a, b in risks),
        "gram": ((gram - true_gram).abs().amax() / true_gram.abs().amax()).item(),
        "sigma": max(abs(a - b) / t[0] for s, t in sigma for a, b in zip(s, t, strict=True)),
        "factor": max(
            abs(a / b - 1) for a, b in zip(result["scales"], reference["scales"], strict=True)
        ),
    }


def assert_close(result, reference, tolerance=1e-5):
    found = errors(result, reference)
    print(found)
    assert max(found.values()) < tolerance, found


# -- two processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["fully_sharded", "partly_sharded", "replicas"])
def test_two_ranks_see_and_decide_what_one_process_does(two, scenario):
    results = of(two, scenario)
    assert_same_decisions(results)
    assert_close(results[0], single())


def test_exact_updates_of_shards(two):
    results = of(two, "exact")
    assert_same_decisions(results)
    assert_close(results[0], single(sketch_dim=None))


@pytest.mark.parametrize("scenario", ["fully_sharded", "partly_sharded"])
def test_one_small_all_reduce_for_each_snapshot_and_nothing_else(two, scenario):
    for result in of(two, scenario):
        assert result["sent"] == [GROUP_BYTES] * SNAPSHOTS


def test_replicas_do_not_communicate(two):
    assert [result["sent"] for result in of(two, "replicas")] == [[], []]


def test_blocks_and_an_interval_that_the_controller_chooses(two):
    results = of(two, "by_block")
    assert_same_decisions(results)
    assert len({name for name, _, _ in results[0]["signature"]}) == 6
    # more than four rows share the room of four
    assert set(results[0]["sent"]) == {6 * (4 * worker.DIM // 6) * 8 + BLOCK_BYTES + SAID_BYTES}


def test_other_kinds_of_sharding_are_refused_with_a_way_out(two):
    for flat, original, zero, partial in of(two, "other_sharding"):
        assert "FSDP1" in flat
        assert "FSDP1" in original
        assert "fully_shard" in original
        assert "ZeroRedundancyOptimizer" in zero
        assert "redistribute" in partial


@pytest.mark.parametrize(
    ("scenario", "rank", "cause"),
    [
        ("controller_fault", 1, "ConnectionError: no answer"),
        ("sketch_fault", 1, "MemoryError: no memory on this rank"),
        ("accounting_fault", 0, "IndexError"),
        ("replica_fault", 1, "MemoryError: no memory on this rank"),
        ("push_fault", 1, "MemoryError: no memory on this rank"),
        ("fault_before_a_push", 1, "ConnectionError: no answer"),
        ("not_a_number", None, None),
    ],
)
def test_a_fault_on_one_rank_is_one_of_all(two, scenario, rank, cause):
    results = of(two, scenario)
    for result in results:
        assert len(result["warned"]) == 1
        assert ("NotFinite" if rank is None else "RankFault") in result["warned"][0]
    if rank is not None:
        assert cause in results[rank]["faults"][0]
        assert cause not in results[1 - rank]["faults"][0]
        for result in results:
            assert len(result["faults"]) == 1
        assert torch.equal(results[0]["last"], results[1]["last"])
        assert torch.isfinite(results[0]["last"]).all()
    after = [
        [s for s, step in zip(r["scales"], r["steps"], strict=True) if step > fault(r)]
        for r in results
    ]
    assert after[0] == after[1]
    assert results[0]["interval"] == results[1]["interval"]
    assert results[0]["steering"] == results[1]["steering"]


def test_replicas_stay_replicas_after_a_fault_on_one(two):
    results = of(two, "replica_fault")
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert len(set(results[0]["scales"]) - {None}) > 1  # factors moved, before and after the fault


def test_no_replica_is_pushed_where_one_has_no_memory_for_it(two):
    results = of(two, "push_fault")
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    for result in results:
        # decided on until all have seen the fault, and after it never again
        assert result["pushes"].count(2.0) == 2
        assert result["pushes"][-1] == 0.0


def test_no_replica_is_pushed_where_a_controller_raises_on_another(two):
    first, second = of(two, "fault_before_a_push")
    assert torch.equal(first["weights"], second["weights"])


def test_a_rank_without_memory_for_the_start_meets_the_others(two):
    healthy, faulty = of(two, "start_fault")
    assert healthy["steps"] == faulty["steps"] == worker.STEPS
    assert "no memory on this rank" in faulty["warned"][0]
    # a fault of one is one of all
    assert "RankFault" in healthy["warned"][0]


def test_a_rank_without_gradients_takes_a_warm_up_from_zero_as_the_others_do(two):
    assert of(two, "warm_up") == [4, 4]


def test_ranks_of_the_trainer_agree(two):
    assert of(two, "trainers_optimizer") == [(0, 1), (0, 1)]


def fault(result):
    return next(s for f, s in zip(result["scales"], result["steps"], strict=True) if f is None)


def test_losses_that_only_one_rank_sees_do_not_steer(two):
    results = of(two, "losses")
    assert [result["scales"] for result in results] == [[1.0, 1.0]] * 2
    assert [set(result["losses"]) for result in results] == [{0.0}, {1.0}]


@pytest.mark.parametrize("kind", worker.SHARDS)
def test_ranks_that_share_a_sketch_go_by_the_mean_of_their_losses(two, kind):
    for result in of(two, "shared_losses"):
        assert list(dict.fromkeys(result[kind]["scales"])) == [1.0, 2.5, 3.0]
        # in the second half only the second rank logs
        assert list(dict.fromkeys(result[kind]["losses"])) == [0.5, 1.0]


@pytest.mark.parametrize("kind", worker.SHARDS)
def test_several_processes_leave_a_plateau_as_one_does(two, kind):
    results = [result[kind] for result in of(two, "escaped")]
    assert_same_decisions(results)
    alone = worker.escaping("alone", lambda model: model)
    assert_close(results[0], alone, tolerance=1e-3)
    # sixfold only where the loss is known to be near its start
    assert results[0]["scales"][3:5] == [6.0, 36.0]


@pytest.mark.parametrize("kind", worker.SHARDS)
def test_all_ranks_go_back_to_their_copies(two, kind):
    for result in (each[kind] for each in of(two, "way_back")):
        assert not result["faults"]
        ((step, back_to),) = result["backs"]
        assert back_to < step
        trail = result["trail"]
        # seen at one snapshot, decided at the next, and done when all have said that they can
        assert step + worker.INTERVAL == 22
        assert torch.equal(trail[22 - 1], trail[back_to - 1])
        assert not torch.equal(trail[22 - 2], trail[back_to - 1])


@pytest.mark.parametrize("kind", worker.SHARDS)
@pytest.mark.parametrize("scenario", ["no_way_back", "copy_let_go"])
def test_no_rank_goes_back_where_one_cannot(two, kind, scenario):
    results = [result[kind] for result in of(two, scenario)]
    assert_same_decisions(results)
    for result in results:
        assert not result["backs"]
        assert not result["faults"]
        assert any(result["kept"]) == (scenario == "copy_let_go")
    assert all(map(torch.equal, results[0]["trail"], results[1]["trail"]))


@pytest.mark.parametrize("kind", worker.SHARDS)
def test_ranks_whose_weights_are_lost_all_go_back(two, kind):
    for result in (each[kind] for each in of(two, "lost")):
        ((step, back_to),) = result["backs"]
        assert "weights and state are those of step" in result["warned"][0]
        trail = result["trail"]
        assert torch.isnan(trail[step - 2]).any()
        assert torch.equal(trail[step - 1], trail[back_to - 1])
        assert torch.isfinite(trail[-1]).all()


@pytest.mark.parametrize("kind", worker.SHARDS)
@pytest.mark.parametrize("scenario", ["fault_with_a_copy", "fault_in_a_return"])
def test_a_fault_on_one_rank_is_none_to_go_back_for(two, kind, scenario):
    for result in (each[kind] for each in of(two, scenario)):
        assert len(result["faults"]) == 1
        assert "RankFault" in result["faults"][0]
        assert not result["backs"]


def test_one_rank_writes_the_log(two):
    assert of(two, "one_log") == [["run.jsonl"], ["run.jsonl"]]


# -- four processes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "hidden"),
    [("fully_sharded", 1501), ("hybrid", 1501), ("two_dimensional", 1504), ("columns", 1504)],
)
def test_four_ranks_see_and_decide_what_one_process_does(four, scenario, hidden):
    results = of(four, scenario)
    assert_same_decisions(results)
    assert_close(results[0], single(hidden=hidden))
    assert all(result["sent"] == [GROUP_BYTES] * SNAPSHOTS for result in results)


def test_a_rank_without_elements_of_a_row(four):
    results = of(four, "blocks")
    assert_same_decisions(results)
    assert_close(results[0], single(granularity="block"))


def test_groups_smaller_than_the_world(four):
    sliced, flattened = zip(*of(four, "pairs"), strict=True)
    assert_same_decisions(sliced)
    assert_close(sliced[0], single())
    assert_same_decisions(flattened)
    assert all(
        set(result["sent"]) == {worker.DIM * 8 + BLOCK_BYTES + SAID_BYTES} for result in flattened
    )


def test_replicas_of_shards_decide_alike(four):
    by_updates, by_losses, without_a_group = zip(*of(four, "replicas_of_shards"), strict=True)
    assert_same_decisions(by_updates)
    assert_close(by_updates[0], single())
    assert all(result["losses"][-1] == 1.5 for result in by_losses)
    assert all(result["scales"] == [3.5, 3.5] for result in by_losses)
    # by losses of their own they would part
    assert [result["losses"][-1] for result in without_a_group] == [0.5, 0.5, 2.5, 2.5]
    assert all(result["scales"] == [1.0, 1.0] for result in without_a_group)


def test_every_placement_is_counted_once(four):
    for results in of(four, "placements"):
        assert len(results) == 3 * (1 + 4 + 9 + 9 + 16 + 25)
        for name, (sharded, whole) in results.items():
            torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-4, msg=name)


def test_a_checkpoint_of_two_ranks_goes_on_with_four_and_with_one(two, four, root):
    uninterrupted = of(two, "save")[0]
    resumed = of(four, "resume")
    assert_same_decisions(resumed)
    assert_close(resumed[0], uninterrupted)
    assert_close(worker.resumed(root / "saved", worker.network()), uninterrupted)


# -- accelerate ------------------------------------------------------------------------------------


def test_accelerate_launch_with_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", str(port), *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, worker.__file__, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2)]
    assert_same_decisions([run for rank in ranks for run in rank])
    assert_close(ranks[0][0], single())


# -- one process ----------------------------------------------------------------------------------

PLACEMENTS = [
    (Replicate(), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(1), Shard(1)),
    (_StridedShard(0, split_factor=3), Shard(0)),
    (_StridedShard(1, split_factor=3), Shard(1)),
    (_StridedShard(1, split_factor=2), Shard(0)),
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("shape", [(12, 18), (7, 5), (1, 4), (13, 2, 3), (2, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("block", [1, 20, 1 << 20])
def test_pieces_of_all_shards_make_up_the_whole(placements, shape, block, monkeypatch):
    monkeypatch.setattr("gapaware.distributed.LARGEST_PIECE", block)
    mesh_shape, whole = (2, 3), torch.arange(1.0, 1 + prod(shape)).view(shape)
    total = torch.zeros(whole.numel())
    for coordinate in product(*map(range, mesh_shape)):
        if any(c and p.is_replicate() for c, p in zip(coordinate, placements, strict=True)):
            continue
        local = whole
        for placement, ranks, mine in zip(placements, mesh_shape, coordinate, strict=True):
            if not placement.is_replicate():
                parts, _ = placement._split_tensor(local, ranks, with_padding=False)
                local = parts[mine]
        held = held_indices(shape, placements, mesh_shape, coordinate)
        assert [sum(map(len, runs)) for runs in held] == list(local.shape)
        if local.numel():
            covered = torch.zeros(whole.numel(), dtype=torch.bool)
            for piece, place in _pieces_of_part(local, shape, held, 0):
                assert not covered[place : place + piece.numel()].any()
                covered[place : place + piece.numel()] = True
                total[place : place + piece.numel()] += piece
    assert torch.equal(total.view(shape), whole)


def test_columns_of_a_large_matrix_are_few_pieces():
    held = held_indices((10_000, 512), [Shard(1)], (8,), (3,))
    pieces = list(_pieces_of_part(torch.ones(10_000, 64), (10_000, 512), held, 0))
    assert len(pieces) == 5
    assert sum(piece.sum().item() for piece, _ in pieces) == 640_000


def test_an_unknown_placement_is_refused():
    with pytest.raises(Unsupported, match="redistribute"):
        held_indices((4,), [Partial()], (2,), (0,))


def test_deepspeed_partitions_are_refused(monkeypatch):
    marked = torch.nn.Parameter(torch.ones(3))
    marked.ds_id = 0
    with pytest.raises(Unsupported, match="DeepSpeed"):
        GapAware(torch.optim.SGD([marked], lr=0.1))

    optimizer = GapAware(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1))
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    optimizer.param_groups[0]["params"] = [torch.ones(3, requires_grad=True)]
    with pytest.raises(Unsupported, match="fully_shard"):
        optimizer.step()


def test_shards_are_pulled_to_their_start_as_the_whole_is(two):
    alone = worker.anchored(lambda model: model)
    for result in of(two, "retained"):
        for whole, expected in zip(result, alone, strict=True):
            assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-6)


def test_shards_are_pushed_as_the_whole_is(two):
    alone = worker.extrapolated(lambda model: model)
    for result in of(two, "pushed"):
        for whole, expected in zip(result, alone, strict=True):
            assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-6)


def test_shards_are_not_averaged_and_replicas_each_for_themselves(two):
    first, second = of(two, "averaged")
    for kind in ("shards", "partly"):
        for trained, evaluated in (first[kind], second[kind]):
            assert all(map(torch.equal, trained, evaluated))
    # only the first rank had asked before its evaluation
    moved = [not all(map(torch.equal, *result["replicas"])) for result in (first, second)]
    assert moved == [True, False]
    assert all(map(torch.equal, first["replicas, later"], second["replicas, later"]))


def test_what_one_rank_does_between_two_swaps_parts_no_replicas(two):
    for first, second in zip(*of(two, "swapped"), strict=True):
        (pushes, holds, weights), (also_pushes, also_holds, others) = first, second
        assert pushes
        assert also_pushes
        assert holds
        assert also_holds
        assert all(map(torch.equal, weights, others))


def test_starting_weights_are_saved_by_shards_and_loaded_by_others(two, four):
    expected = of(two, "retained_and_saved")[0]
    for result in of(four, "retained_and_resumed"):
        for whole, other in zip(result, expected, strict=True):
            assert torch.allclose(whole, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own_first", [True, False])
def test_own_state_may_be_loaded_before_or_after_the_rest(own_first):
    model, other = worker.network(40), worker.network(40)
    optimizer, restored = worker.wrapped(model), worker.wrapped(other)
    worker.train(model, optimizer, range(9))
    other.load_state_dict(model.state_dict())
    own, rest = OwnState(optimizer).state_dict(), deepcopy(optimizer.base.state_dict())
    if own_first:
        OwnState(restored).load_state_dict(own)
    restored.load_state_dict(rest)
    if not own_first:
        OwnState(restored).load_state_dict(own)
    for m, o in ((model, optimizer), (other, restored)):
        worker.train(m, o, range(9, 20))
    assert_same_decisions([worker.seen(optimizer), worker.seen(restored)])


@pytest.mark.parametrize(("rank", "first"), [("0", True), ("1", False), (None, True)])
def test_the_first_process_of_a_launcher_is_known_before_the_group_is(rank, first, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", rank and "2")):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert is_first() is first


def test_a_damaged_own_state_changes_nothing():
    optimizer = worker.wrapped(worker.network(40))
    with pytest.raises(ValueError, match="cannot be read"):
        OwnState(optimizer).load_state_dict({"bytes": b"nonsense"})
