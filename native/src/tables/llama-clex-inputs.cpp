#include "llama-clex-inputs.h"

#include "llama-kv-cache.h"

#include <vector>

llm_graph_input_clex::llm_graph_input_clex(const llama_kv_cache & kv, const llm_graph_context & graph) : kv(kv) {
    factors = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_F32, kv.clex.tables.n_freq);
    ggml_set_input(factors);
    graph.cb(factors, "clex_factors", -1);

    if (kv.clex.tables.has_q_scale()) {
        q_scale = ggml_new_tensor_3d(graph.ctx0, GGML_TYPE_F32, 1, 1, graph.n_tokens);
        ggml_set_input(q_scale);
        graph.cb(q_scale, "clex_q_scale", -1);
    }
}

void llm_graph_input_clex::set_input(const llama_ubatch * ubatch) {
    const auto & tables = kv.clex.tables;

    const auto data = tables.freq_factors(kv.clex.token_bucket(*ubatch, 0));
    ggml_backend_tensor_set(factors, data.data(), 0, ggml_nbytes(factors));

    if (q_scale) {
        std::vector<float> scales(ubatch->n_tokens);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            scales[i] = tables.q_scale(kv.clex.token_bucket(*ubatch, i), kv.clex.seqs[ubatch->seq_id[i][0]].n_tokens);
        }
        ggml_backend_tensor_set(q_scale, scales.data(), 0, ggml_nbytes(q_scale));
    }
}

// the shapes follow from the model and the number of tokens
bool llm_graph_input_clex::can_reuse(const llm_graph_params & params) {
    return !q_scale || q_scale->ne[2] == params.ubatch.n_tokens;
}
