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

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
from clex_train.positions import draw_positions


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

    def draw(self, rows: int, length: int, *key: int) -> tuple[torch.Tensor, list[int]]:
        """Positions float32 [rows, length] and the rows' scaling factors; the same for the same `key`."""
        # hash() of integers alone does not change between processes
        generator = torch.Generator().manual_seed(hash((self.seed, *key)) & (2**63 - 1))
        draws = torch.randint(1, self.max_factor + 1, (min(self.factors_per_batch, rows),), generator=generator)
        factors = [int(draws[row % len(draws)]) for row in range(rows)]
        drawn = [draw_positions(self.positions, length, self.original, t, generator) for t in factors]
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
    no_clex: bool = False,
    from_scratch: bool = False,
    positions: str = "random",
    max_factor: int = 16,
    factors_per_batch: int = 1,
    attention: str = "sdpa",
    learning_rate: float = 2e-5,
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
    network = _load_model(model, from_scratch=from_scratch, attention=attention)
    original = original_context or network.config.max_position_embeddings
    rows = load_sequences(text, dataset, tokenizer, length, streaming=streaming, seed=seed)
    settings: dict[str, Any] = {
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
        arguments = TrainingArguments(**{**settings, **(trainer_args or {})})
    except (TypeError, ValueError) as error:
        raise TrainError(f"transformers refuses the training arguments ({one_line(error)})") from None
    feeding = Feeding(positions, original, max_factor, factors_per_batch, seed)
    trainer = _Trainer(
        network,
        arguments,
        feeding=feeding,
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

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments, *, feeding: Feeding, **rest: Any) -> None:
        super().__init__(model, arguments, **rest)
        self.feeding = feeding
        self.stopped = False
        self._step, self._part = -1, 0

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self._part = self._part + 1 if self._step == self.state.global_step else 0
        self._step = self.state.global_step
        if self.feeding.positions != "none":
            key = self._step, self._part, self.args.process_index
            drawn, _ = self.feeding.draw(*inputs["input_ids"].shape, *key)
            # transformers takes gaps between positions for the borders of packed documents, unless there is a mask
            inputs |= {"position_ids": drawn, "attention_mask": torch.ones_like(inputs["input_ids"])}
        inputs["use_cache"] = False
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


def _load_model(folder: Path, *, from_scratch: bool, attention: str) -> PreTrainedModel:
    try:
        if from_scratch:
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), attn_implementation=attention, dtype=torch.float32
            )
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # of every format it reads
        raise TrainError(f"{folder}: transformers cannot load the model ({one_line(error)})") from None


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        with writing(output):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
