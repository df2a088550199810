"""A training from a model folder to a model folder, or to a LoRA adapter."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from clex_convert.errors import one_line
from clex_convert.model_files import read_config
from clex_convert.transformers_folder import load_tokenizer, name_rope_as_before_5
from clex_train.data import collate, load_sequences
from clex_train.errors import TrainError
from clex_train.layer import ClexLayer, ClexSettings
from clex_train.model import add_clex, clex_layer, load_model
from clex_train.trainer import ClexTrainer, Feeding, writing_folder

_ARGUMENTS = "arguments.json"
# What a resumed training may say differently.
_FREE = ("report", "resume", "save_steps", "log_steps")


@dataclass(frozen=True)
class TrainResult:
    """What a training left.

    Attributes:
        path: the saved folder.
        steps: optimizer steps, those before a resumption included.
        loss: mean over the steps of the last report, or over all of them where there was none.
        seconds: it took, without those before a resumption.
        notes: what to know about it.
    """

    path: Path
    steps: int
    loss: float
    seconds: float
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """TrainingArguments leave settings for accelerate in the environment, where the next ones would find them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@_environment_kept()
def train(
    model: Path,
    output: Path,
    *,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    streaming: bool = False,
    length: int | None = None,
    original_context: int | None = None,
    max_factor: int | None = None,
    param_factor: int | None = None,
    act: str | None = None,
    time_dt: float | None = None,
    log_scale: bool | None = None,
    positions: str = "random",
    factors_per_batch: int = 1,
    no_clex: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    from_scratch: bool = False,
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
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_target: Sequence[str] = (),
    merge: bool = False,
    save_steps: int | None = None,
    resume: bool = False,
    log_steps: int = 10,
    trainer_args: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains a causal language model with a CLEX layer on short sequences spread over the positions of long ones.

    Source of the procedure: CLEX (arXiv 2310.16450) and the authors' code. Checkpoints go to a folder beside the
    output, ``OUT.checkpoints``, which is removed when the output is complete.

    Args:
        model: folder with config.json, weights and tokenizer.
        output: folder that is made: a plain Hugging Face model, or with `lora_rank` an adapter in peft's format.
        text: UTF-8 files, a document each.
        dataset: what load_sequences takes.
        streaming: tokenize while training; needs `max_steps`.
        length: n, tokens of a training sequence; L by default.
        original_context: L, tokens of the original context; the config's max_position_embeddings by default.
        max_factor: largest scaling factor t; 16 by default.
        param_factor: p, the ODE's hidden size is p times the rotary dimension; 1 by default.
        act: ``tanh`` (the default) or ``silu``.
        time_dt: step of the integration in units of t; 0.01 by default.
        log_scale: multiply queries by log(n) / log(L); off by default.
        positions: see draw_positions.
        factors_per_batch: how many draws of t share a batch.
        no_clex: train the model as it is; its positions are drawn all the same.
        rope_scaling: RoPE scaling of transformers in place of the config's own, for `no_clex`.
        from_scratch: random weights in place of the model's.
        learning_rate: peak, of AdamW.
        ode_learning_rate: of the CLEX layer; that of the model by default; 0 keeps it as it is.
        schedule: transformers' name of the learning rate's course.
        warmup_ratio: part of the steps in which the learning rate rises.
        weight_decay: of the model's matrices; the CLEX layer has none.
        batch_size: sequences per device and pass.
        gradient_accumulation: passes per step.
        max_steps: optimizer steps; otherwise `epochs` decide.
        epochs: how often the text is read.
        seed: of everything random.
        bf16: autocast to bfloat16, where the CLEX layer stays in float32; by default with a GPU that has it.
        attention: transformers' name of the attention to compute, ``sdpa`` or ``eager``.
        gradient_checkpointing: compute activations again instead of keeping them.
        lora_rank: train an adapter of this rank beside the CLEX layer, instead of all weights.
        lora_alpha: of the adapter; twice its rank by default.
        lora_target: modules that get an adapter; all linear layers but the output by default.
        merge: save the model with the adapter merged into it instead of the adapter.
        save_steps: steps between checkpoints; none by default.
        resume: continue from the last checkpoint, with the same arguments.
        log_steps: steps between reports.
        trainer_args: JSON file of further TrainingArguments, such as fsdp and deepspeed.
        report: gets lines of progress.

    Raises:
        TrainError: input that cannot be used, or a training that failed.
        ConvertError: files that cannot be read or written.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    given = {name: value for name, value in locals().items() if name not in _FREE}
    started = time.monotonic()
    checkpoints = _Checkpoints(output, json.loads(json.dumps(given, default=str)))
    last = checkpoints.find(resume)
    if not text and dataset is None:
        raise TrainError("there is nothing to train on; give --text or --dataset")
    if streaming and max_steps is None:
        raise TrainError("a stream has no known end; give --max-steps")
    if lora_rank is None and (merge or lora_alpha or lora_target):
        raise TrainError("--lora-alpha, --lora-target and --merge need --lora-rank")
    if no_clex and ode_learning_rate is not None:
        raise TrainError("--ode-learning-rate is of a CLEX layer, which --no-clex leaves out")
    if rope_scaling is not None and not no_clex:
        raise TrainError("--rope-scaling is for training without a CLEX layer; pass --no-clex")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() if bf16 is None else bf16
    arguments = _arguments(
        trainer_args,
        output_dir=str(checkpoints.folder),
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        **_warmup(warmup_ratio),
        weight_decay=weight_decay,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        max_steps=-1 if max_steps is None else max_steps,
        num_train_epochs=epochs,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=gradient_checkpointing,
        # the other kind does not record what a layer takes as keyword arguments
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=2,
        logging_steps=log_steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # every process draws positions of its own, and the layer is no part of what DDP looks for
        ddp_find_unused_parameters=False,
    )
    set_seed(seed)
    tokenizer = _load_tokenizer(model)
    network = load_model(
        model,
        dtype=torch.bfloat16 if bf16 and lora_rank is not None and not merge else torch.float32,
        attention=attention,
        scaling=rope_scaling,
        from_scratch=from_scratch,
    )
    asked = {"max_factor": max_factor, "param_factor": param_factor, "act": act, "time_dt": time_dt}
    asked = {key: value for key, value in {**asked, "log_scale": log_scale}.items() if value is not None}
    layer = _prepare_layer(network, asked, original_context, no_clex)
    if layer is not None:
        original, largest = layer.context, layer.settings.max_factor
        layer.requires_grad_(ode_learning_rate != 0)
    else:
        original, largest = original_context or network.config.max_position_embeddings, max_factor or 16
    n = length or original
    embeddings: Any = network.get_input_embeddings()
    trained: PreTrainedModel | peft.PeftModel = network
    if lora_rank is not None:
        trained = _with_adapter(network, layer, lora_rank, lora_alpha or 2 * lora_rank, lora_target)
    trainer = ClexTrainer(
        trained,
        arguments,
        feeding=Feeding(positions, original, largest, factors_per_batch, seed),
        ode_learning_rate=ode_learning_rate,
        report=report,
        data_collator=partial(collate, vocabulary=embeddings.num_embeddings),
        train_dataset=load_sequences(text, dataset, tokenizer, n, streaming=streaming, seed=seed),
        processing_class=tokenizer,
    )
    first = trainer.is_world_process_zero()
    if first:
        checkpoints.begin()
    try:
        with trainer.stop.listening():
            done = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.stop.saved:
            raise KeyboardInterrupt(f"saved a checkpoint at step {done.global_step}; --resume continues from there")
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if first:
            if merge:
                trained, state = trained.merge_and_unload(), None  # pyright: ignore
            _save(trained, layer, tokenizer, output, state)
    except KeyboardInterrupt as interrupt:
        saved = "its checkpoints are kept for --resume" if any(checkpoints.folder.glob("checkpoint-*")) else ""
        raise KeyboardInterrupt(*(interrupt.args or (saved,))) from None
    finally:
        if first:
            checkpoints.end(complete=output.is_dir())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = losses[-1] if losses else done.training_loss
    return TrainResult(output, done.global_step, loss, time.monotonic() - started)


class _Checkpoints:
    """The folder of checkpoints beside an output, with the arguments that they belong to."""

    def __init__(self, output: Path, arguments: dict[str, Any]) -> None:
        self.output, self.arguments = output, arguments
        self.folder = output.parent / f"{output.name}.checkpoints"

    def find(self, resume: bool) -> Path | None:
        """The last complete checkpoint, where one is wanted."""
        if self.output.exists() or self.output.is_symlink():
            raise TrainError(f"{self.output}: already exists; choose another name or remove it")
        if not self.output.parent.is_dir():
            raise TrainError(f"{self.output}: the folder {self.output.parent} does not exist; create it first")
        # The trainer writes its state last.
        found = [path.parent for path in self.folder.glob("checkpoint-*/trainer_state.json")]
        last = max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)
        if last is not None and not resume:
            raise TrainError(f"{self.folder}: holds an unfinished training; pass --resume to continue it, or remove it")
        if not resume:
            return None
        if not self.folder.is_dir():
            raise TrainError(f"{self.folder}: is not there; no training of {self.output} was begun")
        if last is None:
            return None  # it was killed before the first
        said = read_config(self.folder / _ARGUMENTS)
        for name, value in self.arguments.items():
            if said.get(name) != value:
                raise TrainError(
                    f"{self.folder}: the training was begun with {name} = {said.get(name)}, not {value}; "
                    "continue it with the same arguments"
                )
        return last

    def begin(self) -> None:
        with writing_folder(self.folder):
            self.folder.mkdir(exist_ok=True)
            (self.folder / _ARGUMENTS).write_text(json.dumps(self.arguments, indent=1), encoding="utf-8")

    def end(self, *, complete: bool) -> None:
        """Removes the folder, unless there is a checkpoint in it that is still of use."""
        if complete or not any(self.folder.glob("checkpoint-*")):
            shutil.rmtree(self.folder, ignore_errors=True)


def _arguments(path: Path | None, **values: Any) -> TrainingArguments:
    more = {} if path is None else read_config(path)
    try:
        return TrainingArguments(**{**values, **more})
    except (TypeError, ValueError, ImportError) as error:
        where = "" if path is None else f"{path}: "
        raise TrainError(f"{where}transformers refuses the training arguments ({one_line(error)})") from None


def _warmup(ratio: float) -> dict[str, float]:
    # Release 5 takes both by one name: a number below 1 is a part of the steps.
    if "warmup_ratio" in {field.name for field in fields(TrainingArguments)}:
        return {"warmup_ratio": ratio}
    return {"warmup_steps": min(ratio, math.nextafter(1, 0))}


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.exists():
        raise TrainError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise TrainError(f"{folder}: not a model folder, it has no config.json")
    try:
        return load_tokenizer(folder)
    except Exception as error:  # of the tokenizers' own packages
        raise TrainError(f"{folder}: holds no tokenizer that transformers can load ({one_line(error)})") from None


def _prepare_layer(
    model: PreTrainedModel, asked: dict[str, Any], original_context: int | None, no_clex: bool
) -> ClexLayer | None:
    """The layer that is trained, new or the model's own with the settings that were asked for."""
    layer = clex_layer(model)
    if no_clex:
        if layer is not None:
            raise TrainError("the model has a CLEX layer; --no-clex is for models without")
        return None
    if layer is None:
        return add_clex(model, ClexSettings(**asked), original_context)
    for key in ("param_factor", "act"):
        if asked.get(key) not in (None, getattr(layer.settings, key)):
            raise TrainError(
                f"the model's CLEX layer has {key} = {getattr(layer.settings, key)}, which is not to change"
            )
    if original_context not in (None, layer.context):
        raise TrainError(f"the model's CLEX layer is for an original context of {layer.context} tokens")
    layer.settings = replace(layer.settings, **asked)
    layer.settings.put_into(model.config)
    return layer


def _with_adapter(
    model: PreTrainedModel, layer: ClexLayer | None, rank: int, alpha: float, target: Sequence[str]
) -> peft.PeftModel:
    trainable = layer is not None and layer.proj_func.ode_up_proj.requires_grad
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType], fractions are fine
        target_modules=list(target) or "all-linear",
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise TrainError(f"peft cannot add the adapter ({one_line(error)})") from None
    if layer is not None:
        layer.requires_grad_(trainable)  # peft froze it
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def _save(
    model: PreTrainedModel | peft.PeftModel,
    layer: ClexLayer | None,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    state: Any,
) -> None:
    temporary = output.parent / f".{output.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a training that was killed
    try:
        with writing_folder(output):
            model.save_pretrained(str(temporary), state_dict=state)
            tokenizer.save_pretrained(temporary)
            config = temporary / "config.json"
            if isinstance(model, peft.PeftModel):
                model.base_model.model.config.save_pretrained(temporary)  # pyright: ignore
                if layer is not None:
                    prefix = f"base_model.model.{model.base_model.model.base_model_prefix}.clex_layer."  # pyright: ignore
                    _add_layer(temporary / "adapter_model.safetensors", layer, prefix)
            name_rope_as_before_5(config)
            temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _add_layer(path: Path, layer: ClexLayer, prefix: str) -> None:
    tensors = load_file(path)
    for name, tensor in layer.state_dict().items():
        tensors[prefix + name] = tensor.cpu().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
