#pragma once

#include <stdbool.h>
#include <stddef.h>

struct ggml_compute_params;
struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

// Flash attention on the CPU: for few queries over many keys (decode, drafts, parallel sequences) here, for batches of
// many in ggml-clex-prefill.h. Where these functions decline, ggml's own code computes the node; the environment variable
// GGML_CLEX_ATTN_DISABLE makes them always decline.

// Bytes of work buffer for the node, 0 where it is declined.
size_t ggml_clex_attn_work_size(const struct ggml_tensor * dst, int n_threads);

// Compute GGML_OP_FLASH_ATTN_EXT; called by every thread. False, and nothing is done, where the node is declined.
bool ggml_clex_attn(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
