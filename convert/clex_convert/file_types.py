"""The types of files and of tensors that can be made."""

from __future__ import annotations

# Every type that llama_model_quantize can make, in the words of its constants LLAMA_FTYPE_MOSTLY_*.
OUTTYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
    *("iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "q1_0", "q2_0", "mxfp4_moe"),
)
UNQUANTIZED = ("f32", "f16", "bf16")

# Types of single tensors, in the words of ggml's constants GGML_TYPE_*.
TENSOR_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs"),
    *("tq1_0", "tq2_0", "q1_0", "q2_0", "mxfp4"),
)


def file_type(outtype: str) -> int:
    """Number of a type in llama.cpp's ``enum llama_ftype``."""
    from llama_cpp import llama_cpp

    return getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if outtype == "f32" else f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
