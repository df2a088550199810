#pragma once

// What the tables put into a graph.

#include "llama-graph.h"

class llama_kv_cache;

class llm_graph_input_clex : public llm_graph_input_i {
public:
    // adds tensors to the graph
    llm_graph_input_clex(const llama_kv_cache & kv, const llm_graph_context & graph);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * factors = nullptr; // F32 [n_rot/2], of the bucket of the ubatch
    ggml_tensor * q_scale = nullptr; // F32 [1, 1, n_tokens], null where the tables ask for none

private:
    const llama_kv_cache & kv;
};
