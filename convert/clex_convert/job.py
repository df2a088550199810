"""One conversion, step by step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clex_convert.check import Divergence, check_contents, check_result, check_vocabulary, write_reference
from clex_convert.checkpoint import Checkpoint
from clex_convert.contents import baked, with_tables
from clex_convert.errors import ConvertError, NotFiniteError
from clex_convert.gguf_source import GGUFSource
from clex_convert.imatrix import ImportanceMatrix, check_text, compute_imatrix, read_imatrix
from clex_convert.lora import Adapter
from clex_convert.methods import METHODS, ScalingError
from clex_convert.methods import original_context as usual_context
from clex_convert.methods import tables as make_tables
from clex_convert.output import Output
from clex_convert.quantize import OUTTYPES, UNQUANTIZED, Recipe, needs_imatrix, plans, quantize, tensor_types_of
from clex_convert.scaling import kind_of
from clex_convert.weights import OdeSettings, read_weights
from clex_local.tables import Tables

Progress = Callable[[str, float], None]
DEFAULT_OUTTYPE = "q4_k_m"


@dataclass(frozen=True)
class Size:
    """What a file of one type weighs.

    Attributes:
        outtype: the type.
        size: bytes of the file; None if it cannot be made.
        note: what it needs, or why it cannot be made; may be empty.
    """

    outtype: str
    size: int | None
    note: str = ""


@dataclass
class Job:
    """One conversion: what is wanted, and what is made of it. It writes into temporary files only."""

    source: Path
    outtype: str | None = None
    method: str | None = None
    clex_weights: str | os.PathLike[str] | None = None
    original_context: int | None = None
    factors: Sequence[float] | None = None
    max_factor: int | None = None
    rope_scaling: Mapping[str, Any] | None = None
    act: str | None = None
    time_dt: float | None = None
    log_scale: bool | None = None
    bake: int | None = None
    lora: str | os.PathLike[str] | None = None
    pre_tokenizer: str | None = None
    imatrix: str | os.PathLike[str] | None = None
    imatrix_from: str | os.PathLike[str] | None = None
    imatrix_chunks: int | None = None
    save_imatrix: str | os.PathLike[str] | None = None
    tensor_type: Sequence[str] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    keep_f16: Sequence[str] = ()
    pure: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        self._clex_weights, self._imatrix, self._imatrix_from, self._save_imatrix = (
            None if path is None else Path(path)
            for path in (self.clex_weights, self.imatrix, self.imatrix_from, self.save_imatrix)
        )
        self.is_folder = self.source.is_dir()
        if self.pre_tokenizer is not None and not self.is_folder:
            raise ConvertError("--pre-tokenizer is for model folders; a GGUF file keeps its own")
        if self.lora is not None and not self.is_folder:
            raise ConvertError(
                f"{self.source}: --lora is for model folders; merge it into the model that this file is of"
            )
        if self.factors is not None and self.max_factor is not None:
            raise ConvertError("--factors and --max-factor exclude each other: pass one of them")
        self.settings = OdeSettings(self.act, self.time_dt, self.max_factor, self.log_scale)
        self.settings.check("options")
        self._adapter = None if self.lora is None else Adapter(Path(self.lora))
        self.recipe = self._read_recipe()
        self.notes: list[str] = []
        self.divergence: Divergence | None = None

    def _read_recipe(self) -> Recipe:
        outtype = self.outtype or (DEFAULT_OUTTYPE if self.is_folder else "copy")
        if outtype == "copy" and self.is_folder:
            raise ConvertError(
                f"{self.source}: copy keeps the tensors of a GGUF file; choose a type for a model folder"
            )
        imatrix = None
        if self._imatrix is not None and self._imatrix_from is not None:
            raise ConvertError("an importance matrix is read or computed: give --imatrix or --imatrix-from, not both")
        if self._imatrix is not None:
            imatrix = read_imatrix(self._imatrix)
        elif self._imatrix_from is not None:
            check_text(self._imatrix_from)
            imatrix = ImportanceMatrix.to_come(self._imatrix_from)
        elif self._save_imatrix is not None or self.imatrix_chunks is not None:
            raise ConvertError("--save-imatrix and --imatrix-chunks go with --imatrix-from TEXT")
        return Recipe(
            outtype,
            tensor_types_of(self.tensor_type, self.keep_f16),
            self.output_tensor_type,
            self.token_embedding_type,
            self.pure,
            imatrix,
        )

    def start(self, target: Output, progress: Progress | None, expected: Callable[[int], None] | None) -> None:
        """Names the output, whose folder must be one that can be written, and which must not be read."""
        self.target, self.shown = target, target.path
        self.progress, self.expected = progress or (lambda phase, part: None), expected or (lambda size: None)
        self._check_apart(target.path)
        if self._save_imatrix is not None:
            Output(self._save_imatrix, overwrite=target.overwrite)  # only asked whether it could be
            self._check_apart(self._save_imatrix)
            if os.path.realpath(self._save_imatrix) == os.path.realpath(target.path):
                raise ConvertError(f"{target.path}: cannot be the importance matrix too; choose another name")
        self.temporary = target.temporary()

    def _check_apart(self, path: Path) -> None:
        if not path.exists():
            return
        inputs = {
            "is the source itself": self.source if not self.is_folder else None,
            "holds the ODE weights": self._clex_weights,
            "is the importance matrix": self._imatrix,
            "is the text of the importance matrix": self._imatrix_from,
        }
        for what, read in inputs.items():
            if read is not None and read.exists() and read.samefile(path):
                raise ConvertError(f"{path}: {what}; choose another name for the output")
        for folder in (self.source, self.lora):
            if folder is None or not Path(folder).is_dir() or path.suffix == ".gguf":
                continue
            if any(part.samefile(path) for part in Path(folder).iterdir()):
                raise ConvertError(f"{path}: belongs to the source; choose another name for the output")

    def make(self, check: str) -> None:
        """Makes the file, `made`, with its `tables`."""
        try:
            self._make(check)
        except NotFiniteError:
            if not self.is_folder:
                with GGUFSource(self.source, self.rope_scaling) as model:
                    if (name := model.not_finite()) is not None:
                        what = f"{name} holds values that are not finite (NaN or infinite); the file is of no use"
                        raise NotFiniteError(f"{self.source}: {what}") from None
            raise

    def _make(self, check: str) -> None:
        self.recipe.check()
        direct = self._is_direct(self.recipe.outtype)
        self._write(self.recipe.outtype, lambda: self._expect(None if direct else self.recipe))
        self.made, reference = self.temporary, None
        if not direct:
            if self.recipe.imatrix is not None and not self.recipe.imatrix.weights:
                self.recipe = replace(self.recipe, imatrix=self._compute_imatrix(self.recipe.imatrix))
            if check == "full" and self.recipe.outtype not in UNQUANTIZED:
                reference = self.target.temporary()
                write_reference(self.temporary, reference, self.shown, verbose=self.verbose)
            self.made = self.target.temporary()
            self.notes += quantize(
                self.temporary,
                self.made,
                self.recipe,
                self.shown,
                verbose=self.verbose,
                progress=lambda part: self.progress("quantizing", part),
            )
            self.target.discard(self.temporary)
        if check == "none":
            check_contents(self.made, self.contents, self.shown)
            return
        self.divergence = check_result(self.made, self.contents, self.shown, reference=reference, verbose=self.verbose)
        if check == "full" and reference is None:
            self.notes.append(f"{self.recipe.outtype} quantizes nothing, so there is nothing to compare")

    def _write(self, outtype: str, planned: Callable[[], bool]) -> None:
        """Writes the source and its contents, unquantized where it is a folder, unless `planned` stops it."""
        if not self.is_folder:
            with GGUFSource(self.source, self.rope_scaling) as model:
                if self.shown.exists() and any(path.samefile(self.shown) for path in model.paths):
                    raise ConvertError(f"{self.shown}: is a part of the source; choose another name for the output")
                self._take_tables(model)
                if outtype != "copy" and model.quantized:
                    self.notes.append("the source was quantized already: quantizing it again costs quality")
                model.write(
                    self.contents,
                    self.temporary,
                    self.shown,
                    progress=lambda part: self.progress("copying", part),
                    planned=planned,
                )
            return
        checkpoint = Checkpoint(self.source, self._adapter, self.rope_scaling)
        self._take_tables(checkpoint)
        from clex_convert.hf import write_checkpoint

        self.notes += write_checkpoint(
            checkpoint,
            self.contents,
            self.temporary,
            self.shown,
            precision=outtype if outtype in UNQUANTIZED else checkpoint.precision,
            pre_tokenizer=self.pre_tokenizer,
            verbose=self.verbose,
            progress=lambda part: self.progress("writing", part),
            planned=planned,
        )

    def _take_tables(self, model: Checkpoint | GGUFSource) -> None:
        self.tables = _tables(
            model,
            self.method,
            self._clex_weights,
            self.original_context,
            self.factors,
            self.settings,
            self.rope_scaling is not None,
        )
        architecture = model.gguf_architecture if isinstance(model, Checkpoint) else model.architecture
        if self.bake is None:
            self.contents = with_tables(self.tables, architecture, model.rope)
        else:
            self.contents = baked(self.tables, self.bake, architecture, model.rope)
        model.check_window(self.bake or self.tables.max_context_length)
        self.notes = list(self.contents.notes)

    def _expect(self, recipe: Recipe | None) -> bool:
        """With the header in place: checks what can be checked of the rest before it is written."""
        if self.is_folder:
            check_vocabulary(self.temporary, self.shown, verbose=self.verbose)
        size = needed = self.temporary.stat().st_size
        if recipe is not None:
            (plan,) = plans(self.temporary, [recipe], self.shown, verbose=self.verbose)
            if plan.refusal is not None:
                raise ConvertError(f"{self.shown}: llama.cpp could not make {recipe.outtype}: {plan.refusal}")
            if plan.needs_imatrix and recipe.imatrix is None:
                raise needs_imatrix(recipe.outtype, self.shown)
            size = plan.size
            needed += size
        self.target.check_room(needed)
        self.expected(size)
        return True

    def _compute_imatrix(self, wanted: ImportanceMatrix) -> ImportanceMatrix:
        def compute(path: Path) -> ImportanceMatrix:
            return compute_imatrix(
                self.temporary,
                wanted.path,
                path,
                self.shown,
                chunks=self.imatrix_chunks,
                verbose=self.verbose,
                progress=lambda part: self.progress("importance matrix", part),
            )

        if self._save_imatrix is None:
            return compute(self.target.temporary())
        with Output(self._save_imatrix, overwrite=self.target.overwrite) as kept:
            path = kept.temporary()
            imatrix = compute(path)
            kept.commit(path)
        return replace(imatrix, path=self._save_imatrix)

    def sizes(self) -> list[Size]:
        """What each type weighs."""
        unquantized = ("copy", *UNQUANTIZED)
        if self.outtype is not None:
            outtypes = [self.outtype]
        else:
            outtypes = [*(() if self.is_folder else ("copy",)), *OUTTYPES]
            if self.recipe.imatrix or self.recipe.changes_types:
                outtypes = [outtype for outtype in outtypes if outtype not in unquantized]
        recipes = {outtype: replace(self.recipe, outtype=outtype) for outtype in outtypes}
        found: dict[str, Size] = {}
        for outtype, recipe in recipes.items():
            recipe.check()
            if self._is_direct(outtype):
                self._write(outtype, lambda: False)
                found[outtype] = Size(outtype, self.temporary.stat().st_size)
        rest = [recipe for recipe in recipes.values() if recipe.outtype not in found]
        if rest:
            self._write(rest[0].outtype, lambda: False)
            for recipe, plan in zip(rest, plans(self.temporary, rest, self.source, verbose=self.verbose), strict=True):
                note = plan.refusal or ""
                if plan.needs_imatrix and recipe.imatrix is None:
                    note = note or "needs an importance matrix"
                found[recipe.outtype] = Size(recipe.outtype, None if plan.refusal else plan.size, note)
        return [found[outtype] for outtype in outtypes]

    def _is_direct(self, outtype: str) -> bool:
        """Whether a type is made without llama.cpp's quantizer."""
        return outtype in (UNQUANTIZED if self.is_folder else ("copy",))


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
        elif method is None and kind_of(rope.facts.get("rope_scaling", {})) == "clex":
            raise ConvertError(
                f"{model.path}: its config names CLEX, but it has no CLEX layer; pass its weights with --clex-weights, "
                "or --method yarn for tables without training"
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
