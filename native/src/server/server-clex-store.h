#pragma once

// The document store of llama-server: a prompt begins with what any process has read. LLAMA_CLEX_STORE in the environment
// names its folder, LLAMA_CLEX_STORE_SIZE the bytes that it may have; without the first there is none.

#include "llama-clex-store.h"

#include <cstdint>
#include <map>
#include <memory>

struct server_tokens;

class server_clex_store {
public:
    // A slot's sequence and tokens have n_past tokens of a prompt; where the store has more, they get these. Returns how many
    // they have then. exact: only what was computed with the prompt's table
    int32_t restore(llama_context * ctx, llama_seq_id seq_id, server_tokens & has, const server_tokens & prompt, int32_t n_past, bool exact);

    // after a decode: whole blocks that the sequence got are stored
    void save(llama_context * ctx, llama_seq_id seq_id, const server_tokens & tokens);

private:
    llama_clex_store * get();

    struct closer {
        void operator()(llama_clex_store * store) const { llama_clex_store_close(store); }
    };

    std::unique_ptr<llama_clex_store, closer> store;

    bool tried = false;

    std::map<llama_seq_id, int32_t> n_saved; // blocks of each sequence that were handed over for its request
};
