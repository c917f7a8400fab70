"""SCAN: commands such as "jump around left twice and walk" become sequences of actions.

All 20,910 commands of the grammar (Lake and Baroni, arXiv 1711.00350) are generated; the task takes those
with at most twelve actions and trains on some of them. A sequence counts as right when every action is;
with the true ones before it given, that is when greedy decoding gives it.
"""

from __future__ import annotations

import functools
from itertools import product

import torch
from torch.nn import functional as F

from benchmarks.tasks import Task, Training
from benchmarks.tasks.transformer import Transformer

PRIMITIVES = {"walk": "WALK", "look": "LOOK", "run": "RUN", "jump": "JUMP", "turn": ""}
TURNS = {"left": "LTURN", "right": "RTURN"}
TIMES = {"twice": 2, "thrice": 3}
LONGEST = 12
TRAIN = 2000
HELD_OUT = 500
BATCH_SIZE = 64


def interpret(command: str) -> list[str]:
    """The actions of a command.

    >>> interpret("turn opposite left after jump twice")
    ['JUMP', 'JUMP', 'LTURN', 'LTURN']
    """
    words = command.split()
    if "and" in words:
        first, second = command.split(" and ")
        return interpret(first) + interpret(second)
    if "after" in words:
        first, second = command.split(" after ")
        return interpret(second) + interpret(first)
    if words[-1] in TIMES:
        return interpret(" ".join(words[:-1])) * TIMES[words[-1]]
    act = [PRIMITIVES[words[0]]] if PRIMITIVES[words[0]] else []
    if len(words) == 1:
        return act
    turn = [TURNS[words[-1]]]
    if words[1] == "around":
        return (turn + act) * 4
    return turn * (2 if words[1] == "opposite" else 1) + act


@functools.cache
def commands() -> list[str]:
    """Every command of the grammar."""
    turned = [
        f"{verb} {how}{side}"
        for verb, how, side in product(PRIMITIVES, ("", "opposite ", "around "), TURNS)
    ]
    verbs = [*turned, *(verb for verb in PRIMITIVES if verb != "turn")]
    sentences = [f"{verb}{times}" for verb, times in product(verbs, ("", " twice", " thrice"))]
    pairs = [f"{a} {how} {b}" for a, how, b in product(sentences, ("and", "after"), sentences)]
    return sentences + pairs


@functools.cache
def encoded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 9 + 1 + LONGEST) of the short commands and their actions, and which predict an action.

    A row is the command, 0 up to nine words, the separator 1, the actions, and 2 to the end, the first
    of which has to be predicted too: the row's second tensor is true where the next token counts.
    """
    names = [*PRIMITIVES, *TURNS, *TIMES, "opposite", "around", "and", "after"]
    names += [action for action in (*PRIMITIVES.values(), *TURNS.values()) if action]
    number = {name: i + 3 for i, name in enumerate(names)}
    rows, counts = [], []
    for command in commands():
        actions = interpret(command)
        if len(actions) > LONGEST:
            continue
        words = [number[word] for word in command.split()]
        padding = [0] * (9 - len(words))
        ends = [2] * (LONGEST + 1 - len(actions))
        rows.append([*words, *padding, 1, *(number[action] for action in actions), *ends])
        counts.append([9 <= i <= 9 + len(actions) for i in range(9 + 1 + LONGEST)])
    return torch.tensor(rows), torch.tensor(counts)


def scan(seed: int) -> Training:
    """A two-layer causal transformer on random batches of the training commands."""
    rows, counts = encoded()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[:TRAIN], order[TRAIN : TRAIN + HELD_OUT]
    torch.manual_seed(seed)
    model = Transformer(int(rows.max()) + 1, rows.shape[1] - 1, width=32, layers=2, heads=4)
    draw = torch.Generator().manual_seed(seed)

    def logits_and_answers(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answers = rows[chosen, 1:].masked_fill(~counts[chosen], -100)
        return model(rows[chosen, :-1]).transpose(1, 2), answers

    def loss() -> torch.Tensor:
        batch = train[torch.randint(TRAIN, (BATCH_SIZE,), generator=draw)]
        return F.cross_entropy(*logits_and_answers(batch))

    def evaluate(_: bool) -> tuple[float, float]:
        logits, answers = logits_and_answers(held_out)
        right = (logits.argmax(1) == answers) | (answers == -100)
        return F.cross_entropy(logits, answers).item(), right.all(1).float().mean().item()

    return Training(model, loss, evaluate)


SCAN = Task(
    name="scan",
    setup=scan,
    lr=3e-4,
    budget=4_000,
    target=0.8,
    check_every=50,
    base_kwargs={"weight_decay": 0.1},
)
