#pragma once

// What the tables put into a graph.

#include "ggml.h"

struct llm_graph_context;

// factors of the bucket of the ubatch, and the query scale where the tables ask for one
// both are null for a model without tables
struct llama_clex_inputs {
    ggml_tensor * factors = nullptr; // F32 [n_rot/2]
    ggml_tensor * q_scale = nullptr; // F32 [1, 1, n_tokens]

    explicit llama_clex_inputs(const llm_graph_context & graph);

    // factors of the table, or those that stock would use
    ggml_tensor * rope_factors(ggml_tensor * stock) const { return factors ? factors : stock; }

    ggml_tensor * scale_q(ggml_context * ctx, ggml_tensor * q) const;
};
