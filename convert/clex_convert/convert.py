"""The conversion: source, tables, output file."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_convert.check import CHECKS, Divergence
from clex_convert.errors import ConvertError
from clex_convert.hub import fetch
from clex_convert.job import Job, Progress, Size
from clex_convert.output import Output
from clex_local.tables import Tables


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion made.

    Attributes:
        path: the file.
        tables: its tables; of a baked file those that the one in it comes from.
        baked: context length that one table was baked for; None for a file with all of them.
        outtype: type of its tensors, or ``copy``.
        size: bytes.
        sha256: SHA-256 of the file in hexadecimal digits. The same source and options give the same bytes.
        seconds: time taken.
        notes: what the user should know of it, a sentence each.
        divergence: how far it is from the unquantized model, where ``check="full"`` compared them.
    """

    path: Path
    tables: Tables
    baked: int | None
    outtype: str
    size: int
    sha256: str
    seconds: float
    notes: list[str] = field(default_factory=list)
    divergence: Divergence | None = None


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str | None = None,
    method: str | None = None,
    clex_weights: str | os.PathLike[str] | None = None,
    original_context: int | None = None,
    factors: Sequence[float] | None = None,
    max_factor: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    act: str | None = None,
    time_dt: float | None = None,
    log_scale: bool | None = None,
    bake: int | None = None,
    lora: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    imatrix_from: str | os.PathLike[str] | None = None,
    imatrix_chunks: int | None = None,
    save_imatrix: str | os.PathLike[str] | None = None,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    keep_f16: Sequence[str] = (),
    pure: bool = False,
    overwrite: bool = False,
    check: str = "basic",
    verbose: bool = False,
    progress: Progress | None = None,
    expected: Callable[[int], None] | None = None,
) -> ConversionResult:
    """Converts a model folder or a GGUF file to a GGUF file with tables.

    Settings of the CLEX layer are taken from the arguments, then from the metadata of `clex_weights`, then from the
    adapter's and the source's config, then from the defaults of the authors' code (silu, 0.01, no log scale).

    Args:
        source: Hugging Face model folder, or GGUF file (any part of a split one stands for all of them); or what
            `clex_convert.hub.fetch` downloads, such as ``org/name``.
        output: file to write; it appears complete or not at all.
        outtype: type of the tensors, one of `clex_convert.quantize.OUTTYPES`, or ``copy`` to keep a GGUF file's tensors
            bit for bit; default ``q4_k_m`` for a folder, ``copy`` for a GGUF file.
        method: a key of `clex_convert.methods.METHODS`; default ``clex`` where the weights of a CLEX layer are found,
            the tables of a GGUF file that has some, otherwise what the RoPE scaling of the source asks for, and
            `clex_convert.methods.default_method` for a source without one.
        clex_weights: safetensors file with ode_up_proj and ode_down_proj, for a GGUF file or instead of the folder's.
        original_context: tokens that scaling factor 1 covers; default and upper bound is the source's context length.
        factors: scaling factors t, ascending from 1 and not only whole ones; one table for each.
        max_factor: in place of `factors`: 1, 2, ..., max_factor; for ``longrope`` 1 and max_factor.
        rope_scaling: takes the place of the RoPE scaling that the source names, as transformers' configs have it.
        act: activation of the CLEX layer, ``silu`` or ``tanh``.
        time_dt: step of the integration in units of the scaling factor.
        log_scale: whether queries are scaled by log(tokens) / log(original context).
        bake: write the table of this context length alone, as a model that stock llama.cpp runs.
        lora: folder of a LoRA adapter saved by peft, which is merged into the folder's weights; where it holds the
            matrices of a CLEX layer, these are the model's.
        pre_tokenizer: llama.cpp's name of a BPE pre-tokenizer that it cannot recognise.
        imatrix: importance matrix of llama.cpp's llama-imatrix, which the quantizer weighs its errors by.
        imatrix_from: text to compute one from, with the unquantized model.
        imatrix_chunks: pieces of 512 tokens of that text to read; default all.
        save_imatrix: file to keep the computed one in; an existing one is replaced.
        tensor_type: ``NAME=TYPE`` each: tensors whose names the regular expression NAME is found in get that type.
        output_tensor_type: type of ``output.weight``.
        token_embedding_type: type of ``token_embd.weight``.
        keep_f16: regular expressions; tensors whose names one is found in stay f16.
        pure: give every matrix the type itself, not the mixture of types that goes by its name.
        overwrite: replace an existing output, and an existing file of `save_imatrix`.
        check: ``basic`` opens the result with the runtime's library, compares its tables and decodes a few tokens;
            ``full`` also compares its predictions with the unquantized model's; ``none`` only reads its header back.
        verbose: let llama.cpp log to standard error.
        progress: called with the name of a phase and the part of it that is done, 0 to 1.
        expected: called with the bytes that the output will have, before the first tensor is written.

    Raises:
        clex_local.errors.ClexError: anything about the source, the options or the disk that makes it impossible;
            the message is one line. No file is left behind.
    """
    started = time.monotonic()
    output = Path(output)
    if check not in CHECKS:
        raise ConvertError(f"the check must be one of {', '.join(CHECKS)}, not {check!r}")
    with Output(output, overwrite=overwrite) as target:
        job = Job(
            fetch(source),
            outtype=outtype,
            method=method,
            clex_weights=clex_weights,
            original_context=original_context,
            factors=factors,
            max_factor=max_factor,
            rope_scaling=rope_scaling,
            act=act,
            time_dt=time_dt,
            log_scale=log_scale,
            bake=bake,
            lora=lora,
            pre_tokenizer=pre_tokenizer,
            imatrix=imatrix,
            imatrix_from=imatrix_from,
            imatrix_chunks=imatrix_chunks,
            save_imatrix=save_imatrix,
            tensor_type=tensor_type,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            keep_f16=keep_f16,
            pure=pure,
            verbose=verbose,
        )
        job.start(target, progress, expected)
        job.make(check)
        size, sha256 = job.made.stat().st_size, target.commit(job.made)
    seconds = time.monotonic() - started
    return ConversionResult(
        output, job.tables, bake, job.recipe.outtype, size, sha256, seconds, job.notes, job.divergence
    )


def sizes(source: str | os.PathLike[str], **options: Any) -> list[Size]:
    """What the file that `convert` makes weighs, to the byte. Nothing is written beside the source.

    Args:
        source: as in `convert`.
        options: those of `convert` that decide what the file holds. With ``outtype``, only that type.

    Returns:
        Each type that goes with the options. One that needs an importance matrix has the size that it gets with one;
        if none is among the options, less the keys that name it.

    Raises:
        clex_local.errors.ClexError: as in `convert`.
    """
    job = Job(fetch(source), **options)
    # Only headers are written, the tensors are holes; so the folder for temporary files has room for them.
    with tempfile.TemporaryDirectory() as folder, Output(Path(folder) / "out.gguf", overwrite=False) as target:
        job.start(target, None, None)
        return job.sizes()
