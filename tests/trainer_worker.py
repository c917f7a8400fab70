"""What each process of a Trainer's test does: started by torchrun, leaves what it saw in a file."""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from gapaware import Distillation
from gapaware.huggingface import GapAwareTrainer, gapaware_of, optimizer_cls_and_kwargs

QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.old, self.new = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(self.new(self.trunk(x)), labels)}


def change_of_an_old_head(folder: Path) -> torch.Tensor:
    """By a few steps in which nothing but the distillation asks it."""
    set_seed(1)
    model = TwoHeads()
    start = model.old.weight.detach().clone()
    held = Distillation(model, lambda model, batch: model.old(model.trunk(batch["x"])))
    args = TrainingArguments(
        output_dir=str(folder / "held"),
        learning_rate=0.1,
        max_steps=3,
        **QUIET,
    )
    data = [{"x": torch.randn(4), "labels": i % 2} for i in range(64)]
    GapAwareTrainer(model, args, train_dataset=data, distillation=held).train()
    return model.old.weight.detach() - start


def main(folder: Path) -> None:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_attention_heads=2, **sizes))
    data = [{"input_ids": [(7 * i) % 50] * 8, "labels": int((7 * i) % 50 > 25)} for i in range(256)]
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        learning_rate=3e-6,  # far too small
        lr_scheduler_type="constant",
        max_steps=60,
        per_device_train_batch_size=16,
        **QUIET,
    )
    options = optimizer_cls_and_kwargs(args)
    trainer = GapAwareTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=options)
    trainer.train()
    history = gapaware_of(trainer.optimizer).history
    found = {name: history.column(name) for name in ("step", "scale", "loss")}
    found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    found["held"] = change_of_an_old_head(folder)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
