"""The tensors that a model must have, and may have, by its config."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping

from clex_convert.errors import ConvertError
from clex_convert.model_config import ModelConfig

# Buffers that older releases of transformers saved, and that no one reads.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".self_attention.inv_freq")
Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig, present: Collection[str]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the tensors that the model has, the output matrix among them where it is not tied.

    A line of `ModelClass` is a name, its dimensions and perhaps a condition ``key=value`` or ``key=value|value``, where
    a key that holds a list says it for each layer. The dimensions are sums of multiples of sizes: v is
    the vocabulary, h the width, q and k the rows of all queries and of all keys, d a head, f the feed-forward network,
    e the number of experts, x the width of one, s that of the shared one, and `ModelClass.sizes` has further ones. In a
    name {i} stands for each layer, {e}, {q} and {k} for each expert and for each head of queries and of keys.

    Args:
        config: the model's.
        present: names in its files, which decide between the two layouts of experts.
    """
    values, known = config.values, config.model_class
    heads, keys = values["num_attention_heads"], values.get("num_kv_heads", values.get("num_key_value_heads"))
    sizes = {
        "v": values["vocab_size"],
        "h": values["hidden_size"],
        "q": heads * values["head_dim"],
        "k": keys * values["head_dim"],
        "d": values["head_dim"],
        "f": values.get("ffn_hidden_size", values.get("intermediate_size")),
        "e": values.get("num_local_experts", values.get("num_experts", 0)),
        "x": values.get("moe_intermediate_size"),
        "s": values.get("shared_expert_intermediate_size"),
    }
    sizes |= {letter: math.prod(values[key] for key in product.split("*")) for letter, product in known.sizes.items()}
    counts = {"i": values["num_hidden_layers"], "e": sizes["e"], "q": heads, "k": keys}
    layer = known.layer
    if known.fused and any(name.endswith(".mlp.experts.gate_up_proj") for name in present):
        single = [line for line in layer.splitlines() if "{e}" not in line]
        layer = "\n".join([*single, known.fused])
    for line in filter(None, (known.tensors + layer).splitlines()):
        name, *rest = line.split()
        condition = rest.pop() if rest and "=" in rest[-1] else ""
        key, _, wanted = condition.partition("=")
        of_layer = isinstance(values.get(key), list)
        if condition and not of_layer and str(values[key]).lower() not in wanted.split("|"):
            continue
        if name == known.output and values["tie_word_embeddings"]:
            continue
        shape = tuple(_size(dimension, sizes) for dimension in rest)
        layers = [str(i) for i in range(counts["i"]) if not of_layer or str(values[key][i]) in wanted.split("|")]
        for layer_name in [name.replace("{i}", i) for i in layers] if "{i}" in name else [name]:
            for full in _spelled_out(layer_name, counts):
                yield full, shape


def _size(dimension: str, sizes: Mapping[str, int]) -> int:
    terms = re.findall(r"(\d*)([a-zA-Z]?)", dimension)
    return sum(int(times or 1) * (sizes[size] if size else 1) for times, size in terms if times or size)


def _spelled_out(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    match = re.search(r"\{(\w)\}", name)
    if match is None:
        yield name
        return
    for number in range(counts[match[1]]):
        yield from _spelled_out(name.replace(match[0], str(number), 1), counts)


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], ignored: Collection[str] = ()) -> None:
    """Refuses a model whose weights are not those of its config.

    transformers would draw a missing tensor at random and leave one out that it does not know; of either a user should
    know.

    Args:
        config: the model's.
        shapes: of every tensor in its files.
        ignored: names that are dealt with elsewhere.

    Raises:
        ConvertError: a tensor is missing, too many, or has another shape.
    """
    folder, architecture = config.path.removesuffix("config.json").rstrip("/"), config.architecture
    expected = dict(expected_tensors(config, shapes))
    # The tensors that stand for a quantized one begin as it does, and have shapes of their own.
    quantized = bool(config.values.get("quantization_config"))
    modules = {name.rpartition(".")[0] for name in shapes} if quantized else set()
    for name in expected:
        if name in shapes or (quantized and name.rpartition(".")[0] in modules):
            continue
        similar = next((other for other in shapes if other.endswith(name) or name.endswith(f".{other}")), None)
        hint = f"; they have {similar}" if similar else ""
        raise ConvertError(
            f"{folder}: the weights lack {name}, which {architecture} needs with this config.json{hint}; "
            "download or save the model again"
        )
    if quantized:
        return
    for name, shape in shapes.items():
        if name in expected:
            if shape != expected[name]:
                raise ConvertError(
                    f"{folder}: {name} is {list(shape)}, and by config.json it is {list(expected[name])}; "
                    "they belong to different models"
                )
        elif name not in ignored and not name.endswith(_BUFFERS):
            raise ConvertError(
                f"{folder}: the weights hold {name}, which {architecture} does not have with this config.json, so that "
                "transformers would leave it out; correct config.json, or save the model again without it"
            )
