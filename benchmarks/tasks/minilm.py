"""MiniLM learns the sentiment of tweets: fine-tuning as people do it, which has no plateau.

Real pretrained weights and real texts out of packages (recipes/requirements.txt), dropout, linear decay.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forgetting_tasks.finetune import linear_decay
from benchmarks.forgetting_tasks.minilm import SCORED, TRAINED, Sentences, tokenized
from benchmarks.tasks import Task, Training

CLASSES, BATCH = 3, 16


def fine_tuning(seed: int) -> Training:
    """1200 tweets to train on, 600 held out, others for every seed."""
    tokens, labels = tokenized("tweets")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[:TRAINED], order[TRAINED:]
    torch.manual_seed(seed)
    model = nn.Sequential(Sentences(), nn.Linear(384, CLASSES))
    draw = torch.Generator().manual_seed(seed)
    count = itertools.count()

    def loss() -> Tensor:
        batch = train[torch.randint(TRAINED, (BATCH,), generator=draw)]
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 100_000 + next(count))  # of dropout
            return F.cross_entropy(model(tokens[batch]), labels[batch])

    def evaluate(_: bool) -> tuple[float, float]:
        model.eval()
        logits = torch.cat([model(tokens[rows]) for rows in held_out.split(SCORED)])
        accuracy = (logits.argmax(1) == labels[held_out]).float().mean().item()
        return F.cross_entropy(logits, labels[held_out]).item(), accuracy

    return Training(model, loss, evaluate)


TWEETS = Task(
    name="minilm-tweets",
    setup=fine_tuning,
    lr=1e-4,
    budget=150,
    check_every=75,
    base_kwargs={"weight_decay": 1e-2},
    schedule=linear_decay,
    clip=1.0,
)
