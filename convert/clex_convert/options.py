"""The options of a conversion."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clex_convert.check import CHECKS
from clex_convert.errors import ConvertError
from clex_convert.file_types import OUTTYPES, TENSOR_TYPES
from clex_convert.methods import METHODS
from clex_convert.weights import ACTIVATIONS, DYNAMICS, OdeSettings
from clex_local.commands.options import documented, json_object, option

PathLike = str | os.PathLike[str]
Progress = Callable[[str, float], None]
_METHODS = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())


def _factors(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError("must be numbers with commas between them, such as 1,1.5,2,4") from None


@documented
@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a conversion is asked for."""

    outtype: str | None = option(
        None,
        f"Type of the tensors: copy (those of a GGUF file bit for bit), {', '.join(OUTTYPES)}.",
        choices=("copy", *OUTTYPES),
        metavar="TYPE",
        default_text="q4_k_m for a folder, copy for a GGUF file",
    )
    method: str | None = option(
        None,
        f"How the tables are made. {_METHODS}.",
        choices=tuple(METHODS),
        default_text="clex where a CLEX layer is found, the GGUF file's own where it has tables, what the source's own "
        "RoPE scaling asks for where it has one, otherwise yarn (ntk where only a part of each head is rotated)",
    )
    clex_weights: PathLike | None = option(
        None,
        "Safetensors file with ode_up_proj and ode_down_proj: for a GGUF file, or instead of the folder's.",
        metavar="FILE",
    )
    lora: PathLike | None = option(
        None,
        "LoRA adapter saved by peft, to merge into the weights of the folder or GGUF file; a CLEX layer in it is the "
        "model's.",
        metavar="DIR",
    )
    original_context: int | None = option(
        None,
        "Tokens covered without scaling, at most those of the model; fewer make for larger scaling factors beyond.",
        minimum=1,
        metavar="N",
        default_text="the model's context length",
    )
    factors: Sequence[float] | None = option(
        None,
        "Scaling factor of each table, ascending from 1, such as 1,1.5,2,4,8.",
        parse=_factors,
        metavar="T,T,...",
        default_text="1, 2, ... up to the largest",
    )
    max_factor: int | None = option(
        None,
        "Largest scaling factor: the model reaches N times its original context, with a table for each of 1, 2, ... N "
        "(longrope: for 1 and N).",
        minimum=1,
        metavar="N",
        default_text="what the CLEX layer was trained for; what the source's own scaling says; 4",
    )
    rope_scaling: Mapping[str, Any] | None = option(
        None,
        "RoPE scaling in place of the source's own, as transformers' configs have it: parameters for yarn, longrope "
        'and ntk, such as \'{"rope_type": "yarn", "factor": 4, "beta_fast": 16}\'.',
        parse=json_object,
        metavar="JSON",
    )
    act: str | None = option(
        None, "Activation of the CLEX layer.", choices=ACTIVATIONS, default_text="as its config says, or silu"
    )
    time_dt: float | None = option(
        None,
        "Step of the integration in units of the scaling factor.",
        metavar="X",
        default_text="as the layer's config says, or 0.01",
    )
    dynamics: str | None = option(
        None,
        "Closed form that the CLEX layer was trained around.",
        choices=DYNAMICS,
        default_text="as its config says, or ntk",
    )
    log_scale: bool | None = option(
        None, "Scale attention by log(tokens) / log(original context).", default_text="as the config says, or no"
    )
    bake: int | None = option(
        None,
        "Write the table for a context of CTX tokens alone, as a model that unpatched llama.cpp, Ollama and LM Studio "
        "run; shorter prompts use it too.",
        metavar="CTX",
    )
    pre_tokenizer: str | None = option(
        None, "llama.cpp's name of the BPE pre-tokenizer, where it cannot recognise it.", metavar="NAME"
    )
    imatrix: PathLike | None = option(
        None,
        "Importance matrix to quantize with, as llama.cpp's llama-imatrix makes it (GGUF or .dat).",
        metavar="FILE",
    )
    imatrix_from: PathLike | None = option(
        None, "Compute an importance matrix from a text file, with the unquantized model.", metavar="TEXT"
    )
    imatrix_chunks: int | None = option(None, "Read only N times 512 tokens of that text.", minimum=1, metavar="N")
    save_imatrix: PathLike | None = option(None, "Keep the computed importance matrix.", metavar="FILE")
    tensor_type: Sequence[str] = option(
        (),
        "Type of the tensors that the regular expression NAME is found in; the first that fits counts. Repeatable. "
        f"TYPE: {', '.join(TENSOR_TYPES)}.",
        metavar="NAME=TYPE",
    )
    keep_f16: Sequence[str] = option((), "As `tensor_type=REGEX=f16`, and before them.", metavar="REGEX")
    output_tensor_type: str | None = option(None, "Type of output.weight.", choices=TENSOR_TYPES, metavar="TYPE")
    token_embedding_type: str | None = option(None, "Type of token_embd.weight.", choices=TENSOR_TYPES, metavar="TYPE")
    pure: bool = option(False, "No mixtures: all matrices get the one type.")
    check: str = option(
        "basic",
        "How the result is checked. basic: it is opened, its tables are compared, a few tokens are decoded; full: its "
        "predictions are compared with the unquantized model's as well; none: only its header is read back.",
        choices=CHECKS,
    )
    overwrite: bool = option(False, "Replace an existing OUT.gguf, and an existing file of `save_imatrix`.")
    verbose: bool = option(False, "Show llama.cpp's log.", short="-v")
    progress: Progress | None = option(
        None, "Called with the name of a phase and the part of it that is done, 0 to 1.", command=False
    )
    expected: Callable[[int], None] | None = option(
        None, "Called with the bytes that the output will have, before the first tensor is written.", command=False
    )

    def __post_init__(self) -> None:
        if self.factors is not None and self.max_factor is not None:
            raise ConvertError("`factors` and `max_factor` exclude each other: pass one of them")
        if self.check not in CHECKS:
            raise ConvertError(f"the check must be one of {', '.join(CHECKS)}, not {self.check!r}")
        self.ode_settings.check("options")

    @property
    def ode_settings(self) -> OdeSettings:
        """What is said of the dynamics of a CLEX layer."""
        return OdeSettings(self.act, self.time_dt, self.max_factor, self.log_scale, self.dynamics)
