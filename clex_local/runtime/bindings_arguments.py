"""The arguments of llama-cpp-python's ``Llama``, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import os

    from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
    from llama_cpp.llama_speculative import LlamaDraftModel
    from llama_cpp.llama_tokenizer import BaseLlamaTokenizer


class BindingsArguments(TypedDict, total=False):
    """Those of the release that we are built with; see its documentation, and ours in ``Llama`` where they differ."""

    n_gpu_layers: int
    split_mode: int
    main_gpu: int
    tensor_split: Sequence[float] | None
    vocab_only: bool
    use_mmap: bool
    use_mlock: bool
    kv_overrides: Mapping[str, bool | int | float | str] | None
    seed: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_threads_batch: int | None
    rope_scaling_type: int | None
    pooling_type: int
    attention_type: int
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    logits_all: bool
    embedding: bool
    offload_kqv: bool
    flash_attn: bool | None
    op_offload: bool | None
    swa_full: bool | None
    no_perf: bool
    last_n_tokens_size: int
    lora_base: str | None
    lora_scale: float
    lora_path: str | os.PathLike[str] | None
    numa: bool | int
    chat_format: str | None
    chat_handler: LlamaChatCompletionHandler | None
    draft_model: LlamaDraftModel | None
    tokenizer: BaseLlamaTokenizer | None
    type_k: int | None
    type_v: int | None
    spm_infill: bool
    verbose: bool
