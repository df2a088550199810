#pragma once

// Gives a sequence what the store has of its text.

#include "llama-clex-store-block.h"
#include "llama-clex-store-sequence.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class clex_store_restore : clex_store_sequence {
public:
    using clex_store_sequence::clex_store_sequence;

    // Returns the tokens that the sequence has then.
    int32_t restore(const llama_token * tokens, int32_t n_tokens, int32_t n_total, bool exact);

private:
    struct found : link {
        bool wanted; // computed with the table that is wanted
    };

    using chain = std::vector<found>;

    // the longest chain of a text, and of those the one that has most of the wanted table
    void find(const llama_token * tokens, int32_t n_blocks, bool exact);
    void search(const llama_token * tokens, int32_t n_blocks, bool exact);

    // first blocks of which the caches have cells: those of layers that see everything, and those of layers with a window
    struct place_of {
        size_t i0;
        size_t iw;
    };

    // Blocks into cells that were placed; headers are those of the blocks from i0 on. Returns how many were right.
    size_t load(const llama_token * tokens, const place_of & at, std::vector<clex_block_header> & headers);
    bool   load_block(const llama_token * tokens, const place_of & at, size_t i, std::unique_ptr<clex_block_file> file,
            std::vector<uint8_t> & buffer, clex_block_header & header);

    // an open file of a block, which the disk begins with; null where there is none
    std::unique_ptr<clex_block_file> expect(size_t i) const;

    // throws where it is not the i-th block of the text
    void check(const clex_block_file & file, const llama_token * tokens, size_t i) const;

    // The next sections into the cells of a block. Where one is wrong, they have zeros.
    static void read(clex_block_file & file, llama_clex_store_cache & to, size_t i_block, std::vector<uint8_t> & buffer);

    // Shorten the chain until its end has what layers with a window see from there. Returns the first block of which they get
    // their part.
    size_t find_window();

    // blocks at the beginning of the chain that the sequence has in its cells; exact: computed with the table that is wanted
    size_t n_own(const llama_token * tokens, int32_t n_tokens, bool exact) const;

    // what the cells were computed of and with, and the blocks as used now
    void describe(const llama_token * tokens, const place_of & at, const std::vector<clex_block_header> & headers);

    // find cells for all but the first i0 blocks
    bool place(const llama_token * tokens, size_t i0, size_t iw);

    // one attempt; the tokens that the sequence has then. retry: a block was damaged, and what was found before is not there
    int32_t try_restore(const llama_token * tokens, int32_t n_tokens, bool exact, bool & retry);

    std::atomic<bool> unreadable = { false }; // the system did not let a block be read, which may be whole

    std::string wanted; // label
    chain       cur;
    chain       best;
    size_t      n_looked = 0;
};
