#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <vector>

struct llama_ubatch;

class llama_kv_cells;

// From which text the keys and values of a cell were computed, whatever happens to the cell or to its neighbours later: what
// the document store names them by. A cell says so with a sum over all tokens up to its own and the tables of each.
struct llama_clex_texts {
    struct text {
        uint64_t sum   = 0; // 0: unknown, as of images, of states that were loaded, and of what follows these
        int32_t  table = 0; // that the token was computed with, see llama_clex_cache::table_of()
        bool     alone = false; // or with few others: kernels for few tokens may round otherwise than those for many
    };

    static constexpr uint64_t BEGIN = 0x9e3779b97f4a7c15ull; // of no tokens

    // the sum with one more token
    static uint64_t next(uint64_t sum, llama_token token, int32_t table);

    text get(size_t row) const { return row < texts.size() ? texts[row] : text {}; }

    void set(size_t row, text text);

    // a cell gets the key of a token, which the sequence of the ubatch has not got yet
    void record(const llama_kv_cells & cells, uint32_t i_cell, size_t first_row, const llama_ubatch & ubatch, uint32_t i_token, int32_t table);

    // what the cells of a sequence, of all for -1, have is of unknown origin
    void forget(const llama_kv_cells & cells, size_t first_row, llama_seq_id seq_id);

    // the cells of a stream were copied to another one
    void copy_stream(uint32_t src, uint32_t dst, uint32_t n_cells);

    void clear() { texts.clear(); }

private:
    std::vector<text> texts; // of each cell of all streams, as far as any were recorded
};
