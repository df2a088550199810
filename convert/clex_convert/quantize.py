"""llama.cpp's quantizer: what a file of each type will weigh, and making it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clex_convert.child_process import report, request, run_child
from clex_convert.errors import ConvertError, disk_full
from clex_convert.file_types import file_type
from clex_convert.imatrix import read_imatrix
from clex_convert.recipe import Recipe
from clex_local.errors import one_line
from clex_local.model_file.gguf_api import tensor_types
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.gguf_header import GGUFHeader

# Bytes that llama_model_quantize may use for the rows at work, beside the tensor that they come from; its default is
# eight times as much as a machine for small models has.
_BUFFER = 256 << 20
_ALIGNMENT = 32  # the only one that llama_model_quantize writes
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_NEEDS_IMATRIX = "pass `imatrix_from=TEXT` to compute one from a text, or `imatrix=FILE`"


@dataclass(frozen=True)
class Plan:
    """What quantizing a file will give.

    Attributes:
        size: bytes of the file; 0 if it cannot be made.
        types: type of each tensor, in ggml's words.
        needs_imatrix: whether it can only be made with an importance matrix; the size is that with one.
        refusal: why llama.cpp does not make it; None if it does.
    """

    size: int
    types: dict[str, str]
    needs_imatrix: bool = False
    refusal: str | None = None


def plans(source: Path, recipes: Sequence[Recipe], *, verbose: bool = False) -> list[Plan]:
    """What `quantize` will make of a file, for each recipe.

    Args:
        source: GGUF file; only its header is read, its tensors need not be there yet.
        recipes: other types than ``copy``.
        verbose: show llama.cpp's log.

    Raises:
        ConvertError: an override that matches no tensor or has no effect, or an importance matrix of another model.
    """
    with GGUFFile(source) as file:
        names = [tensor.name for tensor in file.tensors]
        if file.get("general.alignment", _ALIGNMENT) != _ALIGNMENT:
            raise ConvertError(
                f"{source}: its tensors are aligned to {file.get('general.alignment')} bytes, which llama.cpp's "
                "quantizer does not write; start from a file with the usual 32"
            )
        for recipe in recipes:
            if recipe.imatrix is not None and recipe.imatrix.weights:
                recipe.imatrix.check_fits(file.tensors)
    requests = [_as_request(recipe, names) for recipe in recipes]
    found = _dry_run(source, requests, verbose)
    # Some mixtures have other types with an importance matrix, without which these cannot be made at all.
    again = [i for i, run in enumerate(found) if run.asks]
    with_imatrix = [{**requests[i], "imatrix": ""} for i in again]
    if again:
        for i, run in zip(again, _dry_run(source, with_imatrix, verbose), strict=True):
            found[i] = replace(run, asks=True)
    made = []
    for recipe, run in zip(recipes, found, strict=True):
        if run.refusal is not None:
            made.append(Plan(0, run.types, run.asks, run.refusal))
            continue
        if len(run.types) != len(names):
            raise ConvertError(f"{source}: llama.cpp's dry run named {len(run.types)} of {len(names)} tensors")
        _check_effect(recipe, recipe.overrides(names), run.types)
        made.append(Plan(_size(source, recipe, run.types), run.types, run.asks))
    return made


@dataclass
class _DryRun:
    types: dict[str, str]
    asks: bool = False  # for an importance matrix
    refusal: str | None = None


def _dry_run(source: Path, requests: list[dict[str, Any]], verbose: bool) -> list[_DryRun]:
    """What llama.cpp says of a source, for each request."""
    runs = [_DryRun({})]
    refusal = "no reason given"

    def line_read(line: str) -> None:
        nonlocal refusal
        if match := re.match(r"\[ *\d+/ *\d+\] +(\S+) .*, type = +(\S+), size = .*?(?:\((\S+)\))?$", line.strip()):
            runs[-1].types[match[1]] = (match[3] or match[2]).lower().rstrip(",")
        elif "require an imatrix" in line:
            runs[-1].asks = True
        elif match := re.search(r"failed to quantize: (.*)", line):
            refusal = one_line(match[1])

    def reported(status: int) -> None:
        runs[-1].refusal = refusal if status else None
        runs.append(_DryRun({}))

    wanted = {"dry_run": True, "source": str(source), "recipes": requests}
    reason = run_child("clex_convert.quantize", wanted, verbose=verbose, line_read=line_read, reported=reported)
    if reason is not None:
        raise ConvertError(f"{source}: llama.cpp cannot read the source: {reason}")
    return runs[:-1]


def _check_effect(recipe: Recipe, overrides: dict[str, str], types: dict[str, str]) -> None:
    for pattern, kind in recipe.tensor_types:
        named = [name for name in overrides if re.search(pattern, name)]
        if not any(types[name] == overrides[name] for name in named):
            raise ConvertError(
                f"{pattern!r} names only tensors that cannot become {kind}, such as {named[0]}, which will be "
                f"{types[named[0]]}"
            )


def _size(source: Path, recipe: Recipe, types: dict[str, str]) -> int:
    with GGUFFile(source) as file, GGUFHeader(file) as header:
        header.set("general.quantization_version", np.uint32(0))
        header.set("general.file_type", np.uint32(0))
        for key in _SPLIT_KEYS:
            header.remove(key)
        for key, value in recipe.metadata().items():
            header.set(key, value if isinstance(value, str) else np.uint32(value))
        for tensor in file.tensors:
            header.add_tensor(tensor.name, tensor.shape, tensor_types()[types[tensor.name]])
        return len(header.encoded()) + header.data_size


def needs_imatrix(outtype: str, path: Path) -> ConvertError:
    """The error for a type that cannot be made without an importance matrix."""
    return ConvertError(f"{path}: {outtype} needs an importance matrix: {_NEEDS_IMATRIX}")


def quantize(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    verbose: bool,
    progress: Callable[[float], None],
) -> list[str]:
    """Quantizes a GGUF file with ``llama_model_quantize``.

    Args:
        source: GGUF file of any type.
        target: file to write.
        recipe: any but ``copy``.
        verbose: show llama.cpp's log.
        progress: called with the part of the tensors done, 0 to 1.

    Returns:
        What the user should know of the result, a sentence each.

    Raises:
        ConvertError: llama.cpp refuses, or the disk is full.
    """
    notes: list[str] = []
    outtype = recipe.outtype

    def line_read(line: str) -> None:
        if match := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            progress((int(match[1]) - 1) / int(match[2]))
        if match := re.search(r"(\d+ of \d+) tensor\(s\) required fallback", line):
            notes.append(f"{match[1]} tensors have rows that blocks of {outtype} do not divide; they use a larger type")

    with GGUFFile(source) as file:
        names = [tensor.name for tensor in file.tensors]
    wanted = {
        "dry_run": False,
        "source": str(source),
        "target": str(target),
        "recipes": [_as_request(recipe, names)],
    }
    reason = run_child("clex_convert.quantize", wanted, verbose=verbose, line_read=line_read)
    if reason is None:
        return notes
    if "iostream error" in reason:
        raise disk_full(target)
    if "imatrix" in reason or "importance matrix" in reason:
        if recipe.imatrix is None:
            raise needs_imatrix(outtype, target)
        raise ConvertError(f"{target}: {recipe.imatrix.path} does not serve for {outtype}: {reason}")
    raise ConvertError(f"{target}: llama.cpp could not make {outtype}: {reason}")


def _as_request(recipe: Recipe, names: Sequence[str]) -> dict[str, Any]:
    """A recipe as JSON. The expressions are resolved here, so that they are Python's, whatever C++ makes of them."""
    output, embedding = recipe.output_tensor_type, recipe.token_embedding_type
    return {
        "ftype": file_type(recipe.outtype),
        "overrides": {f"^{_escaped(name)}$": tensor_types()[kind] for name, kind in recipe.overrides(names).items()},
        "output": None if output is None else tensor_types()[output],
        "embedding": None if embedding is None else tensor_types()[embedding],
        "pure": recipe.pure,
        "imatrix": None if recipe.imatrix is None else str(recipe.imatrix.path),
        "metadata": recipe.metadata(),
    }


def _escaped(name: str) -> str:
    return re.sub(r"([^A-Za-z0-9_-])", r"\\\1", name)


# In the child


def main() -> None:
    """The child."""
    wanted = request()
    source = os.fsencode(wanted["source"])
    if not wanted["dry_run"]:
        raise SystemExit(_quantize(source, os.fsencode(wanted["target"]), wanted["recipes"][0], dry_run=False))
    for recipe in wanted["recipes"]:
        report(_quantize(source, b"", recipe, dry_run=True))


def _quantize(source: bytes, target: bytes, recipe: dict[str, Any], *, dry_run: bool) -> int:
    from llama_cpp import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = recipe["ftype"]
    parameters.allow_requantize = True
    parameters.max_buf_size = _BUFFER
    parameters.pure = recipe["pure"]
    parameters.dry_run = dry_run
    if recipe["output"] is not None:
        parameters.output_tensor_type = recipe["output"]
    if recipe["embedding"] is not None:
        parameters.token_embedding_type = recipe["embedding"]
    overrides = [(pattern.encode(), kind) for pattern, kind in recipe["overrides"].items()]
    if overrides:
        parameters.tt_overrides = _terminated(llama_cpp.llama_model_tensor_override, overrides)
    weights = {}
    if recipe["imatrix"] is not None:
        # A dry run asks only whether there is one.
        weights = {"": np.ones(1, np.float32)} if dry_run else read_imatrix(Path(recipe["imatrix"])).weights
        entries = [
            (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in weights.items()
        ]
        parameters.imatrix = _terminated(llama_cpp.llama_model_imatrix_data, entries)
    settings = []
    for key, value in recipe["metadata"].items():
        setting: Any = llama_cpp.llama_model_kv_override(key=key.encode())
        if isinstance(value, str):
            setting.tag, setting.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            setting.tag, setting.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        settings.append(setting)
    if settings:
        parameters.kv_overrides = _terminated(llama_cpp.llama_model_kv_override, settings)
    return llama_cpp.llama_model_quantize(source, target, ctypes.pointer(parameters))


def _terminated(kind: Any, items: list[Any]) -> Any:
    """Items of a C array whose last is all zeros."""
    return ctypes.cast((kind * (len(items) + 1))(*items), ctypes.POINTER(kind))


if __name__ == "__main__":
    main()
