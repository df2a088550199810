#include "llama-clex-store-context.h"

#include "llama-clex-store-cells.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <cstring>
#include <numeric>

std::vector<llama_kv_cache *> llama_clex_store_context::caches() const {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(ctx.get_memory())) {
        return { iswa->get_base(), iswa->get_swa() };
    }
    if (auto * kv = dynamic_cast<llama_kv_cache *>(ctx.get_memory())) {
        return { kv };
    }
    return {};
}

void llama_clex_store_context::truncate(llama_seq_id seq_id, llama_pos pos) {
    for (auto * kv : caches()) {
        kv->seq_rm(seq_id, pos, -1);
    }
}

std::string llama_clex_store_context::refusal() const {
    const auto & model   = ctx.get_model();
    const auto & cparams = ctx.get_cparams();

    if (caches().empty()) {
        return "its memory is more than a KV cache";
    }
    for (auto * kv : caches()) {
        if (const char * reason = llama_clex_store_cache(*kv, 0).refusal()) {
            return reason;
        }
    }
    if (model.clex_files.empty()) {
        return "its model was not loaded from files";
    }
    for (const auto & device : model.devices) {
        // what computes there may be another machine the next time
        auto * reg = ggml_backend_dev_backend_reg(device.dev);
        if (reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0) {
            return "other machines compute layers of its model";
        }
    }
    if (ctx.clex_adapted()) {
        return "it has adapters or a control vector";
    }
    if (cparams.embeddings || !cparams.causal_attn || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.training) {
        return "it is not one that continues texts";
    }
    return "";
}

// Where weights are decides what multiplies with them. Those of a mapped file are as those that were read.
static std::string clex_weights_are(const llama_model & model) {
    static const std::string mapped = "_Mapped";

    std::string res;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        std::string type = tensor->buffer ? ggml_backend_buft_name(ggml_backend_buffer_get_type(tensor->buffer)) : "";
        if (type.size() > mapped.size() && type.compare(type.size() - mapped.size(), mapped.size(), mapped) == 0) {
            type.resize(type.size() - mapped.size());
        }
        res += type + '\n';
    }
    return res;
}

clex_digest llama_clex_store_context::config(const std::string & model_digest, llama_seq_id seq_id) const {
    static const std::string build   = clex_store_build();
    static const std::string devices = clex_store_devices();

    const auto & model   = ctx.get_model();
    const auto & cparams = ctx.get_cparams();

    clex_hasher hasher;
    hasher.add(build).add(devices).add(model_digest).add(model.clex_files.overrides()).add(clex_weights_are(model));

    for (const float value : { cparams.rope_freq_base, cparams.rope_freq_scale, cparams.yarn_ext_factor, cparams.yarn_attn_factor,
            cparams.yarn_beta_fast, cparams.yarn_beta_slow }) {
        hasher.add(&value, sizeof(value));
    }
    hasher.number((int) cparams.rope_scaling_type).number(cparams.n_ctx_orig_yarn);
    // which LongRoPE factors stock llama.cpp takes
    hasher.number(cparams.n_ctx_seq > model.hparams.n_ctx_orig_yarn);
    hasher.number(cparams.flash_attn).number(cparams.offload_kqv).number(cparams.op_offload);

    for (auto * kv : caches()) {
        llama_clex_store_cache(*kv, seq_id).add_to(hasher);
    }

    return hasher.get();
}

int32_t llama_clex_store_context::step() const {
    const auto & cparams = ctx.get_cparams();

    // the pieces of a text that is given in batches begin anew in each of them
    const uint32_t piece = cparams.n_batch%cparams.n_ubatch == 0 ? cparams.n_ubatch : cparams.n_batch;

    return (int32_t) std::lcm<uint64_t>(piece, LLAMA_CLEX_STORE_BLOCK);
}

int32_t llama_clex_store_context::n_seq_max() const {
    return (int32_t) ctx.get_cparams().n_seq_max;
}

void llama_clex_store_context::settle() {
    ctx.synchronize();
    ctx.sched_reserve();
    ctx.memory_update(false);
}
