#pragma once

#include <cstddef>

struct ggml_compute_params;
struct ggml_tensor;

// As the functions of ggml-clex-attn.h, which call them, for batches of many queries.

size_t ggml_clex_attn_prefill_work_size(const ggml_tensor * dst, int n_threads);

bool ggml_clex_attn_prefill(const ggml_compute_params * params, ggml_tensor * dst);
