"""The options of a training, each written once; apart from the packages that it is carried out with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_convert.weights import ACTIVATIONS, DYNAMICS
from clex_local.commands.options import documented, json_object, option
from clex_train import TrainError

ATTENTIONS = ("sdpa", "eager")
POSITIONS = ("random", "uniform", "none", "chunked")
_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
# What a resumed training may say differently.
_MAY_CHANGE = ("report", "resume", "save_steps", "log_steps")


def _nowhere(line: str) -> None:
    """Reports to nobody."""


@documented
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a model is trained."""

    text: Sequence[Path] = option((), "UTF-8 text, one document. Repeatable.", metavar="FILE")
    dataset: str | None = option(
        None,
        "Documents: a folder saved by the library datasets, or what its load_dataset takes; column text.",
        metavar="PATH",
    )
    chat: Sequence[Path] = option(
        (),
        'Conversations, an object {"messages": [{"role": ..., "content": ...}, ...]} a line, in the model\'s own '
        "template; the answers alone are learned, and what is longer than `length` left out. With text, as many "
        "sequences of it as conversations, from all its parts. Repeatable.",
        metavar="FILE",
    )
    streaming: bool = option(False, "Tokenize while training, not once before it. Needs `max_steps`.")
    length: int | None = option(
        None, "Tokens of a sequence.", default_text="the original context", metavar="N", minimum=2
    )
    original_context: int | None = option(
        None,
        "Tokens covered without scaling.",
        default_text="the model's max_position_embeddings",
        metavar="N",
        minimum=1,
    )
    max_factor: int | None = option(
        None, "Largest scaling factor t.", default_text="16, or the model's", metavar="N", minimum=1
    )
    param_factor: int | None = option(
        None,
        "The ODE's hidden size is P times the rotary dimension.",
        default_text="1, or the model's",
        metavar="P",
        minimum=1,
    )
    act: str | None = option(
        None, "Activation of the ODE.", default_text="tanh, or the model's", choices=tuple(ACTIVATIONS)
    )
    time_dt: float | None = option(
        None,
        "Step of the integration in units of t.",
        default_text="0.01, or the model's",
        metavar="DT",
        above=0,
        maximum=1,
    )
    log_scale: bool | None = option(
        None, "Multiply queries by log(n) / log(original context).", default_text="off, or the model's"
    )
    dynamics: str | None = option(
        None,
        "Closed form that the ODE goes around, and that an untrained layer is: NTK-aware scaling by 2t - 1, as CLEX's "
        "authors do it, or YaRN by t, attention factor included, which their code does not know.",
        default_text="ntk, or the model's",
        choices=DYNAMICS,
    )
    positions: str = option(
        "random",
        "How a sequence is spread over the positions of one that is t times as long. random: sorted random positions, "
        "as CLEX's authors do it; uniform: evenly spaced; none: not at all; chunked: in four contiguous chunks with "
        "random skips between them, after PoSE, which is not the authors'.",
        choices=POSITIONS,
    )
    span: int | None = option(
        None,
        "Tokens of the sequence that a shorter one stands for: it is spread over N * t positions. With the original "
        "context, short sequences reach the positions of long ones.",
        default_text="`length`",
        metavar="N",
        minimum=2,
    )
    factors_per_batch: int = option(
        1, "Scaling factors that are drawn for a batch, and shared by its sequences.", metavar="N", minimum=1
    )
    no_clex: bool = option(False, "Train the model as it is, without a CLEX layer, for comparison.")
    rope_scaling: Mapping[str, Any] | None = option(
        None,
        "With `no_clex`: RoPE scaling of transformers in place of the config's own.",
        metavar="JSON",
        parse=json_object,
    )
    from_scratch: bool = option(False, "Begin with random weights; MODEL needs a config and a tokenizer.")
    learning_rate: float = option(2e-5, "Its peak, of AdamW.", metavar="LR", minimum=0)
    ode_learning_rate: float | None = option(
        None,
        "That of the CLEX layer; 0 leaves the layer as it is, at first the closed form of `dynamics`.",
        default_text="`learning_rate`",
        metavar="LR",
        minimum=0,
    )
    schedule: str = option("cosine", "Course of the learning rates after the warm-up.", choices=_SCHEDULES)
    warmup_ratio: float = option(
        0.03, "Part of the steps in which the learning rates rise.", metavar="R", minimum=0, maximum=1
    )
    weight_decay: float = option(
        0.0, "Of the model's matrices; the CLEX layer has one of its own.", metavar="W", minimum=0
    )
    ode_weight_decay: float = option(
        0.0, "Decay of the CLEX layer towards the closed form that it goes around.", metavar="W", minimum=0
    )
    batch_size: int = option(1, "Sequences of a pass.", metavar="N", minimum=1)
    gradient_accumulation: int = option(1, "Passes of a step.", metavar="N", minimum=1)
    max_steps: int | None = option(None, "Steps to train.", default_text="as `epochs` says", metavar="N", minimum=1)
    epochs: float = option(1.0, "How often the text is read.", metavar="X", above=0)
    seed: int = option(0, "Of all that is random.", metavar="N", minimum=0)
    bf16: bool | None = option(
        None,
        "Compute in bfloat16, the CLEX layer excepted; the frozen weights under a LoRA adapter are kept in it.",
        default_text="with a GPU or a CPU that has instructions for it",
    )
    attention: str = option(
        "sdpa",
        "What computes attention: torch's kernel, or plain products, which are faster for short sequences on a CPU.",
        choices=ATTENTIONS,
    )
    gradient_checkpointing: bool = option(False, "Save memory by computing activations twice.")
    lora: Path | None = option(
        None, "Train this LoRA adapter of MODEL further, with the CLEX layer that it may have.", metavar="DIR"
    )
    lora_rank: int | None = option(
        None, "Train a new LoRA adapter of this rank, and the CLEX layer.", metavar="R", minimum=1
    )
    lora_alpha: float | None = option(None, "Its alpha.", default_text="twice its rank", metavar="A", above=0)
    lora_target: Sequence[str] = option(
        (),
        "Modules that get it, such as q_proj. Repeatable.",
        default_text="all linear layers but the output",
        metavar="NAME",
    )
    merge: bool = option(False, "Save the model with the adapter in it, not the adapter.")
    save_steps: int | None = option(
        None, "Save a checkpoint every N steps, to OUT.checkpoints.", metavar="N", minimum=1
    )
    resume: bool = option(False, "Continue an interrupted training from its last checkpoint.")
    log_steps: int = option(10, "Report every N steps.", metavar="N", minimum=1)
    trainer_args: Path | None = option(
        None,
        "JSON object of further TrainingArguments of transformers, such as fsdp and deepspeed.",
        metavar="FILE",
    )
    report: Callable[[str], None] = option(_nowhere, "Gets lines of progress.", command=False)

    def check(self) -> None:
        """Finds out whether they go together.

        Raises:
            TrainError: they do not.
        """
        text = bool(self.text) or self.dataset is not None
        if not text and not self.chat:
            raise TrainError("there is nothing to train on; give `text`, `dataset` or `chat`")
        if self.chat and self.streaming:
            raise TrainError("conversations are tokenized at once; give `chat` without `streaming`")
        if self.streaming and self.max_steps is None:
            raise TrainError("a stream has no known end; give `max_steps`")
        if self.lora_rank is None and (self.lora_alpha or self.lora_target):
            raise TrainError("`lora_alpha` and `lora_target` need `lora_rank`")
        if self.merge and not self.adapts:
            raise TrainError("`merge` needs `lora_rank` or `lora`")
        if self.lora is not None and (self.lora_rank or self.from_scratch):
            raise TrainError(
                "`lora` is an adapter of MODEL's weights with a rank; leave out `lora_rank` and `from_scratch`"
            )
        if self.no_clex and (self.ode_learning_rate is not None or self.ode_weight_decay):
            raise TrainError(
                "`ode_learning_rate` and `ode_weight_decay` are of a CLEX layer, which `no_clex` leaves out"
            )
        if self.rope_scaling is not None and not self.no_clex:
            raise TrainError("`rope_scaling` is for training without a CLEX layer; pass `no_clex=True`")

    @property
    def adapts(self) -> bool:
        """Whether a LoRA adapter is trained, and the model's weights are frozen."""
        return self.lora is not None or self.lora_rank is not None

    @property
    def clex_settings(self) -> dict[str, Any]:
        """What they say of the CLEX layer; what they leave open is not in it."""
        names = ("max_factor", "param_factor", "act", "time_dt", "log_scale", "dynamics")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def identity(self, model: Path, output: Path) -> dict[str, Any]:
        """What has to be the same where a training is resumed, with values as JSON has them."""
        fixed = {name: value for name, value in vars(self).items() if name not in _MAY_CHANGE}
        return json.loads(json.dumps({"model": model, "output": output, **fixed}, default=str))
