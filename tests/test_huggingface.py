"""GapAware in the real Trainer: factory, logs, checkpoints, bases."""

from __future__ import annotations

import builtins
import importlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'gapaware[transformers]'")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from gapaware import Composite, Decision, Distillation, GapAware
from gapaware.huggingface import (
    GapAwareTrainer,
    GapAwareTrainerMixin,
    gapaware_of,
    optimizer_cls_and_kwargs,
)

ROWS = [{"input_ids": [(7 * i + j) % 50 for j in range(8)], "labels": i % 3} for i in range(64)]


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    set_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def arguments(output: Any, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(output),
        "max_steps": 12,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | overrides))


def trainer_for(
    args: TrainingArguments,
    cls: type[Trainer] = GapAwareTrainer,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> Trainer:
    return cls(
        model=tiny_bert(),
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, **options),
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def doubling(observation: Any) -> Decision:
    """A controller whose scale changes at each snapshot, so that a lost scale shows."""
    return Decision(min(observation.scale * 2, 64.0), why="doubling")


def by_group(observation: Any) -> Decision:
    return Decision(2.0 if observation.row.endswith("0") else 8.0, why="by group")


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices are tiny: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the factory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_base_is_the_optimizer_that_the_trainer_would_have_built(tmp_path, optim):
    args = arguments(tmp_path, optim=optim, adam_beta2=0.97, adam_epsilon=1e-7)
    alone = Trainer(model=tiny_bert(), args=args, train_dataset=ROWS).create_optimizer()
    wrapped = trainer_for(args, mode="observe").create_optimizer()

    assert isinstance(wrapped, GapAware)
    assert type(wrapped.base) is type(alone)

    def settings(groups):
        return [
            {k: v for k, v in group.items() if k not in ("params", "param_names")}
            | {"shapes": [tuple(p.shape) for p in group["params"]]}
            for group in groups
        ]

    assert settings(wrapped.param_groups) == settings(alone.param_groups)
    named = [name for group in wrapped.param_groups for name in group["param_names"]]
    assert sorted(named) == sorted(name for name, _ in tiny_bert().named_parameters())


def test_biases_and_norms_do_not_decay(tmp_path):
    args = arguments(tmp_path)
    groups = trainer_for(args).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])


def test_adamw_whatever_optim_says(tmp_path):
    args = arguments(tmp_path, optim="sgd")
    built = trainer_for(args, base="adamw").create_optimizer()
    assert type(built.base) is torch.optim.AdamW
    assert built.param_groups[0]["lr"] == 1e-3
    assert args.optim == "sgd"


def test_muon_composite_uses_the_trainers_learning_rate(tmp_path):
    args = arguments(tmp_path)
    trainer = trainer_for(args, base="muon", mode="escape")
    trainer.train()
    wrapper = gapaware_of(trainer.optimizer)
    assert isinstance(wrapper.base, Composite)
    assert {type(o) for o in wrapper.leaves()} == {torch.optim.Muon, torch.optim.AdamW}
    assert {group["initial_lr"] for group in wrapper.param_groups} == {1e-3}
    assert all(
        math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    )


def test_own_function_of_the_model(tmp_path):
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    built = trainer_for(arguments(tmp_path), base=sgd, mode="retain").create_optimizer()
    assert isinstance(built, GapAware)
    assert type(built.base) is torch.optim.SGD


def test_own_function_may_return_a_gapaware(tmp_path):
    def wrapped(model):
        return GapAware(torch.optim.SGD(model.parameters(), lr=0.1), mode="escape")

    built = trainer_for(arguments(tmp_path), base=wrapped).create_optimizer()
    assert isinstance(built, GapAware)
    assert not isinstance(built.base, GapAware)
    with pytest.raises(ValueError, match=r"mode: base returned a GapAware"):
        trainer_for(arguments(tmp_path), base=wrapped, mode="retain").create_optimizer()


@pytest.mark.parametrize("base", ["adam", 3, torch.optim.AdamW])
def test_wrong_base_names_the_way_out(tmp_path, base):
    with pytest.raises(ValueError, match=r"base=.*function of the model"):
        optimizer_cls_and_kwargs(arguments(tmp_path), base=base)


def test_a_function_that_returns_no_optimizer_is_named(tmp_path):
    trainer = trainer_for(arguments(tmp_path), base=lambda model: None)
    with pytest.raises(TypeError, match="base returned NoneType: return an optimizer"):
        trainer.create_optimizer()


def test_unknown_option_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match=r"^modus: no option of GapAware; it has .*mode"):
        optimizer_cls_and_kwargs(arguments(tmp_path), modus="auto")


def test_arguments_that_are_not_the_trainers_are_refused():
    with pytest.raises(
        TypeError, match=r"args=\{'lr': 1\}: not a transformers\.TrainingArguments; pass"
    ):
        optimizer_cls_and_kwargs({"lr": 1})


def test_deepspeed_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"args\.deepspeed.*FSDP"):
        optimizer_cls_and_kwargs(args)


# -- training ------------------------------------------------------------------------------------


def test_neutral_run_is_bit_for_bit_that_of_the_trainer_alone(tmp_path):
    args = arguments(tmp_path, warmup_steps=3, lr_scheduler_type="cosine")
    alone = Trainer(model=tiny_bert(), args=args, train_dataset=ROWS)
    alone.train()
    wrapped = trainer_for(args, mode="observe", interval=2)
    wrapped.train()
    assert torch.equal(weights(alone), weights(wrapped))
    assert len(gapaware_of(wrapped.optimizer).history) > 0


def test_plain_trainer_works_without_the_mixin(tmp_path):
    args = arguments(tmp_path)
    trainer = trainer_for(args, cls=Trainer, controller=doubling, interval=2)
    trainer.train()
    assert gapaware_of(trainer.optimizer).scales[0] > 1
    assert not any("effective_learning_rate" in entry for entry in trainer.state.log_history)


def test_mixin_leaves_other_optimizers_alone(tmp_path):
    trainer = GapAwareTrainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    assert gapaware_of(trainer.optimizer) is None
    assert not any("effective_learning_rate" in entry for entry in trainer.state.log_history)


# -- logs ----------------------------------------------------------------------------------------


class Backend(TrainerCallback):
    """What a logging backend such as TensorBoard is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_every_backend_gets_the_effective_learning_rate(tmp_path):
    backend = Backend()
    applied: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            applied.append(self.param_groups[0]["lr"])
            return super().step(closure)

    args = arguments(tmp_path, lr_scheduler_type="linear")
    trainer = trainer_for(
        args,
        base=lambda model: Spy(model.parameters(), lr=1e-2),
        callbacks=[backend],
        controller=doubling,
        interval=2,
    )
    trainer.train()

    logged = [logs for logs in backend.logs if "learning_rate" in logs]
    assert [logs["effective_learning_rate"] for logs in logged] == pytest.approx(applied)
    schedule = [1e-2 * (1 - step / 12) for step in range(12)]
    assert [logs["learning_rate"] for logs in logged] == pytest.approx(schedule)
    assert logged[0]["gapaware/scale"] == 1.0
    assert logged[-1]["gapaware/scale"] > 1.0
    names = {"plateau", "steady", "transition", "forgetting", "undetermined"}
    assert {logs["gapaware/regime"] for logs in logged if "gapaware/regime" in logs} <= names
    assert "gapaware/regime" in logged[-1]
    assert not any("gapaware/scale_min" in logs for logs in logged)

    history = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [e["effective_learning_rate"] for e in history] == pytest.approx(applied)


def test_backends_and_callbacks_get_the_forgetting_risk(tmp_path):
    backend = Backend()
    trainer = trainer_for(
        arguments(tmp_path), mode="observe", interval=2, callbacks=[backend], risk_limit=1e-12
    )
    with pytest.warns(UserWarning, match="risk of forgetting"):
        trainer.train()
    risks = gapaware_of(trainer.optimizer).history.column("risk")
    logged = [logs["gapaware/risk"] for logs in backend.logs if "gapaware/risk" in logs]
    assert len(set(logged)) > 2
    assert list(dict.fromkeys(logged)) == risks


def test_the_trainer_evaluates_and_saves_the_average_and_trains_without_it(tmp_path):
    """It calls eval() and train() of an optimizer; what it saves resumes the trained weights."""

    def wandering(observation):
        return Decision(4.0, average=True)

    def run(folder, resume=None, **overrides):
        args = arguments(tmp_path / folder, learning_rate=1e-2, **overrides)
        average = folder != "without"
        trainer = trainer_for(args, controller=wandering, interval=2, average=average)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    trainer, without = run("with", **evaluated), run("without", **evaluated)

    def losses(trainer):
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    # the first is before there is a decision
    assert losses(trainer)[0] == losses(without)[0]
    assert losses(trainer)[1:] != losses(without)[1:]
    # it ended with an evaluation
    assert not torch.equal(weights(trainer), weights(without))
    gapaware_of(trainer.optimizer).train()
    assert torch.equal(weights(trainer), weights(without))

    resumed = run("with", resume=str(tmp_path / "with" / "checkpoint-8"), **evaluated)
    gapaware_of(resumed.optimizer).train()
    assert torch.equal(weights(resumed), weights(without))
    assert losses(resumed)[-1] == losses(trainer)[-1]


def test_the_best_model_stays_in_place_when_it_is_evaluated(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        max_steps=18,
        load_best_model_at_end=True,
    )
    averaging = {"controller": lambda seen: Decision(4.0, average=True), "interval": 2}
    trainer = trainer_for(args, **averaging)
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-6)


def test_a_scale_is_logged_before_there_is_a_decision(tmp_path):
    trainer = trainer_for(arguments(tmp_path, max_steps=2))
    trainer.train()
    assert trainer.state.log_history[0]["gapaware/scale"] == 1.0


def test_what_to_pull_to_is_found_by_name(tmp_path):
    """The Trainer's own groups have no names; GapAware's need them for an anchor without the new head."""
    model = tiny_bert()
    anchor = {n: p for n, p in model.named_parameters() if not n.startswith("classifier")}
    args = arguments(tmp_path, max_steps=2)
    trainer = trainer_for(args, mode="retain", anchor=anchor)
    trainer.train()
    kept = gapaware_of(trainer.optimizer).starting_weights()
    assert len(kept) == len(anchor) < len(list(model.parameters()))


def test_scales_of_several_groups(tmp_path):
    trainer = trainer_for(arguments(tmp_path), controller=by_group, granularity="group", interval=2)
    trainer.train()
    last = [e for e in trainer.state.log_history if "learning_rate" in e][-1]
    assert last["gapaware/scale_min"] < last["gapaware/scale_max"]
    assert last["gapaware/scale"] in (last["gapaware/scale_min"], last["gapaware/scale_max"])


def test_loss_reaches_the_history_and_its_file(tmp_path):
    log = tmp_path / "run.jsonl"
    trainer = trainer_for(arguments(tmp_path), interval=1, mode="observe", log_to=log)
    trainer.train()
    logged = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    records = list(gapaware_of(trainer.optimizer).history)
    assert records
    for record in records:
        assert record["loss"] == pytest.approx(logged[record["step"]], abs=1e-3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("loss" in line for line in lines)


def test_a_step_that_was_interrupted_does_not_count_in_the_next_run(tmp_path):
    class Stop(TrainerCallback):
        left = 1

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and self.left:
                self.left = 0
                raise KeyboardInterrupt

    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=4)
    trainer = trainer_for(args, mode="observe", interval=1, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = len(gapaware_of(trainer.optimizer).history)
    trainer.train()
    logged = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    losses = gapaware_of(trainer.optimizer).history.column("loss")[before:]
    # the first decision is on a snapshot of before
    assert losses[1] == pytest.approx(logged[0], rel=1e-3)


def test_loss_of_accumulated_batches_is_the_loss_of_the_step(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=6)
    trainer = trainer_for(args, interval=1, mode="observe")
    trainer.train()
    logged = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    records = list(gapaware_of(trainer.optimizer).history)
    assert records
    for record in records:
        assert record["loss"] == pytest.approx(logged[record["step"]], abs=1e-3)


@pytest.mark.parametrize(("batches", "scaled"), [(1, None), (2, False), (2, True)])
def test_distillation_is_added_to_the_loss_of_a_step_in_training_alone(tmp_path, batches, scaled):
    """Counted once a step, however many batches that has and whoever divides their losses."""

    def trained(distillation=None):
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=batches)
        trainer = trainer_for(args)
        trainer.distillation = distillation
        trainer.loss_is_scaled_for_ga = scaled
        trainer.eval_dataset = ROWS[:8]
        trainer.train()
        return trainer

    asked = []

    def three(batch):
        assert "labels" in batch
        asked.append(len(batch["input_ids"]))
        return torch.tensor(3.0, requires_grad=True)

    plain, held = trained(), trained(three)
    assert len(asked) == batches
    first = [trainer.state.log_history[0]["loss"] for trainer in (plain, held)]
    assert first[1] - first[0] == pytest.approx(3.0, abs=1e-3)
    held.evaluate()
    assert len(asked) == batches


@pytest.mark.parametrize(
    ("asked", "given", "settled"),
    [(True, None, False), (True, True, True), (True, False, False), (False, None, None)],
)
def test_with_distillation_ddp_looks_for_no_unused_weights(tmp_path, asked, given, settled):
    """It would not find an old head, which answers outside DDP."""
    args = arguments(tmp_path, ddp_find_unused_parameters=given)
    distillation = (lambda batch: torch.zeros(())) if asked else None
    trainer = GapAwareTrainer(tiny_bert(), args, train_dataset=ROWS, distillation=distillation)
    assert trainer.args.ddp_find_unused_parameters is settled
    # what the Trainer's accelerator wraps the model with: by default, True
    assert trainer.accelerator.ddp_handler.find_unused_parameters is (settled is not False)


def test_distillation_that_cannot_be_called_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"distillation=3: not callable; .*gapaware\.Distillation"):
        GapAwareTrainer(tiny_bert(), arguments(tmp_path), distillation=3)


def test_mixin_in_front_of_another_trainer(tmp_path):
    class Other(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class Mixed(GapAwareTrainerMixin, Other):
        pass

    trainer = trainer_for(arguments(tmp_path, max_steps=3), cls=Mixed)
    trainer.train()
    assert "effective_learning_rate" in trainer.state.log_history[0]


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "muon"])
def test_resumed_run_ends_where_the_unbroken_one_does(tmp_path, base):
    options = {"base": base, "controller": doubling, "interval": 2, "max_scale": 8.0}

    def run(output, resume=None):
        args = arguments(output, save_strategy="steps", save_steps=7, max_steps=14)
        trainer = trainer_for(args, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = run(tmp_path)
    resumed = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-7"))
    assert torch.equal(weights(unbroken), weights(resumed))
    ours, theirs = gapaware_of(unbroken.optimizer), gapaware_of(resumed.optimizer)
    assert theirs.scales == ours.scales
    assert theirs.scales[0] > 1
    tail = [{k: r[k] for k in ("step", "scale", "regime", "loss")} for r in ours.history][-3:]
    assert [{k: r[k] for k in ("step", "scale", "regime", "loss")} for r in theirs.history][
        -3:
    ] == tail


def test_checkpoint_loads_with_weights_only(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=6, max_steps=6)
    trainer_for(args, interval=2).train()
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {"state", "param_groups"} <= set(state)


# -- imports -------------------------------------------------------------------------------------


def test_two_processes_leave_a_plateau_by_the_mean_of_their_losses_and_hold_an_old_head(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), str(Path(__file__).with_name("trainer_worker.py"))]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first.pop("weights"), second.pop("weights"))
    held, other = first.pop("held"), second.pop("held")
    assert held.abs().sum() > 0
    assert torch.equal(held, other)
    # each has batches of its own, and knows the mean loss of both
    assert len(first["loss"]) > 5
    assert first == second
    assert max(first["scale"]) > 6


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("no transformers here")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "gapaware.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'gapaware\[transformers\]'"):
        importlib.import_module("gapaware.huggingface")


def test_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    monkeypatch.delitem(sys.modules, "gapaware.huggingface")
    with pytest.raises(ImportError, match=r"4\.57\.1.*>= 5"):
        importlib.import_module("gapaware.huggingface")


def test_mixin_in_front_of_a_trainer_whose_batches_are_no_dicts(tmp_path):
    class Pairs(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            words, labels = inputs
            return model(input_ids=words, labels=labels).loss

    class Mixed(GapAwareTrainerMixin, Pairs):
        pass

    def pairs(rows):
        return tuple(torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))

    trainer = Mixed(
        tiny_bert(), arguments(tmp_path, max_steps=2), train_dataset=ROWS, data_collator=pairs
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_distillation_of_another_model_is_refused_when_training_begins(tmp_path):
    def answers(model, batch):
        return model(input_ids=batch["input_ids"]).logits

    args = arguments(tmp_path, max_steps=2)
    held = Distillation(tiny_bert(), answers)
    trainer = GapAwareTrainer(tiny_bert(), args, train_dataset=ROWS, distillation=held)
    with pytest.raises(ValueError, match="distillation: is of another model"):
        trainer.train()
    model = tiny_bert()
    held = Distillation(model, answers)
    GapAwareTrainer(model, args, train_dataset=ROWS, distillation=held).train()
