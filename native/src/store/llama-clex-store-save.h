#pragma once

// Stores what a sequence has of its text.

#include "llama-clex-store-sequence.h"

#include <cstdint>

class clex_store_save : clex_store_sequence {
public:
    using clex_store_sequence::clex_store_sequence;

    // Returns the tokens that are stored or about to be.
    int32_t save(const llama_token * tokens, int32_t n_tokens);

private:
    // a block of cells on its way to its file; false where it has to wait
    // windowed: its cells in layers with a window, or null
    bool store_block(const llama_token * tokens, const llama_clex_store_cache::cell * cells, const llama_clex_store_cache::cell * windowed,
            int32_t index, const clex_digest & parent, const link & l);

    void describe(clex_block_header & header, const llama_token * tokens) const;
};
