#include "llama-clex-cache.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <memory>

// cells per re-rotation graph: bounds its memory and the time until an abort is noticed
static const size_t LLAMA_CLEX_CHUNK = 1024;

// inputs of the graph that rotates one chunk of cells
class llm_graph_input_clex_rotate : public llm_graph_input_i {
public:
    llm_graph_input_clex_rotate(const llama_kv_cache & kv, const llama_clex_rotation & rot, size_t i0, size_t n) :
        kv(kv),
        factors_old(kv.clex.tables.freq_factors(rot.from)),
        factors_new(kv.clex.tables.freq_factors(rot.to)),
        rows   (rot.rows   .begin() + i0, rot.rows   .begin() + i0 + n),
        rows64 (rot.rows   .begin() + i0, rot.rows   .begin() + i0 + n),
        pos_old(rot.pos_old.begin() + i0, rot.pos_old.begin() + i0 + n),
        pos_new(rot.pos_new.begin() + i0, rot.pos_new.begin() + i0 + n) {
        for (auto & pos : pos_old) {
            pos = -pos; // the inverse of the rotation that the key has
        }
    }

    void build(ggml_context * ctx, int64_t n_pos) {
        const int64_t n      = rows.size();
        const int64_t n_freq = factors_old.size();

        t_rows        = input(ctx, GGML_TYPE_I32, n);
        t_rows64      = input(ctx, GGML_TYPE_I64, n);
        t_pos_old     = input(ctx, GGML_TYPE_I32, n*n_pos);
        t_pos_new     = input(ctx, GGML_TYPE_I32, n*n_pos);
        t_factors_old = input(ctx, GGML_TYPE_F32, n_freq);
        t_factors_new = input(ctx, GGML_TYPE_F32, n_freq);
        t_k_rot       = kv.build_input_k_rot(ctx);
    }

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        set(t_rows,        rows.data());
        set(t_rows64,      rows64.data());
        set_pos(t_pos_old, pos_old);
        set_pos(t_pos_new, pos_new);
        set(t_factors_old, factors_old.data());
        set(t_factors_new, factors_new.data());

        if (t_k_rot && t_k_rot->buffer) {
            kv.set_input_k_rot(t_k_rot);
        }
    }

    ggml_tensor * t_rows        = nullptr;
    ggml_tensor * t_rows64      = nullptr;
    ggml_tensor * t_pos_old     = nullptr;
    ggml_tensor * t_pos_new     = nullptr;
    ggml_tensor * t_factors_old = nullptr;
    ggml_tensor * t_factors_new = nullptr;
    ggml_tensor * t_k_rot       = nullptr; // Hadamard rotation of quantized caches, its own inverse

private:
    static ggml_tensor * input(ggml_context * ctx, ggml_type type, int64_t n) {
        ggml_tensor * res = ggml_new_tensor_1d(ctx, type, n);
        ggml_set_input(res);
        return res;
    }

    static void set(ggml_tensor * dst, const void * data) {
        if (dst->buffer) {
            ggml_backend_tensor_set(dst, data, 0, ggml_nbytes(dst));
        }
    }

    // M-RoPE takes the position of a text three times, and 0 once
    static void set_pos(ggml_tensor * dst, std::vector<llama_pos> pos) {
        const size_t n = pos.size();
        if ((size_t) dst->ne[0] == GGML_MROPE_SECTIONS*n) {
            pos.resize(GGML_MROPE_SECTIONS*n);
            std::copy_n(pos.begin(), n, pos.begin() +   n);
            std::copy_n(pos.begin(), n, pos.begin() + 2*n);
        }
        set(dst, pos.data());
    }

    const llama_kv_cache & kv;

    std::vector<float>     factors_old;
    std::vector<float>     factors_new;
    std::vector<int32_t>   rows;
    std::vector<int64_t>   rows64;
    std::vector<llama_pos> pos_old;
    std::vector<llama_pos> pos_new;
};

// rows of every layer: read as F32, rotate back with the old table and forth with the new one, write in place
void llama_clex_cache::build_rotate(const llama_kv_cache & kv, const llama_clex_rotation & rot,
        llm_graph_input_clex_rotate & inp, ggml_context * ctx, ggml_cgraph * gf) const {
    const auto & hparams = kv.hparams;

    inp.build(ctx, hparams.n_pos_per_embd());

    const int64_t n = inp.t_rows->ne[0];

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const auto & layer = kv.layers[i];

        const uint32_t il = layer.il;

        const auto & rope = layers.ropes[i];
        if (rope.n_dims == 0) {
            continue;
        }

        const int64_t n_embd_k = hparams.n_embd_k_gqa(il);

        ggml_tensor * k = ggml_reshape_2d(ctx, layer.k, n_embd_k, ggml_nelements(layer.k)/n_embd_k);

        ggml_tensor * cur = ggml_get_rows(ctx, rot.source == LLAMA_CLEX_FROM_KEPT ? kept.k[i] : k, inp.t_rows);

        if (rot.source == LLAMA_CLEX_FROM_CACHE_KEEP) {
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, kept.k[i], cur, inp.t_rows64));
        }

        cur = ggml_reshape_3d(ctx, cur, hparams.n_embd_head_k(il), hparams.n_head_kv(il), n);

        if (!rot.still) {
            if (inp.t_k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp.t_k_rot);
            }
            cur = rope.apply(ctx, cur, inp.t_pos_old, inp.t_factors_old, 1.0f);
            cur = rope.apply(ctx, cur, inp.t_pos_new, inp.t_factors_new, 1.0f);
            if (inp.t_k_rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, inp.t_k_rot);
            }
        }

        cur = ggml_set_rows(ctx, k, ggml_reshape_2d(ctx, cur, n_embd_k, n), inp.t_rows64);

        ggml_build_forward_expand(gf, cur);
    }
}

ggml_status llama_clex_cache::rotate(
        llama_kv_cache & kv, llama_context * lctx, const std::vector<llama_clex_rotation> & rotations, const std::function<bool()> & abort) {
    auto * sched = lctx->get_sched();

    // graphs in flight still read the keys
    ggml_backend_sched_synchronize(sched);

    for (const auto & rot : rotations) {
        for (size_t i0 = 0; i0 < rot.rows.size(); i0 += LLAMA_CLEX_CHUNK) {
            const size_t n = std::min(LLAMA_CLEX_CHUNK, rot.rows.size() - i0);

            if (abort()) {
                LLAMA_LOG_WARN("%s: aborted with %zu keys left\n", __func__, rot.rows.size() - i0);
                return GGML_STATUS_ABORTED;
            }

            auto * res = lctx->get_gf_res_reserve();
            res->reset();

            auto inp = std::make_unique<llm_graph_input_clex_rotate>(kv, rot, i0, n);
            build_rotate(kv, rot, *inp, res->get_ctx(), res->get_gf());
            res->add_input(std::move(inp));

            ggml_backend_sched_reset(sched);

            if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
                LLAMA_LOG_ERROR("%s: failed to allocate the graph that re-rotates %zu keys\n", __func__, n);
                return GGML_STATUS_ALLOC_FAILED;
            }

            res->set_inputs(nullptr);

            const auto status = lctx->graph_compute(res->get_gf(), true);
            ggml_backend_sched_synchronize(sched);
            if (status != GGML_STATUS_SUCCESS) {
                LLAMA_LOG_ERROR("%s: failed to re-rotate %zu keys\n", __func__, n);
                return status;
            }

            for (size_t j = i0; j < i0 + n; ++j) {
                auto & cells = kv.v_cells[rot.rows[j]/kv.get_size()];

                const uint32_t i = rot.rows[j]%kv.get_size();

                llama_kv_cell_ext ext = cells.ext_get(i);
                ext.clex = rot.to;
                cells.ext_set(i, ext);
                cells.shift_done(i);

                if (rot.source == LLAMA_CLEX_FROM_CACHE_KEEP) {
                    kept.keys[rot.rows[j]] = { rot.from, rot.pos_old[j] };
                }
            }

            stats.n_cells += rot.crosses ? n : 0;
        }
    }

    return GGML_STATUS_SUCCESS;
}
