#pragma once

// Products of panels of weights with activations in tile registers, as bf16.
//
// Why bf16 and not 8 bits: the units do as many products of bf16 a second as of 8-bit numbers in blocks of 32, which half of a tile is, and sums of
// the latter had to leave the tiles to be scaled after each block. Weights that are scaled when they are unpacked are summed over all
// blocks in the tiles. Rounding both factors to bf16 costs less than rounding activations to 8 bits does.
//
// Factors that are F16 or more exact are split into two bf16, of which three products are summed: high*high, low*high and high*low.
// What is left out and rounded is less than 2^-16 of a product.
//
//   activations (A)  for each step of 32 terms: tokens 0 to 15, 16 to 31: 16 rows of 32 terms, 1 KiB; with low parts, those follow
//   weights (B)      for each step of 32 terms: rows 0 to 15, 16 to 31: 16 rows of pairs of terms of 16 rows, 1 KiB; likewise
//   results (C)      float, as they lie: 16 tokens times 16 rows of weights

#include "ggml-clex-panel.h"
#include "ggml-clex-tiles.h"

#if defined(GGML_CLEX_PANEL) && defined(GGML_CLEX_TILES)

namespace clex_tiles {

using clex_panel::fvec;
using clex_panel::ivec;
using clex_panel::LANES;

constexpr int ROWS   = 32; // of weights
constexpr int TOKENS = 32;
constexpr int STEP   = 32; // terms
constexpr int TILE   = 1024; // bytes

constexpr int step_bytes(bool split) { return (split ? 4 : 2)*TILE; } // of weights or activations

//
// numbers as bf16, rounded to the nearest, halves to the even
//

#if defined(GGML_CLEX_PANEL_512)

static inline ivec i_and(ivec a, ivec b) { return _mm512_and_si512(a, b); }
static inline ivec i_or(ivec a, ivec b) { return _mm512_or_si512(a, b); }
static inline ivec i_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
static inline ivec i_all(int32_t x) { return _mm512_set1_epi32(x); }
template <int N> static inline ivec i_left(ivec a) { return _mm512_slli_epi32(a, N); }
template <int N> static inline ivec i_right(ivec a) { return _mm512_srli_epi32(a, N); }
template <int N> static inline ivec i_right_signed(ivec a) { return _mm512_srai_epi32(a, N); }
static inline ivec i_bits(fvec a) { return _mm512_castps_si512(a); }
static inline fvec f_bits(ivec a) { return _mm512_castsi512_ps(a); }
static inline fvec f_sub(fvec a, fvec b) { return _mm512_sub_ps(a, b); }
static inline void i_store(void * p, ivec a) { _mm512_storeu_si512(p, a); }

#else

static inline ivec i_and(ivec a, ivec b) { return _mm256_and_si256(a, b); }
static inline ivec i_or(ivec a, ivec b) { return _mm256_or_si256(a, b); }
static inline ivec i_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
static inline ivec i_all(int32_t x) { return _mm256_set1_epi32(x); }
template <int N> static inline ivec i_left(ivec a) { return _mm256_slli_epi32(a, N); }
template <int N> static inline ivec i_right(ivec a) { return _mm256_srli_epi32(a, N); }
template <int N> static inline ivec i_right_signed(ivec a) { return _mm256_srai_epi32(a, N); }
static inline ivec i_bits(fvec a) { return _mm256_castps_si256(a); }
static inline fvec f_bits(ivec a) { return _mm256_castsi256_ps(a); }
static inline fvec f_sub(fvec a, fvec b) { return _mm256_sub_ps(a, b); }
static inline void i_store(void * p, ivec a) { _mm256_storeu_si256((__m256i *) p, a); }

#endif

// The upper half of each lane is the bf16, the rest is not 0. A number that is none stays one: its payload is left alone.
static inline ivec round_upper(fvec x) {
    const ivec bits = i_bits(x);
    const ivec odd  = i_and(i_right<16>(bits), i_all(1));
    const ivec sum  = i_add(i_add(bits, i_all(0x7fff)), odd);
#if defined(GGML_CLEX_PANEL_512)
    return _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, i_all(0x400000));
#else
    const __m256 none = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return i_bits(_mm256_blendv_ps(f_bits(sum), f_bits(i_or(bits, i_all(0x400000))), none));
#endif
}

// LANES pairs of bf16
static inline ivec pairs(fvec first, fvec second) {
#if defined(GGML_CLEX_PANEL_BF16)
    alignas(64) static constexpr uint16_t IN_TURN[32] = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
    };
    return _mm512_permutexvar_epi16(_mm512_load_si512((const void *) IN_TURN), (__m512i) _mm512_cvtne2ps_pbh(second, first));
#else
    return i_or(i_right<16>(round_upper(first)), i_and(round_upper(second), i_all((int32_t) 0xffff0000)));
#endif
}

// x less its bf16
static inline fvec rest(fvec x) {
    return f_sub(x, f_bits(i_and(round_upper(x), i_all((int32_t) 0xffff0000))));
}

// n numbers, a multiple of 16, as bf16 in a row
static inline void round_row(const float * x, int64_t n, char * y) {
#if defined(GGML_CLEX_PANEL_BF16)
    for (int64_t i = 0; i < n; i += LANES) {
        clex_panel::round_bf16(x + i, y + 2*i);
    }
#else
    alignas(64) uint32_t bits[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
        i_store(bits, i_right<16>(round_upper(clex_panel::f_load(x + i))));
        for (int j = 0; j < LANES; ++j) {
            const uint16_t one = (uint16_t) bits[j];
            memcpy(y + 2*(i + j), &one, 2);
        }
    }
#endif
}

static inline void rest_row(const float * x, int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += LANES) {
        clex_panel::f_store(y + i, rest(clex_panel::f_load(x + i)));
    }
}

//
// panels and activations
//

// where LANES rows of weights from row0 on begin, at the pair of terms from k on
static inline char * pairs_at(char * w, int64_t k, int64_t row0, bool split) {
    return w + k/STEP*step_bytes(split) + row0/16*TILE + k%STEP/2*64 + row0%16*4;
}

template <int BYTE>
static inline fvec weight(ivec w, fvec scale, fvec min, bool has_min) {
    const fvec x = clex_panel::f_from(i_right_signed<24>(i_left<24 - 8*BYTE>(w)));
    return has_min ? clex_panel::f_fma(x, scale, min) : clex_panel::f_mul(x, scale);
}

// panel::ROWS rows of weights from row0 on: numbers of 8 bits with scales become bf16
template <int PART, bool MIN>
static inline void weights_of_panel(const clex_panel::panel & p, int64_t n_terms, char * w, int64_t row0) {
    const ivec flip = i_all(clex_panel::UNSIGNED ? (int32_t) 0x80808080 : 0);
    for (int64_t v = 0; v < clex_panel::VECTORS; ++v) {
        for (int64_t k = 0; k < n_terms; k += 4) {
            const ivec q     = clex_panel::w_load(p.w[k/4][v*LANES]) ^ flip;
            const fvec scale = clex_panel::f_load(p.d[k/PART] + v*LANES);
            const fvec min   = MIN ? clex_panel::f_load(p.m[k/PART] + v*LANES) : clex_panel::f_zero();
            char * to = pairs_at(w, k, row0 + v*LANES, false);
            i_store(to,      pairs(weight<0>(q, scale, min, MIN), weight<1>(q, scale, min, MIN)));
            i_store(to + 64, pairs(weight<2>(q, scale, min, MIN), weight<3>(q, scale, min, MIN)));
        }
    }
}

// LANES rows of bf16 from row0 on, of which n_terms, a multiple of 32, are taken; low: where the tiles of low parts are
static inline void weights_of_rows(const char * rows, int64_t stride, int64_t n_terms, char * w, int64_t row0, bool split, bool low) {
    for (int64_t k = 0; k < n_terms; k += 2*LANES) { // 4*LANES bytes of each row
        char * to = pairs_at(w, k, row0, split) + (low ? 2*TILE : 0);
        clex_panel::transpose_square((const int8_t *) rows + 2*k, stride, (int8_t *) to, 64, 0);
    }
}

// n activations from k on of TOKENS tokens; those of a token that is null, and those up to a multiple of 32, are 0
template <bool SPLIT>
static inline void pack_activations(const float * const * x, int64_t k, int64_t n, char * y) {
    for (int64_t i = 0; i < n; i += STEP, y += step_bytes(SPLIT)) {
        for (int t = 0; t < TOKENS; ++t) {
            alignas(64) float part[STEP] = {}, low[STEP];
            if (x[t]) {
                memcpy(part, x[t] + k + i, (n - i < STEP ? n - i : STEP)*sizeof(float));
            }
            round_row(part, STEP, y + 64*t);
            if (SPLIT) {
                rest_row(part, STEP, low);
                round_row(low, STEP, y + 64*t + 2*TILE);
            }
        }
    }
}

//
// products
//

// Tiles 0 to 3 are results, 16*ROWS rows times 16*COLUMNS columns; 4 and 5 are of A, below each other, and 6 and 7 of B, beside each other.
// Strides are bytes.

template <typename Tiles, int ROWS, int COLUMNS>
GGML_CLEX_TILE_CODE static inline void multiply_step(const char * a, int64_t stride) {
    Tiles::template load<4>(a, stride);
    Tiles::template dot<0, 4, 6>();
    if (COLUMNS == 2) {
        Tiles::template dot<1, 4, 7>();
    }
    if (ROWS == 2) {
        Tiles::template load<5>(a + 16*stride, stride);
        Tiles::template dot<2, 5, 6>();
        if (COLUMNS == 2) {
            Tiles::template dot<3, 5, 7>();
        }
    }
}

// next: bytes to the second of both
template <typename Tiles, int COLUMNS>
GGML_CLEX_TILE_CODE static inline void load_columns(const char * b, int64_t stride, int64_t next) {
    Tiles::template load<6>(b, stride);
    if (COLUMNS == 2) {
        Tiles::template load<7>(b + next, stride);
    }
}

template <typename Tiles, int ROWS, int COLUMNS>
GGML_CLEX_TILE_CODE static inline void begin_results(const float * c, int64_t c_row, bool add) {
    if (!add) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template zero<2>();
        Tiles::template zero<3>();
        return;
    }
    const int64_t stride = c_row*(int64_t) sizeof(float);
    Tiles::template load<0>(c, stride);
    if (COLUMNS == 2) {
        Tiles::template load<1>(c + 16, stride);
    }
    if (ROWS == 2) {
        Tiles::template load<2>(c + 16*c_row, stride);
        if (COLUMNS == 2) {
            Tiles::template load<3>(c + 16*c_row + 16, stride);
        }
    }
}

template <typename Tiles, int ROWS, int COLUMNS>
GGML_CLEX_TILE_CODE static inline void end_results(float * c, int64_t c_row) {
    const int64_t stride = c_row*(int64_t) sizeof(float);
    Tiles::template store<0>(c, stride);
    if (COLUMNS == 2) {
        Tiles::template store<1>(c + 16, stride);
    }
    if (ROWS == 2) {
        Tiles::template store<2>(c + 16*c_row, stride);
        if (COLUMNS == 2) {
            Tiles::template store<3>(c + 16*c_row + 16, stride);
        }
    }
}

// c[16*HALVES][c_row] (+)= a*w over n steps, for 32 rows of weights
template <typename Tiles, int HALVES, bool SPLIT>
GGML_CLEX_TILE_CODE static inline void multiply(const char * w, const char * a, float * c, int64_t c_row, int n, bool first) {
    begin_results<Tiles, HALVES, 2>(c, c_row, !first);
    for (int i = 0; i < n; ++i) {
        load_columns<Tiles, 2>(w, 64, TILE);
        multiply_step<Tiles, HALVES, 2>(a, 64);
        if (SPLIT) {
            multiply_step<Tiles, HALVES, 2>(a + 2*TILE, 64);
            load_columns<Tiles, 2>(w + 2*TILE, 64, TILE);
            multiply_step<Tiles, HALVES, 2>(a, 64);
        }
        w += step_bytes(SPLIT);
        a += step_bytes(SPLIT);
    }
    end_results<Tiles, HALVES, 2>(c, c_row);
}

// Results of tokens up to a multiple of 16 are written.
template <typename Tiles, bool SPLIT>
GGML_CLEX_TILE_CODE static void product(int tokens, const void * w, const char * a, float * c, int64_t c_row, int n, bool first) {
    if (tokens > 16) {
        multiply<Tiles, 2, SPLIT>((const char *) w, a, c, c_row, n, first);
    } else {
        multiply<Tiles, 1, SPLIT>((const char *) w, a, c, c_row, n, first);
    }
}

} // namespace clex_tiles

#endif
