#include "llama-clex.h"

#include "llama-clex-memory.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>

static const llama_kv_cache * clex_kv(const llama_context * ctx) {
    return ctx->get_model().clex.enabled() ? llama_clex_kv(ctx->get_memory()) : nullptr;
}

static bool clex_has_bucket(const llama_model * model, int32_t bucket) {
    return bucket >= 0 && bucket < llama_clex_n_buckets(model);
}

static std::string clex_layers_of(llama_model & model, llama_clex_layers & layers) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx    = 256;
    params.n_batch  = 16;
    params.n_ubatch = 16;

    try {
        const llama_context ctx(model, params);

        const auto * kv = llama_clex_kv(ctx.get_memory());
        if (!kv || !kv->clex.layers.known) {
            return "it has no KV cache that holds keys of its own";
        }
        layers = kv->clex.layers;
    } catch (const std::exception & err) {
        return err.what();
    }
    return layers.refusal;
}

bool llama_clex_takes_tables(llama_model * model, llama_clex_layers_info * info, char * reason, size_t size) {
    llama_clex_layers layers;

    const std::string refusal = model->hparams.vocab_only ? "only its vocabulary was loaded" : clex_layers_of(*model, layers);

    if (info) {
        const auto n_table = std::count_if(layers.ropes.begin(), layers.ropes.end(), [](const auto & rope) { return rope.n_dims > 0; });

        *info = { (int32_t) n_table, layers.n_windowed, (int32_t) (layers.ropes.size() - n_table) };
    }
    if (reason && size > 0) {
        snprintf(reason, size, "%s", refusal.c_str());
    }
    return refusal.empty();
}

const char * llama_clex_method(const llama_model * model) {
    return model->clex.method.c_str();
}

int32_t llama_clex_n_buckets(const llama_model * model) {
    return (int32_t) model->clex.scaling_factors.size();
}

int32_t llama_clex_original_context(const llama_model * model) {
    return (int32_t) model->clex.n_ctx_orig;
}

int32_t llama_clex_max_context(const llama_model * model) {
    return (int32_t) model->clex.n_ctx_max();
}

float llama_clex_scaling_factor(const llama_model * model, int32_t bucket) {
    return clex_has_bucket(model, bucket) ? model->clex.scaling_factors[bucket] : 0.0f;
}

int32_t llama_clex_inv_freq(const llama_model * model, int32_t bucket, float * dst, int32_t n) {
    if (!clex_has_bucket(model, bucket)) {
        return 0;
    }

    const int32_t n_freq = (int32_t) model->clex.n_freq;
    if (n > 0) {
        std::copy_n(model->clex.inv_freq.data() + (size_t) bucket*n_freq, std::min(n, n_freq), dst);
    }
    return n_freq;
}

float llama_clex_attn_scale(const llama_model * model, int32_t bucket) {
    if (!clex_has_bucket(model, bucket)) {
        return 0.0f;
    }
    return model->clex.attn_scale.empty() ? 1.0f : model->clex.attn_scale[bucket];
}

bool llama_clex_log_scale(const llama_model * model) {
    return model->clex.log_scale;
}

int32_t llama_clex_bucket(const llama_model * model, int64_t n_tokens) {
    return model->clex.bucket_for(n_tokens);
}

bool llama_clex_set_policy(llama_context * ctx, llama_clex_policy policy, bool clamp) {
    auto * kv = const_cast<llama_kv_cache *>(clex_kv(ctx));
    if (!kv || (policy != LLAMA_CLEX_POLICY_BY_LENGTH && policy != LLAMA_CLEX_POLICY_FIXED)) {
        return false;
    }
    kv->clex.policy = policy;
    kv->clex.clamp  = clamp;
    return true;
}

bool llama_clex_seq_reserve(llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens) {
    auto * kv = const_cast<llama_kv_cache *>(clex_kv(ctx));
    if (!kv || seq_id < 0 || seq_id >= LLAMA_MAX_SEQ || kv->clex.choose_bucket(n_tokens) < 0) {
        return false;
    }
    kv->clex.seqs[seq_id].n_declared = n_tokens;
    return true;
}

int32_t llama_clex_seq_bucket(const llama_context * ctx, llama_seq_id seq_id) {
    const auto * kv = clex_kv(ctx);
    return kv && seq_id >= 0 && seq_id < LLAMA_MAX_SEQ ? kv->clex.seqs[seq_id].bucket : -1;
}

llama_clex_stats llama_clex_get_stats(const llama_context * ctx) {
    const auto * kv = clex_kv(ctx);
    return kv ? kv->clex.stats : llama_clex_stats {};
}

bool llama_clex_causal(const llama_context * ctx) {
    return ctx->get_cparams().causal_attn;
}
