#pragma once

#include <stddef.h>

struct ggml_compute_params;
struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

// bytes of work memory that ggml_clex_attn_prefill needs for this node
size_t ggml_clex_attn_prefill_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}

// Computes GGML_OP_FLASH_ATTN_EXT for batches of many queries. Every thread calls it; false, and nothing done, for
// batches of few queries and what else is left to the code of ggml.
bool ggml_clex_attn_prefill(const ggml_compute_params * params, ggml_tensor * dst);
#endif
