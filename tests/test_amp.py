"""Mixed precision: GradScaler skips the same steps and scales the same gradients as without the wrapper."""

import pytest
import torch
from gradients import assert_same_run
from models import batch, mlp

from gapaware import Composite, GapAware

BASES = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "sgd fused": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, fused=True),
    "composite fused": lambda m: Composite(
        torch.optim.SGD(list(m.parameters())[:2], lr=1e-2, fused=True),
        torch.optim.AdamW(list(m.parameters())[2:], lr=1e-2, fused=True),
    ),
    "composite half fused": lambda m: Composite(
        torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=1e-2),
        torch.optim.AdamW([p for p in m.parameters() if p.ndim != 2], lr=1e-2, fused=True),
    ),
}


def train(model, optimizer, scaler, steps=24, clip=False, accumulate=1):
    """Ordinary code with a scaler; a batch overflows now and then. Returns the scaler's scale each step."""
    scales = []
    for step in range(steps):
        for part in range(accumulate):
            x, y = batch(step * accumulate + part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - y).square().mean()
            # not at step 0, where torch's own fused SGD with momentum is left with uninitialized buffers
            if step in (2, 7, 8, 15):
                loss = loss * float("inf")
            scaler.scale(loss / accumulate).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def new_scaler():
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("clip", [False, True])
def test_same_trajectory_with_overflows(base, clip):
    alone, wrapped = mlp(), mlp()
    optimizer_alone = BASES[base](alone)
    optimizer = GapAware(BASES[base](wrapped), mode="observe", interval=1, sketch_dim=64)
    expected = train(alone, optimizer_alone, new_scaler(), clip=clip)
    assert train(wrapped, optimizer, new_scaler(), clip=clip) == expected
    assert len(set(expected)) > 2
    assert_same_run(optimizer_alone, optimizer, alone.parameters(), wrapped.parameters())
    assert "fault" not in optimizer.history.column("decision")
    for leaf in optimizer.leaves():
        assert not hasattr(leaf, "grad_scale")
        assert not hasattr(leaf, "found_inf")


@pytest.mark.parametrize("base", BASES)
def test_accumulated_gradients_with_a_factor(base):
    model = mlp()
    optimizer = GapAware(BASES[base](model), interval=2, sketch_dim=64, controller=lambda seen: 2.0)
    train(model, optimizer, new_scaler(), accumulate=3)
    assert optimizer.scales == [2.0] * len(optimizer.param_groups)
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    assert all(p.isfinite().all() for p in model.parameters())


def test_skipped_steps_move_nothing_and_are_no_updates():
    """A window of which most steps were skipped has the spectrum of the others alone."""
    model = mlp()
    optimizer = GapAware(BASES["adamw fused"](model), mode="observe", interval=1, sketch_dim=64)
    scaler = new_scaler()
    for step in range(40):
        before = [p.clone() for p in model.parameters()]
        x, y = batch(step)
        overflow = step % 2 == 1
        scaler.scale((model(x) - y).square().mean() * (float("inf") if overflow else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == overflow
    spectrum = optimizer.history[-1]["spectrum"]
    assert min(spectrum["sigma"]) > 0
    assert len(spectrum["sigma"]) <= 6


def test_whether_amp_is_supported_by_the_step_is_the_bases_answer():
    model = mlp()
    for name, expected in {
        "adamw": False,
        "adamw fused": True,
        "composite fused": True,
        "composite half fused": False,
    }.items():
        optimizer = GapAware(BASES[name](model))
        assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) == expected, name
