"""Training on transformers' Trainer: what is trained, how a step is fed, and what is left on the disk."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from clex_convert.errors import one_line, writing
from clex_train.data import collate, load_sequences
from clex_train.errors import TrainError
from clex_train.layer import ClexSettings
from clex_train.model import add_clex, clex_layer, load_model
from clex_train.positions import draw_positions, factor_for


@dataclass(frozen=True)
class TrainResult:
    """What a training left.

    Attributes:
        path: the saved folder.
        steps: optimizer steps, those before a resumption included.
        loss: mean over the steps since the last report but one.
        seconds: it took, without those before a resumption.
    """

    path: Path
    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Feeding:
    """How the positions of a batch are drawn; see draw_positions."""

    positions: str
    original: int
    max_factor: int
    factors_per_batch: int
    seed: int
    clex: bool

    def draw(self, rows: int, length: int, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions float32 [rows, length] and scaling factors int64 [rows]; the same for the same `key`."""
        seed = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        if self.positions == "none":
            factors = torch.tensor([factor_for(length, self.original, self.max_factor)])
        else:
            factors = torch.randint(1, self.max_factor + 1, (self.factors_per_batch,), generator=generator)
        factors = factors.repeat(-(-rows // len(factors)))[:rows]
        drawn = [draw_positions(self.positions, length, self.original, int(t), generator) for t in factors]
        return torch.stack(drawn), factors


def train(
    model: Path,
    output: Path,
    *,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    streaming: bool = False,
    length: int,
    original_context: int | None = None,
    max_factor: int = 16,
    param_factor: int = 1,
    act: str = "tanh",
    time_dt: float = 0.01,
    log_scale: bool = False,
    positions: str = "random",
    factors_per_batch: int = 1,
    no_clex: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    from_scratch: bool = False,
    attention: str = "sdpa",
    learning_rate: float = 2e-5,
    ode_learning_rate: float | None = None,
    schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    batch_size: int = 1,
    gradient_accumulation: int = 1,
    max_steps: int | None = None,
    epochs: float = 1.0,
    seed: int = 0,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    save_steps: int | None = None,
    resume: bool = False,
    log_steps: int = 10,
    trainer_args: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains a causal language model and saves it as a plain Hugging Face folder."""
    started = time.monotonic()
    checkpoints = output.parent / f"{output.name}.checkpoints"
    if os.path.lexists(output):
        raise TrainError(f"{output}: already exists; choose another name")
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None and not resume:
        raise TrainError(f"{checkpoints}: holds an unfinished training; pass --resume to continue it, or remove it")
    if resume and last is None:
        raise TrainError(f"{checkpoints}: holds no checkpoint to resume from")
    set_seed(seed)
    tokenizer = _load_tokenizer(model)
    scaling = None if rope_scaling is None else dict(rope_scaling)
    network = load_model(model, attention=attention, rope_scaling=scaling, from_scratch=from_scratch)
    layer = clex_layer(network)
    if no_clex and layer is not None:
        raise TrainError(f"{model}: has a CLEX layer, which --no-clex cannot take away")
    if layer is None and not no_clex:
        settings = ClexSettings(max_factor, param_factor, act, time_dt, log_scale)
        layer = add_clex(network, settings, original_context)
    if layer is not None:
        original, max_factor = layer.context, layer.settings.max_factor
        layer.requires_grad_(ode_learning_rate != 0)
    else:
        original = original_context or network.config.max_position_embeddings
    rows = load_sequences(text, dataset, tokenizer, length, streaming=streaming, seed=seed)
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "learning_rate": learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "max_steps": -1 if max_steps is None else max_steps,
        "num_train_epochs": epochs,
        "seed": seed,
        "bf16": torch.cuda.is_available() if bf16 is None else bf16,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no" if save_steps is None else "steps",
        "save_steps": save_steps or 500,
        "save_total_limit": 2,
        "logging_steps": log_steps,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        arguments = TrainingArguments(**{**values, **(trainer_args or {})})
    except (TypeError, ValueError) as error:
        raise TrainError(f"transformers refuses the training arguments ({one_line(error)})") from None
    feeding = Feeding(positions, original, max_factor, factors_per_batch, seed, layer is not None)
    trainer = _Trainer(
        network,
        arguments,
        feeding=feeding,
        ode_learning_rate=ode_learning_rate,
        data_collator=collate,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[_Report(report)],
    )
    trainer.remove_callback(PrinterCallback)
    with _stopping(trainer), writing(checkpoints):
        trainer.train(resume_from_checkpoint=last)
    if trainer.stopped:
        raise KeyboardInterrupt
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        _save(network, tokenizer, output)
        shutil.rmtree(checkpoints, ignore_errors=True)
    steps = trainer.state.global_step
    return TrainResult(output, steps, losses[-1] if losses else math.nan, time.monotonic() - started)


class _Trainer(Trainer):
    """Draws the positions of each batch, by the number of its step, and stops at a loss that is not finite."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        *,
        feeding: Feeding,
        ode_learning_rate: float | None,
        **rest: Any,
    ) -> None:
        super().__init__(model, arguments, **rest)
        self.feeding, self.ode_learning_rate = feeding, ode_learning_rate
        self.stopped = False
        self._step, self._part = -1, 0

    def create_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer()
        layer = clex_layer(self.model)
        ode = [] if layer is None else [weight for weight in layer.parameters() if weight.requires_grad]
        if ode:
            own = {id(weight) for weight in ode}
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if id(weight) not in own]
            rate = self.args.learning_rate if self.ode_learning_rate is None else self.ode_learning_rate
            optimizer.add_param_group({"params": ode, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self._part = self._part + 1 if self._step == self.state.global_step else 0
        self._step = self.state.global_step
        ids, key = inputs["input_ids"], (self._step, self._part, self.args.process_index)
        positions, factors = self.feeding.draw(*ids.shape, *key)
        # transformers takes gaps between positions for the borders of packed documents, unless there is a mask
        inputs |= {"position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self.feeding.clex:
            inputs["clex_factors"] = factors
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {float(loss)} at step {self._step + 1}; a smaller --learning-rate, more warm-up or "
                "float32 (--no-bf16) may help"
            )
        return loss


class _Report(TrainerCallback):
    """One line for every few steps."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.since, self.step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.since, self.step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        seconds = (now - self.since) / max(1, state.global_step - self.step)
        self.since, self.step = now, state.global_step
        self.report(
            f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, "
            f"learning rate {logs['learning_rate']:.3g}, {seconds:.3g} s/step"
        )


class _Stop(TrainerCallback):
    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_training_stop = control.should_save = True


@contextlib.contextmanager
def _stopping(trainer: _Trainer) -> Iterator[None]:
    """Ctrl-C and requests to end the process let the step end, and save a checkpoint; a second one ends at once."""
    stop = _Stop()
    trainer.add_callback(stop)
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        stop.asked = trainer.stopped = True
        for one in signals:
            signal.signal(one, signal.default_int_handler)

    before = [signal.signal(one, ask) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of the tokenizers' own packages
        raise TrainError(f"{folder}: holds no tokenizer that transformers can load ({one_line(error)})") from None


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        with writing(output):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
