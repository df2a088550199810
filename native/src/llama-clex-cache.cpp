#include "llama-clex-impl.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// cells per re-rotation graph: bounds its memory and the time until an abort is noticed
static const size_t LLAMA_CLEX_CHUNK = 1024;

//
// re-rotation
//

// group the keys that one graph can rotate
static void clex_add(std::vector<llama_clex_rotation> & rotations, const llama_clex_rotation & kind,
        int32_t row, llama_pos pos_old, llama_pos pos_new) {
    auto it = std::find_if(rotations.begin(), rotations.end(), [&](const llama_clex_rotation & r) { return r.is_like(kind); });
    if (it == rotations.end()) {
        it = rotations.insert(rotations.end(), kind);
    }

    it->rows   .push_back(row);
    it->pos_old.push_back(pos_old);
    it->pos_new.push_back(pos_new);
}

std::vector<llama_clex_rotation> llama_clex_cache::pending(const llama_kv_cache & kv, const llama_ubatch * ubatch) const {
    std::vector<llama_clex_rotation> res;

    std::vector<bool> streams(kv.n_stream, ubatch == nullptr);
    if (ubatch) {
        for (uint32_t k = 0; k < ubatch->n_seqs_unq; ++k) {
            streams[kv.seq_to_stream[ubatch->seq_id_unq[k]]] = true;
        }
    }

    const int32_t wanted = ubatch ? bucket(*ubatch) : -1;

    const auto in_ubatch = [&](const llama_kv_cells & cells, uint32_t i) {
        return std::any_of(ubatch->seq_id_unq, ubatch->seq_id_unq + ubatch->n_seqs_unq,
                [&](llama_seq_id s) { return cells.seq_has(i, s); });
    };

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (!streams[s]) {
            continue;
        }

        const auto & cells = kv.v_cells[s];

        const uint32_t i1 = cells.used_max_p1();

        for (uint32_t i = cells.used_min(); i < i1; ++i) {
            if (cells.is_empty(i)) {
                continue;
            }

            const int32_t   from  = cells.ext_get(i).clex;
            const llama_pos shift = cells.get_shift(i);

            // nearly all cells of nearly all decodes stop here
            if (from == wanted && shift == 0) {
                continue;
            }

            if (ubatch ? !in_ubatch(cells, i) : shift == 0) {
                continue;
            }

            const int32_t   row     = s*cells.size() + i;
            const llama_pos pos_new = cells.pos_get(i);

            llama_clex_rotation kind;
            kind.to      = ubatch ? wanted : from;
            kind.crosses = kind.to != from;

            const auto * key = kept.find(row);

            kind.source = !kept.enabled() ? LLAMA_CLEX_FROM_CACHE : key ? LLAMA_CLEX_FROM_KEPT : LLAMA_CLEX_FROM_CACHE_KEEP;
            kind.from   = key ? key->bucket : from;

            const llama_pos pos_old = key ? key->pos : pos_new - shift;

            kind.still = kind.from == kind.to && pos_old == pos_new;

            clex_add(res, kind, row, pos_old, pos_new);
        }
    }

    return res;
}

std::vector<llama_clex_rotation> llama_clex_cache::pending_restore(const llama_kv_cache & kv, llama_seq_id seq_id) const {
    std::vector<llama_clex_rotation> res;

    for (uint32_t s = 0; kept.enabled() && s < kv.n_stream; ++s) {
        const auto & cells = kv.v_cells[s];

        for (uint32_t i = cells.used_min(); i < cells.used_max_p1(); ++i) {
            if (cells.is_empty(i) || (seq_id != -1 && !cells.seq_has(i, seq_id))) {
                continue;
            }

            const int32_t   row = s*cells.size() + i;
            const llama_pos pos = cells.pos_get(i);

            const auto * key = kept.find(row);
            if (!key || key->bucket == cells.ext_get(i).clex || key->pos != pos || cells.get_shift(i) != 0) {
                continue;
            }

            llama_clex_rotation kind;
            kind.source = LLAMA_CLEX_FROM_KEPT;
            kind.from   = key->bucket;
            kind.to     = key->bucket;
            kind.still  = true;

            clex_add(res, kind, row, pos, pos);
        }
    }

    return res;
}

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

    void build(ggml_context * ctx) {
        const int64_t n      = rows.size();
        const int64_t n_freq = factors_old.size();

        t_rows        = input(ctx, GGML_TYPE_I32, n);
        t_rows64      = input(ctx, GGML_TYPE_I64, n);
        t_pos_old     = input(ctx, GGML_TYPE_I32, n);
        t_pos_new     = input(ctx, GGML_TYPE_I32, n);
        t_factors_old = input(ctx, GGML_TYPE_F32, n_freq);
        t_factors_new = input(ctx, GGML_TYPE_F32, n_freq);
        t_k_rot       = kv.build_input_k_rot(ctx);
    }

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        set(t_rows,        rows.data());
        set(t_rows64,      rows64.data());
        set(t_pos_old,     pos_old.data());
        set(t_pos_new,     pos_new.data());
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

    inp.build(ctx);

    const int64_t n = inp.t_rows->ne[0];

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const auto & layer = kv.layers[i];

        const uint32_t il = layer.il;

        if (!hparams.has_rope(il)) {
            continue;
        }

        const auto rope = [&](ggml_tensor * cur, ggml_tensor * pos, ggml_tensor * factors) {
            return ggml_rope_ext(ctx, cur, pos, factors, hparams.n_rot(il), hparams.rope_type, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
        };

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
            cur = rope(cur, inp.t_pos_old, inp.t_factors_old);
            cur = rope(cur, inp.t_pos_new, inp.t_factors_new);
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

//
// context
//

void llama_clex_check_types(const llama_model & model, const llama_memory_params & params) {
    if (!model.clex.enabled()) {
        return;
    }

    const auto check = [](const char * name, ggml_type type, uint32_t n_embd_head) {
        if (n_embd_head % ggml_blck_size(type) != 0) {
            throw std::runtime_error(format("the %s cache cannot be %s: its blocks of %d do not divide the head size %u",
                        name, ggml_type_name(type), (int) ggml_blck_size(type), n_embd_head));
        }
    };

    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        check("K", params.type_k, model.hparams.n_embd_head_k(il));
        check("V", params.type_v, model.hparams.n_embd_head_v(il));
    }
}

void llama_clex_init_context(const llama_model & model, llama_cparams & cparams, llama_memory_i * memory) {
    if (!model.clex.enabled()) {
        return;
    }

    auto * kv = dynamic_cast<llama_kv_cache *>(memory);
    if (!kv) {
        throw std::runtime_error("the RoPE tables of this model need a plain KV cache, which this context does not have");
    }

    kv->clex.n_ctx = cparams.n_ctx_seq;
    kv->clex.kept.init(*kv);

    if (cparams.rope_freq_base  != model.hparams.rope_freq_base_train ||
        cparams.rope_freq_scale != model.hparams.rope_freq_scale_train) {
        LLAMA_LOG_WARN("%s: the model has RoPE tables, the RoPE parameters of the context are ignored\n", __func__);
    }

    // with another type the context would be taken for one of a custom scaling, and n_ctx_train be changed
    cparams.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_NONE;
    cparams.rope_freq_base    = 1.0f;
    cparams.rope_freq_scale   = 1.0f;
    cparams.yarn_ext_factor   = 0.0f;
    cparams.yarn_attn_factor  = model.clex.rope_scale;
}

llama_kv_cache * llama_context::clex_kv() {
    return model.clex.enabled() ? dynamic_cast<llama_kv_cache *>(memory.get()) : nullptr;
}

bool llama_context::clex_select() {
    auto * kv = clex_kv();

    return !kv || kv->clex.select(*kv, *balloc);
}

void llama_context::clex_flush() {
    if (clex_kv()) {
        sched_reserve();
        memory_update(false);
    }
}

void llama_context::clex_restore(llama_seq_id seq_id) {
    auto * kv = clex_kv();
    if (kv) {
        clex_rotate(kv->clex.pending_restore(*kv, seq_id), true);
    }
}

ggml_status llama_context::clex_update(const llama_ubatch * ubatch) {
    auto * kv = clex_kv();

    // a shift comes from memory_update(), which reserves the worst-case graph itself
    return kv ? clex_rotate(kv->clex.pending(*kv, ubatch), ubatch != nullptr) : GGML_STATUS_SUCCESS;
}

ggml_status llama_context::clex_rotate(const std::vector<llama_clex_rotation> & rotations, bool reserve) {
    if (rotations.empty()) {
        return GGML_STATUS_SUCCESS;
    }

    auto * kv = clex_kv();

    auto & stats = kv->clex.stats;

    const int64_t t_start_us = ggml_time_us();
    const int64_t n_cells    = stats.n_cells;

    // the scheduler is about to be used for other graphs, see memory_update()
    for (auto & res : gf_res_prev) {
        if (res) {
            res->reset();
        }
    }
    gf_res_prev_active = nullptr;

    // an abort inside a chunk would leave some of its layers in the old bucket: let it come between chunks only
    const auto callback      = abort_callback;
    void *     callback_data = abort_callback_data;

    set_abort_callback(nullptr, nullptr);
    const auto status = kv->clex.rotate(*kv, this, rotations, [&] { return callback && callback(callback_data); });
    set_abort_callback(callback, callback_data);

    if (reserve) {
        const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);
        const auto     mctx     = memory->init_full();
        if (!graph_reserve(n_tokens, cparams.n_seq_max, std::min(n_tokens, cparams.n_outputs_max), mctx.get())) {
            LLAMA_LOG_ERROR("%s: failed to reserve the worst-case graph after a re-rotation\n", __func__);
        }
    }

    if (stats.n_cells > n_cells) {
        stats.n_rerotations += 1;
        stats.t_us          += ggml_time_us() - t_start_us;
    }

    return status;
}

//
// graph
//

class llm_graph_input_clex : public llm_graph_input_i {
public:
    llm_graph_input_clex(const llama_kv_cache & kv) : kv(kv) {}

    void set_input(const llama_ubatch * ubatch) override {
        const auto & tables = kv.clex.tables;
        const auto   bucket = kv.clex.bucket(*ubatch);

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
