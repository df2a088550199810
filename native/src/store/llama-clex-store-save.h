#pragma once

// Stores what a sequence has of its text.

#include "llama-clex-store-block.h"
#include "llama-clex-store-sequence.h"

#include <cstddef>
#include <cstdint>
#include <vector>

class clex_store_save : clex_store_sequence {
public:
    using clex_store_sequence::clex_store_sequence;

    // Returns the tokens that are stored or about to be.
    int32_t save(const llama_token * tokens, int32_t n_tokens);

private:
    struct part : link {
        clex_digest parent; // name of the block before
    };

    // the whole blocks of a text
    std::vector<part> name_blocks(const llama_token * tokens, const std::vector<llama_clex_store_cache::cell> & cells) const;

    // a block of cells on its way to its file; false where it has to wait
    // windowed: its cells in layers with a window, or null
    bool store_block(const llama_token * tokens, size_t index, const std::vector<llama_clex_store_cache::cell> & all_cells,
            const llama_clex_store_cache::cell * windowed, const part & p, const clex_store_writer::text & files);

    void describe(clex_block_header & header, const llama_token * tokens) const;
};
