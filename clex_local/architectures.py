"""The architectures of GGUF, one row each: every fact about one that no file says.

What transformers' classes compute is in `clex_convert.model_classes`. ``python -m clex_local.architectures`` prints the
table of docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_FREQS = ("rope_freqs.weight",)
_LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Architecture:
    """What is known of one architecture.

    Attributes:
        name: in GGUF, the value of ``general.architecture``.
        models: families of models that are of it, for people.
        classes: transformers' classes that become it; each has its entry in `clex_convert.model_classes`.
        trainable: those of them to which `clex_train` can add a CLEX layer.
        factor_tensors: tensors of frequency factors that stock llama.cpp's graph takes, whatever the context's size.
            Source: calls of get_rope_factors in its src/models/.
        tables: whether its RoPE can have tables.
        compared: whether the tests compare its logits with those of transformers. Where they do not, only the library
            has looked at its graph, and found that the cached keys are what RoPE gives.
        sliding_window: ``named`` where layers have a window if the file names one, ``always`` where they have one also
            if it does not, empty where the graph has none, whatever the file says. Source: swa_type in src/models/.
        windowed_layers: number of layers without which no model has the window; 0 where the number does not matter.
        recurrent: whether layers, or some of them, keep a state in place of keys and values.
            Source: llm_arch_is_recurrent and llm_arch_is_hybrid.
        expands_keys: whether keys that the model compresses are cached expanded.
    """

    name: str
    models: str = ""
    classes: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    factor_tensors: tuple[str, ...] = ()
    tables: bool = True
    compared: bool = True
    sliding_window: str = ""
    windowed_layers: int = 0
    recurrent: bool = False
    expands_keys: bool = False


def _trained(name: str, models: str, *classes: str, factor_tensors: tuple[str, ...] = ()) -> Architecture:
    """A row all of whose classes can be trained."""
    return Architecture(name, models, classes, classes, factor_tensors)


def _others(names: str, **facts: Any) -> Iterable[Architecture]:
    """Rows of architectures without tables."""
    for name in names.split():
        yield Architecture(name, tables=False, compared=False, **facts)


_ROWS = (
    _trained(
        *("llama", "Llama, Mistral, Mixtral, SmolLM, TinyLlama"),
        *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        factor_tensors=_FREQS,
    ),
    # Its folders all ask for YaRN.
    Architecture("mistral3", "Mistral 3", factor_tensors=_FREQS),
    _trained("phi2", "Phi-1, Phi-2", "PhiForCausalLM"),
    _trained("phi3", "Phi-3, Phi-4", "Phi3ForCausalLM", factor_tensors=_LONGROPE),
    _trained("gptneox", "GPT-NeoX, Pythia", "GPTNeoXForCausalLM"),
    _trained("qwen2", "Qwen2, Qwen2.5", "Qwen2ForCausalLM"),
    Architecture("qwen2moe", "Qwen2-MoE", ("Qwen2MoeForCausalLM",)),
    _trained("qwen3", "Qwen3", "Qwen3ForCausalLM"),
    _trained("qwen3moe", "Qwen3-MoE", "Qwen3MoeForCausalLM"),
    Architecture("stablelm", "StableLM", ("StableLmForCausalLM",)),
    Architecture("falcon", "Falcon", ("FalconForCausalLM",)),
    Architecture("olmo2", "OLMo 2", ("Olmo2ForCausalLM",), ("Olmo2ForCausalLM",), sliding_window="named"),
    # Without tables, but of known caches.
    *_others("minicpm3 plm", expands_keys=True),
    Architecture("exaone4", tables=False, compared=False, sliding_window="always", windowed_layers=64),
    *_others("gemma2 llama4", sliding_window="always"),
    *_others(
        "afmoe cohere2 cohere2moe dflash dots3note exaone-moe gemma-embedding gemma3 gemma3n gemma4 gemma4-assistant "
        "gpt-oss granite_swa laguna maple mellum mimo2 modern-bert muse-glimmer plamo3 smallthinker spark2_5 step35",
        sliding_window="named",
    ),
    *_others("deepseek4 lfm2", sliding_window="named", recurrent=True),
    *_others(
        "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2moe nemotron_h "
        "nemotron_h_moe qwen3next kimi-linear bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp minimax-01",
        recurrent=True,
    ),
)
ARCHITECTURES = {row.name: row for row in _ROWS}


def find(name: object) -> Architecture:
    """The row of a name in GGUF; one that knows of nothing, tables neither, for a name that has none."""
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    return row or Architecture(str(name), tables=False, compared=False)


def of_class(name: str) -> Architecture:
    """The architecture that one of transformers' classes becomes.

    Raises:
        KeyError: it becomes none of those here.
    """
    for row in with_tables():
        if name in row.classes:
            return row
    raise KeyError(name)


def with_tables() -> tuple[Architecture, ...]:
    """The rows of architectures that can have tables."""
    return tuple(row for row in ARCHITECTURES.values() if row.tables)


def names_with_tables() -> str:
    """Their names, for messages."""
    return ", ".join(row.name for row in with_tables())


def trainable_classes() -> tuple[str, ...]:
    """transformers' classes to which `clex_train` can add a CLEX layer."""
    return tuple(name for row in with_tables() for name in row.trainable)


def families(*, trained: bool = False) -> str:
    """The families of models that can have tables, or that can be trained, in one sentence's list."""
    if trained:
        return _listed([name.removesuffix("ForCausalLM") for name in trainable_classes()])
    return _listed([row.models for row in with_tables()])


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def table() -> str:
    """A Markdown table of the architectures that can have tables."""
    lines = ["| models | in GGUF | folders of | can be trained | compared with |", "| --- | --- | --- | --- | --- |"]
    for row in with_tables():
        classes = "<br>".join(f"`{name}`" for name in row.classes) or "GGUF files only"
        trained = "<br>".join("yes" if name in row.trainable else "no" for name in row.classes) or "no"
        compared = "transformers" if row.compared else "the graph"
        lines.append(f"| {row.models} | `{row.name}` | {classes} | {trained} | {compared} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
