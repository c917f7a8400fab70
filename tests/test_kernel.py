"""The CUDA kernel without a GPU: its work lists, itself in Triton's interpreter, and what it compiles to.

The work lists are tested wherever the suite runs; the rest by `make test-kernel`, which installs Triton.
"""

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gapaware import kernel, reference, sketch, worklist
from gapaware.blocks import CHUNK, ONE_BLOCK, WIDTH
from gapaware.hashing import buckets, sign_table
from gapaware.sketch import CountSketch
from gapaware.worklist import BLOCK, LANES, LONG, Piece, batches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or not INTERPRETED, reason="make test-kernel"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 3


def laid_out(tensors, gap=0):
    """Pieces of one row, one after another, with places between them that nobody holds."""
    pieces, place = [], 0
    for tensor in tensors:
        pieces.append((tensor, place))
        place += tensor.numel() + gap
    return pieces


def pieces_of(rows):
    """By dtype, as `Fused` asks for them."""
    kinds = {dtype: [] for dtype in DTYPES}
    for number, row in enumerate(rows):
        for flat, place in row:
            kinds[flat.dtype].append(Piece(number, flat.data_ptr(), flat.numel(), place))
    return [(dtype.itemsize, pieces) for dtype, pieces in kinds.items()]


def expected(row, dim=1000, seed=SEED):
    whole = np.zeros(max((place + flat.numel() for flat, place in row), default=0))
    for flat, place in row:
        whole[place : place + flat.numel()] = flat.double().numpy()
    return reference.count_sketch(whole, dim, seed)


def random(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def values(address, count, dtype):
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).double().numpy()


def walk(batch):
    """Do what the kernel is told; return the partial sums and how often each was written."""
    sums, written = np.zeros(batch.partials), np.zeros(batch.partials, int)
    signs = sign_table(SEED).astype(float)
    for work, dtype in zip(batch.work, DTYPES, strict=True):
        for segment, start, short, shorts in work.programs.tolist():
            first, whole, others, _, begin, reach, least = work.segments[segment].tolist()
            numbers = [*range(first, first + whole + others), *range(short, short + shorts)]
            low, high = max(start, least), min(start + BLOCK, reach)
            written[begin + low : begin + high] += 1
            for number in numbers:
                address, packed = work.items[number].tolist()
                a, b = max(packed & 0x1FFFF, low), min(packed >> 17 & 0x1FFFF, high)
                if a >= b:
                    continue
                offset, flip = packed >> 34 & 0x1FFFF, 1 - 2 * (packed >> 51)
                x = values(address + a * dtype.itemsize, b - a, dtype)
                sums[begin + a : begin + b] += flip * signs[offset + a : offset + b] * x
    return sums, written


def fold(batch, sums, dim):
    rows = []
    for begin, layers, reach, least in batch.rows.tolist():
        width = reach - least
        total = sums[begin + least : begin + least + layers * width].reshape(layers, width).sum(0)
        rows.append(np.bincount(buckets(dim, SEED)[least:reach], weights=total, minlength=dim))
    return rows


ROWS = {
    "one element": lambda: [laid_out(random(1))],
    "one short tensor": lambda: [laid_out(random(1000))],
    "a chunk and a little": lambda: [laid_out(random(CHUNK + 3))],
    "many chunks": lambda: [laid_out(random(23 * CHUNK + 5))],
    "short and long": lambda: [laid_out(random(5, 70_000, 3, 2 * CHUNK, 1, 9000, LONG, CHUNK))],
    "gaps": lambda: [laid_out(random(700, CHUNK, 50_000, 6 * CHUNK), gap=7777)],
    "rows": lambda: [laid_out(random(n, 3 * n)) for n in (1, 999, CHUNK // 4, 40_000, CHUNK)],
    "an empty row": lambda: [laid_out(random(10)), [], laid_out(random(20))],
    "rows that begin late": lambda: [
        [(flat, place + shift) for flat, place in laid_out(random(*sizes))]
        for shift, sizes in ((7, (1,)), (50_001, (9, 3000)), (CHUNK - 5, (20,)), (999, (CHUNK,)))
    ],
    "dtypes": lambda: [
        laid_out([*random(5, CHUNK), *random(7, 80_000, dtype=torch.bfloat16)]),
        laid_out([*random(9000, dtype=torch.float16), *random(2 * CHUNK)]),
    ],
    "not aligned": lambda: [laid_out([tensor[1:] for tensor in random(20 * CHUNK, 1000)])],
    "empty pieces": lambda: [laid_out(random(0, 10, 0, CHUNK, 0))],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dim", [64, 1000])
def test_work_lists_describe_the_sketch(kind, dim):
    rows = ROWS[kind]()
    found = []
    for batch in batches(pieces_of(rows), rows=len(rows), most=2, dim=dim, seed=SEED):
        assert batch.first_row == len(found)
        sums, written = walk(batch)
        assert (
            written == 1
        ).all()  # each by one program: nothing to add atomically, nothing left over
        found += fold(batch, sums, dim)
    assert len(found) == len(rows)
    for row, got in zip(rows, found, strict=True):
        np.testing.assert_allclose(got, expected(row, dim), rtol=0, atol=1e-9)


def test_a_large_row_is_read_by_enough_programs_with_aligned_loads():
    (x,) = random(40 * CHUNK)
    (batch,) = batches(pieces_of([[(x, 0)]]), rows=1, most=1, dim=16_384, seed=SEED)
    work = batch.work[0]
    assert len(work.segments) == LANES
    assert len(work.programs) >= 1024
    assert work.segments[:, 1].sum() == 40
    for first, whole, _, start, *_ in work.segments.tolist():
        addresses = work.items[first : first + whole, 0] + start * 4
        assert (addresses % (LANES * 4) == 0).all()


def test_the_order_of_additions_does_not_depend_on_addresses():
    def tables(tensors):
        (batch,) = batches(pieces_of([laid_out(tensors)]), rows=1, most=1, dim=1000, seed=SEED)
        work = batch.work[0]
        return [work.items[:, 1], work.segments, work.programs]

    tensors = random(5, 30 * CHUNK, 9000, 70_001)
    for one, other in zip(tables(tensors), tables([t.clone() for t in tensors]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dim", [1024, 16_384, CHUNK])
@pytest.mark.parametrize("most", [64, 300])
def test_workspace_and_launches_are_bounded(dim, most):
    rows = 300
    pieces = [(4, [Piece(row, 4096, CHUNK, 0) for row in range(rows)])]
    found = batches(pieces, rows=rows, most=most, dim=dim, seed=SEED)
    assert sum(len(batch.rows) for batch in found) == rows
    assert max(len(batch.rows) for batch in found) <= most
    assert max(batch.partials for batch in found) * 4 <= LANES * CHUNK * 4 + most * dim * 8
    assert len(found) <= (2 + CHUNK // (2 * dim)) * -(-rows // most)


def test_tables_are_small():
    """Of a model of 1.5e9 parameters in 600 tensors, and of one in ten thousand small tensors."""
    for count, length in ((600, 2_500_000), (10_000, 1000)):
        pieces = [Piece(0, 4096, length, number * length) for number in range(count)]
        (batch,) = batches([(4, pieces)], rows=1, most=1, dim=16_384, seed=SEED)
        tables = batch.work[0]
        size = tables.items.nbytes + tables.segments.nbytes + tables.programs.nbytes
        assert size < 1e-4 * 4 * count * length + 1e6


@pytest.mark.parametrize("seed", [0, SEED])
def test_sign_bits_are_the_sign_table(seed):
    bits, signs = kernel.sign_bits(seed)[LANES:], sign_table(seed)
    for lane in range(LANES):
        minus = bits[: len(signs) - lane] >> lane & 1
        np.testing.assert_array_equal(minus == 1, signs[lane:] < 0)


# -- in Triton's interpreter ------------------------------------------------------------------------


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter takes as long for a program of any size."""
    monkeypatch.setattr(worklist, "BLOCK", 1 << 14)
    monkeypatch.setattr(worklist, "LONG", 1 << 15)
    monkeypatch.setattr(kernel, "BLOCK", 1 << 14)
    monkeypatch.setattr(kernel, "TILE", 1 << 17)
    monkeypatch.setattr(kernel, "WIDE", 1 << 17)
    # the dispatch of CountSketch.rows
    monkeypatch.setattr(sketch, "_has_kernel", lambda device: True)


def in_place(rows):
    return frozenset(flat.untyped_storage().data_ptr() for row in rows for flat, _ in row)


def run(rows, dim, sketch=None):
    sketch = sketch or CountSketch(dim, SEED)
    return sketch.rows(rows, torch.device("cpu"), resident=in_place(rows))[0]


def assert_close(got, rows, dim):
    """Within a millionth of the largest bucket of the row."""
    for sums, row in zip(got.numpy(), rows, strict=True):
        exact = expected(row, dim)
        assert np.abs(sums - exact).max() <= 1e-6 * np.abs(exact).max(initial=0)


@interpreted
@pytest.mark.parametrize(
    ("kind", "dim"),
    [
        ("one element", 64),
        ("many chunks", 16_384),
        ("short and long", 1000),
        ("rows", 1000),
        ("an empty row", CHUNK),
        ("rows that begin late", 1000),
        ("short and long", 64),
        ("dtypes", 1000),
        ("not aligned", 1000),
    ],
)
def test_kernel_equals_reference(kind, dim, large_blocks):
    rows = ROWS[kind]()
    got = run(rows, dim)
    assert_close(got, rows, dim)
    assert got.dtype == torch.float64


@interpreted
@pytest.mark.parametrize("most", [1, 64])
def test_short_sketches_of_blocks_are_those_of_the_cpu(most, large_blocks, monkeypatch):
    """Of blocks that take turns, that are small, that no piece is in, and that the other path adds."""
    monkeypatch.setattr(kernel, "MOST", most)
    (other,) = random(300, dtype=torch.float64)
    rows = [laid_out([*random(900, 2 * CHUNK, 40, 5000, 90_000), other]), [], ROWS["dtypes"]()[0]]
    ends = [[place + flat.numel() for flat, place in row] for row in rows]
    stretches = [
        list(zip(ends[0], (0, 1, 2, 0, 3, 4), strict=True)),
        ONE_BLOCK,
        list(zip(ends[2], range(4), strict=True)),
    ]
    cpu, sketch = torch.device("cpu"), CountSketch(1000, SEED)
    got, shares = sketch.rows(rows, cpu, stretches=stretches, resident=in_place(rows))
    assert_close(got, rows, 1000)
    monkeypatch.setattr("gapaware.sketch._has_kernel", lambda device: False)
    _, exact = sketch.rows(rows, cpu, stretches=stretches)
    shares, exact = shares.view(-1, WIDTH), exact.view(-1, WIDTH)
    assert len(shares) == len(exact) == 5 + 1 + 4
    assert not shares[5].any()
    assert ((shares - exact).abs().amax(1) <= 2e-6 * exact.abs().amax(1)).all()


@interpreted
def test_kernel_with_its_real_blocks():
    rows = [laid_out(random(5 * BLOCK + 3, 100))]
    fused = kernel.Fused(64, SEED, torch.device("cpu"))
    got, _ = fused(rows, in_place(rows), None, None, [ONE_BLOCK])
    assert_close(got, rows, 64)


@interpreted
def test_more_parts_than_one_float32_sum_takes(large_blocks, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNKS_PER_FLUSH", 2 * kernel.UNROLL)
    # with an offset that would drown small values; whole chunks and parts, several sums of each
    tensors = [100 + random(36 * CHUNK)[0], *random(*[LONG + n for n in range(24)])]
    rows = [laid_out(tensors, gap=CHUNK // 2)]
    assert_close(run(rows, 16_384), rows, 16_384)


@interpreted
def test_same_bits_on_every_run_and_at_every_address(large_blocks):
    rows = ROWS["short and long"]()
    sketch = CountSketch(1000, SEED)
    first = run(rows, 1000, sketch)
    assert torch.equal(run(rows, 1000, sketch), first)
    elsewhere = [[(flat.clone(), place) for flat, place in row] for row in rows]
    assert torch.equal(run(elsewhere, 1000, sketch), first)
    assert torch.equal(run(rows, 1000), first)


@interpreted
def test_what_changed_in_place_is_seen_and_what_moved_is_found(large_blocks):
    (x,) = random(5000)
    sketch = CountSketch(64, SEED)
    before = run([[(x, 0)]], 64, sketch)
    x *= 2
    assert torch.equal(run([[(x, 0)]], 64, sketch), 2 * before)
    (y,) = random(6000)
    assert_close(run([[(y, 0)]], 64, sketch), [[(y, 0)]], 64)


@interpreted
def test_the_number_of_rows_may_change_where_nothing_else_does(large_blocks):
    (x,) = random(500)
    sketch = CountSketch(64, SEED)
    for rows in ([[(x, 0)]], [[(x, 0)], []], [[(x, 0)]]):
        assert_close(run(rows, 64, sketch), rows, 64)


@interpreted
def test_a_key_saves_looking_at_the_pieces(large_blocks):
    (x,) = random(5000)
    sketch, device, resident = CountSketch(64, SEED), torch.device("cpu"), in_place([[(x, 0)]])
    first, _ = sketch.rows([[(x, 0)]], device, resident=resident, key="here")

    def unasked():
        raise AssertionError("the pieces were looked at")
        yield

    again, _ = sketch.rows([unasked()], device, resident=resident, key="here")
    assert torch.equal(again, first)
    with pytest.raises(AssertionError, match="looked at"):
        sketch.rows([unasked()], device, resident=resident, key="elsewhere")
    with pytest.raises(AssertionError, match="looked at"):
        sketch.rows([unasked()], device, resident=resident)
    assert torch.equal(sketch.rows([[(x, 0)]], device, resident=resident)[0], first)


@interpreted
def test_temporary_copies_and_other_dtypes_are_added_by_the_other_path(large_blocks):
    (x,) = random(5000)
    (y,) = random(3000, dtype=torch.float64)
    rows = [[(x, 0), (y, 5000)], [(x, 0)]]
    resident = frozenset({x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()})
    sketch, device = CountSketch(64, SEED), torch.device("cpu")
    assert_close(sketch.rows(rows, device, resident=resident, key=1)[0], rows, 64)
    # with pieces that have to be handed over there is no skipping
    x += 1
    y += 1
    assert_close(sketch.rows(rows, device, resident=resident, key=1)[0], rows, 64)
    # nothing is known to stay
    assert_close(sketch.rows(rows, device)[0], rows, 64)


@interpreted
def test_strided_pieces_are_not_read_as_if_they_were_dense(large_blocks):
    (x,) = random(2000)
    rows = [[(x[::2], 0)]]
    assert_close(run(rows, 64), rows, 64)


@interpreted
def test_not_a_number_is_seen(large_blocks):
    (x,) = random(5000)
    x[17] = float("nan")
    got = run([[(x, 0)], laid_out(random(10))], 64)
    assert not got[0].isfinite().all()
    assert got[1].isfinite().all()


# -- compiled for an H100 ---------------------------------------------------------------------------

COMPILE = """
import re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gapaware import kernel
from gapaware.blocks import CHUNK
from gapaware.sketch import CHUNKS_PER_FLUSH

def compiled(function, arguments, constants, **options):
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5 if "items" in arguments else 4)}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for dtype, element in kernel.DTYPES.items():
    code = compiled(
        kernel._add_up,
        {"items": "*i64", "segments": "*i64", "programs": "*i64", "signs": "*u8", "partials": "*fp32"},
        dict(ELEMENT=element, SIZE=dtype.itemsize, CHUNK=CHUNK, BLOCK=kernel.BLOCK, LANES=kernel.LANES,
             UNROLL=kernel.UNROLL, FLUSH=CHUNKS_PER_FLUSH),
        num_warps=kernel.BLOCK // kernel.LANES // kernel.WARP, maxnreg=kernel.REGISTERS,
    )
    ptx = code.asm["ptx"]
    wide = {4: "ld.global.v4.b32", 2: "ld.global.v2.b32"}[dtype.itemsize]
    print("wide loads", dtype, ptx.count(wide))
    print("atomics", dtype, len(re.findall(r"\\b(atom|red)\\.", ptx)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    print("spilt", dtype, *re.findall(r"(?:STACK|LOCAL):(\\d+)", usage))
    print("registers", dtype, *re.findall(r"REG:(\\d+)", usage))
fold = compiled(
    kernel._fold,
    {"partials": "*fp32", "rows": "*i64", "order": "*i32", "sketches": "*fp64", "dim": "i32",
     "places": "i32"},
    dict(DEEP=8, WIDE=kernel.WIDE),
)
print("atomics", "fold", len(re.findall(r"\\b(atom|red)\\.", fold.asm["ptx"])))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="make test-kernel")
def test_compiles_for_an_h100():
    """Into one wide load for each thread and part, without spilling, in the registers that were planned."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    numbers = {what: [] for what in ("wide", "atomics", "spilt", "registers")}
    for first, *rest in said:
        numbers[first] += [int(word) for word in rest if word.isdigit()]
    assert numbers["wide"] == [kernel.UNROLL] * 3
    assert numbers["atomics"] == [0] * 4
    assert numbers["spilt"] == [0, 0] * 3
    assert len(numbers["registers"]) == 3
    assert max(numbers["registers"]) <= kernel.REGISTERS
