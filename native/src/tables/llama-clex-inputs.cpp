#include "llama-clex-inputs.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include <memory>
#include <vector>

class llm_graph_input_clex : public llm_graph_input_i {
public:
    llm_graph_input_clex(const llama_kv_cache & kv) : kv(kv) {}

    void set_input(const llama_ubatch * ubatch) override {
        const auto & tables = kv.clex.tables;
        const auto   bucket = kv.clex.ubatch_bucket(*ubatch);

        const auto data = tables.freq_factors(bucket);
        ggml_backend_tensor_set(factors, data.data(), 0, ggml_nbytes(factors));

        if (q_scale) {
            std::vector<float> scales(ubatch->n_tokens);
            for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
                scales[i] = tables.q_scale(bucket, kv.clex.seqs[ubatch->seq_id[i][0]].n_tokens);
            }
            ggml_backend_tensor_set(q_scale, scales.data(), 0, ggml_nbytes(q_scale));
        }
    }

    // the shapes follow from the model and the number of tokens
    bool can_reuse(const llm_graph_params & params) override {
        return !q_scale || q_scale->ne[2] == params.ubatch.n_tokens;
    }

    ggml_tensor * factors = nullptr;
    ggml_tensor * q_scale = nullptr;

    const llama_kv_cache & kv;
};

llama_clex_inputs::llama_clex_inputs(const llm_graph_context & graph) {
    const auto * mctx = dynamic_cast<const llama_kv_cache_context *>(graph.mctx);
    if (!mctx || !mctx->get_kv()->clex.tables.enabled()) {
        return;
    }

    const auto & kv = *mctx->get_kv();

    auto inp = std::make_unique<llm_graph_input_clex>(kv);

    factors = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_F32, kv.clex.tables.n_freq);
    ggml_set_input(factors);
    graph.cb(factors, "clex_factors", -1);
    inp->factors = factors;

    if (kv.clex.tables.has_q_scale()) {
        q_scale = ggml_new_tensor_3d(graph.ctx0, GGML_TYPE_F32, 1, 1, graph.n_tokens);
        ggml_set_input(q_scale);
        graph.cb(q_scale, "clex_q_scale", -1);
        inp->q_scale = q_scale;
    }

    graph.res->add_input(std::move(inp));
}

ggml_tensor * llama_clex_inputs::scale_q(ggml_context * ctx, ggml_tensor * q) const {
    return q_scale ? ggml_mul(ctx, q, q_scale) : q;
}
