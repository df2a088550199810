#pragma once

// The two products of attention for many queries with numbers of 16 bits: twice as many at once as F32.
//
// Each row of K and each query has a scale of its own, the finest with which its length as a vector is at most the root of 2^31: then no sum is more than
// 32 bits have (Cauchy and Schwarz). That is 15 bits and a sign for the largest numbers, several times finer than F16 is for them.
//
// Each row of V has 13 bits and a half and a sign for its largest number. Its scale goes into the weights of its position, which have one for each query,
// with which their sum is at most 2^31 divided by the largest number of V. What no query sees has weights of 0 and adds nothing, to no scale either.

#include "ggml-clex-panel.h"
#include "ggml-clex-vec.h"

// Not with AVX-512 without VNNI: the two units of such processors would do a product and a sum in the time of two products of F32.
#if defined(GGML_CLEX_PANEL_512)

#define GGML_CLEX_PAIRS

namespace clex_pairs {

using clex_panel::ivec;

static inline ivec i_load (const int32_t * p)   { return _mm512_loadu_si512((const void *) p); }
static inline void i_store(int32_t * p, ivec a) { _mm512_storeu_si512((void *) p, a); }
static inline ivec rounded(vec a)               { return _mm512_cvtps_epi32(a); }
static inline ivec pairs  (ivec low, ivec high) { return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16)); }
static inline void store_16(int16_t * p, ivec a) { _mm256_storeu_si256((__m256i *) p, _mm512_cvtsepi32_epi16(a)); }

static inline vec least(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec root (vec a)        { return _mm512_sqrt_ps(a); }
// a/b, and 0 where `size`, a magnitude, is as good as 0; not where it is not a number
static inline vec ratio(vec size, vec a, vec b) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(size, _mm512_set1_ps(1e-35f), _CMP_NLT_UQ), a, b);
}
static inline vec larger(vec max, vec x) { // the magnitude; not a number where one of them is not
    const ivec magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(max), magnitude));
}
// of magnitudes, in every lane
static inline vec   largest(vec a) { return _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_castps_si512(a)))); }
static inline float total  (const vec * a) { return _mm512_reduce_add_ps(a[0]); } // 16 numbers
static inline float first  (vec a) { return _mm512_cvtss_f32(a); }

} // namespace clex_pairs

#elif defined(GGML_CLEX_PANEL) && defined(__AVX2__) && !defined(__AVX512F__)

#define GGML_CLEX_PAIRS

namespace clex_pairs {

using clex_panel::ivec;

static inline ivec i_load (const int32_t * p)   { return _mm256_loadu_si256((const __m256i *) p); }
static inline void i_store(int32_t * p, ivec a) { _mm256_storeu_si256((__m256i *) p, a); }
static inline ivec rounded(vec a)               { return _mm256_cvtps_epi32(a); }
static inline ivec pairs  (ivec low, ivec high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa); }
static inline void store_16(int16_t * p, ivec a) {
    _mm_storeu_si128((__m128i *) p, _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

static inline vec least(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec root (vec a)        { return _mm256_sqrt_ps(a); }
static inline vec ratio(vec size, vec a, vec b) {
    return _mm256_and_ps(_mm256_cmp_ps(size, _mm256_set1_ps(1e-35f), _CMP_NLT_UQ), _mm256_div_ps(a, b));
}
static inline vec larger(vec max, vec x) {
    const ivec magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(max), magnitude));
}
static inline vec largest(vec a) {
    ivec x = _mm256_castps_si256(a);
    x = _mm256_max_epi32(x, _mm256_permute2x128_si256(x, x, 1));
    x = _mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
    return _mm256_castsi256_ps(_mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0xb1)));
}
static inline float total(const vec * a) {
    const vec sum = _mm256_add_ps(a[0], a[1]);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float first(vec a) { return _mm256_cvtss_f32(a); }

} // namespace clex_pairs

#endif

#if defined(GGML_CLEX_PAIRS)

namespace clex_pairs {

static constexpr int LANES   = 16; // numbers that a row is taken in, for the same sums whatever a vector has
static constexpr int VECTORS = LANES/VEC;

// what up to VEC vectors, one in each lane, are multiplied by to become whole numbers, and what brings these back
struct scales {
    vec to, back;

    // of the largest magnitude and of the squares that were divided by it before they were summed
    scales(vec max, vec squares) {
        const vec room = ratio(max, vec_set(46330.0f), root(squares)); // rounding makes vectors longer by 8 at most
        const vec most = least(room, vec_set(32767.0f));
        to   = ratio(max, most, max);
        back = ratio(max, max, most);
    }
};

// the magnitude, and what it is divided by: nothing where all is 0
static inline vec inverse(vec max) {
    return ratio(max, vec_set(1.0f), max);
}

// two numbers of each lane
static inline ivec pair(vec low, vec high, vec to_low, vec to_high) {
    return pairs(rounded(vec_mul(low, to_low)), rounded(vec_mul(high, to_high)));
}

// VEC vectors of n numbers, n even, x[n][VEC] with x_row between rows: pairs y[n/2][VEC] with y_row between them, and what brings them back
static inline void pack_columns(const float * x, int64_t x_row, int64_t n, int32_t * y, int64_t y_row, float * back) {
    vec max = vec_set(0.0f), squares = vec_set(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        max = larger(max, vec_load(x + i*x_row));
    }
    const vec by = inverse(max);
    for (int64_t i = 0; i < n; ++i) {
        const vec a = vec_mul(vec_load(x + i*x_row), by);
        squares = vec_fma(a, a, squares);
    }
    const scales scale(max, squares);
    for (int64_t i = 0; i < n; i += 2) {
        i_store(y + i/2*y_row, pair(vec_load(x + i*x_row), vec_load(x + (i + 1)*x_row), scale.to, scale.to));
    }
    vec_store(back, scale.back);
}

// the largest magnitude of n numbers, whole vectors of VEC, in every lane
static inline vec largest(const float * x, int64_t n) {
    vec max = vec_set(0.0f);
    for (int64_t i = 0; i < n; i += VEC) {
        max = larger(max, vec_load(x + i));
    }
    return largest(max);
}

// one vector of n numbers, a multiple of LANES; what brings it back
static inline float pack_row(const float * x, int64_t n, int32_t * y) {
    const vec max = largest(x, n), by = inverse(max);
    vec squares[VECTORS];
    for (vec & sum : squares) {
        sum = vec_set(0.0f);
    }
    for (int64_t i = 0; i < n; i += LANES) {
        for (int j = 0; j < VECTORS; ++j) {
            const vec a = vec_mul(vec_load(x + i + j*VEC), by);
            squares[j] = vec_fma(a, a, squares[j]);
        }
    }
    const scales scale(max, vec_set(total(squares)));
    for (int64_t i = 0; i < n; i += VEC) {
        store_16((int16_t *) y + i, rounded(vec_mul(vec_load(x + i), scale.to)));
    }
    return first(scale.back);
}

static constexpr float VALUE_MAX   = 11585;  // of a number of V
static constexpr float WEIGHTS_MAX = 185000; // of the sum of a query's weights in a tile; rounding adds 32 at most

// n rows of V, whole vectors of VEC, and a row of 0 behind an odd number of them: pairs y[n/2, rounded up][size] of the numbers of two rows,
// and what brings each row back
static inline void pack_values(const float * x, int64_t n, int64_t size, int32_t * y, float * back) {
    for (int64_t i = 0; i < n; i += 2) {
        const float * low = x + i*size, * high = low + size;
        const vec max_low = largest(low, size), max_high = largest(high, size);
        const vec to_low  = vec_mul(inverse(max_low),  vec_set(VALUE_MAX));
        const vec to_high = vec_mul(inverse(max_high), vec_set(VALUE_MAX));
        back[i]     = first(max_low)/VALUE_MAX;
        back[i + 1] = first(max_high)/VALUE_MAX;
        for (int64_t j = 0; j < size; j += VEC) {
            i_store(y + i/2*size + j, pair(vec_load(low + j), vec_load(high + j), to_low, to_high));
        }
    }
}

// weights w[n][VEC] with w_row between rows, of n positions for VEC queries, times the scale of each position: see pack_columns; behind an odd
// number of them is a row of which nothing counts, as the scale there is 0
static inline void pack_weights(const float * w, int64_t w_row, int64_t n, const float * scale, int32_t * y, int64_t y_row, float * back) {
    vec max = vec_set(0.0f), sum = vec_set(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        const vec x = vec_mul(vec_load(w + i*w_row), vec_set(scale[i]));
        max = larger(max, x);
        sum = vec_add(sum, x);
    }
    // the largest number has 15 bits at most
    const vec most = vec_max(vec_mul(sum, vec_set(1/WEIGHTS_MAX)), vec_mul(max, vec_set(1/32767.0f)));
    const vec to   = inverse(most);
    for (int64_t i = 0; i < n; i += 2, w += 2*w_row, y += y_row) {
        i_store(y, pair(vec_load(w), vec_load(w + w_row), vec_mul(to, vec_set(scale[i])), vec_mul(to, vec_set(scale[i + 1]))));
    }
    vec_store(back, most);
}

// ROWS times N*VEC sums over `terms` pairs; a(i, p) is a[i*a_row + p*a_term], b has rows of columns. See product_block of F32.
template <int ROWS, int N, typename Put>
static inline void multiply_block(const int32_t * a, int64_t a_row, int64_t a_term, const int32_t * b, int64_t b_row, int64_t terms, Put put) {
    ivec sum[ROWS][N];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            sum[i][j] = clex_panel::i_zero();
        }
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < terms; ++p) {
        ivec row[N];
        for (int j = 0; j < N; ++j) {
            row[j] = i_load(b + p*b_row + j*VEC);
        }
        for (int i = 0; i < ROWS; ++i) {
            const ivec x = clex_panel::i_set(a + i*a_row + p*a_term);
            for (int j = 0; j < N; ++j) {
                sum[i][j] = clex_panel::dot_pairs(sum[i][j], row[j], x);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            put(i, j*VEC, clex_panel::f_from(sum[i][j]));
        }
    }
}

// the same for multiples of ROWS rows and of VEC columns; put(row, column, sums); between(): before each block
template <int ROWS, int N, typename Put, typename Between>
static inline void multiply(const int32_t * a, int64_t a_row, int64_t a_term, const int32_t * b, int64_t b_row, int64_t terms, int64_t rows,
        int64_t columns, int64_t first, Put put, Between between) {
    int64_t j = first;
    for (; j + N*VEC <= columns; j += N*VEC) {
        for (int64_t i = 0; i < rows; i += ROWS) {
            between();
            multiply_block<ROWS, N>(a + i*a_row, a_row, a_term, b + j, b_row, terms, [&](int row, int column, vec x) { put(i + row, j + column, x); });
        }
    }
    if constexpr (N > 1) {
        if (j < columns) {
            multiply<ROWS, 1>(a, a_row, a_term, b, b_row, terms, rows, columns, j, put, between);
        }
    }
}

} // namespace clex_pairs

#endif
