"""What each process of a Trainer's test does: started by torchrun, leaves what it saw in a file."""

import os
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from gapaware.huggingface import GapAwareTrainer, gapaware_of, optimizer_cls_and_kwargs


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
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    options = optimizer_cls_and_kwargs(args)
    trainer = GapAwareTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=options)
    trainer.train()
    history = gapaware_of(trainer.optimizer).history
    found = {name: history.column(name) for name in ("step", "scale", "loss")}
    found["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
