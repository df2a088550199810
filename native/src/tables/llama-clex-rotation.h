#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

// where the keys to rotate are read
enum llama_clex_source {
    LLAMA_CLEX_FROM_CACHE,      // the cache
    LLAMA_CLEX_FROM_CACHE_KEEP, // the cache, and they are kept as they are
    LLAMA_CLEX_FROM_KEPT,       // those that were kept
};

// keys to bring from one table to another, and from one position to another after a shift
struct llama_clex_rotation {
    int32_t from    = 0;
    int32_t to      = 0;
    bool    still   = false; // neither the table nor the position is another one: to be copied
    bool    crosses = false; // the cells enter another bucket

    llama_clex_source source = LLAMA_CLEX_FROM_CACHE;

    std::vector<int32_t> rows; // cell indices over all streams
    std::vector<int32_t> pos_old;
    std::vector<int32_t> pos_new;

    bool is_like(const llama_clex_rotation & other) const {
        return from == other.from && to == other.to && still == other.still && crosses == other.crosses && source == other.source;
    }
};
