#include "llama-clex-inputs.h"

#include "llama-clex-rope.h"

#include "llama-kv-cache.h"

#include <algorithm>

llm_graph_input_clex::llm_graph_input_clex(const llama_kv_cache & kv, const llm_graph_context & graph) :
    kv(kv), ctx(graph.ctx0), runs(runs_of(graph.ubatch)) {
    factors = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, kv.clex.tables.n_freq, runs.size() - 1);
    ggml_set_input(factors);
    graph.cb(factors, "clex_factors", -1);

    if (kv.clex.tables.has_q_scale()) {
        q_scale = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, 1, graph.n_tokens);
        ggml_set_input(q_scale);
        graph.cb(q_scale, "clex_q_scale", -1);
    }
}

// The ubatch for which memory is reserved has no sequences: it stands for one with as many runs as there can be.
llm_graph_input_clex::run_starts llm_graph_input_clex::runs_of(const llama_ubatch & ubatch) const {
    const int64_t n_tokens = ubatch.n_tokens;

    run_starts res = { 0 };

    if (!ubatch.seq_id[0]) {
        const int64_t n_runs = std::min<int64_t>(n_tokens, kv.clex.max_runs(kv));
        for (int64_t i = 1; i < n_runs; ++i) {
            res.push_back(i*n_tokens/n_runs);
        }
    } else {
        for (int64_t i = 1; i < n_tokens; ++i) {
            if (kv.clex.token_bucket(ubatch, i) != kv.clex.token_bucket(ubatch, i - 1)) {
                res.push_back(i);
            }
        }
    }
    res.push_back(n_tokens);

    return res;
}

void llm_graph_input_clex::set_input(const llama_ubatch * ubatch) {
    const auto & tables = kv.clex.tables;

    for (size_t run = 0; run + 1 < runs.size(); ++run) {
        const auto data = tables.freq_factors(kv.clex.token_bucket(*ubatch, runs[run]));
        ggml_backend_tensor_set(factors, data.data(), run*factors->nb[1], data.size()*sizeof(float));
    }

    if (q_scale) {
        std::vector<float> scales(ubatch->n_tokens);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            scales[i] = tables.q_scale(kv.clex.token_bucket(*ubatch, i), kv.clex.seqs[ubatch->seq_id[i][0]].n_tokens);
        }
        ggml_backend_tensor_set(q_scale, scales.data(), 0, ggml_nbytes(q_scale));
    }
}

// which buckets the runs are in is told by the factors
bool llm_graph_input_clex::can_reuse(const llm_graph_params & params) {
    return runs_of(params.ubatch) == runs;
}

ggml_tensor * llm_graph_input_clex::positions(const llama_clex_rope & rope, ggml_tensor * pos, size_t run) {
    auto & views = pos_of_runs[pos];

    for (size_t i = views.size(); i + 1 < runs.size(); ++i) {
        const int64_t n = runs[i + 1] - runs[i];

        if (rope.is_multi()) {
            // the sections of all tokens lie behind each other
            ggml_tensor * all = ggml_view_2d(ctx, pos, n, GGML_MROPE_SECTIONS, runs.back()*pos->nb[0], runs[i]*pos->nb[0]);
            views.push_back(ggml_reshape_1d(ctx, ggml_cont(ctx, all), n*GGML_MROPE_SECTIONS));
        } else {
            views.push_back(ggml_view_1d(ctx, pos, n, runs[i]*pos->nb[0]));
        }
    }
    return views[run];
}

ggml_tensor * llm_graph_input_clex::rotate(const llama_clex_rope & rope, ggml_tensor * cur, ggml_tensor * pos) {
    const float scale = kv.clex.tables.rope_scale;

    if (runs.size() == 2) {
        return rope.apply(ctx, cur, pos, factors, scale);
    }

    ggml_tensor * res = nullptr;
    for (size_t run = 0; run + 1 < runs.size(); ++run) {
        ggml_tensor * part = ggml_view_3d(ctx, cur, cur->ne[0], cur->ne[1], runs[run + 1] - runs[run],
                cur->nb[1], cur->nb[2], runs[run]*cur->nb[2]);

        ggml_tensor * own = ggml_view_1d(ctx, factors, factors->ne[0], run*factors->nb[1]);

        part = rope.apply(ctx, part, positions(rope, pos, run), own, scale);
        res  = res ? ggml_concat(ctx, res, part, 2) : part;
    }
    return res;
}
