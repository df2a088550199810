#pragma once

// Kinds of weights in products with batches: how a panel of rows is unpacked, activations are packed for it, and the two are multiplied.

#include "ggml-clex-panel.h"

#if defined(GGML_CLEX_PANEL)

#include <cstddef>
#include <cstdint>

struct ggml_tensor;

namespace clex_kinds {

// Rows of weights as they lie in memory.
struct weight_rows {
    const char * data;
    size_t       row; // bytes
};

constexpr int TOKENS_MAX = 32; // of a tile, of any kind
constexpr int ROWS       = 64; // that are unpacked at once

struct weight_kind {
    const char * name; // of what computes it
    int     block;       // numbers; the length of a row is a multiple
    size_t  block_bytes; // as it lies in memory
    int     chunk;       // terms of a sum that a panel has
    int     together;    // rows that lie block by block in turn
    int     rows;        // of a panel, a part of ROWS
    int     tokens;      // of a tile
    size_t  act_size;    // bytes of a block of 32 activations of a tile
    size_t  panel_size;  // bytes
    bool    packed;      // the weights are in an order of their own, and nothing is between rows
    // fill a panel with n rows from `first` on: terms k to k + n_terms
    void (*unpack)(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, void * panel);
    // n_terms activations of a tile from k on; x has as many rows as the tile tokens, of which those that are null become 0
    void (*pack)(const float * const * x, int64_t k, int64_t n_terms, char * y);
    // c[tokens][c_row] (+)= the rows of the panel times n blocks of 32 activations of so many tokens of the tile
    void (*product)(int tokens, const void * panel, const char * a, float * c, int64_t c_row, int n, bool first);
    // around all products of a thread; may be null
    void (*begin)();
    void (*end)();
};

// Null: there is none.
struct weight_kinds {
    const weight_kind * vectors;
    const weight_kind * tiles;
    const char *        otherwise; // name of what computes it where neither does
};

weight_kinds weight_kinds_of(const ggml_tensor * weights);

// of what computes products of large batches with quantized weights
const char * name_of_units();

} // namespace clex_kinds

#endif
