"""The architectures of GGUF, one row each: every fact about one that no file says.

What transformers' classes compute is in `clex_convert.model_classes`.
``python -m clex_local.model_file.architectures`` prints the table of docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        scales_windows: whether layers with a window follow the model's RoPE scaling, as the others do.
        windowed_layers: number of layers without which no model has the window; 0 where the number does not matter.
        window: tokens of a window whose size the file does not name.
        window_pattern: where the file does not say which layers have a window, one of so many layers has none; 0 where
            all have one. Source: load_swa_pattern in src/models/.
        first_sees_all: whether it is the first of so many that has none, and not the last.
        unrotated: whether the layers beside those with a window have no RoPE, so that tables change nothing and the
            model needs none.
        recurrent: which layers keep a state in place of keys and values: ``all``; ``headless``, those without heads for
            keys; ``bare``, those of them that have no feed-forward network either; ``between`` those that are whole
            multiples of an interval; or ``beside``, all, which keep keys and values as well. Empty where none does.
            Source: llm_arch_is_recurrent, llm_arch_is_hybrid and is_recr_impl in src/models/.
        attention_interval: the interval of ``between`` where the file does not say.
        layers_with_cache: layers from which on the cache of earlier ones is used; 0 where all have their own.
        own_cache: whether the cache is of a kind that no other architecture has, of a size unknown to us.
            Source: llama_model::create_memory.
        expands_keys: whether keys that the model compresses are cached expanded.
        paired: whether the rows of queries and of keys, which transformers rotates as two halves of a head, are in
            pairs in GGUF. Source: permute in the conversion scripts.
        rewritten: parts of names in GGUF, of the tensors that hold something else, or in another order, than those of
            transformers (beside `paired`). Source: modify_tensors in the conversion scripts.
    """

    name: str
    models: str = ""
    classes: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    factor_tensors: tuple[str, ...] = ()
    tables: bool = True
    compared: bool = True
    sliding_window: str = ""
    scales_windows: bool = False
    windowed_layers: int = 0
    window: int = 0
    window_pattern: int = 0
    first_sees_all: bool = False
    unrotated: bool = False
    recurrent: str = ""
    attention_interval: int = 0
    layers_with_cache: int = 0
    own_cache: bool = False
    expands_keys: bool = False
    paired: bool = False
    rewritten: tuple[str, ...] = ()


def _trained(name: str, models: str, *classes: str, **facts: Any) -> Architecture:
    """A row all of whose classes can be trained."""
    return Architecture(name, models, classes, classes, **facts)


def _file(name: str, models: str, **facts: Any) -> Architecture:
    """A row of GGUF files whose graph alone was looked at."""
    return Architecture(name, models, compared=False, **facts)


def _others(names: str, **facts: Any) -> Iterable[Architecture]:
    """Rows of architectures without tables."""
    for name in names.split():
        yield Architecture(name, tables=False, compared=False, **facts)


_ROWS = (
    _trained(
        "llama",
        "Llama, Mistral, Mixtral, SmolLM, TinyLlama",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        factor_tensors=_FREQS,
        paired=True,
    ),
    # Its folders all ask for YaRN.
    Architecture("mistral3", "Mistral 3", factor_tensors=_FREQS),
    _trained("phi2", "Phi-1, Phi-2", "PhiForCausalLM"),
    _trained("phi3", "Phi-3, Phi-4", "Phi3ForCausalLM", factor_tensors=_LONGROPE),
    _trained("gptneox", "GPT-NeoX, Pythia", "GPTNeoXForCausalLM", rewritten=("attn_qkv",)),
    _trained("qwen2", "Qwen2, Qwen2.5", "Qwen2ForCausalLM"),
    Architecture("qwen2moe", "Qwen2-MoE", ("Qwen2MoeForCausalLM",), rewritten=("ffn_gate_inp_shexp",)),
    _trained("qwen3", "Qwen3", "Qwen3ForCausalLM"),
    _trained("qwen3moe", "Qwen3-MoE", "Qwen3MoeForCausalLM"),
    Architecture("stablelm", "StableLM", ("StableLmForCausalLM",)),
    Architecture("falcon", "Falcon", ("FalconForCausalLM",), rewritten=("attn_qkv",)),
    Architecture(
        "olmo2",
        "OLMo 2, OLMo 3",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        ("Olmo2ForCausalLM",),
        sliding_window="named",
        window_pattern=4,
    ),
    Architecture("smollm3", "SmolLM3", ("SmolLM3ForCausalLM",), paired=True),
    Architecture("arcee", "Arcee AFM", ("ArceeForCausalLM",), factor_tensors=_FREQS, paired=True),
    Architecture("apertus", "Apertus", ("ApertusForCausalLM",), factor_tensors=_FREQS),
    Architecture("granite", "Granite", ("GraniteForCausalLM",), factor_tensors=_FREQS, paired=True),
    Architecture(
        *("granitemoe", "Granite MoE"),
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        factor_tensors=_FREQS,
        paired=True,
    ),
    Architecture("chatglm", "GLM-4 of 2024", ("GlmForCausalLM",)),
    Architecture("glm4", "GLM-4-0414", ("Glm4ForCausalLM",)),
    Architecture("glm4moe", "GLM-4.5, GLM-4.6", ("Glm4MoeForCausalLM",)),
    Architecture("dots1", "dots.llm1", ("Dots1ForCausalLM",)),
    Architecture("gemma", "Gemma", ("GemmaForCausalLM",), rewritten=("norm",)),
    Architecture(
        *("gemma2", "Gemma 2"),
        ("Gemma2ForCausalLM",),
        sliding_window="always",
        scales_windows=True,
        window=4096,
        window_pattern=2,
        rewritten=("norm",),
    ),
    Architecture(
        *("gemma3", "Gemma 3"),
        ("Gemma3ForCausalLM",),
        sliding_window="named",
        window_pattern=6,
        rewritten=("norm",),
    ),
    Architecture("command-r", "Command R, Aya", ("CohereForCausalLM",)),
    Architecture(
        *("cohere2", "Command R7B"),
        ("Cohere2ForCausalLM",),
        sliding_window="named",
        scales_windows=True,
        window_pattern=4,
        unrotated=True,
    ),
    Architecture("olmo", "OLMo", ("OlmoForCausalLM",), paired=True),
    Architecture("olmoe", "OLMoE", ("OlmoeForCausalLM",)),
    Architecture(
        "gpt-oss", "gpt-oss", ("GptOssForCausalLM",), sliding_window="named", scales_windows=True, window_pattern=2
    ),
    Architecture(
        *("exaone4", "EXAONE 4"),
        ("Exaone4ForCausalLM",),
        factor_tensors=_FREQS,
        sliding_window="always",
        scales_windows=True,
        windowed_layers=64,
        window=4096,
        window_pattern=4,
        unrotated=True,
    ),
    Architecture("ernie4_5", "ERNIE 4.5", ("Ernie4_5ForCausalLM",)),
    Architecture("ernie4_5-moe", "ERNIE 4.5 MoE", ("Ernie4_5_MoeForCausalLM",)),
    Architecture("starcoder2", "StarCoder2", ("Starcoder2ForCausalLM",)),
    Architecture("seed_oss", "Seed-OSS", ("SeedOssForCausalLM",)),
    Architecture("nemotron", "Nemotron, Minitron", ("NemotronForCausalLM",), rewritten=("norm",)),
    Architecture(
        *("qwen3next", "Qwen3-Next"),
        ("Qwen3NextForCausalLM",),
        recurrent="between",
        attention_interval=4,
        rewritten=("norm", "ssm_", "ffn_gate_inp_shexp"),
    ),
    Architecture("falcon-h1", "Falcon-H1", ("FalconH1ForCausalLM",), recurrent="beside", rewritten=("blk.",)),
    Architecture(
        *("lfm2", "LFM2"),
        ("Lfm2ForCausalLM",),
        sliding_window="named",
        recurrent="headless",
        rewritten=("shortconv.conv",),
    ),
    # GGUF files only: no class of transformers that is compared, or one that computes something else.
    _file("deci", "DeciLM, Nemotron Super", factor_tensors=_FREQS),
    _file("grok", "Grok-1"),
    _file("qwen", "Qwen"),
    Architecture("qwen2vl", "Qwen2-VL, Qwen2.5-VL"),
    _file("qwen3vl", "Qwen3-VL"),
    _file("qwen3vlmoe", "Qwen3-VL-MoE"),
    Architecture("qwen35", "Qwen3.5", recurrent="between", attention_interval=4),
    _file("qwen35moe", "Qwen3.5-MoE", recurrent="between", attention_interval=4),
    # Its class in transformers weighs the experts in another way.
    _file("phimoe", "Phi-3.5-MoE", factor_tensors=_LONGROPE),
    _file("plamo", "PLaMo"),
    _file("plamo2", "PLaMo 2", recurrent="headless"),
    _file("plamo3", "PLaMo 3", sliding_window="named", window_pattern=8),
    _file("codeshell", "CodeShell"),
    _file("orion", "Orion"),
    Architecture("internlm2", "InternLM2"),
    _file("minicpm", "MiniCPM", factor_tensors=_FREQS),
    _file("gemma3n", "Gemma 3n", sliding_window="named", window_pattern=5, layers_with_cache=20),
    Architecture("xverse", "XVERSE"),
    _file(
        *("cohere2moe", "Command A+"),
        sliding_window="named",
        scales_windows=True,
        window_pattern=4,
        first_sees_all=True,
    ),
    _file("dbrx", "DBRX"),
    _file("openelm", "OpenELM"),
    _file("arctic", "Arctic"),
    _file("deepseek", "DeepSeek-MoE"),
    _file("bitnet", "BitNet"),
    Architecture("jais2", "Jais 2"),
    _file("exaone", "EXAONE 3", factor_tensors=_FREQS),
    _file("granitehybrid", "Bamba", factor_tensors=_FREQS, recurrent="headless"),
    Architecture("granite_swa", "Granite with windows", factor_tensors=_FREQS, sliding_window="named"),
    _file("bailingmoe", "Ling"),
    _file("bailingmoe2", "Ling 2"),
    _file("hy_v3", "Hy3"),
    Architecture("lfm2moe", "LFM2-MoE", recurrent="headless"),
    _file("grovemoe", "GroveMoE"),
    _file("hrm_text", "HRM-Text"),
    Architecture("minimax-m2", "MiniMax-M2"),
    _file("pangu-embedded", "openPangu Embedded"),
    _file("mimo2", "MiMo-V2", sliding_window="named"),
    _file("step35", "Step 3.5", sliding_window="named"),
    _file("spark2_5", "Spark 2.5", sliding_window="named", scales_windows=True),
    _file("mellum", "Mellum", sliding_window="named", scales_windows=True, window_pattern=4),
    _file("nanbeige", "Nanbeige", factor_tensors=_FREQS),
    _file("laguna", "Laguna", sliding_window="named", window_pattern=4, first_sees_all=True),
    # Without tables. Their layers that see every token have no RoPE, or there is something else in the way.
    *_others("llama4", sliding_window="always", window=8192, window_pattern=4, unrotated=True),
    *_others("afmoe exaone-moe muse-glimmer", sliding_window="named", window_pattern=4, unrotated=True),
    *_others("smallthinker", sliding_window="named", window_pattern=4, first_sees_all=True, unrotated=True),
    *_others("maple", sliding_window="named", unrotated=True),
    *_others("minicpm3 plm", expands_keys=True),
    *_others("gemma-embedding", sliding_window="named", window_pattern=6),
    *_others("modern-bert", sliding_window="named", window_pattern=3, first_sees_all=True),
    *_others("gemma4", sliding_window="named"),
    *_others("dflash dots3note gemma4-assistant", sliding_window="named", own_cache=True),
    *_others("deepseek32 glm-dsa hy_v4 minimax-m3", own_cache=True),
    *_others("deepseek4", sliding_window="named", recurrent="headless", own_cache=True),
    *_others("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7", recurrent="all"),
    *_others("jamba kimi-linear bailingmoe3 kimi-k3", recurrent="headless"),
    *_others("nemotron_h nemotron_h_moe", recurrent="bare"),
    *_others("minimax-01", recurrent="between", attention_interval=8),
    *_others("glm5-next", recurrent="headless", own_cache=True),
    *_others("qwen4exp", recurrent="between", attention_interval=4, own_cache=True),
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
    """Their names, for messages: the first ones, and where all are."""
    return shortened([row.name for row in with_tables()])


def shortened(names: Sequence[str], most: int = 12) -> str:
    """A list for a message, of which only the beginning is shown."""
    if len(names) <= most:
        return ", ".join(names)
    rest = f"{len(names) - most} more (`python -m clex_local.model_file.architectures` lists them)"
    return f"{', '.join(names[:most])} and {rest}"


def trainable_classes() -> tuple[str, ...]:
    """transformers' classes to which `clex_train` can add a CLEX layer."""
    return tuple(name for row in with_tables() for name in row.trainable)


def families(*, trained: bool = False) -> str:
    """The families of models that can have tables, or the classes that can be trained, as a part of a sentence."""
    if trained:
        return _listed([name.removesuffix("ForCausalLM") for name in trainable_classes()])
    graphs = [row for row in with_tables() if not row.compared]
    compared = [row.models for row in with_tables() if row.compared]
    return (
        f"{', '.join(compared)}; and GGUF files of {len(graphs)} more architectures, whose graphs alone were looked at"
    )


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
