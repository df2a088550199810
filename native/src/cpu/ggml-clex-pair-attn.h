#pragma once

// The two products of attention for many queries with numbers of 16 bits: twice as many at once as F32.
//
// Each row of K and each query has a scale of its own, the finest with which its length as a vector is at most the root of 2^31: then no sum is more than
// 32 bits have (Cauchy and Schwarz). That is 15 bits and a sign for the largest numbers, several times finer than F16 is for them.
//
// Each row of V has 13 bits and a half and a sign for its largest number. Its scale goes into the weights of its position, which have one for each query,
// with which their sum is at most 2^31 divided by the largest number of V. What no query sees has weights of 0 and adds nothing, to no scale either.

#include "ggml-clex-panel.h"

#if defined(GGML_CLEX_PANEL_PAIRS)

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace clex_pairs {

static constexpr int LANES = 16;

// what up to 16 vectors, one in each lane, are multiplied by to become whole numbers, and what brings these back
struct scales {
    __m512 to, back;

    // of the largest magnitude and of the squares that were divided by it before they were summed
    scales(__m512 max, __m512 squares) {
        const __mmask16 any  = _mm512_cmp_ps_mask(max, _mm512_set1_ps(1e-35f), _CMP_NLT_UQ);
        const __m512    room = _mm512_div_ps(_mm512_set1_ps(46330.0f), _mm512_sqrt_ps(squares)); // rounding makes vectors longer by 8 at most
        const __m512    most = _mm512_min_ps(room, _mm512_set1_ps(32767.0f));
        to   = _mm512_maskz_div_ps(any, most, max);
        back = _mm512_maskz_div_ps(any, max, most);
    }
};

// the magnitude, and what it is divided by: nothing where all is 0
static inline __m512 inverse(__m512 max) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(max, _mm512_set1_ps(1e-35f), _CMP_NLT_UQ), _mm512_set1_ps(1.0f), max);
}

static inline __m512 larger(__m512 max, __m512 x) { // not a number where one of them is not
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(max), magnitude));
}

// two numbers of each lane
static inline __m512i pair(__m512 low, __m512 high, __m512 to_low, __m512 to_high) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, to_low));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, to_high));
    return _mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b, 16));
}

// 16 vectors of n numbers, n even, x[n][16] with x_row between rows: pairs y[n/2][16] with y_row between them, and what brings them back
static inline void pack_columns(const float * x, int64_t x_row, int64_t n, int32_t * y, int64_t y_row, float * back) {
    __m512 max = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; ++i) {
        max = larger(max, _mm512_loadu_ps(x + i*x_row));
    }
    const __m512 by = inverse(max);
    for (int64_t i = 0; i < n; ++i) {
        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(x + i*x_row), by);
        squares = _mm512_fmadd_ps(a, a, squares);
    }
    const scales scale(max, squares);
    for (int64_t i = 0; i < n; i += 2) {
        _mm512_storeu_si512((void *) (y + i/2*y_row), pair(_mm512_loadu_ps(x + i*x_row), _mm512_loadu_ps(x + (i + 1)*x_row), scale.to, scale.to));
    }
    _mm512_storeu_ps(back, scale.back);
}

// the largest magnitude of n numbers, whole vectors of LANES, in every lane
static inline __m512 largest(const float * x, int64_t n) {
    __m512 max = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        max = larger(max, _mm512_loadu_ps(x + i));
    }
    return _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_castps_si512(max))));
}

// one vector of n numbers, whole vectors of LANES; what brings it back
static inline float pack_row(const float * x, int64_t n, int32_t * y) {
    const __m512 max = largest(x, n), by = inverse(max);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(x + i), by);
        squares = _mm512_fmadd_ps(a, a, squares);
    }
    const scales scale(max, _mm512_set1_ps(_mm512_reduce_add_ps(squares)));
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale.to));
        _mm256_storeu_si256((__m256i *) ((int16_t *) y + i), _mm512_cvtsepi32_epi16(a));
    }
    return _mm512_cvtss_f32(scale.back);
}

static constexpr float VALUE_MAX   = 11585;  // of a number of V
static constexpr float WEIGHTS_MAX = 185000; // of the sum of a query's weights in a tile; rounding adds 32 at most

// n rows of V, whole vectors of LANES, and a row of 0 behind an odd number of them: pairs y[n/2, rounded up][size] of the numbers of two rows,
// and what brings each row back
static inline void pack_values(const float * x, int64_t n, int64_t size, int32_t * y, float * back) {
    for (int64_t i = 0; i < n; i += 2) {
        const float * low = x + i*size, * high = low + size;
        const __m512 max_low = largest(low, size), max_high = largest(high, size);
        const __m512 to_low  = _mm512_mul_ps(inverse(max_low),  _mm512_set1_ps(VALUE_MAX));
        const __m512 to_high = _mm512_mul_ps(inverse(max_high), _mm512_set1_ps(VALUE_MAX));
        back[i]     = _mm512_cvtss_f32(max_low)/VALUE_MAX;
        back[i + 1] = _mm512_cvtss_f32(max_high)/VALUE_MAX;
        for (int64_t j = 0; j < size; j += LANES) {
            _mm512_storeu_si512((void *) (y + i/2*size + j), pair(_mm512_loadu_ps(low + j), _mm512_loadu_ps(high + j), to_low, to_high));
        }
    }
}

// weights w[n][16] with w_row between rows, of n positions for 16 queries, times the scale of each position: see pack_columns; behind an odd
// number of them is a row of which nothing counts, as the scale there is 0
static inline void pack_weights(const float * w, int64_t w_row, int64_t n, const float * scale, int32_t * y, int64_t y_row, float * back) {
    __m512 max = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; ++i) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(w + i*w_row), _mm512_set1_ps(scale[i]));
        max = larger(max, x);
        sum = _mm512_add_ps(sum, x);
    }
    // the largest number has 15 bits at most
    const __m512 most = _mm512_max_ps(_mm512_mul_ps(sum, _mm512_set1_ps(1/WEIGHTS_MAX)), _mm512_mul_ps(max, _mm512_set1_ps(1/32767.0f)));
    const __m512 to   = inverse(most);
    for (int64_t i = 0; i < n; i += 2) {
        _mm512_storeu_si512((void *) (y + i/2*y_row), pair(_mm512_loadu_ps(w + i*w_row), _mm512_loadu_ps(w + (i + 1)*w_row),
            _mm512_mul_ps(to, _mm512_set1_ps(scale[i])), _mm512_mul_ps(to, _mm512_set1_ps(scale[i + 1]))));
    }
    _mm512_storeu_ps(back, most);
}

// ROWS times N*LANES sums over `terms` pairs; a(i, p) is a[i*a_row + p*a_term], b has rows of columns. See product_block of F32.
template <int ROWS, int N, typename Put>
static inline void multiply_block(const int32_t * a, int64_t a_row, int64_t a_term, const int32_t * b, int64_t b_row, int64_t terms, Put put) {
    __m512i sum[ROWS][N];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            sum[i][j] = _mm512_setzero_si512();
        }
    }
    for (int64_t p = 0; p < terms; ++p) {
        __m512i row[N];
        for (int j = 0; j < N; ++j) {
            row[j] = _mm512_loadu_si512((const void *) (b + p*b_row + j*LANES));
        }
        for (int i = 0; i < ROWS; ++i) {
            const __m512i x = _mm512_set1_epi32(a[i*a_row + p*a_term]);
            for (int j = 0; j < N; ++j) {
                sum[i][j] = _mm512_dpwssd_epi32(sum[i][j], row[j], x);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            put(i, j*LANES, _mm512_cvtepi32_ps(sum[i][j]));
        }
    }
}

// the same for multiples of 8 rows and of LANES columns; put(row, column, sums); between(): before each block
template <int N, typename Put, typename Between>
static inline void multiply(const int32_t * a, int64_t a_row, int64_t a_term, const int32_t * b, int64_t b_row, int64_t terms, int64_t rows,
        int64_t columns, int64_t first, Put put, Between between) {
    static constexpr int ROWS = 8;
    int64_t j = first;
    for (; j + N*LANES <= columns; j += N*LANES) {
        for (int64_t i = 0; i < rows; i += ROWS) {
            between();
            multiply_block<ROWS, N>(a + i*a_row, a_row, a_term, b + j, b_row, terms, [&](int row, int column, __m512 x) { put(i + row, j + column, x); });
        }
    }
    if constexpr (N > 1) {
        if (j < columns) {
            multiply<1>(a, a_row, a_term, b, b_row, terms, rows, columns, j, put, between);
        }
    }
}

} // namespace clex_pairs

#endif
