"""MiniLM with two heads: topics of BBC News and sentiments of tweets, in both orders.

Real pretrained weights and real texts out of packages (recipes/requirements.txt), cut to 48 tokens.
Dear: some minutes a run on one core.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from benchmarks.forgetting_tasks import NEW, OLD, Domains, Examples, ForgettingTask, TwoHeads
from recipes.assets import Classification, bbc_news, minilm, tweets

LENGTH, SCORED, TRAINED = 48, 200, 1200


class Sentences(nn.Module):
    """The encoder's mean over the tokens, (n, 384)."""

    def __init__(self) -> None:
        super().__init__()
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # the pooling layer that is left out is no mistake
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(minilm(), add_pooling_layer=False)
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

    def forward(self, tokens: Tensor) -> Tensor:
        """Of token ids (n, length), padded with zeros."""
        mask = tokens != 0
        tokens = tokens[:, : int(mask.sum(1).max())]
        mask = mask[:, : tokens.shape[1]].long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        mean: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean


@functools.cache
def tokenized(name: str) -> tuple[Tensor, Tensor]:
    """Token ids (n, length) and classes of the first texts of a corpus."""
    corpus: Classification = {"news": bbc_news, "tweets": tweets}[name]()
    wanted = TRAINED + 3 * SCORED
    tokens = AutoTokenizer.from_pretrained(minilm())(
        corpus.texts[:wanted],
        truncation=True,
        padding="max_length",
        max_length=LENGTH,
        return_tensors="pt",
    )
    return tokens["input_ids"], torch.tensor(corpus.labels[:wanted])


def domains(old_name: str, new_name: str, seed: int) -> Domains:
    """Other texts to train on and to score for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, head: int) -> Examples:
        tokens, labels = tokenized(name)
        order = torch.randperm(len(labels), generator=generator)
        return Examples(tokens[order], labels[order], head)

    old, new = drawn(old_name, OLD), drawn(new_name, NEW)
    return Domains(
        old[slice(SCORED, None)],
        old[slice(0, SCORED)],
        new[slice(2 * SCORED, None)],
        new[slice(0, SCORED)],
        new[slice(SCORED, 2 * SCORED)],
    )


def task(old: str, new: str, classes: dict[str, int]) -> ForgettingTask:
    """From one corpus to the other."""
    return ForgettingTask(
        name=f"{old}-{new}",
        build=lambda: TwoHeads(Sentences(), 384, classes[old], classes[new]),
        domains=functools.partial(domains, old, new),
        classes=classes[new],
        steps=80,
        batch_size=16,
        lr=1e-4,
        old_steps=60,
        old_lr=1e-4,
        two_heads=True,
        fresh=("heads.1.",),
        points=10,
    )


CLASSES = {"news": 5, "tweets": 3}
NEWS_TO_TWEETS = task("news", "tweets", CLASSES)
TWEETS_TO_NEWS = task("tweets", "news", CLASSES)
