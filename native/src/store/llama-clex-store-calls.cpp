#include "llama-clex-store.h"

#include "llama-clex-store-cells.h"
#include "llama-clex-store-context.h"
#include "llama-clex-store-documents.h"
#include "llama-clex-store-open.h"
#include "llama-clex-store-restore.h"
#include "llama-clex-store-save.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

// f(digest of the model) where the store and the context can be used; what is not caught here would end the host
template <typename F>
static int32_t clex_store_call(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id, int32_t otherwise, F f) {
    if (!store || !store->is_ours() || seq_id < 0 || !llama_clex_store_takes(store, ctx, nullptr, 0)) {
        return otherwise;
    }
    if (seq_id >= llama_clex_store_context(*ctx).n_seq_max()) {
        return otherwise;
    }
    try {
        const std::string digest = store->model_digest(ctx->get_model().clex_files);
        if (digest.empty()) {
            return otherwise;
        }
        return f(digest);
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, err.what());
        return otherwise;
    }
}

//
// C API
//

llama_clex_store * llama_clex_store_open(const char * path, int64_t max_bytes) {
    try {
        return new llama_clex_store(path, max_bytes);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return nullptr;
    }
}

void llama_clex_store_close(llama_clex_store * store) {
    // in a forked process there is no thread to wait for
    if (store && store->is_ours()) {
        delete store;
    }
}

bool llama_clex_store_takes(llama_clex_store * store, const llama_context * ctx, char * reason, size_t size) {
    GGML_UNUSED(store);

    const std::string refusal = llama_clex_store_context(*const_cast<llama_context *>(ctx)).refusal();
    if (reason && size > 0) {
        snprintf(reason, size, "%s", refusal.c_str());
    }
    return refusal.empty();
}

int32_t llama_clex_store_restore(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id,
        const llama_token * tokens, int32_t n_tokens, int32_t n_total, uint32_t flags) {
    auto * memory = ctx->get_memory();
    const int32_t n_has = memory && seq_id >= 0 ? memory->seq_pos_max(seq_id) + 1 : 0;

    if (n_tokens <= n_has) {
        return n_has;
    }
    return clex_store_call(store, ctx, seq_id, n_has, [&](const std::string & digest) {
        return clex_store_restore(*store, *ctx, seq_id, digest)
            .restore(tokens, n_tokens, std::max(n_tokens, n_total), flags & LLAMA_CLEX_STORE_EXACT);
    });
}

int32_t llama_clex_store_save(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens) {
    if (n_tokens < LLAMA_CLEX_STORE_BLOCK) {
        return 0;
    }
    return clex_store_call(store, ctx, seq_id, 0, [&](const std::string & digest) {
        return clex_store_save(*store, *ctx, seq_id, digest).save(tokens, n_tokens);
    });
}

// of each cache: how many, and they
size_t llama_clex_store_origin_get(const llama_context * ctx, llama_seq_id seq_id, uint8_t * dst, size_t size) {
    llama_clex_store_context context(*const_cast<llama_context *>(ctx));
    if (seq_id < 0 || seq_id >= context.n_seq_max() || !context.refusal().empty()) {
        return 0;
    }

    std::vector<uint8_t> res;
    for (auto * kv : context.caches()) {
        std::vector<llama_clex_store_cache::origin> origins;
        llama_clex_store_cache(*kv, seq_id).get_origins(origins);

        const uint64_t n = origins.size();
        const auto *   p = reinterpret_cast<const uint8_t *>(&n);
        res.insert(res.end(), p, p + sizeof(n));
        p = reinterpret_cast<const uint8_t *>(origins.data());
        res.insert(res.end(), p, p + n*sizeof(origins[0]));
    }
    std::copy_n(res.data(), std::min(size, res.size()), dst);
    return res.size();
}

void llama_clex_store_origin_set(llama_context * ctx, llama_seq_id seq_id, const uint8_t * src, size_t size) {
    llama_clex_store_context context(*ctx);
    if (seq_id < 0 || seq_id >= context.n_seq_max() || !context.refusal().empty()) {
        return;
    }
    for (auto * kv : context.caches()) {
        uint64_t n;
        if (size < sizeof(n)) {
            return;
        }
        memcpy(&n, src, sizeof(n));
        src  += sizeof(n);
        size -= sizeof(n);

        if (n > size/sizeof(llama_clex_store_cache::origin)) {
            return;
        }
        std::vector<llama_clex_store_cache::origin> origins(n);
        if (n > 0) {
            memcpy(origins.data(), src, n*sizeof(origins[0]));
        }
        src  += n*sizeof(origins[0]);
        size -= n*sizeof(origins[0]);

        llama_clex_store_cache(*kv, seq_id).set_origins(origins.data(), n);
    }
}

bool llama_clex_store_flush(llama_clex_store * store) {
    return store->is_ours() && store->writer.flush();
}

llama_clex_store_stats llama_clex_store_get_stats(const llama_clex_store * store) {
    if (!store->is_ours()) {
        return {};
    }
    const auto counts = store->writer.get_counts();

    llama_clex_store_stats res = {};
    res.n_restored   = store->n_restored;
    res.n_stored     = counts.n_stored*LLAMA_CLEX_STORE_BLOCK;
    res.n_skipped    = store->n_skipped;
    res.n_damaged    = store->n_damaged;
    res.n_evicted    = counts.n_evicted;
    res.n_bytes      = counts.n_bytes;
    res.max_bytes    = store->max_bytes;
    res.t_restore_us = store->t_restore_us;
    res.t_store_us   = store->t_store_us;
    res.stopped      = counts.stopped;
    return res;
}

int32_t llama_clex_store_list(llama_clex_store * store, llama_clex_store_document * docs, int32_t n) {
    const auto found = clex_store_documents(store->folder).list();
    std::copy_n(found.begin(), std::min<size_t>(found.size(), std::max(0, n)), docs);
    return (int32_t) found.size();
}

int64_t llama_clex_store_remove(llama_clex_store * store, const char * name) {
    return clex_store_documents(store->folder).remove(name);
}

int64_t llama_clex_store_clear(llama_clex_store * store) {
    int64_t res = 0;
    for (const auto & file : store->folder.scan()) {
        res += clex_store_folder::remove(file.path) ? file.size : 0;
    }
    return res;
}

llama_clex_store_check_result llama_clex_store_check(llama_clex_store * store) {
    return clex_store_documents(store->folder).check();
}
