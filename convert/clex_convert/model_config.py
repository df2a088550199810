"""What a ``config.json`` says, as transformers' class of its architecture takes it.

Each value stands in one place here, under the class's own name for it, whichever release wrote the file: 4 has the
rotary embedding's base beside ``rope_scaling``, 5 has both in ``rope_parameters``. What the file leaves out is the
class's default; what llama.cpp would not compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_convert.errors import ConvertError
from clex_convert.model_class import ModelClass
from clex_convert.model_classes import MODEL_CLASSES
from clex_local.errors import one_line
from clex_local.model_file import architectures

# Sizes without which nothing can be said of a model; the classes have defaults, those of one released size.
_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_POSITIVE = (
    *("max_position_embeddings", "original_max_position_embeddings", "intermediate_size", "ffn_hidden_size"),
    *("num_key_value_heads", "num_kv_heads", "head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_experts", "num_local_experts", "num_experts_per_tok"),
)
_SWITCHES = (
    *("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "qk_layernorm", "use_parallel_residual", "bias"),
    *("alibi", "new_decoder_architecture", "multi_query", "parallel_attn", "norm_topk_prob", "use_sliding_window"),
)
# Values of the rotary embedding that release 5 moves into rope_parameters.
_INSIDE = ("rope_theta", "partial_rotary_factor")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# What llama.cpp's conversion reads of a config beside the keys of the class.
_GENERAL = ("architectures", "model_type", "_name_or_path", "quantization_config", "dtype", "torch_dtype", "vocab_size")


@dataclass(frozen=True)
class ModelConfig:
    """A config, every value of which is known and in one place.

    Attributes:
        path: the file, for messages.
        architecture: name of transformers' class.
        values: what the class reads, with ``rope_theta``, ``partial_rotary_factor`` and ``head_dim``; and other keys
            of the file.
        scaling: what ``rope_scaling`` or ``rope_parameters`` says beside these; may be empty.
        scaling_key: the one of the two that says it.
    """

    path: str
    architecture: str
    values: Mapping[str, Any]
    scaling: Mapping[str, Any]
    scaling_key: str

    @property
    def model_class(self) -> ModelClass:
        """What is known of the class."""
        return MODEL_CLASSES[self.architecture]

    @property
    def gguf_architecture(self) -> str:
        """Name of the model's architecture in GGUF."""
        return architectures.of_class(self.architecture).name

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.values["head_dim"] * self.values["partial_rotary_factor"])

    @property
    def window(self) -> int | None:
        """Tokens that some layer looks back on, itself among them, where llama.cpp does not know; None otherwise."""
        values, how = self.values, self.model_class.window
        if how in ("", "computed"):
            return None
        on = how == "all" or values["use_sliding_window"]
        window = values["sliding_window"] if on else None
        if how != "layers":
            return window
        types = values["layer_types"]
        if types is None:
            return window if values["max_window_layers"] < values["num_hidden_layers"] else None
        return window if "sliding_attention" in types else None

    def check_window(self, context: int) -> None:
        """Refuses a window that a context of so many tokens would show.

        Raises:
            ConvertError: the window is smaller; llama.cpp's graphs of these architectures have none.
        """
        if self.window is not None and self.window < context:
            raise ConvertError(
                f"{self.path}: layers attend to the last {self.window} tokens only (sliding_window), which llama.cpp "
                f"does not compute for {self.architecture}, and the result is to have {context} tokens; set "
                "sliding_window to null to let them attend to all"
            )

    def for_scripts(self, context: int) -> dict[str, Any]:
        """The config for llama.cpp's conversion scripts, with a plain RoPE of `context` tokens.

        Nothing but what the class reads: the scripts try names of many architectures, and take the first.
        """
        values, model_class = self.values, self.model_class
        keys = (*_SIZES, *model_class.defaults, *_GENERAL, "rope_theta", "partial_rotary_factor")
        made = {key: values[key] for key in keys if key in values}
        made["max_position_embeddings"] = context
        if "original_max_position_embeddings" in made:
            made["original_max_position_embeddings"] = context
        if "sliding_window" in made and not self.windowed_layers:
            made["sliding_window"] = None  # it is not smaller than the context, or there is no layer that has it
        if not model_class.own_head_dim:
            made.pop("head_dim", None)
        if model_class.for_scripts is not None:
            made |= model_class.for_scripts(values)
        return made

    @property
    def windowed_layers(self) -> list[bool]:
        """Of each layer, whether it has a window that llama.cpp computes; empty where none has."""
        if self.model_class.window != "computed" or self.values["sliding_window"] is None:
            return []
        found = [kind == "sliding_attention" for kind in self.values["layer_types"]]
        return found if any(found) else []

    def window_keys(self) -> dict[str, Any]:
        """The GGUF keys, without the architecture, of the layers that have a window; the scripts write some of them."""
        if not self.windowed_layers:
            return {}
        return {
            "attention.sliding_window": np.uint32(self.values["sliding_window"]),
            "attention.sliding_window_pattern": np.array(self.windowed_layers),
            "rope.freq_base_swa": np.float32(self.values["rope_local_base_freq"]),
        }

    def is_left_out(self, tensor: str) -> bool:
        """Whether a tensor belongs to a head that guesses tokens ahead, which transformers leaves out too."""
        layers = self.values["num_hidden_layers"]
        for start in self.model_class.draft_head:
            head, layered, _ = start.partition("{n}")
            number = tensor.removeprefix(head).partition(".")[0]
            if tensor.startswith(head) and (not layered or (number.isdecimal() and int(number) >= layers)):
                return True
        return False


def read_model_config(
    said: Mapping[str, Any], path: str, *changes: Mapping[str, Any], scaling: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Reads a config.

    Args:
        said: the object in the file.
        path: the file, for messages.
        changes: keys that take the place of the file's, the later ones before the earlier ones.
        scaling: takes the place of the RoPE scaling that the file and the changes name.

    Raises:
        ConvertError: an architecture that cannot be converted, a key that is missing or unusable, one value that is
            said twice and differently, or a value that llama.cpp does not compute.
    """
    architecture = _architecture(said, path)
    model_class = MODEL_CLASSES[architecture]
    values: dict[str, Any] = {}
    key, rope, scaled = "rope_scaling", {}, False
    layers = [*((layer, path) for layer in (said, *changes)), ({"rope_scaling": scaling or {}}, "`rope_scaling`")]
    for layer, where in layers if scaling is not None else layers[:-1]:
        flat, found = _flat(layer, model_class, where)
        values.update(flat)
        if found is not None:
            key, rope = found
        scaled = scaled or found is not None
    if model_class.scaled and not scaled:
        raise _missing("rope_parameters", path)
    _check_unread(said, values, model_class, path)
    spoken = set(values)
    values = {**model_class.defaults, **values}
    _derive(values, model_class, path)
    _check(values, spoken, model_class, architecture, path)
    return ModelConfig(path, architecture, values, rope, key)


def _missing(key: str, path: str) -> ConvertError:
    return ConvertError(f"{path}: the key {key} is missing or unusable; add it")


def _architecture(said: Mapping[str, Any], path: str) -> str:
    classes = said.get("architectures")
    others = {model_class.model_type: other for other, model_class in MODEL_CLASSES.items()}
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        missing = str(_missing("architectures", path))
        known = others.get(str(said.get("model_type")))
        raise ConvertError(missing if known is None else f'{missing}: ["{known}"]')
    name = classes[0]
    if name not in MODEL_CLASSES:
        raise ConvertError(
            f"{path}: the architecture {one_line(name, 60)} is not supported; supported: "
            f"{architectures.shortened(list(MODEL_CLASSES))}"
        )
    # transformers goes by model_type.
    other = others.get(str(said.get("model_type")), name)
    if other != name:
        raise ConvertError(
            f"{path}: names the architecture {name} and the model_type {said['model_type']}, which is {other}; "
            "correct one of them"
        )
    return name


def _flat(
    said: Mapping[str, Any], model_class: ModelClass, path: str
) -> tuple[dict[str, Any], tuple[str, dict[str, Any]] | None]:
    """The keys with the class's own names and the rotary embedding's values among them; and its scaling, if any."""
    values = dict(said)
    inside: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if (mapping := values.pop(name, None)) is not None:
            if not isinstance(mapping, dict):
                raise _missing(name, path)
            inside[name], local = _of_all_layers(mapping, f"{path}: {name}", model_class)
            if local is not None:
                values["rope_local_base_freq"] = local
    for key, names in model_class.names.items():
        spoken = [name for name in names if values.get(name) is not None]
        if spoken:
            _agree({name: values[name] for name in spoken}, path)
            values[key] = values[spoken[0]]
            for name in spoken:
                if name != key:
                    del values[name]
    for key in _INSIDE:
        own = model_class.names.get(key, (key,))[0]
        places = {f"{name}.{key}": mapping.pop(key) for name, mapping in inside.items() if key in mapping}
        if places and key in values:
            places[own] = values[key]
        if places:
            _agree(places, path)
            values[key] = next(iter(places.values()))
    kinds = {name: mapping for name, mapping in inside.items() if any(value is not None for value in mapping.values())}
    if len(kinds) == 2 and kinds["rope_parameters"] != kinds["rope_scaling"]:
        raise ConvertError(f"{path}: rope_scaling and rope_parameters say different things; leave one of them out")
    if kinds:
        return values, next(iter(kinds.items()))
    return values, (next(iter(inside)), {}) if inside else None


def _of_all_layers(mapping: dict[str, Any], where: str, model_class: ModelClass) -> tuple[dict[str, Any], float | None]:
    """What holds for every layer that sees all tokens, of a mapping that says it for each type of layer.

    And the base of those with a window, if it says it and llama.cpp computes it.
    """
    types = {key: value for key, value in mapping.items() if isinstance(value, dict)}
    if not types:
        said = [str(mapping[key]) for key in ("rope_type", "type") if mapping.get(key) is not None]
        if len({{"su": "longrope"}.get(kind, kind) for kind in said}) > 1:
            raise ConvertError(f"{where}: rope_type is {said[0]!r} and type is {said[1]!r}; leave one of them out")
        return dict(mapping), None
    if model_class.window == "computed" and types.keys() == {*_LAYER_TYPES}:
        full, local = (types[kind] for kind in _LAYER_TYPES)
        base = local.get("rope_theta")
        if local.get("rope_type", "default") != "default" or not _is_number(base):
            raise ConvertError(
                f"{where}: layers with a sliding window have {one_line(local, 60)}; of their own llama.cpp computes a "
                "rope_theta, nothing else"
            )
        return {**{key: value for key, value in mapping.items() if key not in types}, **full}, base
    first = next(iter(types.values()))
    if any(value != first for value in types.values()):
        raise ConvertError(f"{where}: differs by the type of layer ({', '.join(types)}), which tables cannot do")
    return {**{key: value for key, value in mapping.items() if key not in types}, **first}, None


def _agree(places: Mapping[str, Any], path: str) -> None:
    first = next(iter(places.values()))
    if any(value != first for value in places.values()):
        said = " and ".join(f"{place} = {one_line(value, 40)}" for place, value in places.items())
        raise ConvertError(f"{path}: says {said}, which is one value in two places; leave the wrong one out")


def _check_unread(said: Mapping[str, Any], values: Mapping[str, Any], model_class: ModelClass, path: str) -> None:
    """Refuses a name that the class does not read, but other programs do, where it would have said something else."""
    for name, key in model_class.unread.items():
        own = model_class.names.get(key, (key,))[0]
        inside = [said[place] for place in ("rope_parameters", "rope_scaling") if isinstance(said.get(place), dict)]
        if name not in said or own in said or any(key in mapping for mapping in inside):
            taken = values.get(key) if name != key else None  # others were compared where they were read
        else:
            taken = model_class.defaults[key]
        if taken is not None and said.get(name, taken) != taken:
            raise ConvertError(
                f"{path}: says {name} = {one_line(said[name], 40)}, but what transformers reads is {own}, "
                f"{one_line(taken, 40)} here; say {own}"
            )


def _derive(values: dict[str, Any], model_class: ModelClass, path: str) -> None:
    """Sizes that follow from others, and checks of those that everything depends on."""
    for key in _SIZES:
        if not _is_count(values.get(key)):
            raise _missing(key, path)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    own = width // heads
    values["head_dim"] = own if values.get("head_dim") is None else values["head_dim"]
    values.setdefault("partial_rotary_factor", 1.0)
    for key in _SWITCHES:
        if key in values and values[key] is None:
            values[key] = False
    if "num_kv_heads" not in model_class.defaults and values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if model_class.window == "computed":
        if values.get("layer_types") is None:
            period = values.get("sliding_window_pattern") or model_class.period if values["sliding_window"] else 0
            if period and not _is_count(period):
                raise _missing("layer_types", path)
            last = [not period or (i + 1) % period == 0 for i in range(values["num_hidden_layers"])]
            values["layer_types"] = [_LAYER_TYPES[0] if full else _LAYER_TYPES[1] for full in last]
        if values.get("rope_local_base_freq") is None:
            values["rope_local_base_freq"] = values["rope_theta"]
    if model_class.derive is not None:
        model_class.derive(values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(values: Mapping[str, Any], spoken: set[str], model_class: ModelClass, architecture: str, path: str) -> None:
    if values.get("alibi"):
        raise ConvertError(f"{path}: the model has ALiBi in place of a rotary embedding; tables need the latter")
    for key in (key for key in _POSITIVE if key in model_class.defaults or key == "head_dim"):
        if not _is_count(values[key]):
            raise _missing(key, path)
    for key in (key for key in _SWITCHES if key in model_class.defaults):
        if not isinstance(values[key], bool):
            raise ConvertError(f"{path}: {key} must be true or false, not {one_line(values[key], 40)}")
    theta, partial = values["rope_theta"], values["partial_rotary_factor"]
    if not _is_number(theta) or not theta > 1:
        raise _missing("rope_theta", path)
    if not _is_number(partial) or not 0 < partial <= 1:
        raise _missing("partial_rotary_factor", path)
    accepted = {"is_causal": (True,), **model_class.accepted}
    if not model_class.partial:
        accepted["partial_rotary_factor"] = (1,)
    if not model_class.own_head_dim:
        accepted["head_dim"] = (values["hidden_size"] // values["num_attention_heads"],)
    if model_class.limits is not None:
        accepted |= model_class.limits(values)
    for key, able in accepted.items():
        if key in values and values[key] not in able:
            default = "" if key in spoken else ", its default,"
            raise ConvertError(
                f"{path}: {architecture} with {key} = {one_line(values[key], 60)}{default} is not supported; llama.cpp "
                f"computes it with {' or '.join(str(value) for value in able if value is not None)}"
            )
    _check_layers(values, model_class, path)


def _check_layers(values: Mapping[str, Any], model_class: ModelClass, path: str) -> None:
    if not model_class.window:
        return
    window = values["sliding_window"]
    on = model_class.window in ("all", "computed") or values["use_sliding_window"]
    if on and window is not None and not _is_count(window):
        raise _missing("sliding_window", path)
    types = values.get("layer_types") if "layer_types" in model_class.defaults else None
    if types is None:
        return
    if not isinstance(types, list) or len(types) != values["num_hidden_layers"] or not set(types) <= {*_LAYER_TYPES}:
        raise ConvertError(
            f"{path}: layer_types must name each of the {values['num_hidden_layers']} layers "
            f"{' or '.join(_LAYER_TYPES)}"
        )
    if "sliding_attention" in types and (not on or window is None):
        raise ConvertError(f"{path}: layer_types has sliding_attention, but no sliding_window is in use; say which")
