#include "llama-clex-texts.h"

#include "llama-batch.h"
#include "llama-kv-cells.h"

#include <algorithm>

// kernels that are chosen by the number of tokens do not change beyond this
static constexpr uint32_t CLEX_MANY = 32;

uint64_t llama_clex_texts::next(uint64_t sum, llama_token token, int32_t table) {
    // the finalizer of MurmurHash3 over what was there and what comes
    uint64_t x = sum*0x9e3779b97f4a7c15ull ^ ((uint64_t) (uint32_t) token << 32 | (uint32_t) table);
    x = (x ^ x >> 33)*0xff51afd7ed558ccdull;
    x = (x ^ x >> 33)*0xc4ceb9fe1a85ec53ull;
    x ^= x >> 33;
    return x ? x : BEGIN;
}

void llama_clex_texts::set(size_t row, text text) {
    if (row >= texts.size()) {
        texts.resize(row + 1);
    }
    texts[row] = text;
}

void llama_clex_texts::record(
        const llama_kv_cells & cells, uint32_t i_cell, size_t first_row, const llama_ubatch & ubatch, uint32_t i_token, int32_t table) {
    const llama_pos pos = ubatch.pos[i_token];

    text res;

    // a token of several sequences sees the cells of all of them
    if (ubatch.token && ubatch.n_seq_id[i_token] == 1) {
        uint64_t before = pos == 0 ? BEGIN : 0;

        const auto & seq = cells.seq_pos_get(ubatch.seq_id[i_token][0]);

        const auto it = seq.lower_bound({ pos - 1, 0 });
        if (it != seq.end() && it->first == pos - 1) {
            before = get(first_row + it->second).sum;
        }
        if (before != 0) {
            const auto same = [&](uint32_t k) { return k < ubatch.n_tokens && ubatch.seq_id[k][0] == ubatch.seq_id[i_token][0]; };

            const bool single = !same(i_token + 1) && (i_token == 0 || !same(i_token - 1));

            res = { next(before, ubatch.token[i_token], table), table, single || ubatch.n_tokens < CLEX_MANY };
        }
    }

    set(first_row + i_cell, res);
}

void llama_clex_texts::forget(const llama_kv_cells & cells, size_t first_row, llama_seq_id seq_id) {
    for (uint32_t i = 0; i < cells.size() && first_row + i < texts.size(); ++i) {
        if (!cells.is_empty(i) && (seq_id == -1 || cells.seq_has(i, seq_id))) {
            texts[first_row + i] = {};
        }
    }
}

void llama_clex_texts::copy_stream(uint32_t src, uint32_t dst, uint32_t n_cells) {
    for (uint32_t i = 0; i < n_cells; ++i) {
        set((size_t) dst*n_cells + i, get((size_t) src*n_cells + i));
    }
}
