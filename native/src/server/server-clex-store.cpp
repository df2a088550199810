#include "server-clex-store.h"

#include "server-common.h"

#include <cstdlib>

static constexpr int32_t BLOCK = LLAMA_CLEX_STORE_BLOCK;

llama_clex_store * server_clex_store::get() {
    if (!tried) {
        tried = true;

        const char * path = std::getenv("LLAMA_CLEX_STORE");
        const char * size = std::getenv("LLAMA_CLEX_STORE_SIZE");
        if (path && *path) {
            store.reset(llama_clex_store_open(path, size ? std::atoll(size) : 0));
            if (store) {
                SRV_INF("what is read is kept in %s\n", path);
            }
        }
    }
    return store.get();
}

int32_t server_clex_store::restore(
        llama_context * ctx, llama_seq_id seq_id, server_tokens & has, const server_tokens & prompt, int32_t n_past, bool exact) {
    n_saved[seq_id] = 0; // what was stored may have been removed since the last request

    const int32_t n_tokens = (int32_t) prompt.size();
    if (n_tokens - 1 - n_past < BLOCK || prompt.has_mtmd || !get() || !llama_clex_store_takes(get(), ctx, nullptr, 0)) {
        return n_past;
    }
    // what follows is removed in any case
    llama_memory_seq_rm(llama_get_memory(ctx), seq_id, n_past, -1);

    const llama_tokens & tokens = prompt.get_text_tokens();

    const int32_t n = llama_clex_store_restore(get(), ctx, seq_id, tokens.data(), n_tokens, n_tokens, exact ? LLAMA_CLEX_STORE_EXACT : 0);

    has.keep_first(std::min(n, n_past));
    for (int32_t i = n_past; i < n; ++i) {
        has.push_back(tokens[i]);
    }
    return n;
}

void server_clex_store::save(llama_context * ctx, llama_seq_id seq_id, const server_tokens & tokens) {
    const int32_t n_blocks = (llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) + 1)/BLOCK;

    int32_t & n = n_saved[seq_id];
    if (n_blocks > n && !tokens.has_mtmd && get()) {
        const llama_tokens & text = tokens.get_text_tokens();
        llama_clex_store_save(get(), ctx, seq_id, text.data(), (int32_t) text.size());
    }
    n = n_blocks;
}
