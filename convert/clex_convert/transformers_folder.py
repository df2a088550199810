"""Model folders as transformers loads them, saved by releases before 5 or since, with one before 5 or since.

Release 5 keeps all of a RoPE in ``rope_parameters`` of the config, the base included, and lists further special tokens
in ``extra_special_tokens``. Releases before 5 keep the base in ``rope_theta``, look for no other name, and know a
dictionary by the name of ``extra_special_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# What release 5 keeps in rope_parameters and releases before it beside rope_scaling.
_BESIDE = ("rope_theta", "partial_rotary_factor")
# Classes that releases before 5 do not have; theirs of the same purpose reads tokenizer.json alone.
_BACKENDS = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


def since_release_5() -> bool:
    """Whether this is a release of transformers since 5."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def load_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder, with the RoPE that its config.json asks for.

    Raises:
        Exception: whatever transformers raises.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    if not since_release_5() and isinstance(said := getattr(config, "rope_parameters", None), dict):
        for key in _BESIDE:
            if key in said:
                setattr(config, key, said[key])
        set_rope_scaling(config, {key: value for key, value in said.items() if key not in _BESIDE})
        del config.rope_parameters
    return config


def rope_scaling(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of its RoPE scaling, in either release's words; empty where it says nothing."""
    return getattr(config, "rope_parameters" if since_release_5() else "rope_scaling", None) or {}


def rope_theta(config: PretrainedConfig) -> float:
    """The base of a config's RoPE."""
    named = (getattr(config, key, None) for key in ("rope_theta", "rotary_emb_base"))
    return float(next((value for value in (rope_scaling(config).get("rope_theta"), *named) if value), 10000.0))


def set_rope_scaling(config: PretrainedConfig, values: Mapping[str, Any] | None) -> None:
    """Gives a config another RoPE scaling, or none; its base and its rotated part stay."""
    values = dict(values or {})
    if values.get("rope_type", values.get("type", "default")) == "default":
        values = {}
    if not since_release_5():
        config.rope_scaling = values or None
        return
    kept = {key: value for key, value in rope_scaling(config).items() if key in _BESIDE}
    config.rope_parameters = {"rope_type": values.get("type", "default"), **kept, **values}
    config.standardize_rope_params()


def name_rope_as_before_5(config: Path) -> None:
    """Rewrites a config.json with the names that all releases of transformers, and CLEX's authors' code, read."""
    values = json.loads(config.read_text(encoding="utf-8"))
    said = values.pop("rope_parameters", None)
    if not isinstance(said, dict):
        return
    values.update({key: said.pop(key) for key in _BESIDE if key in said})
    if "type" in said:
        said.pop("rope_type", None)
    if said.get("rope_type") != "default":
        values["rope_scaling"] = said
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tokenizer_config_before_5(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in the words of releases before 5, which release 5 reads as well."""
    values = dict(values)
    if isinstance(extra := values.get("extra_special_tokens"), list):
        del values["extra_special_tokens"]
        values["additional_special_tokens"] = [*(values.get("additional_special_tokens") or ()), *extra]
    if values.get("tokenizer_class") in _BACKENDS:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    return values


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        Exception: whatever transformers raises, or it has no vocabulary.
    """
    tokenizer: Any = _load_tokenizer(folder)
    # Release 5 makes one of three tokens of a class whose files are missing or empty.
    if tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise ValueError("it has no vocabulary: the tokenizer's files are missing or empty")
    return tokenizer


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    if since_release_5() or not path.is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    said = json.loads(path.read_text(encoding="utf-8"))
    translated, more = tokenizer_config_before_5(said), {}
    if isinstance(said.get("extra_special_tokens"), list):
        # What is passed goes before what the file says.
        more = {"additional_special_tokens": translated["additional_special_tokens"], "extra_special_tokens": {}}
    known = translated.get("tokenizer_class") == said.get("tokenizer_class")
    kind: Any = AutoTokenizer if known else PreTrainedTokenizerFast
    return kind.from_pretrained(folder, local_files_only=True, **more)


def cache_argument(model: Any) -> str:
    """The name by which a model's forward takes its cache, which changes in the course of release 5."""
    import inspect

    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
