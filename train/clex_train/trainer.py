"""transformers' Trainer for sequences with drawn positions, and a layer with a learning rate of its own."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clex_train import TrainError
from clex_train.layer import ClexLayer
from clex_train.model import clex_layer
from clex_train.positions import draw_positions, factor_for
from clex_train.saving import writing_folder

# Beside the adapter of a LoRA training, whose checkpoints hold nothing else of the model.
_ODE_FILE = "clex_layer.safetensors"


@dataclass(frozen=True)
class PositionSampler:
    """How the positions of a batch are drawn; see draw_positions.

    Attributes:
        positions: their kind.
        original: L in tokens.
        max_factor: largest scaling factor t.
        factors_per_batch: how many different draws of t share a batch.
        seed: of all draws.
        span: tokens that a sequence stands for at t = 1, None for its own.
    """

    positions: str
    original: int
    max_factor: int
    factors_per_batch: int
    seed: int
    span: int | None = None

    def draw(self, rows: int, length: int, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions float32 [rows, length] and scaling factors int64 [rows]; the same for the same `key`."""
        seed = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        if self.positions == "none":
            factors = torch.tensor([factor_for(length, self.original, self.max_factor)])
        else:
            factors = torch.randint(1, self.max_factor + 1, (self.factors_per_batch,), generator=generator)
        factors = factors.repeat(-(-rows // len(factors)))[:rows]
        common = generator, self.span
        drawn = [draw_positions(self.positions, length, self.original, int(t), *common) for t in factors]
        return torch.stack(drawn), factors


class ClexTrainer(Trainer):
    """Draws the positions of each batch by the number of its step, so that a resumed training draws the same."""

    def __init__(
        self,
        *args: Any,
        sampler: PositionSampler,
        ode_learning_rate: float | None,
        ode_weight_decay: float = 0.0,
        report: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        """Takes what Trainer takes, and:

        Args:
            sampler: of positions.
            ode_learning_rate: of the CLEX layer; None for the model's.
            ode_weight_decay: of its second matrix, which is zero where the layer is its closed form.
            report: gets a line every few steps.
        """
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Report(report))
        self.stop = _Stop(self)
        self.add_callback(self.stop)
        self.sampler, self.ode_learning_rate, self.ode_weight_decay = sampler, ode_learning_rate, ode_weight_decay
        self._step, self._part = -1, 0
        self._check_sharding()
        if self.accelerator.distributed_type == DistributedType.FSDP:
            self._spare_from_fsdp()

    def _check_sharding(self) -> None:
        for name, asked, found in (
            ("fsdp", self.args.fsdp, self.is_fsdp_enabled),
            ("deepspeed", self.args.deepspeed, self.is_deepspeed_enabled),
        ):
            if asked and not found:
                raise TrainError(
                    f"`trainer_args` asks for {name}, which accelerate passes by on this machine's CPUs; leave it out"
                )
        plugin: Any = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and self.args.bf16 and self._layer is not None:
            raise TrainError(
                "DeepSpeed's bf16 takes no CLEX layer, which is float32; give `bf16=False` and torch_autocast in "
                "DeepSpeed's config, as in examples/deepspeed_zero3.json"
            )
        own = [name for name in ("optimizer", "scheduler") if plugin is not None and name in plugin.deepspeed_config]
        if own and self._layer is not None:
            raise TrainError(
                f"DeepSpeed's {' and '.join(own)} would give the CLEX layer the model's learning rate; leave it out of "
                "DeepSpeed's config (AdamW is used anyway; its WarmupLR is nearest to `schedule` constant_with_warmup)"
            )

    def _spare_from_fsdp(self) -> None:
        """Keeps from FSDP's mixed precision what bfloat16 is too coarse for: positions, the layer and the loss.

        The layer is small, so every process has a copy.
        """
        plugin: Any = self.accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None:
            exact = {"cast_forward_inputs": False, "cast_root_forward_inputs": False, "output_dtype": None}
            known = {field.name for field in fields(policy)}  # FSDP's first and second version differ
            changes: dict[str, Any] = {name: value for name, value in exact.items() if name in known}
            plugin.mixed_precision_policy = replace(policy, **changes)
        layer = self._layer
        if layer is not None:
            layer.to(self.args.device)
            plugin.ignored_modules = [layer]
            for weight in layer.parameters():
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(_average_gradient)

    @property
    def _layer(self) -> ClexLayer | None:
        return None if self.model is None else clex_layer(self.model)

    def create_optimizer(self) -> Any:
        """As Trainer does it, with the CLEX layer's matrices in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer, layer = super().create_optimizer(), self._layer
        ode = [] if layer is None else [weight for weight in layer.parameters() if weight.requires_grad]
        if ode:
            own = {id(weight) for weight in ode}
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if id(weight) not in own]
            rate = self.args.learning_rate if self.ode_learning_rate is None else self.ode_learning_rate
            decays = {id(layer.proj_func.ode_down_proj): self.ode_weight_decay} if layer is not None else {}
            for weight in ode:
                optimizer.add_param_group({"params": [weight], "lr": rate, "weight_decay": decays.get(id(weight), 0.0)})
        return optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds positions and scaling factors to a batch.

        Raises:
            TrainError: the loss is not finite.
        """
        self._part = self._part + 1 if self._step == self.state.global_step else 0
        self._step = self.state.global_step
        ids, key = inputs["input_ids"], (self._step, self._part, self.args.process_index)
        positions, factors = self.sampler.draw(*ids.shape, *key)
        # transformers takes gaps between positions for the borders of packed documents, unless there is a mask; padding
        # is behind the tokens, where none of them sees it
        inputs |= {"position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self._layer is not None:
            inputs["clex_factors"] = factors
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {float(loss)} at step {self._step + 1}; a smaller learning rate, more warm-up or float32 "
                "(`bf16=False`) may help"
            )
        return loss

    # checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with writing_folder(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self._layer is not None and hasattr(self.model, "peft_config"):
            folder = Path(output_dir or str(self.args.output_dir))
            save_file(
                {name: tensor.contiguous() for name, tensor in self._layer.state_dict().items()}, folder / _ODE_FILE
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / _ODE_FILE
        if self._layer is not None and path.is_file():
            self._layer.load_state_dict(load_file(path))


def _average_gradient(weight: torch.Tensor) -> None:
    assert weight.grad is not None
    torch.distributed.all_reduce(weight.grad)
    weight.grad /= torch.distributed.get_world_size()


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
    """Ctrl-C and requests to end the process let the step end, and save a checkpoint; a second one ends at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.asked, self.saved = trainer, False, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            for one in numbers:
                signal.signal(one, signal.default_int_handler)

        before = [signal.signal(one, ask) for one in numbers]
        try:
            yield
        finally:
            for one, handler in zip(numbers, before, strict=True):
                signal.signal(one, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:  # all or none, lest some wait for the others
            asked = torch.tensor(float(self.asked), device=args.device)
            self.asked = bool(self.trainer.accelerator.reduce(asked, "sum") > 0)  # pyright: ignore
        if self.asked and state.global_step < state.max_steps:
            self.saved = control.should_training_stop = control.should_save = True
