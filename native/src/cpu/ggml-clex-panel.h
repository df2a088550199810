#pragma once

// Products of a panel of weights with the activations of some tokens: int8 with scales of blocks, in registers.
//
// Weights of any quantized type become numbers of 8 bits, a scale for each block of 32 or 16 of a row, and with some types a
// minimum that is subtracted; activations become numbers of 8 bits and a scale for each block of 32, or of 256 where the weights have
// blocks of 256. The sums over a block are exact integers, all else is F32. Each number of the result is summed in the same
// order, whatever the other tokens and rows are.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)

#include <emmintrin.h>

namespace clex_panel {

// the sum of 16 numbers
static inline int32_t sum_16(__m128i x) {
    const __m128i s = _mm_sad_epu8(_mm_xor_si128(x, _mm_set1_epi8((char) 0x80)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_cvtsi128_si32(_mm_srli_si128(s, 8)) - 128*16;
}

} // namespace clex_panel

#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#define GGML_CLEX_PANEL
#define GGML_CLEX_PANEL_512   // vectors of 512 bits, which AVX-512 without VNNI is not enough for
#define GGML_CLEX_PANEL_UNITS // for products of 8-bit numbers

namespace clex_panel {

typedef __m512  fvec;
typedef __m512i ivec;

constexpr int LANES   = 16; // rows in a vector
constexpr int VECTORS = 2;  // vectors of rows that are multiplied at once
constexpr int TOKENS  = 6;  // tokens that are multiplied at once

// The units multiply unsigned by signed numbers: weights have 128 added, which the sums of the activations take off again.
constexpr bool UNSIGNED = true;

static inline fvec f_zero() { return _mm512_setzero_ps(); }
static inline fvec f_load(const float * p) { return _mm512_loadu_ps(p); }
static inline void f_store(float * p, fvec a) { _mm512_storeu_ps(p, a); }
static inline fvec f_set(const float * p) { return _mm512_set1_ps(*p); }
static inline fvec f_mul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
static inline fvec f_fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); } // a*b + c
static inline fvec f_from(ivec a) { return _mm512_cvtepi32_ps(a); }
static inline ivec i_zero() { return _mm512_setzero_si512(); }
static inline ivec i_set(const int32_t * p) { return _mm512_set1_epi32(*p); }
static inline ivec w_load(const int8_t * p) { return _mm512_loadu_si512((const void *) p); }
static inline ivec a_load(const int8_t * p) { int32_t x; memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
static inline ivec dot(ivec sum, ivec w, ivec a) { return _mm512_dpbusd_epi32(sum, w, a); }

#define GGML_CLEX_PANEL_FOLDED
static inline ivec dot_pairs(ivec sum, ivec w, ivec a) { return _mm512_dpwssd_epi32(sum, w, a); } // of 16-bit numbers
#define GGML_CLEX_PANEL_PAIRS // for F16, twice as fast as F32

#if defined(__AVX512BF16__)
#define GGML_CLEX_PANEL_BF16
// pairs of bf16
static inline fvec dot_bf16(fvec sum, const int8_t * w, const char * a) {
    return _mm512_dpbf16_ps(sum, (__m512bh) w_load(w), (__m512bh) a_load((const int8_t *) a));
}
static inline void round_bf16(const float * x, char * y) { // LANES numbers
    _mm256_storeu_si256((__m256i *) y, (__m256i) _mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
}
#endif

// 4*LANES bytes of each of LANES rows become LANES times 4 bytes of each row; `flip` changes bits of each byte
static inline void transpose_square(const int8_t * rows, int64_t stride, int8_t * to, int64_t to_stride, uint8_t flip) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_xor_si512(_mm512_loadu_si512((const void *) (rows + i*stride)), _mm512_set1_epi8((char) flip));
    }
    for (int i = 0; i < 8; ++i) {
        b[2*i]     = _mm512_unpacklo_epi32(a[2*i], a[2*i + 1]);
        b[2*i + 1] = _mm512_unpackhi_epi32(a[2*i], a[2*i + 1]);
    }
    // a[4*i + j]: numbers j, j + 4, j + 8 and j + 12 of rows 4*i to 4*i + 3
    for (int i = 0; i < 4; ++i) {
        a[4*i]     = _mm512_unpacklo_epi64(b[4*i],     b[4*i + 2]);
        a[4*i + 1] = _mm512_unpackhi_epi64(b[4*i],     b[4*i + 2]);
        a[4*i + 2] = _mm512_unpacklo_epi64(b[4*i + 1], b[4*i + 3]);
        a[4*i + 3] = _mm512_unpackhi_epi64(b[4*i + 1], b[4*i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i x = _mm512_shuffle_i32x4(a[j],     a[4 + j],  0x88); // j and j + 8 of rows 0 to 7
        const __m512i y = _mm512_shuffle_i32x4(a[j],     a[4 + j],  0xdd); // j + 4 and j + 12
        const __m512i z = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i u = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_store_si512((void *) (to + (j)     *to_stride), _mm512_shuffle_i32x4(x, z, 0x88));
        _mm512_store_si512((void *) (to + (j + 4) *to_stride), _mm512_shuffle_i32x4(y, u, 0x88));
        _mm512_store_si512((void *) (to + (j + 8) *to_stride), _mm512_shuffle_i32x4(x, z, 0xdd));
        _mm512_store_si512((void *) (to + (j + 12)*to_stride), _mm512_shuffle_i32x4(y, u, 0xdd));
    }
}

// the largest magnitude of n numbers, a multiple of 32; not a number where one of them is not
static inline float largest(const float * x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i max[2] = { _mm512_setzero_si512(), _mm512_setzero_si512() };
    for (int64_t i = 0; i < n; i += 32) {
        for (int j = 0; j < 2; ++j) {
            max[j] = _mm512_max_epi32(max[j], _mm512_and_si512(_mm512_loadu_si512((const void *) (x + i + 16*j)), magnitude));
        }
    }
    const int32_t y = _mm512_reduce_max_epi32(_mm512_max_epi32(max[0], max[1]));
    float f;
    memcpy(&f, &y, 4);
    return f;
}

// n numbers, 32 at most, to 32 numbers of 16 bits, and what these are multiplied by. Their length as a vector is at most the root of 2^31, so that
// no sum of products of two such blocks is more than 32 bits have: that leaves more bits to each than its worst case would.
static inline float round_pairs(const float * x, int64_t n, int16_t * q) {
    const uint32_t present = (uint32_t) ((1ull << n) - 1);
    __m512 a[2];
    for (int i = 0; i < 2; ++i) {
        a[i] = _mm512_maskz_loadu_ps((__mmask16) (present >> 16*i), x + 16*i);
    }
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a[0]), magnitude),
        _mm512_and_si512(_mm512_castps_si512(a[1]), magnitude)));
    float max;
    memcpy(&max, &bits, 4);
    const bool is_zero = max < 1e-35f;
    const float by = is_zero ? 0.0f : 1.0f/max;
    for (int i = 0; i < 2; ++i) {
        a[i] = _mm512_mul_ps(a[i], _mm512_set1_ps(by));
    }
    const float square = _mm512_reduce_add_ps(_mm512_fmadd_ps(a[0], a[0], _mm512_mul_ps(a[1], a[1])));
    const float room   = 46330.0f/sqrtf(square); // rounding makes the vector longer by 3 at most
    const float most   = room < 32767.0f ? room : 32767.0f;
    for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256((__m256i *) (q + 16*i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(a[i], _mm512_set1_ps(most)))));
    }
    return is_zero ? 0.0f : max/most;
}

// 16 numbers times a factor, rounded, and their sum
static inline int32_t round_16(const float * x, float factor, int8_t * q) {
    const __m128i y = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(factor))));
    _mm_storeu_si128((__m128i *) q, y);
    return sum_16(y);
}

} // namespace clex_panel

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace clex_panel {

typedef __m256  fvec;
typedef __m256i ivec;

constexpr int LANES   = 8;
constexpr int VECTORS = 2;

static inline fvec f_zero() { return _mm256_setzero_ps(); }
static inline fvec f_load(const float * p) { return _mm256_loadu_ps(p); }
static inline void f_store(float * p, fvec a) { _mm256_storeu_ps(p, a); }
static inline fvec f_set(const float * p) { return _mm256_set1_ps(*p); }
static inline fvec f_mul(fvec a, fvec b) { return _mm256_mul_ps(a, b); }
static inline fvec f_fma(fvec a, fvec b, fvec c) { return _mm256_fmadd_ps(a, b, c); }
static inline fvec f_from(ivec a) { return _mm256_cvtepi32_ps(a); }
static inline ivec i_zero() { return _mm256_setzero_si256(); }
static inline ivec i_set(const int32_t * p) { return _mm256_set1_epi32(*p); }
static inline ivec w_load(const int8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }
static inline ivec a_load(const int8_t * p) { int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }

#if defined(__AVXVNNI__)

#define GGML_CLEX_PANEL
#define GGML_CLEX_PANEL_UNITS // for products of 8-bit numbers

constexpr int  TOKENS   = 3;
constexpr bool UNSIGNED = true;

static inline ivec dot(ivec sum, ivec w, ivec a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }

#define GGML_CLEX_PANEL_FOLDED
static inline ivec dot_pairs(ivec sum, ivec w, ivec a) { return _mm256_dpwssd_avx_epi32(sum, w, a); }

#else

#define GGML_CLEX_PANEL

constexpr int  TOKENS   = 2;
constexpr bool UNSIGNED = false;

// Pairs fit into 16 bits: activations are at most 127. The compiler takes the magnitude of a weight once for all tokens.
static inline ivec dot(ivec sum, ivec w, ivec a) {
    const ivec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline ivec dot_pairs(ivec sum, ivec w, ivec a) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, a)); }

#endif

static inline void transpose_square(const int8_t * rows, int64_t stride, int8_t * to, int64_t to_stride, uint8_t flip) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) (rows + i*stride)), _mm256_set1_epi8((char) flip));
    }
    for (int i = 0; i < 4; ++i) {
        b[2*i]     = _mm256_unpacklo_epi32(a[2*i], a[2*i + 1]);
        b[2*i + 1] = _mm256_unpackhi_epi32(a[2*i], a[2*i + 1]);
    }
    // a[4*i + j]: numbers j and j + 4 of rows 4*i to 4*i + 3
    for (int i = 0; i < 2; ++i) {
        a[4*i]     = _mm256_unpacklo_epi64(b[4*i],     b[4*i + 2]);
        a[4*i + 1] = _mm256_unpackhi_epi64(b[4*i],     b[4*i + 2]);
        a[4*i + 2] = _mm256_unpacklo_epi64(b[4*i + 1], b[4*i + 3]);
        a[4*i + 3] = _mm256_unpackhi_epi64(b[4*i + 1], b[4*i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_si256((__m256i *) (to + j*to_stride),       _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
        _mm256_storeu_si256((__m256i *) (to + (j + 4)*to_stride), _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
    }
}

static inline float largest(const float * x, int64_t n) {
    __m256i max = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        const __m256i y = _mm256_loadu_si256((const __m256i *) (x + i));
        max = _mm256_max_epi32(max, _mm256_and_si256(y, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

static inline int32_t round_16(const float * x, float factor, int8_t * q) {
    const __m256  f = _mm256_set1_ps(factor);
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), f));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), f));
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    const __m128i y = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storeu_si128((__m128i *) q, y);
    return sum_16(y);
}

} // namespace clex_panel

#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

#define GGML_CLEX_PANEL
#define GGML_CLEX_PANEL_UNITS // for products of 8-bit numbers

namespace clex_panel {

typedef float32x4_t fvec;
typedef int32x4_t   ivec;

constexpr int  LANES    = 4;
constexpr int  VECTORS  = 2;
constexpr int  TOKENS   = 6;
constexpr bool UNSIGNED = false;

static inline fvec f_zero() { return vdupq_n_f32(0.0f); }
static inline fvec f_load(const float * p) { return vld1q_f32(p); }
static inline void f_store(float * p, fvec a) { vst1q_f32(p, a); }
static inline fvec f_set(const float * p) { return vld1q_dup_f32(p); }
static inline fvec f_mul(fvec a, fvec b) { return vmulq_f32(a, b); }
static inline fvec f_fma(fvec a, fvec b, fvec c) { return vfmaq_f32(c, a, b); }
static inline fvec f_from(ivec a) { return vcvtq_f32_s32(a); }
static inline ivec i_zero() { return vdupq_n_s32(0); }
static inline ivec i_set(const int32_t * p) { return vld1q_dup_s32(p); }
static inline ivec w_load(const int8_t * p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
static inline ivec a_load(const int8_t * p) { return vld1q_dup_s32((const int32_t *) p); }
static inline ivec dot(ivec sum, ivec w, ivec a) { return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a)); }

static inline void transpose_square(const int8_t * rows, int64_t stride, int8_t * to, int64_t to_stride, uint8_t flip) {
    int32x4_t a[4];
    for (int i = 0; i < 4; ++i) {
        a[i] = vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s8(vld1q_s8(rows + i*stride)), vdupq_n_u8(flip)));
    }
    const int64x2_t b[4] = {
        vreinterpretq_s64_s32(vtrn1q_s32(a[0], a[1])), vreinterpretq_s64_s32(vtrn2q_s32(a[0], a[1])),
        vreinterpretq_s64_s32(vtrn1q_s32(a[2], a[3])), vreinterpretq_s64_s32(vtrn2q_s32(a[2], a[3])),
    };
    for (int j = 0; j < 2; ++j) {
        vst1q_s8(to + j*to_stride,       vreinterpretq_s8_s64(vtrn1q_s64(b[j], b[2 + j])));
        vst1q_s8(to + (j + 2)*to_stride, vreinterpretq_s8_s64(vtrn2q_s64(b[j], b[2 + j])));
    }
}

static inline float largest(const float * x, int64_t n) {
    uint32x4_t max = vdupq_n_u32(0);
    for (int64_t i = 0; i < n; i += 4) {
        max = vmaxq_u32(max, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
    }
    const uint32_t y = vmaxvq_u32(max);
    float f;
    memcpy(&f, &y, 4);
    return f;
}

static inline int32_t round_16(const float * x, float factor, int8_t * q) {
    int16x4_t h[4];
    for (int i = 0; i < 4; ++i) {
        h[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4*i), factor)));
    }
    const int8x16_t y = vcombine_s8(vqmovn_s16(vcombine_s16(h[0], h[1])), vqmovn_s16(vcombine_s16(h[2], h[3])));
    vst1q_s8(q, y);
    return vaddlvq_s8(y);
}

} // namespace clex_panel

#endif

#if defined(GGML_CLEX_PANEL)

namespace clex_panel {

constexpr int ROWS  = LANES*VECTORS; // of a panel
constexpr int CHUNK = 256;           // bytes of a row that a panel has at most: as many terms of a sum, or fewer of more bytes each

// Some terms of the sums of ROWS rows.
struct panel {
    alignas(64) int8_t w[CHUNK/4][ROWS][4]; // or a float, or two bf16
    alignas(64) float  d[CHUNK/16][ROWS];
    alignas(64) float  m[CHUNK/16][ROWS];
};

// Block of 32 activations of TOKENS tokens, bytes from its start: numbers, scales, what the sums of each part of a block of weights
// start from, and sums of the numbers of each part for the minimum.
template <int PARTS, bool MIN>
struct layout {
    static constexpr int D    = 32*TOKENS;
    static constexpr int BIAS = D    + 4*TOKENS;
    static constexpr int SUM  = BIAS + (UNSIGNED ? 4*TOKENS*PARTS : 0);
    static constexpr int SIZE = SUM  + (MIN ? 4*TOKENS*PARTS : 0);
};

// fill vector v of a panel from n bytes of each of its rows
static inline void transpose(const int8_t (*rows)[CHUNK], panel & p, int64_t v, int64_t n, uint8_t flip) {
    for (int64_t k = 0; k < n; k += 4*LANES) {
        transpose_square(rows[0] + k, CHUNK, p.w[k/4][v*LANES], 4*ROWS, flip);
    }
}

// what n numbers, a multiple of 32, are divided by to become numbers of 8 bits
struct step {
    bool  is_zero;
    float size, factor;

    step(const float * x, int64_t n) {
        const float max = x ? largest(x, n) : 0.0f;
        is_zero = max < 1e-35f;
        size    = is_zero ? 0.0f : max/127.0f;
        factor  = is_zero ? 0.0f : 127.0f/max;
    }

    // 32 of them, and the sums of both halves
    void round(const float * x, int8_t * q, int32_t * sums) const {
        sums[0] = sums[1] = 0;
        if (is_zero) {
            memset(q, 0, 32);
        } else {
            sums[0] = round_16(x, factor, q);
            sums[1] = round_16(x + 16, factor, q + 16);
        }
    }
};

// n activations from k on of TOKENS tokens; those of a token that is null are 0
template <int PARTS, bool MIN, bool WIDE>
static inline void pack_activations(const float * const * x, int64_t k, int64_t n, char * y) {
    using L = layout<PARTS, MIN>;
    static constexpr int64_t SCALED = WIDE ? 256 : 32; // numbers with the same scale
    for (int t = 0; t < TOKENS; ++t) {
        char * block = y;
        for (int64_t i = k; i < k + n; i += SCALED) {
            const step by(x[t] ? x[t] + i : nullptr, SCALED);
            for (int64_t j = i; j < i + SCALED; j += 32, block += L::SIZE) {
                int32_t sum[2];
                by.round(x[t] ? x[t] + j : nullptr, (int8_t *) block + 32*t, sum);
                if (PARTS == 1) {
                    sum[0] += sum[1];
                }
                ((float *) (block + L::D))[t] = by.size;
                for (int part = 0; part < PARTS; ++part) {
                    if (UNSIGNED) {
                        ((int32_t *) (block + L::BIAS))[part*TOKENS + t] = -128*sum[part];
                    }
                    if (MIN) {
                        ((float *) (block + L::SUM))[part*TOKENS + t] = WIDE ? (float) sum[part] : by.size*(float) sum[part];
                    }
                }
            }
        }
    }
}

// c[T][c_row], or nothing yet
template <int T>
static inline void load_sums(fvec (&sum)[T][VECTORS], const float * c, int64_t c_row, bool first) {
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[t][v] = first ? f_zero() : f_load(c + t*c_row + v*LANES);
        }
    }
}

template <int T>
static inline void store_sums(const fvec (&sum)[T][VECTORS], float * c, int64_t c_row) {
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            f_store(c + t*c_row + v*LANES, sum[t][v]);
        }
    }
}

// c[tokens][c_row] += panel*activations for T of the tokens and n blocks of 32. PARTS blocks of weights in 32. WIDE: activations have one scale
// for all n blocks. In one function, long as it is: sums and products stay in registers only where the compiler sees all their uses.
template <int T, int PARTS, bool MIN, bool WIDE>
static inline void product(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
    using L = layout<PARTS, MIN>;
    fvec sum[T][VECTORS];
    load_sums(sum, c, c_row, first || WIDE);
    const int8_t * w = p.w[0][0];
    const float  * d = p.d[0];
    const float  * m = p.m[0];
    for (int b = 0; b < n; ++b) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; ++part) {
            ivec x[T][VECTORS];
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    x[t][v] = UNSIGNED ? i_set((const int32_t *) (a + L::BIAS) + part*TOKENS + t) : i_zero();
                }
            }
#pragma GCC unroll 8
            for (int q = 0; q < 8/PARTS; ++q) {
                ivec y[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    y[v] = w_load(w + v*4*LANES);
                }
                w += 4*ROWS;
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                    const ivec z = a_load((const int8_t *) a + 32*t + 32/PARTS*part + 4*q);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) {
                        x[t][v] = dot(x[t][v], y[v], z);
                    }
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const fvec scale = f_load(d + v*LANES);
                const fvec min   = MIN ? f_load(m + v*LANES) : f_zero();
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                    const fvec s = WIDE ? scale : f_mul(scale, f_set((const float *) (a + L::D) + t));
                    sum[t][v] = f_fma(f_from(x[t][v]), s, sum[t][v]);
                    if (MIN) {
                        sum[t][v] = f_fma(min, f_set((const float *) (a + L::SUM) + part*TOKENS + t), sum[t][v]);
                    }
                }
            }
            d += ROWS;
            m += ROWS;
        }
        a += L::SIZE;
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            float * y = c + t*c_row + v*LANES;
            if (WIDE) {
                const fvec s = f_set((const float *) (a - L::SIZE + L::D) + t);
                sum[t][v] = first ? f_mul(sum[t][v], s) : f_fma(sum[t][v], s, f_load(y));
            }
            f_store(y, sum[t][v]);
        }
    }
}

#if defined(GGML_CLEX_PANEL_FOLDED)

// Weights in blocks of 256 whose scales of 32 or 16 are whole numbers times one of the block, and so are minima, which cost half as much as pairs of 16
// bits. A panel has one block: d has the whole scales of the parts, m pairs of minima, and in its last rows the scales of the block. Scales
// that fit are multiplied into the weights: these are folded, have no scales of parts, and one exact sum.

constexpr int SCALE = CHUNK/16 - 2; // the row of m with the scale of the block
constexpr int SCALE_OF_MINIMA = CHUNK/16 - 1;

// A block of 32 activations: numbers, scale, and what is for minima or for weights that had 128 added. The former: sums of two parts of the weights
// as a pair of 16-bit numbers, those of this block, or where the parts are as long as it, those of this and the next, in every other
// block. The latter: in the first block, what the sum over all of them starts from.
struct whole_layout {
    static constexpr int D    = 32*TOKENS;
    static constexpr int SUM  = D   + 4*TOKENS;
    static constexpr int SIZE = SUM + 4*TOKENS;
};

// n is 256
template <int PARTS, bool MIN>
static inline void pack_whole(const float * const * x, int64_t k, int64_t n, char * y) {
    using L = whole_layout;
    for (int t = 0; t < TOKENS; ++t) {
        const step by(x[t] ? x[t] + k : nullptr, n);
        int32_t total = 0;
        int16_t pair[2] = {};
        char * block = y;
        for (int64_t i = 0; i < n; i += 32, block += L::SIZE) {
            int32_t sum[2];
            by.round(x[t] ? x[t] + k + i : nullptr, (int8_t *) block + 32*t, sum);
            ((float *) (block + L::D))[t] = by.size;
            total += sum[0] + sum[1];
            if (MIN && PARTS == 2) {
                pair[0] = (int16_t) sum[0];
                pair[1] = (int16_t) sum[1];
                memcpy(block + L::SUM + 4*t, pair, 4);
            } else if (MIN) {
                pair[i/32%2] = (int16_t) (sum[0] + sum[1]);
                memcpy(block - i/32%2*L::SIZE + L::SUM + 4*t, pair, 4);
            }
        }
        if (!MIN) {
            ((int32_t *) (y + L::SUM))[t] = -128*total;
        }
    }
}

// adds the minima to sums without them: pairs of minima times pairs of sums
template <int T, int PARTS>
static inline void add_minima(const panel & p, const char * a, fvec (&sum)[T][VECTORS]) {
    ivec x[T][VECTORS];
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            x[t][v] = i_zero();
        }
    }
    for (int i = 0; i < 4*PARTS; ++i) {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const ivec pair = a_load((const int8_t *) a + i*2/PARTS*whole_layout::SIZE + whole_layout::SUM + 4*t);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                x[t][v] = dot_pairs(x[t][v], w_load((const int8_t *) (p.m[i] + v*LANES)), pair);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[t][v] = f_fma(f_from(x[t][v]), f_load(p.m[SCALE_OF_MINIMA] + v*LANES), sum[t][v]);
        }
    }
}

// N times four bytes of a part, and of each token: numbers of 8 bits, or of 16
template <int T, int N, bool PAIRS = false>
static inline void add_products(ivec (&x)[T][VECTORS], const int8_t * w, const char * a) {
#pragma GCC unroll 16
    for (int q = 0; q < N; ++q) {
        ivec y[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            y[v] = w_load(w + (q*ROWS + v*LANES)*4);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            const ivec z = a_load((const int8_t *) a + 4*(N*t + q));
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                x[t][v] = PAIRS ? dot_pairs(x[t][v], y[v], z) : dot(x[t][v], y[v], z);
            }
        }
    }
}

// the sums of folded weights
template <int T, bool MIN>
static inline void sum_folded(const panel & p, const char * a, int n, fvec (&sum)[T][VECTORS]) {
    ivec x[T][VECTORS];
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            x[t][v] = MIN ? i_zero() : i_set((const int32_t *) (a + whole_layout::SUM) + t);
        }
    }
    for (int b = 0; b < n; ++b) {
        add_products<T, 8>(x, p.w[8*b][0], a + b*whole_layout::SIZE);
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[t][v] = f_from(x[t][v]);
        }
    }
}

// those of weights with scales of 32
template <int T>
static inline void sum_scaled(const panel & p, const char * a, int n, fvec (&sum)[T][VECTORS]) {
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[t][v] = f_zero();
        }
    }
    for (int b = 0; b < n; ++b) {
        ivec x[T][VECTORS];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                x[t][v] = i_zero();
            }
        }
        add_products<T, 8>(x, p.w[8*b][0], a + b*whole_layout::SIZE);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const fvec scale = f_load(p.d[b] + v*LANES);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                sum[t][v] = f_fma(f_from(x[t][v]), scale, sum[t][v]);
            }
        }
    }
}

// as `product`, n is 8
template <int T, int PARTS, bool MIN, bool FOLDED>
static inline void product_whole(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
    static_assert(FOLDED || (MIN && PARTS == 1), "others have fewer steps with `product`");
    fvec sum[T][VECTORS];
    if constexpr (FOLDED) {
        sum_folded<T, MIN>(p, a, n, sum);
    } else {
        sum_scaled(p, a, n, sum);
    }
    for (int t = 0; t < T; ++t) {
        for (int v = 0; v < VECTORS; ++v) {
            sum[t][v] = f_mul(sum[t][v], f_load(p.m[SCALE] + v*LANES));
        }
    }
    if (MIN) {
        add_minima<T, PARTS>(p, a, sum);
    }
    for (int t = 0; t < T; ++t) {
        const fvec s = f_set((const float *) (a + whole_layout::D) + t);
        for (int v = 0; v < VECTORS; ++v) {
            float * y = c + t*c_row + v*LANES;
            f_store(y, first ? f_mul(sum[t][v], s) : f_fma(sum[t][v], s, f_load(y)));
        }
    }
}

#endif

#if defined(GGML_CLEX_PANEL_PAIRS)

// Weights and activations as numbers of 16 bits with a scale for each block of 32, see round_pairs. What is rounded is less than where
// activations become F16.

// 32 activations: numbers of each token, then the scales
struct pair_layout {
    static constexpr int D    = 64*TOKENS;
    static constexpr int SIZE = D + 4*TOKENS;
};

// as `product`
template <int T>
static inline void product_of_pairs(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
    fvec sum[T][VECTORS];
    load_sums(sum, c, c_row, first);
    for (int b = 0; b < n; ++b, a += pair_layout::SIZE) {
        ivec x[T][VECTORS];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                x[t][v] = i_zero();
            }
        }
        add_products<T, 16, true>(x, p.w[16*b][0], a);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            const fvec scale = f_load(p.d[b] + v*LANES);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                sum[t][v] = f_fma(f_from(x[t][v]), f_mul(scale, f_set((const float *) (a + pair_layout::D) + t)), sum[t][v]);
            }
        }
    }
    store_sums(sum, c, c_row);
}

#endif

// what multiplies floats, and pairs of bf16
struct float_dot {
    static constexpr int SIZE = 4; // bytes of a number
    static fvec add(fvec sum, const int8_t * w, const char * a) { return f_fma(f_load((const float *) w), f_set((const float *) a), sum); }
};

#if defined(GGML_CLEX_PANEL_BF16)
struct bf16_dot {
    static constexpr int SIZE = 2;
    static fvec add(fvec sum, const int8_t * w, const char * a) { return dot_bf16(sum, w, a); }
};
#endif

// as above for weights and activations that are floats or bf16; those of a token lie in a row
template <int T, typename Dot>
static inline void product_of_floats(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
    fvec sum[T][VECTORS];
    load_sums(sum, c, c_row, first);
    const int64_t row = 32*Dot::SIZE*n;
    const int8_t * w = p.w[0][0];
#pragma GCC unroll 4
    for (int64_t i = 0; i < row; i += 4) {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                sum[t][v] = Dot::add(sum[t][v], w + v*4*LANES, a + t*row + i);
            }
        }
        w += 4*ROWS;
    }
    store_sums(sum, c, c_row);
}

} // namespace clex_panel

#endif
