#pragma once

#include <stdbool.h>
#include <stddef.h>

struct ggml_compute_params;
struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

// Products of weights with batches of 9 tokens and more on the CPU. Where these functions decline, ggml's own code computes
// the node; the environment variable GGML_CLEX_MATMUL_DISABLE makes them always decline.

// Bytes of work buffer for the node, 0 where it is declined.
size_t ggml_clex_matmul_work_size(const struct ggml_tensor * dst, int n_threads);

// Compute GGML_OP_MUL_MAT or GGML_OP_MUL_MAT_ID; called by every thread. False, and nothing is done, where the node is declined or
// of another kind.
bool ggml_clex_matmul(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// Name of what computes batches with quantized weights where these functions do not decline; "ggml" where they always do.
const char * ggml_clex_matmul_units(void);

#ifdef __cplusplus
}
#endif
