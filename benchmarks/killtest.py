"""Kill a training process at random moments, resume it each time, and compare with a run left alone.

    python -m benchmarks.killtest                 # 20 kills

The worker trains a small network with dropout, a schedule, and a checkpoint every 25 steps, written beside
and renamed. It is killed with SIGKILL, started again and again until it ends; then its weights have to be
those of the run that was left alone, bit for bit, and its log has to hold every snapshot once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from gapaware import GapAware
from gapaware.history import read_log

STEPS = 3000
CHECKPOINT_EVERY = 25


def train(folder: Path, steps: int) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = GapAware(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        mode="escape",
        interval=3,
        sketch_dim=1024,
        target=1e-3,
        log_to=folder / "run.jsonl",
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    checkpoint = folder / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 8, generator=generator)
        loss = (model(x) - torch.stack((x[:, 0] * x[:, 1], x.sum(1).sin()), 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.log(loss=loss)
        scheduler.step()
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step + 1,
            }
            torch.save(state, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", checkpoint)
        print(step + 1, flush=True)


def run(folder: Path, steps: int, kill_at: Sequence[int], jitter: random.Random) -> int:
    """Run the worker to its end, killing it near each of the given steps; the number of kills.

    Raises:
        RuntimeError: the worker ended in an error of its own.
    """
    kills = 0
    waiting = sorted(kill_at)
    command = [sys.executable, "-m", "benchmarks.killtest", "--worker", str(folder)]
    command += ["--steps", str(steps)]
    with tqdm(total=steps, unit="step") as bar:
        while True:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert worker.stdout is not None
            for line in worker.stdout:
                bar.update(int(line) - bar.n)
                if waiting and int(line) >= waiting[0]:
                    waiting.pop(0)
                    time.sleep(jitter.uniform(0.0, 0.01))
                    worker.kill()
                    break
            worker.stdout.close()
            code = worker.wait()
            if code == 0:
                return kills
            if code != -signal.SIGKILL:
                raise RuntimeError(f"the worker ended by itself, with exit status {code}")
            kills += 1


def compare(alone: Path, killed: Path) -> list[str]:
    """What differs between the two runs; empty when nothing does."""
    differences = []
    one, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (alone, killed))
    for name, value in one["model"].items():
        if not torch.equal(value, other["model"][name]):
            differences.append(f"weights of {name} differ")
    logs = []
    for folder in (alone, killed):
        if list(folder.glob("run.*.jsonl")):
            differences.append(f"{folder.name}: a resumed run started a new log")
        _, records = read_log(folder / "run.jsonl")
        steps = [record["step"] for record in records]
        if steps != sorted(set(steps)):
            differences.append(f"{folder.name}: steps in the log repeat or go back")
        logs.append([(r["step"], r["scale"], r["decision"], r.get("loss")) for r in records])
    if logs[0] != logs[1]:
        differences.append("the logs tell different stories")
    return differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test; 0 when every kill came about and nothing differs."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.killtest", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=20, help="how often (default 20)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"in a run (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        train(options.worker, options.steps)
        return 0
    jitter = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = Path(scratch, "alone"), Path(scratch, "killed")
        for folder in (alone, killed):
            folder.mkdir()
        run(alone, options.steps, [], jitter)
        moments = jitter.sample(range(CHECKPOINT_EVERY, options.steps), options.kills)
        kills = run(killed, options.steps, moments, jitter)
        differences = compare(alone, killed)
        _, records = read_log(killed / "run.jsonl")
        scales = [record["scale"] for record in records]
    print(f"kills survived: {kills} of {options.kills}")
    print(
        f"snapshots logged once each: {len(records)}, factor from {min(scales):g} to {max(scales):g}"
    )
    print(differences or "weights and log equal those of the run left alone")
    if options.json:
        figures = {
            "steps": options.steps,
            "seed": options.seed,
            "kills_asked": options.kills,
            "kills_survived": kills,
            "snapshots": len(records),
            "smallest_scale": min(scales),
            "largest_scale": max(scales),
            "differences": differences,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if differences or kills < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
