#include "llama-clex-context.h"

#include "llama-clex-memory.h"

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

void llama_clex_own_rope(const llama_model & model, llama_context_params & params) {
    if (!model.clex.enabled()) {
        return;
    }

    const auto & hparams = model.hparams;

    if ((params.rope_freq_base  != 0.0f && params.rope_freq_base  != hparams.rope_freq_base_train) ||
        (params.rope_freq_scale != 0.0f && params.rope_freq_scale != hparams.rope_freq_scale_train)) {
        LLAMA_LOG_WARN("%s: the model has RoPE tables, the RoPE parameters of the context are ignored\n", __func__);
    }

    params.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED;
    params.rope_freq_base    =  0.0f;
    params.rope_freq_scale   =  0.0f;
    params.yarn_ext_factor   = -1.0f;
    params.yarn_attn_factor  = -1.0f;
    params.yarn_beta_fast    = -1.0f;
    params.yarn_beta_slow    = -1.0f;
    params.yarn_orig_ctx     =  0;
}

void llama_clex_init_context(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    auto * kv = llama_clex_kv(memory);

    if (model.clex.enabled() && !kv) {
        throw std::runtime_error(format("RoPE tables cannot be used with the architecture '%s': it has no KV cache that holds keys of its own",
                    llm_arch_name(model.arch)));
    }
    if (kv) {
        kv->clex.n_ctx = cparams.n_ctx_seq;
    }
}

llama_clex_removal::llama_clex_removal(llama_memory_i * memory) : kv(llama_clex_kv(memory)) {
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
    return model.clex.enabled() ? llama_clex_kv(memory.get()) : nullptr;
}

uint32_t llama_context::clex_max_nodes() {
    auto * kv = clex_kv();

    return kv ? kv->clex.max_nodes(*kv) : 0;
}

bool llama_context::clex_adapted() const {
    for (uint32_t il = 0; cvec && il < model.hparams.n_layer(); ++il) {
        if (cvec->tensor_for(il)) {
            return true;
        }
    }
    return !loras->empty();
}

bool llama_context::clex_select() {
    if (auto * any = llama_clex_kv(memory.get())) {
        any->clex.adapted = clex_adapted() || !cparams.causal_attn;
    }

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
