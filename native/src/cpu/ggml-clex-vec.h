#pragma once

// A vector of VEC floats for AVX-512, AVX2, NEON and whatever else GCC and Clang know, and the types of a KV cache as such vectors.

#include "ggml-impl.h"
#include "quants.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

#include <immintrin.h>

typedef __m512 vec;
static constexpr int VEC           = 16;
static constexpr int VEC_REGISTERS = 32;

static inline vec  vec_set  (float x)                { return _mm512_set1_ps(x); }
static inline vec  vec_load (const float * p)        { return _mm512_loadu_ps(p); }
static inline void vec_store(float * p, vec a)       { _mm512_storeu_ps(p, a); }
static inline vec  vec_add  (vec a, vec b)           { return _mm512_add_ps(a, b); }
static inline vec  vec_sub  (vec a, vec b)           { return _mm512_sub_ps(a, b); }
static inline vec  vec_mul  (vec a, vec b)           { return _mm512_mul_ps(a, b); }
static inline vec  vec_fma  (vec a, vec b, vec c)    { return _mm512_fmadd_ps(a, b, c); } // a*b + c
static inline vec  vec_max  (vec a, vec b)           { return _mm512_max_ps(a, b); }
static inline vec  vec_exp  (vec a)                  { return ggml_v_expf(a); }

static inline vec vec_set_f16  (const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_set1_epi16((short) *p)); }
static inline vec vec_from_f16 (const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
static inline vec vec_from_bf16(const ggml_bf16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p)), 16));
}
// 16 numbers
static inline void vec_from_i8(const int8_t * p, vec * x) {
    x[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}
// the low and the high nibbles of 16 bytes, times d, plus m
static inline void vec_from_nibbles(const uint8_t * p, vec d, vec m, vec * low, vec * high) {
    const __m512i x     = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p));
    const __m512  table = _mm512_fmadd_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), d, m);
    low [0] = _mm512_permutexvar_ps(x, table); // looks at four bits only
    high[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), table);
}
// 16 where the bit is set, else 0, for the VEC lowest bits
static inline vec vec_from_bits(uint32_t bits) { return _mm512_maskz_mov_ps((__mmask16) bits, _mm512_set1_ps(16.0f)); }

static inline float vec_hmax(vec a) { return _mm512_reduce_max_ps(a); }
// the sums of four vectors
static inline void vec_sum4(const vec a[4], float * s) {
    const __m512  ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512  cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512  x  = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256  y  = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

typedef __m256 vec;
static constexpr int VEC           = 8;
static constexpr int VEC_REGISTERS = 16;

static inline vec  vec_set  (float x)                { return _mm256_set1_ps(x); }
static inline vec  vec_load (const float * p)        { return _mm256_loadu_ps(p); }
static inline void vec_store(float * p, vec a)       { _mm256_storeu_ps(p, a); }
static inline vec  vec_add  (vec a, vec b)           { return _mm256_add_ps(a, b); }
static inline vec  vec_sub  (vec a, vec b)           { return _mm256_sub_ps(a, b); }
static inline vec  vec_mul  (vec a, vec b)           { return _mm256_mul_ps(a, b); }
static inline vec  vec_fma  (vec a, vec b, vec c)    { return _mm256_fmadd_ps(a, b, c); } // a*b + c
static inline vec  vec_max  (vec a, vec b)           { return _mm256_max_ps(a, b); }
static inline vec  vec_exp  (vec a)                  { return ggml_v_expf(a); }

static inline vec vec_set_f16  (const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_set1_epi16((short) *p)); }
static inline vec vec_from_f16 (const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
static inline vec vec_from_bf16(const ggml_bf16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), 16));
}
// 16 numbers
static inline void vec_from_i8(const int8_t * p, vec * x) {
    for (int i = 0; i < 2; ++i) {
        x[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (p + 8*i))));
    }
}
// the low and the high nibbles of 16 bytes, times d, plus m
static inline void vec_from_nibbles(const uint8_t * p, vec d, vec m, vec * low, vec * high) {
    for (int i = 0; i < 2; ++i) {
        const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (p + 8*i)));
        low [i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15))), d, m);
        high[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4)), d, m);
    }
}
// 16 where the bit is set, else 0, for the VEC lowest bits
static inline vec vec_from_bits(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int) bits), bit), bit);
    return _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(16.0f));
}

static inline float vec_hmax(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// the sums of four vectors
static inline void vec_sum4(const vec a[4], float * s) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#include <arm_neon.h>

typedef float32x4_t vec;
static constexpr int VEC           = 4;
static constexpr int VEC_REGISTERS = 32;

static inline vec  vec_set  (float x)                { return vdupq_n_f32(x); }
static inline vec  vec_load (const float * p)        { return vld1q_f32(p); }
static inline void vec_store(float * p, vec a)       { vst1q_f32(p, a); }
static inline vec  vec_add  (vec a, vec b)           { return vaddq_f32(a, b); }
static inline vec  vec_sub  (vec a, vec b)           { return vsubq_f32(a, b); }
static inline vec  vec_mul  (vec a, vec b)           { return vmulq_f32(a, b); }
static inline vec  vec_fma  (vec a, vec b, vec c)    { return vfmaq_f32(c, a, b); } // a*b + c
static inline vec  vec_max  (vec a, vec b)           { return vmaxq_f32(a, b); }
#if defined(__ARM_FEATURE_SVE)
static inline vec  vec_exp  (vec a)                  { return vec { expf(a[0]), expf(a[1]), expf(a[2]), expf(a[3]) }; }
#else
static inline vec  vec_exp  (vec a)                  { return ggml_v_expf(a); }
#endif

static inline vec vec_set_f16  (const ggml_fp16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(p))); }
static inline vec vec_from_f16 (const ggml_fp16_t * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vec vec_from_bf16(const ggml_bf16_t * p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *) p), 16));
}
// 16 numbers
static inline void vec_widen(int8x16_t b, vec * x) {
    const int16x8_t h[2] = { vmovl_s8(vget_low_s8(b)), vmovl_s8(vget_high_s8(b)) };
    for (int i = 0; i < 2; ++i) {
        x[2*i]     = vcvtq_f32_s32(vmovl_s16(vget_low_s16 (h[i])));
        x[2*i + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(h[i])));
    }
}
static inline void vec_from_i8(const int8_t * p, vec * x) { vec_widen(vld1q_s8(p), x); }
// the low and the high nibbles of 16 bytes, times d, plus m
static inline void vec_from_nibbles(const uint8_t * p, vec d, vec m, vec * low, vec * high) {
    const uint8x16_t b = vld1q_u8(p);
    vec_widen(vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(15))), low);
    vec_widen(vreinterpretq_s8_u8(vshrq_n_u8(b, 4)), high);
    for (int i = 0; i < 4; ++i) {
        low [i] = vfmaq_f32(m, low [i], d);
        high[i] = vfmaq_f32(m, high[i], d);
    }
}
// 16 where the bit is set, else 0, for the VEC lowest bits
static inline vec vec_from_bits(uint32_t bits) {
    const uint32_t   powers[4] = { 1, 2, 4, 8 };
    const uint32x4_t set       = vtstq_u32(vdupq_n_u32(bits), vld1q_u32(powers));
    return vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(vdupq_n_f32(16.0f))));
}

static inline float vec_hmax(vec a) { return vmaxvq_f32(a); }
// the sums of four vectors
static inline void vec_sum4(const vec a[4], float * s) {
    vst1q_f32(s, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}

#elif defined(__GNUC__)

typedef float    vec     __attribute__((vector_size(16)));
typedef int32_t  vec_i32 __attribute__((vector_size(16)));
typedef uint32_t vec_u32 __attribute__((vector_size(16)));
typedef uint16_t vec_u16 __attribute__((vector_size(8)));
static constexpr int VEC           = 4;
static constexpr int VEC_REGISTERS = 16;

template <typename V> static inline V vec_read(const void * p) { V a; memcpy(&a, p, sizeof(a)); return a; }

static inline vec  vec_set  (float x)                { return vec { x, x, x, x }; }
static inline vec  vec_load (const float * p)        { return vec_read<vec>(p); }
static inline void vec_store(float * p, vec a)       { memcpy(p, &a, sizeof(a)); }
static inline vec  vec_add  (vec a, vec b)           { return a + b; }
static inline vec  vec_sub  (vec a, vec b)           { return a - b; }
static inline vec  vec_mul  (vec a, vec b)           { return a*b; }
static inline vec  vec_fma  (vec a, vec b, vec c)    { return a*b + c; }
static inline vec  vec_max  (vec a, vec b)           { return a > b ? a : b; }
static inline vec  vec_exp  (vec a)                  { return vec { expf(a[0]), expf(a[1]), expf(a[2]), expf(a[3]) }; }

static inline vec vec_set_f16  (const ggml_fp16_t * p) { return vec_set(GGML_CPU_FP16_TO_FP32(*p)); }
static inline vec vec_from_f16 (const ggml_fp16_t * p) {
    return vec { GGML_CPU_FP16_TO_FP32(p[0]), GGML_CPU_FP16_TO_FP32(p[1]), GGML_CPU_FP16_TO_FP32(p[2]), GGML_CPU_FP16_TO_FP32(p[3]) };
}
static inline vec vec_from_bf16(const ggml_bf16_t * p) {
    return (vec) (__builtin_convertvector(vec_read<vec_u16>(p), vec_u32) << 16);
}
// four bytes, in the highest bits; compilers have no good code for vectors of so few
static inline vec_u32 vec_bytes(const void * p) {
    const uint32_t x = vec_read<uint32_t>(p);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return vec_u32 { x, x, x, x } * vec_u32 { 1, 1 << 8, 1 << 16, 1 << 24 };
#else
    return vec_u32 { x, x, x, x } * vec_u32 { 1 << 24, 1 << 16, 1 << 8, 1 };
#endif
}
// 16 numbers
static inline void vec_from_i8(const int8_t * p, vec * x) {
    for (int i = 0; i < 4; ++i) {
        x[i] = __builtin_convertvector((vec_i32) vec_bytes(p + 4*i) >> 24, vec);
    }
}
// the low and the high nibbles of 16 bytes, times d, plus m
static inline void vec_from_nibbles(const uint8_t * p, vec d, vec m, vec * low, vec * high) {
    for (int i = 0; i < 4; ++i) {
        const vec_u32 x = vec_bytes(p + 4*i);
        low [i] = __builtin_convertvector((vec_i32) (x >> 24 & 15), vec)*d + m;
        high[i] = __builtin_convertvector((vec_i32) (x >> 28),      vec)*d + m;
    }
}
// 16 where the bit is set, else 0, for the VEC lowest bits
static inline vec vec_from_bits(uint32_t bits) {
    const int32_t b = (int32_t) bits;
    return __builtin_convertvector(vec_i32 { b, b, b, b } & vec_i32 { 1, 2, 4, 8 }, vec) * vec { 16, 8, 4, 2 };
}

static inline float vec_hmax(vec a) { return fmaxf(fmaxf(a[0], a[1]), fmaxf(a[2], a[3])); }
// the sums of four vectors
static inline void vec_sum4(const vec a[4], float * s) {
    for (int i = 0; i < 4; ++i) {
        s[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
    }
}

#else

#define GGML_CLEX_NO_VEC

#endif

#ifndef GGML_CLEX_NO_VEC

//
// types of a cache: load(row, i, x) makes the i-th N vectors of a row
//
// A row of a quantized type is one block after another, each of 32 numbers:
//
//   q8_0   | d | qs: 32 bytes |                                x = qs*d
//   q4_0   | d | qs: 16 bytes |                                x = (qs - 8)*d
//   q4_1   | d | m | qs: 16 bytes |                            x = qs*d + m
//   q5_0   | d | qh: 32 bits | qs: 16 bytes |                  x = (qs + 16*qh - 16)*d
//   q5_1   | d | m | qh: 32 bits | qs: 16 bytes |              x = (qs + 16*qh)*d + m
//
//   qs of four bits: byte i has number i in its low nibble and number i + 16 in its high one; bit i of qh belongs to number i
//

struct type_f32 {
    static constexpr int N = 1;
    static void load(const char * row, int i, vec * x) { x[0] = vec_load((const float *) row + i*VEC); }
};

struct type_f16 {
    static constexpr int N = 1;
    static void load(const char * row, int i, vec * x) { x[0] = vec_from_f16((const ggml_fp16_t *) row + i*VEC); }
};

struct type_bf16 {
    static constexpr int N = 1;
    static void load(const char * row, int i, vec * x) { x[0] = vec_from_bf16((const ggml_bf16_t *) row + i*VEC); }
};

struct type_q8_0 {
    static constexpr int N = QK8_0/VEC;
    static void load(const char * row, int i, vec * x) {
        const block_q8_0 * b = (const block_q8_0 *) row + i;
        const vec d = vec_set_f16(&b->d);
        vec_from_i8(b->qs,      x);
        vec_from_i8(b->qs + 16, x + N/2);
        for (int j = 0; j < N; ++j) {
            x[j] = vec_mul(x[j], d);
        }
    }
};

// x*d + m, where x has four bits, or five where the block has qh
template <typename B, bool HAS_MIN, bool HAS_QH>
struct type_q {
    static constexpr int N = 32/VEC;
    static void load(const char * row, int i, vec * x) {
        const B * b = (const B *) row + i;
        const vec d = vec_set_f16(&b->d);
        vec m;
        if constexpr (HAS_MIN) {
            m = vec_set_f16(&b->m);
        } else {
            m = vec_mul(d, vec_set(HAS_QH ? -16.0f : -8.0f));
        }
        uint32_t high_bits = 0;
        if constexpr (HAS_QH) {
            memcpy(&high_bits, b->qh, sizeof(high_bits));
        }
        vec_from_nibbles(b->qs, d, m, x, x + N/2);
        if constexpr (HAS_QH) {
            for (int j = 0; j < N; ++j) {
                x[j] = vec_fma(vec_from_bits(high_bits >> j*VEC), d, x[j]);
            }
        }
    }
};

using type_q4_0 = type_q<block_q4_0, false, false>;
using type_q4_1 = type_q<block_q4_1, true,  false>;
using type_q5_0 = type_q<block_q5_0, false, true>;
using type_q5_1 = type_q<block_q5_1, true,  true>;

// One row of n numbers as F32.
template <typename T>
static void convert(const char * src, float * dst, int n) {
    for (int i = 0; i < n; i += T::N*VEC) {
        vec x[T::N];
        T::load(src, i/(T::N*VEC), x);
        for (int e = 0; e < T::N; ++e) {
            vec_store(dst + i + e*VEC, x[e]);
        }
    }
}

#endif
