"""Checks of a file that was made: that it loads, decodes, and says nearly what the unquantized model says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clex_convert.child_process import report, request, run_child
from clex_convert.errors import ConvertError, NotFiniteError, disk_full
from clex_convert.rope_metadata import RopeMetadata
from clex_local.errors import ClexError
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.keys import ModelKeys
from clex_local.model_file.tables import read_tables, tables_of

CHECKS = ("none", "basic", "full")

# The opening of Moby-Dick (Herman Melville, 1851).
TEXT = Path(__file__).with_name("check.txt")
_FULL, _BASIC = 512, 16  # tokens of it, as far as the model's original context goes
_BATCH = 64

# Text that a vocabulary needs its tokens for single bytes for, or a token for what is unknown.
_PROBE = "\tNaïve 漢字 🙂\n".encode()


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a quantized model are from those of the unquantized one, on a short text.

    Attributes:
        kl: mean Kullback-Leibler divergence of the next token's distribution, in nats.
        agreement: part of the tokens after which both expect the same token most, 0 to 1.
        tokens: tokens of the text.
    """

    kl: float
    agreement: float
    tokens: int


def check_vocabulary(path: Path, *, verbose: bool) -> None:
    """Lets llama.cpp read a file's settings and vocabulary, without its tensors, and tokenize a few characters.

    Raises:
        ConvertError: it refuses them, such as a pre-tokenizer name it does not know.
    """
    reason = run_child("clex_convert.check", {"task": "vocabulary", "model": str(path)}, verbose=verbose)
    if reason is None:
        return
    hint = ""
    if "pre-tokenizer" in reason:
        hint = "; pass another `pre_tokenizer`"
    elif "cannot encode the text" in reason:  # such as a sentencepiece vocabulary without tokens for bytes
        hint = "; if its tokenizer is a byte-level BPE, pass the name of its pre-tokenizer with `pre_tokenizer`"
    raise ConvertError(f"{path}: llama.cpp cannot load the result: {reason}{hint}")


def write_reference(model: Path, target: Path, *, verbose: bool) -> None:
    """Writes the log-probabilities of every next token of the text, [tokens, n_vocab] in float32.

    Args:
        model: GGUF file of the unquantized model.
        target: file to write.
        verbose: show llama.cpp's log.

    Raises:
        ConvertError: the model cannot be computed with, or the disk is full.
    """
    _decode(model, {"reference": str(target), "tokens": _FULL}, verbose, "the unquantized model")


def check_result(
    path: Path, metadata: RopeMetadata, *, reference: Path | None = None, verbose: bool = False
) -> Divergence | None:
    """Opens a file with the runtime's library, compares its keys with those it should have, and decodes with it.

    Args:
        path: the file.
        metadata: its keys, as they were made.
        reference: what `write_reference` wrote of the unquantized model, to be compared with.
        verbose: show llama.cpp's log.

    Returns:
        How far it is from the reference, if there is one.

    Raises:
        ConvertError: the file cannot be used, its keys are others, or its logits are not finite.
    """
    check_metadata(path, metadata)
    wanted: dict[str, Any] = {"tokens": _BASIC}
    if reference is not None:
        wanted = {"tokens": _FULL, "compared": str(reference)}
    found = _decode(path, wanted, verbose, "the result")
    return Divergence(**found["divergence"]) if reference is not None else None


def check_metadata(path: Path, metadata: RopeMetadata) -> None:
    """Checks that a file is complete and says of the rotary embedding what it should, to the last bit.

    Raises:
        ConvertError: it is not, or says something else.
    """
    try:
        with GGUFFile(path) as file:
            tables_of(file)
            wanted = {ModelKeys(file).key("context_length"): np.uint32(metadata.context_length), **metadata.keys}
            given = {key: file.get(key) for key in file.keys() if key in wanted or key.startswith("clex.")}  # noqa: SIM118
    except ClexError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConvertError(f"{path}: the result cannot be used: {reason}") from None
    for key in {**wanted, **given}:
        if key not in wanted or key not in given or _bytes(given[key], wanted[key]) != _bytes(wanted[key], wanted[key]):
            raise ConvertError(f"{path}: the result cannot be used: {key} is not what was written; try again")


def _bytes(value: Any, like: Any) -> bytes:
    return value.encode() if isinstance(value, str) else np.asarray(value, np.asarray(like).dtype).tobytes()


def _decode(path: Path, wanted: dict[str, Any], verbose: bool, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    request = {"task": "decode", "model": str(path), **wanted}
    reason = run_child("clex_convert.check", request, verbose=verbose, reported=found.update)
    if "unsaved" in found:
        raise disk_full(wanted.get("reference", path))
    if "infinite" in found:
        advice = "choose another `outtype`" if what == "the result" else "its weights are of no use"
        raise NotFiniteError(f"{path}: {what} computes values that are not finite; {advice}")
    if "tables" in found:
        raise ConvertError(f"{path}: the library reads other tables from {what} than were written: {found['tables']}")
    if reason is not None:
        raise ConvertError(f"{path}: {what} cannot be decoded with: {reason}")
    return found


# In the child


def main() -> None:
    """The child."""
    wanted = request()
    path = Path(wanted["model"])
    if wanted["task"] == "vocabulary":
        _tokenize(path)
    else:
        _run(path, wanted)


def _tokenize(path: Path) -> None:
    from llama_cpp import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise SystemExit(1)
    tokens, vocabulary = (llama_cpp.llama_token * 256)(), llama_cpp.llama_model_get_vocab(model)
    assert vocabulary is not None
    if llama_cpp.llama_tokenize(vocabulary, _PROBE, len(_PROBE), tokens, len(tokens), True, False) <= 0:
        raise SystemExit("llama.cpp cannot tokenize with this vocabulary")


def _run(path: Path, wanted: dict[str, Any]) -> None:
    from clex_convert.decoder import Decoder, NotFiniteLogits

    decoder = Decoder(path, wanted["tokens"], n_batch=_BATCH)
    _compare_tables(path, decoder.model)
    tokens = decoder.tokenize(TEXT.read_bytes())[: decoder.n_ctx]
    reference = None
    if "compared" in wanted:
        reference = np.memmap(wanted["compared"], np.float32, "r", shape=(len(tokens), decoder.n_vocab))
    kl, agreed = 0.0, 0
    with open(wanted.get("reference", os.devnull), "wb") as file:
        for start in range(0, len(tokens), decoder.n_batch):
            try:
                logits = decoder.decode(tokens[start : start + decoder.n_batch], start)
            except NotFiniteLogits:
                logits = None
            if logits is None or not np.isfinite(logits).all():
                report({"infinite": True})
                raise SystemExit(1)
            for i, row in enumerate(logits, start):
                log_probabilities = _log_softmax(row)
                _save(log_probabilities, file)
                if reference is not None:
                    kl += float((np.exp(reference[i]) * (reference[i].astype(np.float64) - log_probabilities)).sum())
                    agreed += int(np.argmax(reference[i]) == np.argmax(row))
    report({"divergence": {"kl": max(kl / len(tokens), 0.0), "agreement": agreed / len(tokens), "tokens": len(tokens)}})


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _save(values: npt.NDArray[np.float64], file: Any) -> None:
    try:
        file.write(values.astype(np.float32).tobytes())
        file.flush()
    except OSError:
        report({"unsaved": True})
        raise SystemExit(1) from None


def _compare_tables(path: Path, model: Any) -> None:
    """The tables as the library has loaded them."""
    from clex_local.library import llama_clex

    tables = read_tables(path)
    if tables is None:
        return
    for bucket, factor in enumerate(tables.scaling_factors):
        same = llama_clex.inv_freq(model, bucket).tobytes() == tables.inv_freq[bucket].tobytes()
        if not same or llama_clex.scaling_factor(model, bucket) != factor:
            report({"tables": f"bucket {bucket + 1}"})
            raise SystemExit(1)


if __name__ == "__main__":
    main()
