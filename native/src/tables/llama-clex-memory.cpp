#include "llama-clex-memory.h"

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

// Memories that have keys of layers which see everything in one KV cache: a plain one, one beside that of layers with a
// sliding window, and either beside the states of recurrent layers. Others hold keys in a form of their own.

llama_kv_cache * llama_clex_kv(llama_memory_i * memory) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        memory = hybrid->get_mem_attn();
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(memory);
}

llama_kv_cache * llama_clex_kv(const llama_memory_context_i * mctx) {
    const llama_kv_cache_context * plain = dynamic_cast<const llama_kv_cache_context *>(mctx);

    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        plain = hybrid->get_attn();
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        mctx = hybrid->get_attn();
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        plain = iswa->get_base();
    }
    return plain ? plain->get_kv() : nullptr;
}
