#pragma once

// The two products of a tile of attention in tile registers: each factor is split into two bf16, see ggml-clex-tile-products.h.
//
//   scores = K Q   A: rows of K, [positions][size_k]          B: pairs of dimensions of Q, [size_k/2][columns][2]
//   o     += P V   A: scores transposed, [columns][positions]  B: pairs of positions of V, [positions/2][size_v][2]

#include "ggml-clex-tile-products.h"

#if defined(GGML_CLEX_PANEL) && defined(GGML_CLEX_TILES)

namespace clex_tiles {

// Both parts of a factor. A: rows are stride bytes apart, a step has 64 of them; B: rows of pairs are stride bytes apart, a step has 16 rows.
struct operand {
    char *  high;
    char *  low;
    int64_t stride;

    static int64_t bytes(int64_t rows, int64_t stride) { return 2*rows*stride; }
    static operand at(char * room, int64_t rows, int64_t stride) { return { room, room + rows*stride, stride }; }
};

// n rows of k numbers, a multiple of 16, to a multiple of 32
static inline void pack_rows(const float * x, int64_t x_row, int64_t n, int64_t k, const operand & to) {
    float low[32];
    for (int64_t i = 0; i < n; ++i) {
        char * high_row = to.high + i*to.stride, * low_row = to.low + i*to.stride;
        for (int64_t j = 0; j < k; j += 16) {
            rest_row(x + i*x_row + j, 16, low);
            round_row(x + i*x_row + j, 16, high_row + 2*j);
            round_row(low, 16, low_row + 2*j);
        }
        memset(high_row + 2*k, 0, to.stride - 2*k);
        memset(low_row  + 2*k, 0, to.stride - 2*k);
    }
}

// n rows of numbers, to a multiple of 32 rows, in pairs of rows; columns is a multiple of LANES
static inline void pack_pairs(const float * x, int64_t x_row, int64_t n, int64_t columns, const operand & to) {
    for (int64_t i = 0; i < (n + 31)/32*32; i += 2) {
        char * high_row = to.high + i/2*to.stride, * low_row = to.low + i/2*to.stride;
        for (int64_t j = 0; j < columns; j += LANES) {
            const fvec a = i     < n ? clex_panel::f_load(x + i*x_row + j)       : clex_panel::f_zero();
            const fvec b = i + 1 < n ? clex_panel::f_load(x + (i + 1)*x_row + j) : clex_panel::f_zero();
            i_store(high_row + 4*j, pairs(a, b));
            i_store(low_row  + 4*j, pairs(rest(a), rest(b)));
        }
    }
}

// n rows of numbers become columns, to a multiple of 32; columns is a multiple of LANES
static inline void pack_transposed(const float * x, int64_t x_row, int64_t n, int64_t columns, const operand & to) {
    alignas(64) int8_t square[2][LANES][4*LANES];
    alignas(64) int8_t turned[LANES][4*LANES];
    for (int64_t i = 0; i < (n + 31)/32*32; i += 2*LANES) {
        for (int64_t j = 0; j < columns; j += LANES) {
            for (int64_t p = 0; p < LANES; ++p) {
                const float * from = x + (i + 2*p)*x_row + j;
                const fvec a = i + 2*p     < n ? clex_panel::f_load(from)         : clex_panel::f_zero();
                const fvec b = i + 2*p + 1 < n ? clex_panel::f_load(from + x_row) : clex_panel::f_zero();
                i_store(square[0][p], pairs(a, b));
                i_store(square[1][p], pairs(rest(a), rest(b)));
            }
            for (int part = 0; part < 2; ++part) {
                clex_panel::transpose_square(square[part][0], 4*LANES, turned[0], 4*LANES, 0);
                for (int64_t c = 0; c < LANES; ++c) {
                    memcpy((part ? to.low : to.high) + (j + c)*to.stride + 2*i, turned[c], 4*LANES);
                }
            }
        }
    }
}

// c[16*ROWS][16*COLUMNS] (+)= a*b over n steps, from row i and column j on
template <typename Tiles, int ROWS, int COLUMNS>
GGML_CLEX_TILE_CODE static inline void multiply_block(float * c, int64_t c_row, const operand & a, const operand & b,
        int64_t i, int64_t j, int64_t n, bool add) {
    c += i*c_row + j;
    begin_results<Tiles, ROWS, COLUMNS>(c, c_row, add);
    for (int64_t s = 0; s < n; ++s) {
        const int64_t at = i*a.stride + 64*s, from = s*16*b.stride + 4*j;
        load_columns<Tiles, COLUMNS>(b.high + from, b.stride, 64);
        multiply_step<Tiles, ROWS, COLUMNS>(a.high + at, a.stride);
        multiply_step<Tiles, ROWS, COLUMNS>(a.low + at, a.stride);
        load_columns<Tiles, COLUMNS>(b.low + from, b.stride, 64);
        multiply_step<Tiles, ROWS, COLUMNS>(a.high + at, a.stride);
    }
    end_results<Tiles, ROWS, COLUMNS>(c, c_row);
}

// c[rows][columns] (+)= a*b over k terms; rows and columns up to multiples of 16 are written, terms up to one of 32 read
template <typename Tiles>
GGML_CLEX_TILE_CODE static void multiply(float * c, int64_t c_row, const operand & a, const operand & b, int64_t k, int64_t rows,
        int64_t columns, bool add) {
    const int64_t n = (k + 31)/32;
    for (int64_t j = 0; j < columns; j += 32) {
        for (int64_t i = 0; i < rows; i += 32) {
            if (rows - i > 16 && columns - j > 16) {
                multiply_block<Tiles, 2, 2>(c, c_row, a, b, i, j, n, add);
            } else if (rows - i > 16) {
                multiply_block<Tiles, 2, 1>(c, c_row, a, b, i, j, n, add);
            } else if (columns - j > 16) {
                multiply_block<Tiles, 1, 2>(c, c_row, a, b, i, j, n, add);
            } else {
                multiply_block<Tiles, 1, 1>(c, c_row, a, b, i, j, n, add);
            }
        }
    }
}

} // namespace clex_tiles

#endif
