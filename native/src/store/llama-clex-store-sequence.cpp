#include "llama-clex-store-sequence.h"

#include "llama-kv-cache.h"

clex_store_sequence::clex_store_sequence(llama_clex_store & store, llama_context & lctx, llama_seq_id seq_id, const std::string & digest) :
    store(store), lctx(lctx), context(lctx), seq_id(seq_id), digest(digest),
    model_id(clex_hex(reinterpret_cast<const uint8_t *>(digest.data()), digest.size())),
    config(context.config(digest, seq_id)), cache(*context.caches()[0], seq_id), sizes(cache.section_sizes()) {
    if (context.caches().size() > 1) {
        window = std::make_unique<llama_clex_store_cache>(*context.caches()[1], seq_id);
        window_sizes = window->section_sizes();
    }
}

clex_store_sequence::link clex_store_sequence::make_link(const clex_digest & key, uint32_t index, const std::string & label) const {
    return { store.folder.path(model_id, key, index, label), clex_block_name(key, label) };
}
