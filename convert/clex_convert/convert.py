"""The conversion: source, tables, output file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clex_convert.checkpoint import Checkpoint
from clex_convert.contents import Contents, baked, with_tables
from clex_convert.errors import ConvertError
from clex_convert.gguf_source import GGUFSource
from clex_convert.hub import fetch
from clex_convert.lora import Adapter
from clex_convert.methods import METHODS, ScalingError
from clex_convert.methods import original_context as usual_context
from clex_convert.methods import tables as make_tables
from clex_convert.native import OUTTYPES, check_loads, quantize
from clex_convert.output import Output
from clex_convert.weights import OdeSettings, read_weights
from clex_local.errors import ClexError
from clex_local.gguf_file import GGUFFile
from clex_local.tables import Tables, tables_of

Progress = Callable[[str, float], None]
DEFAULT_OUTTYPE = "q4_k_m"


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
    """

    path: Path
    tables: Tables
    baked: int | None
    outtype: str
    size: int
    sha256: str
    seconds: float
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str | None = None,
    method: str | None = None,
    clex_weights: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    original_context: int | None = None,
    factors: Sequence[float] | None = None,
    max_factor: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    act: str | None = None,
    time_dt: float | None = None,
    log_scale: bool | None = None,
    bake: int | None = None,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
    verbose: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Converts a model folder or a GGUF file to a GGUF file with tables.

    Settings of the CLEX layer are taken from the arguments, then from the metadata of `clex_weights`, then from the
    adapter's and the source's config, then from the defaults of the authors' code (silu, 0.01, no log scale).

    Args:
        source: Hugging Face model folder, or GGUF file (any part of a split one stands for all of them); or what
            `clex_convert.hub.fetch` downloads, such as ``org/name``.
        output: file to write; it appears complete or not at all.
        outtype: type of the tensors, one of `clex_convert.native.OUTTYPES`, or ``copy`` to keep a GGUF file's tensors
            bit for bit; default ``q4_k_m`` for a folder, ``copy`` for a GGUF file.
        method: a key of `clex_convert.methods.METHODS`; default ``clex`` where the weights of a CLEX layer are found,
            the tables of a GGUF file that has some, otherwise what the RoPE scaling of the source asks for.
        clex_weights: safetensors file with ode_up_proj and ode_down_proj, for a GGUF file or instead of the folder's.
        lora: folder of a LoRA adapter saved by peft, which is merged into the folder's weights; where it holds the
            matrices of a CLEX layer, these are the model's.
        original_context: tokens that scaling factor 1 covers; default and upper bound is the source's context length.
        factors: scaling factors t, ascending from 1 and not only whole ones; one table for each.
        max_factor: in place of `factors`: 1, 2, ..., max_factor; for ``longrope`` 1 and max_factor.
        rope_scaling: takes the place of the RoPE scaling that the source names, as transformers' configs have it.
        act: activation of the CLEX layer, ``silu`` or ``tanh``.
        time_dt: step of the integration in units of the scaling factor.
        log_scale: whether queries are scaled by log(tokens) / log(original context).
        bake: write the table of this context length alone, as a model that stock llama.cpp runs.
        pre_tokenizer: llama.cpp's name of a BPE pre-tokenizer that it cannot recognise.
        overwrite: replace an existing output.
        verbose: let llama.cpp log to standard error.
        progress: called with the name of a phase and the part of it that is done, 0 to 1.

    Raises:
        clex_local.errors.ClexError: anything about the source, the options or the disk that makes it impossible;
            the message is one line. No file is left behind.
    """
    started = time.monotonic()
    output, adapter_path = Path(output), None if lora is None else Path(lora)
    weights_path = None if clex_weights is None else Path(clex_weights)
    if outtype not in (None, "copy", *OUTTYPES):
        raise ConvertError(f"the type {outtype!r} is unknown; use copy, {', '.join(OUTTYPES)}")
    with Output(output, overwrite=overwrite) as target:
        source = fetch(source)
        _check_apart(source, output, weights_path, adapter_path)
        temporary = target.temporary()  # finds out early whether the folder can be written
        options = OdeSettings(act, time_dt, max_factor, log_scale)
        options.check("options")
        adapter = None if adapter_path is None else Adapter(adapter_path)
        if factors is not None and max_factor is not None:
            raise ConvertError("--factors and --max-factor exclude each other: pass one of them")
        progress = progress or (lambda phase, part: None)
        job = _Job(target, temporary, outtype, bake, adapter, pre_tokenizer, verbose, progress)

        def tables_for(model: Checkpoint | GGUFSource) -> Tables:
            return _tables(model, method, weights_path, original_context, factors, options, rope_scaling is not None)

        if source.is_dir():
            made = job.folder(source, rope_scaling, tables_for)
        else:
            made = job.gguf(source, rope_scaling, tables_for)
        _read_back(made, bake, output)
        size, sha256 = made.temporary.stat().st_size, target.commit(made.temporary)
    return ConversionResult(
        output, made.tables, bake, made.outtype, size, sha256, time.monotonic() - started, made.notes
    )


def _read_back(made: _Made, bake: int | None, output: Path) -> None:
    """Checks a file about to be put in place: it must be complete to its last tensor, and have what was made for it."""
    try:
        with GGUFFile(made.temporary) as file:
            tables = tables_of(file)
            context = file.get(f"{file.get('general.architecture')}.context_length")
    except ClexError as error:
        reason = str(error).removeprefix(f"{made.temporary}: ")
        raise ConvertError(f"{output}: the result cannot be used: {reason}") from None
    assert (tables is None) == (bake is not None)
    assert context == (made.tables.original_context_length if bake is None else bake)


def _check_apart(source: Path, output: Path, weights: Path | None, adapter: Path | None) -> None:
    """The output must be none of the files that are read."""
    if not output.exists():
        return
    if source.is_file() and source.samefile(output):
        raise ConvertError(f"{output}: is the source itself; choose another name for the output")
    if weights is not None and weights.exists() and weights.samefile(output):
        raise ConvertError(f"{output}: holds the ODE weights; choose another name for the output")
    for folder in (source, adapter):
        if folder is None or not folder.is_dir() or output.suffix == ".gguf":
            continue
        if any(path.samefile(output) for path in folder.iterdir()):
            raise ConvertError(f"{output}: belongs to the source; choose another name for the output")


def _tables(
    model: Checkpoint | GGUFSource,
    method: str | None,
    weights_path: Path | None,
    original_context: int | None,
    factors: Sequence[float] | None,
    options: OdeSettings,
    rescaled: bool,
) -> Tables:
    rope = model.rope
    if method not in (None, *METHODS):
        raise ConvertError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    weights = None
    if method is None or METHODS[method].needs_weights:
        if weights_path is not None:
            weights = read_weights(weights_path)
        elif isinstance(model, Checkpoint):
            weights = model.ode_weights()
        elif method is None and not rescaled and (own := model.own_tables()) is not None:
            return _own_tables(own, str(model.path), original_context, factors, options)
        if weights is not None:
            method = "clex"
        elif method is None and rope.scaling.kind == "default":
            raise ConvertError(
                f"{model.path}: has no CLEX layer; pass its weights with --clex-weights, or --method ntk for "
                "NTK-aware scaling without training"
            )
    elif weights_path is not None:
        raise ConvertError(f"the method {method} has no weights; drop --clex-weights or use --method clex")
    usual = usual_context(method, rope.scaling, rope.context)
    longest = max(usual, rope.context)
    context = usual if original_context is None else original_context
    if not 0 < context <= longest:
        raise ConvertError(
            f"{model.path}: the original context must be from 1 to the model's own {longest} tokens, not {context}"
        )
    settings = options
    if weights is not None:
        settings = settings.over(weights.settings).over(rope.settings)
    try:
        return make_tables(
            method,
            dim=rope.dim,
            base=rope.base,
            original_context=context,
            factors=factors,
            max_factor=settings.max_factor if factors is None else None,
            scaling=rope.scaling,
            head_dim=rope.head_dim,
            weights=weights,
            act=settings.act,
            time_dt=settings.time_dt,
            log_scale=bool(settings.log_scale),
            source=rope.facts,
        )
    except ScalingError as error:
        raise ConvertError(f"{model.path}: {error}") from None


def _own_tables(
    tables: Tables, where: str, original_context: int | None, factors: Sequence[float] | None, options: OdeSettings
) -> Tables:
    """The tables that a GGUF file has already; only their log scale is left to choose."""
    if original_context is not None or factors is not None or options != OdeSettings(log_scale=options.log_scale):
        raise ConvertError(f"{where}: has tables already, which are kept as they are; pass --method to make new ones")
    return tables if options.log_scale is None else replace(tables, log_scale=options.log_scale)


@dataclass
class _Made:
    temporary: Path
    tables: Tables
    outtype: str
    notes: list[str]


@dataclass
class _Job:
    """One conversion in progress: writes into temporary files only."""

    target: Output
    temporary: Path
    outtype: str | None
    bake: int | None
    adapter: Adapter | None
    pre_tokenizer: str | None
    verbose: bool
    progress: Progress

    def contents(self, tables: Tables, model: Checkpoint | GGUFSource) -> Contents:
        architecture = model.gguf_architecture if isinstance(model, Checkpoint) else model.architecture
        if self.bake is None:
            return with_tables(tables, architecture, model.rope)
        return baked(tables, self.bake, architecture, model.rope)

    def folder(
        self, source: Path, rope_scaling: Mapping[str, Any] | None, tables_for: Callable[[Checkpoint], Tables]
    ) -> _Made:
        outtype = self.outtype or DEFAULT_OUTTYPE
        if outtype == "copy":
            raise ConvertError(f"{source}: copy keeps the tensors of a GGUF file; choose a type for a model folder")
        checkpoint = Checkpoint(source, self.adapter, rope_scaling)
        tables = tables_for(checkpoint)
        contents = self.contents(tables, checkpoint)
        from clex_convert.hf import PRECISIONS, write_checkpoint

        direct = outtype in PRECISIONS
        write_checkpoint(
            checkpoint,
            contents,
            self.temporary,
            self.target.path,
            precision=outtype if direct else checkpoint.precision,
            pre_tokenizer=self.pre_tokenizer,
            verbose=self.verbose,
            progress=lambda part: self.progress("writing", part),
        )
        check_loads(self.temporary, self.target.path, verbose=self.verbose)
        made = _Made(self.temporary, tables, outtype, list(contents.notes))
        return made if direct else self.quantized(made)

    def gguf(
        self, source: Path, rope_scaling: Mapping[str, Any] | None, tables_for: Callable[[GGUFSource], Tables]
    ) -> _Made:
        outtype = self.outtype or "copy"
        if self.pre_tokenizer is not None:
            raise ConvertError("--pre-tokenizer is for model folders; a GGUF file keeps its own")
        if self.adapter is not None:
            raise ConvertError(f"{source}: --lora is for model folders; merge it into the model that this file is of")
        with GGUFSource(source, rope_scaling) as model:
            if self.target.path.exists() and any(path.samefile(self.target.path) for path in model.paths):
                raise ConvertError(f"{self.target.path}: is a part of the source; choose another name for the output")
            tables = tables_for(model)
            contents = self.contents(tables, model)
            notes = list(contents.notes)
            if outtype != "copy" and model.quantized:
                notes.append("the source was quantized already: quantizing it again costs quality")
            model.write(
                contents, self.temporary, self.target.path, progress=lambda part: self.progress("copying", part)
            )
        made = _Made(self.temporary, tables, outtype, notes)
        return made if outtype == "copy" else self.quantized(made)

    def quantized(self, made: _Made) -> _Made:
        result = self.target.temporary()
        more = quantize(
            made.temporary,
            result,
            made.outtype,
            self.target.path,
            verbose=self.verbose,
            progress=lambda part: self.progress("quantizing", part),
        )
        self.target.discard(made.temporary)
        return replace(made, temporary=result, notes=made.notes + more)
