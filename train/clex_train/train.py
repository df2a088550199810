"""A training from a model folder to a model folder, or to a LoRA adapter."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from clex_convert.model_files import read_config
from clex_convert.transformers_folder import load_tokenizer
from clex_local.commands.options import takes_options
from clex_local.errors import one_line
from clex_train import TrainError
from clex_train.chat import load_conversations
from clex_train.checkpoints import Checkpoints
from clex_train.data import collate, load_sequences
from clex_train.layer import ClexLayer, ClexSettings
from clex_train.model import add_clex, clex_layer, load_model
from clex_train.options import TrainOptions
from clex_train.saving import save_model
from clex_train.trainer import ClexTrainer, PositionSampler


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


@takes_options(TrainOptions)
def train(model: Path, output: Path, options: TrainOptions) -> TrainResult:
    """Trains a causal language model with a CLEX layer on short sequences spread over the positions of long ones.

    Source of the procedure: CLEX (arXiv 2310.16450) and the authors' code. Checkpoints go to a folder beside the
    output, ``OUT.checkpoints``, which is removed when the output is complete.

    Args:
        model: folder with config.json, weights and tokenizer.
        output: folder that is made: a plain Hugging Face model, with `lora_rank` or `lora` an adapter of peft.
        {options}

    Raises:
        TrainError: input that cannot be used, or a training that failed.
        ConvertError: files that cannot be read or written.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    started = time.monotonic()
    checkpoints = Checkpoints(output, options.identity(model, output))
    last = checkpoints.find(options.resume)
    options.check()
    with _environment_kept():
        training = _Training.prepare(model, checkpoints.folder, options)
        steps, loss = training.run(output, checkpoints, last, merge=options.merge)
    return TrainResult(output, steps, loss, time.monotonic() - started)


@dataclass(frozen=True)
class _Training:
    """What takes part in a training.

    Attributes:
        model: that of transformers, or peft's around it.
        layer: its CLEX layer, unless it is trained without.
        tokenizer: the model's.
        trainer: holds the data and the positions.
        whole: loads the model once more, in float32.
    """

    model: PreTrainedModel | peft.PeftModel
    layer: ClexLayer | None
    tokenizer: PreTrainedTokenizerBase
    trainer: ClexTrainer
    whole: Callable[[], PreTrainedModel]

    @classmethod
    def prepare(cls, folder: Path, checkpoints: Path, options: TrainOptions) -> _Training:
        bf16 = _computes_in_bfloat16() if options.bf16 is None else options.bf16
        arguments = _training_arguments(checkpoints, bf16, options)
        set_seed(options.seed)
        tokenizer = _load_tokenizer(folder)
        # What is frozen need not be cast at every step; random weights are nowhere else.
        halved = bf16 and options.adapts and not options.from_scratch
        network = _load_network(folder, torch.bfloat16 if halved else torch.float32, options)
        layer = _prepare_layer(network, options)
        sampler = _position_sampler(network, layer, options)
        embeddings: Any = network.get_input_embeddings()
        trained = _with_adapter(network, layer, options) if options.adapts else network
        if bf16:
            _spare_casts(trained)
        rows = _load_rows(tokenizer, options.length or sampler.original, options)
        with _wording(options.trainer_args):
            trainer = ClexTrainer(
                trained,
                arguments,
                sampler=sampler,
                ode_learning_rate=options.ode_learning_rate,
                ode_weight_decay=options.ode_weight_decay,
                report=options.report,
                data_collator=partial(collate, vocabulary=embeddings.num_embeddings),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        return cls(trained, layer, tokenizer, trainer, partial(_load_network, folder, torch.float32, options))

    def run(self, output: Path, checkpoints: Checkpoints, last: Path | None, *, merge: bool) -> tuple[int, float]:
        """Trains and saves the result; the number of steps, and the loss."""
        first = self.trainer.is_world_process_zero()
        if first:
            checkpoints.begin()
        try:
            with self.trainer.stop.listening():
                done = self.trainer.train(resume_from_checkpoint=None if last is None else str(last))
            if self.trainer.stop.saved:
                raise KeyboardInterrupt(
                    f"saved a checkpoint at step {done.global_step}; `resume=True` continues from there"
                )
            state = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
            if first:
                model, state = (self._merged(state), None) if merge else (self.model, state)
                save_model(model, self.layer, self.tokenizer, output, state, bf16=self.trainer.args.bf16)
        except KeyboardInterrupt as interrupt:
            saved = "its checkpoints are kept for `resume=True`" if checkpoints.exist else ""
            raise KeyboardInterrupt(*(interrupt.args or (saved,))) from None
        finally:
            if first:
                checkpoints.end(complete=output.is_dir())
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        return done.global_step, losses[-1] if losses else done.training_loss

    def _merged(self, state: Any) -> PreTrainedModel:
        """The model with its adapter in it, made anew: one that is sharded cannot be merged into, and what is frozen
        may be in bfloat16, where the folder has more.
        """
        trained: Any = self.model
        unset_hf_deepspeed_config()  # or DeepSpeed would divide this one, too, and wait for the others
        network, config = self.whole(), trained.base_model.model.config
        if self.layer is not None and clex_layer(network) is None:
            add_clex(network, self.layer.settings, self.layer.context)
        halved = {
            name
            for name, weight in trained.named_parameters()
            if weight.dtype == torch.bfloat16 and not weight.requires_grad
        }
        whole: Any = peft.get_peft_model(network, trained.peft_config[trained.active_adapter])
        whole.load_state_dict({name: tensor for name, tensor in state.items() if name not in halved}, strict=False)
        network.config = config
        return whole.merge_and_unload()


def _training_arguments(checkpoints: Path, bf16: bool, options: TrainOptions) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    values: dict[str, Any] = dict(
        output_dir=str(checkpoints),
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        **_warmup(options.warmup_ratio),
        weight_decay=options.weight_decay,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        num_train_epochs=options.epochs,
        seed=options.seed,
        bf16=bf16,
        use_cpu=not gpu,
        gradient_checkpointing=options.gradient_checkpointing,
        # the other kind does not record what a layer takes as keyword arguments
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        # every process draws positions of its own, and the layer is no part of what DDP looks for
        ddp_find_unused_parameters=False,
    )
    path = options.trainer_args
    more = {} if path is None else read_config(path)
    if more.get("deepspeed"):
        values["use_cpu"] = False  # accelerate passes DeepSpeed by where it is told of a CPU
    if isinstance(more.get("fsdp_config"), dict) and "version" in more["fsdp_config"]:
        os.environ["FSDP_VERSION"] = str(more["fsdp_config"]["version"])  # transformers 4 leaves it to accelerate
    with _wording(path):
        return TrainingArguments(**{**values, **more})


@contextlib.contextmanager
def _wording(path: Path | None) -> Iterator[None]:
    """Words the refusal of transformers to take the arguments of a training."""
    try:
        yield
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        where = "" if path is None else f"{path}: "
        raise TrainError(f"{where}transformers refuses the training arguments ({one_line(error)})") from None


def _warmup(ratio: float) -> dict[str, float]:
    # Release 5 takes both by one name: a number below 1 is a part of the steps.
    if "warmup_ratio" in {field.name for field in fields(TrainingArguments)}:
        return {"warmup_ratio": ratio}
    return {"warmup_steps": min(ratio, math.nextafter(1, 0))}


def _load_rows(tokenizer: PreTrainedTokenizerBase, length: int, options: TrainOptions) -> Any:
    """What is trained on."""
    chats = load_conversations(options.chat, tokenizer, length, options.report) if options.chat else []
    if chats and not options.text and options.dataset is None:
        return chats
    text = load_sequences(
        options.text, options.dataset, tokenizer, length, streaming=options.streaming, seed=options.seed
    )
    if not chats:
        return text
    assert isinstance(text, Dataset)  # options.check() refuses a stream
    count = min(len(chats), len(text))
    return [*chats, *text.select([k * len(text) // count for k in range(count)])]


def _computes_in_bfloat16() -> bool:
    """Whether the device that trains has instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _load_network(folder: Path, dtype: torch.dtype, options: TrainOptions) -> PreTrainedModel:
    return load_model(
        folder,
        dtype=dtype,
        attention=options.attention,
        scaling=options.rope_scaling,
        from_scratch=options.from_scratch,
        lora=options.lora,
    )


def _spare_casts(model: torch.nn.Module) -> None:
    """Adapters cast their inputs to float32, which autocast makes bfloat16 again: twice for nothing."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010, no attribute that its class declares


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.exists():
        raise TrainError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise TrainError(f"{folder}: not a model folder, it has no config.json")
    try:
        return load_tokenizer(folder)
    except Exception as error:  # of the tokenizers' own packages
        raise TrainError(f"{folder}: holds no tokenizer that transformers can load ({one_line(error)})") from None


def _prepare_layer(model: PreTrainedModel, options: TrainOptions) -> ClexLayer | None:
    """The layer that is trained, new or the model's own with the settings that were asked for."""
    layer = clex_layer(model)
    if options.no_clex:
        if layer is not None:
            raise TrainError("the model has a CLEX layer; `no_clex` is for models without")
        return None
    if layer is None:
        layer = add_clex(model, ClexSettings(**options.clex_settings), options.original_context)
    else:
        _change_settings(layer, model, options)
    layer.requires_grad_(options.ode_learning_rate != 0)
    return layer


def _change_settings(layer: ClexLayer, model: PreTrainedModel, options: TrainOptions) -> None:
    asked = options.clex_settings
    for key in ("param_factor", "act", "dynamics"):
        if asked.get(key) not in (None, getattr(layer.settings, key)):
            raise TrainError(
                f"the model's CLEX layer has {key} = {getattr(layer.settings, key)}, which is not to change"
            )
    if options.original_context is not None:
        layer.move_to(options.original_context)
        model.config.max_position_embeddings = options.original_context
    layer.settings = replace(layer.settings, **asked)
    layer.settings.put_into(model.config)


def _position_sampler(model: PreTrainedModel, layer: ClexLayer | None, options: TrainOptions) -> PositionSampler:
    if layer is not None:
        original, largest = layer.context, layer.settings.max_factor
    else:
        original = options.original_context or model.config.max_position_embeddings
        largest = options.max_factor or ClexSettings.max_factor
    return PositionSampler(options.positions, original, largest, options.factors_per_batch, options.seed, options.span)


def _with_adapter(model: PreTrainedModel, layer: ClexLayer | None, options: TrainOptions) -> peft.PeftModel:
    trainable = layer is not None and layer.proj_func.ode_up_proj.requires_grad
    try:
        if options.lora is not None:
            adapted = peft.PeftModel.from_pretrained(model, str(options.lora), is_trainable=True)
        else:
            rank = options.lora_rank
            assert rank is not None  # one of the two is given
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=options.lora_alpha or 2 * rank,  # pyright: ignore[reportArgumentType], fractions are fine
                target_modules=list(options.lora_target) or "all-linear",
                task_type=peft.TaskType.CAUSAL_LM,
            )
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise TrainError(f"peft cannot add the adapter ({one_line(error)})") from None
    if layer is not None:
        layer.requires_grad_(trainable)  # peft froze it
    assert isinstance(adapted, peft.PeftModel)
    return adapted
