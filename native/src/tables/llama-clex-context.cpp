#include "llama-clex-context.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

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

    // in the first bucket alone nothing is ever re-rotated
    if (model.clex.bucket_for(std::min(kv->clex.n_ctx, model.clex.n_ctx_max())) > 0) {
        kv->clex.kept.init(*kv);
    }

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

llama_clex_removal::llama_clex_removal(llama_memory_i * memory) : kv(dynamic_cast<llama_kv_cache *>(memory)) {
    for (llama_seq_id s = 0; kv && s < LLAMA_MAX_SEQ; ++s) {
        if (kv->clex.seqs[s].n_declared > 0 && kv->seq_pos_max(s) >= 0) {
            seq_ids.push_back(s);
        }
    }
}

llama_clex_removal::~llama_clex_removal() {
    for (const llama_seq_id s : seq_ids) {
        if (kv->seq_pos_max(s) < 0) {
            kv->clex.seqs[s].n_declared = 0;
        }
    }
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
