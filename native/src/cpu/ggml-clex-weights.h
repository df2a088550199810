#pragma once

// Blocks of quantized weights as numbers of 8 bits with scales: x = d*q + m, where d and m belong to each PART numbers.

#define GGML_COMMON_IMPL_CPP
#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-impl.h"
#include "simd-mappings.h"

#include <cstdint>
#include <cstring>

namespace clex_weights {

// What all types say of themselves. Those of 256 have whole scales and minima as well: `whole` gives them and what both are multiplied
// with. Small ones are folded: `folded` gives whole numbers that are weights times their scales, minima, and what both are multiplied with.
template <typename B, int N_, int PART_, bool MIN_>
struct type {
    using block = B;
    static constexpr int  N    = N_;    // numbers of a block
    static constexpr int  PART = PART_; // numbers that share a scale, 16 or more
    static constexpr bool MIN  = MIN_;  // whether there is an m
    static constexpr bool WIDE = N_ == QK_K; // activations have one scale for so many, as in ggml's own products with these types
};

static inline float from_half(ggml_half x) {
    return GGML_CPU_FP16_TO_FP32(x);
}

//
// 16 bytes
//

#if defined(__SSSE3__)

typedef __m128i bytes;
static inline bytes b_load (const void * p)             { return _mm_loadu_si128((const __m128i *) p); }
static inline void  b_store(void * p, bytes x)          { _mm_storeu_si128((__m128i *) p, x); }
static inline bytes b_low  (bytes x)                    { return _mm_and_si128(x, _mm_set1_epi8(15)); }
static inline bytes b_high (bytes x)                    { return b_low(_mm_srli_epi16(x, 4)); }
static inline bytes b_sub  (bytes x, int8_t y)          { return _mm_sub_epi8(x, _mm_set1_epi8(y)); }
static inline bytes b_table(const int8_t * t, bytes x)  { return _mm_shuffle_epi8(b_load(t), x); }
static inline bytes b_or   (bytes x, bytes y)           { return _mm_or_si128(x, y); }
static inline bytes b_and  (bytes x, uint8_t y)         { return _mm_and_si128(x, _mm_set1_epi8((char) y)); }
static inline bytes b_shift_by(bytes x, int n)          { return _mm_srl_epi16(x, _mm_cvtsi32_si128(n)); } // as below
template <int N> static inline bytes b_shift(bytes x)   { return _mm_srli_epi16(x, N); } // high bits of a byte come from the next

#elif defined(__ARM_NEON) && defined(__aarch64__)

typedef uint8x16_t bytes;
static inline bytes b_load (const void * p)             { return vld1q_u8((const uint8_t *) p); }
static inline void  b_store(void * p, bytes x)          { vst1q_u8((uint8_t *) p, x); }
static inline bytes b_low  (bytes x)                    { return vandq_u8(x, vdupq_n_u8(15)); }
static inline bytes b_high (bytes x)                    { return vshrq_n_u8(x, 4); }
static inline bytes b_sub  (bytes x, int8_t y)          { return vsubq_u8(x, vdupq_n_u8((uint8_t) y)); }
static inline bytes b_table(const int8_t * t, bytes x)  { return vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(t)), x); }
static inline bytes b_or   (bytes x, bytes y)           { return vorrq_u8(x, y); }
static inline bytes b_and  (bytes x, uint8_t y)         { return vandq_u8(x, vdupq_n_u8(y)); }
static inline bytes b_shift_by(bytes x, int n)          { return vshlq_u8(x, vdupq_n_s8((int8_t) -n)); }
template <int N> static inline bytes b_shift(bytes x)   { return vshrq_n_u8(x, N); }

#endif

// bits N and N + 1 of each byte become bits 4 and 5
template <int N>
static inline bytes b_bits(bytes x) {
#if defined(__SSSE3__)
    return _mm_and_si128(N < 4 ? _mm_slli_epi16(x, 4 - N) : x, _mm_set1_epi8(0x30));
#else
    return vandq_u8(N < 4 ? vshlq_n_u8(x, 4 - N) : x, vdupq_n_u8(0x30));
#endif
}

// bytes below 16
static inline bytes b_times_16(bytes x) {
#if defined(__SSSE3__)
    return _mm_slli_epi16(x, 4);
#else
    return vshlq_n_u8(x, 4);
#endif
}

// the low nibbles of 16 bytes, then the high ones, of which ZERO is taken off
template <int ZERO>
static inline void nibbles(const uint8_t * x, int8_t * q) {
    const bytes b = b_load(x);
    b_store(q,      b_sub(b_low (b), ZERO));
    b_store(q + 16, b_sub(b_high(b), ZERO));
}

// what a table has for them
static inline void nibbles_of_table(const uint8_t * x, const int8_t * table, int8_t * q) {
    const bytes b = b_load(x);
    b_store(q,      b_table(table, b_low (b)));
    b_store(q + 16, b_table(table, b_high(b)));
}

// eight bytes at once
static constexpr uint64_t ONES = 0x0101010101010101ULL;
static constexpr uint64_t TOPS = 0x8080808080808080ULL;

// the bits of a byte as bytes of 0 and 1
static inline uint64_t spread(uint8_t bits) {
    const uint64_t x = bits*ONES & 0x8040201008040201ULL;
    return (x + (ONES*127)) >> 7 & ONES; // no carry: at most one bit of each is set
}

// bytes less 1; none is -128
static inline uint64_t less_one(uint64_t x) {
    return ((x | TOPS) - ONES) ^ (~x & TOPS);
}

static inline uint64_t read_8(const void * p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static inline void write_8(void * p, uint64_t x) {
    memcpy(p, &x, 8);
}

// nibbles as above with a fifth bit each, of which ZERO is taken off
template <int ZERO>
static inline void five_bits(const uint8_t * x, const uint8_t * bits, int8_t * q) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    uint32_t mask;
    memcpy(&mask, bits, 4);
    const bytes b = b_load(x);
    const __m256i y = _mm256_set_m128i(b_high(b), b_low(b));
    _mm256_storeu_si256((__m256i *) q, _mm256_mask_add_epi8(_mm256_sub_epi8(y, _mm256_set1_epi8(ZERO)), mask, y, _mm256_set1_epi8(16 - ZERO)));
#else
    uint64_t y[4];
    nibbles<0>(x, (int8_t *) y);
    for (int i = 0; i < 4; ++i) {
        y[i] |= spread(bits[i])*16;
    }
    for (int i = 0; i < 2; ++i) {
        b_store(q + 16*i, b_sub(b_load(y + 2*i), ZERO));
    }
#endif
}

// numbers whose bit is set become negative; none is 0
static inline void negate(const uint8_t * signs, int n, int8_t * q) {
#if defined(__AVX512BW__)
    for (int i = 0; i < n; i += 64) {
        const __m512i x = _mm512_loadu_si512((const void *) (q + i));
        _mm512_storeu_si512((void *) (q + i), _mm512_mask_sub_epi8(x, read_8(signs + i/8), _mm512_setzero_si512(), x));
    }
#else
    for (int i = 0; i < n/8; ++i) {
        const uint64_t s = spread(signs[i]);
        write_8(q + 8*i, (read_8(q + 8*i) ^ s*255) + s);
    }
#endif
}

struct q8_0 : type<block_q8_0, 32, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        memcpy(q, b.qs, 32);
        d[0] = from_half(b.d);
    }
};

struct q4_0 : type<block_q4_0, 32, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        nibbles<8>(b.qs, q);
        d[0] = from_half(b.d);
    }
};

struct q4_1 : type<block_q4_1, 32, 32, true> {
    static void unpack(const block & b, int8_t * q, float * d, float * m) {
        nibbles<0>(b.qs, q);
        d[0] = from_half(b.data.data.d);
        m[0] = from_half(b.data.data.m);
    }
};

struct q5_0 : type<block_q5_0, 32, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        five_bits<16>(b.qs, b.qh, q);
        d[0] = from_half(b.d);
    }
};

struct q5_1 : type<block_q5_1, 32, 32, true> {
    static void unpack(const block & b, int8_t * q, float * d, float * m) {
        five_bits<0>(b.qs, b.qh, q);
        d[0] = from_half(b.data.data.d);
        m[0] = from_half(b.data.data.m);
    }
};

struct iq4_nl : type<block_iq4_nl, 32, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        nibbles_of_table(b.qs, kvalues_iq4nl, q);
        d[0] = from_half(b.d);
    }
};

struct mxfp4 : type<block_mxfp4, 32, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        nibbles_of_table(b.qs, kvalues_mxfp4, q);
        d[0] = GGML_CPU_E8M0_TO_FP32_HALF(b.e);
    }
};

struct nvfp4 : type<block_nvfp4, 64, 16, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 4; ++i) {
            int8_t x[32]; // of two parts
            if (i % 2 == 0) {
                nibbles_of_table(b.qs + 8*i, kvalues_mxfp4, x);
                for (int j = 0; j < 4; ++j) {
                    write_8(q + 16*i + 8*j, read_8(x + (j % 2)*16 + j/2*8));
                }
            }
            d[i] = GGML_CPU_UE4M3_TO_FP32(b.d[i]);
        }
    }
};

struct q1_0 : type<block_q1_0, 128, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 16; ++i) {
            write_8(q + 8*i, less_one(spread(b.qs[i])*2));
        }
        d[0] = d[1] = d[2] = d[3] = from_half(b.d);
    }
};

struct q2_0 : type<block_q2_0, 64, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 16; i += 2) {
            const uint64_t x = b.qs[i] | (uint64_t) b.qs[i + 1] << 32;
            write_8(q + 4*i, less_one((x | x << 6 | x << 12 | x << 18) & ONES*3));
        }
        d[0] = d[1] = from_half(b.d);
    }
};

// numbers of two bits: 16 from j on of group i of 32, of which four have the same bytes
static inline bytes two_bits(const uint8_t * x, int i, int j) {
    return b_and(b_shift_by(b_load(x + i/4*32 + j), i%4*2), 3);
}

struct tq2_0 : type<block_tq2_0, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 32; j += 16) {
                b_store(q + 32*i + j, b_sub(two_bits(b.qs, i, j), 1));
            }
            d[i] = from_half(b.d);
        }
    }
    static void folded(const block & b, int8_t * q, float * d, int16_t *) {
        float parts[8];
        unpack(b, q, parts, nullptr);
        d[0] = parts[0];
    }
};

struct tq1_0 : type<block_tq1_0, QK_K, 32, false> {
    // digit `place` of numbers to the base of 3, each a fraction of 256
    static int8_t * digits(const uint8_t * x, int n, int places, int8_t * q) {
        static const uint8_t powers[5] = { 1, 3, 9, 27, 81 };
        for (int place = 0; place < places; ++place) {
            for (int i = 0; i < n; ++i) {
                *q++ = (int8_t) (((uint8_t) (x[i]*powers[place])*3 >> 8) - 1);
            }
        }
        return q;
    }
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        q = digits(b.qs, 32, 5, q);
        q = digits(b.qs + 32, 16, 5, q);
        digits(b.qh, 4, 4, q);
        for (int i = 0; i < 8; ++i) {
            d[i] = from_half(b.d);
        }
    }
    static void folded(const block & b, int8_t * q, float * d, int16_t *) {
        float parts[8];
        unpack(b, q, parts, nullptr);
        d[0] = parts[0];
    }
};

// the eight scales and minima of q4_K and q5_K, 6 bits each
static inline void six_bits(const uint8_t * x, int32_t * scales, int32_t * mins) {
    for (int i = 0; i < 8; ++i) {
        scales[i] = i < 4 ? x[i] & 63     : (x[i + 4] & 15) | (x[i - 4] >> 6 << 4);
        mins[i]   = i < 4 ? x[i + 4] & 63 : (x[i + 4] >> 4) | (x[i] >> 6 << 4);
    }
}

// d and m of a block from whole numbers
template <typename W>
static inline void from_whole(const typename W::block & b, float * d, float * m) {
    static constexpr int N = W::N/W::PART;
    int32_t scales[N], mins[N] = {};
    float by[2] = {};
    W::whole(b, scales, mins, by);
    for (int i = 0; i < N; ++i) {
        d[i] = by[0]*scales[i];
        if (W::MIN) {
            m[i] = by[1]*mins[i];
        }
    }
}

struct q4_K : type<block_q4_K, QK_K, 32, true> {
    static void unpack(const block & b, int8_t * q, float * d, float * m) {
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 2; ++j) {
                const bytes x = b_load(b.qs + 32*i + 16*j);
                b_store(q + 64*i + 16*j,      b_low (x));
                b_store(q + 64*i + 16*j + 32, b_high(x));
            }
        }
        from_whole<q4_K>(b, d, m);
    }
    static void whole(const block & b, int32_t * scales, int32_t * mins, float * by) {
        six_bits(b.scales, scales, mins);
        by[0] = from_half(b.data.data.d);
        by[1] = -from_half(b.data.data.dmin);
    }
};

struct q5_K : type<block_q5_K, QK_K, 32, true> {
    static void unpack(const block & b, int8_t * q, float * d, float * m) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 32; j += 16) {
                const bytes low  = b_and(b_shift_by(b_load(b.qs + i/2*32 + j), i%2*4), 15);
                const bytes high = b_and(b_shift_by(b_load(b.qh + j), i), 1);
                b_store(q + 32*i + j, b_or(low, b_times_16(high)));
            }
        }
        from_whole<q5_K>(b, d, m);
    }
    static void whole(const block & b, int32_t * scales, int32_t * mins, float * by) {
        six_bits(b.scales, scales, mins);
        by[0] = from_half(b.data.data.d);
        by[1] = -from_half(b.data.data.dmin);
    }
};

struct q6_K : type<block_q6_K, QK_K, 16, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 4; ++i) { // 32 bytes of low bits go with 32 of high ones
            const uint8_t * low  = b.ql + 32*i;
            const uint8_t * high = b.qh + i/2*32;
            int8_t * to = q + i/2*128 + i%2*32;
            for (int j = 0; j < 32; j += 16) {
                const bytes l = b_load(low + j), h = i%2 ? b_shift<2>(b_load(high + j)) : b_load(high + j);
                b_store(to + j,      b_sub(b_or(b_low (l), b_bits<0>(h)), 32));
                b_store(to + j + 64, b_sub(b_or(b_high(l), b_bits<4>(h)), 32));
            }
        }
        from_whole<q6_K>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 16; ++i) {
            scales[i] = b.scales[i];
        }
        by[0] = from_half(b.d);
    }
};

// what numbers of two or three bits are times each scale, 16 bytes for each
struct folded_tables {
    int8_t q2_K[16][16] = {}; // 0 to 3 times 0 to 15
    int8_t q3_K[64][16] = {}; // 4 to -3 times -32 to 31: the other sign would not fit into 8 bits

    constexpr folded_tables() {
        for (int s = 0; s < 16; ++s) {
            for (int i = 0; i < 4; ++i) {
                q2_K[s][i] = (int8_t) (i*s);
            }
        }
        for (int s = 0; s < 64; ++s) {
            for (int i = 0; i < 8; ++i) {
                q3_K[s][i] = (int8_t) ((4 - i)*(s - 32));
            }
        }
    }
};
static constexpr folded_tables FOLDED;

struct q2_K : type<block_q2_K, QK_K, 16, true> {
    static void unpack(const block & b, int8_t * q, float * d, float * m) {
        const float scale = from_half(b.data.data.d), min = from_half(b.data.data.dmin);
        for (int i = 0; i < 16; ++i) {
            b_store(q + 16*i, two_bits(b.qs, i/2, i%2*16));
            d[i] = scale*(b.scales[i] & 15);
            m[i] = -min*(b.scales[i] >> 4);
        }
    }
    static void folded(const block & b, int8_t * q, float * d, int16_t * m) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            b_store(q + 16*i, b_table(FOLDED.q2_K[b.scales[i] & 15], two_bits(b.qs, i/2, i%2*16)));
            m[i] = b.scales[i] >> 4;
        }
        d[0] = from_half(b.data.data.d);
        d[1] = -from_half(b.data.data.dmin);
    }
};

struct q3_K : type<block_q3_K, QK_K, 16, false> {
    // numbers i of 16, of 0 to 7: 4 more than they are
    static bytes three_bits(const block & b, int i) {
        const bytes high = b_and(b_shift_by(b_load(b.hmask + i%2*16), i/2), 1);
        return b_or(two_bits(b.qs, i/2, i%2*16), b_shift<2>(b_times_16(high)));
    }
    static int scale(const block & b, int i) { // 32 more than it is
        return (b.scales[i%8] >> i/8*4 & 15) | (b.scales[8 + i%4] >> i/4*2 & 3) << 4;
    }
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 16; ++i) {
            b_store(q + 16*i, b_sub(three_bits(b, i), 4));
            d[i] = from_half(b.d)*(scale(b, i) - 32);
        }
    }
    static void folded(const block & b, int8_t * q, float * d, int16_t *) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            b_store(q + 16*i, b_table(FOLDED.q3_K[scale(b, i)], three_bits(b, i)));
        }
        d[0] = -from_half(b.d);
    }
};

struct iq4_xs : type<block_iq4_xs, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 8; ++i) {
            nibbles_of_table(b.qs + 16*i, kvalues_iq4nl, q + 32*i);
        }
        from_whole<iq4_xs>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 8; ++i) {
            scales[i] = ((b.scales_l[i/2] >> i%2*4 & 15) | (b.scales_h >> 2*i & 3) << 4) - 32;
        }
        by[0] = from_half(b.d);
    }
};

struct iq2_xxs : type<block_iq2_xxs, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        uint8_t signs[QK_K/8];
        for (int i = 0; i < 8; ++i) {
            uint8_t  index[4];
            uint32_t rest;
            memcpy(index, b.qs + 4*i, 4);
            memcpy(&rest, b.qs + 4*i + 2, 4);
            for (int j = 0; j < 4; ++j) {
                write_8(q + 32*i + 8*j, iq2xxs_grid[index[j]]);
                signs[4*i + j] = ksigns_iq2xs[rest >> 7*j & 127];
            }
        }
        negate(signs, QK_K, q);
        from_whole<iq2_xxs>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 8; ++i) {
            scales[i] = 2*(b.qs[4*i + 3] >> 12) + 1;
        }
        by[0] = from_half(b.d)*0.125f;
    }
};

struct iq2_xs : type<block_iq2_xs, QK_K, 16, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        uint8_t signs[QK_K/8];
        for (int i = 0; i < 32; ++i) {
            write_8(q + 8*i, iq2xs_grid[b.qs[i] & 511]);
            signs[i] = ksigns_iq2xs[b.qs[i] >> 9];
        }
        negate(signs, QK_K, q);
        from_whole<iq2_xs>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 16; ++i) {
            scales[i] = 2*(b.scales[i/2] >> i%2*4 & 15) + 1;
        }
        by[0] = from_half(b.d)*0.125f;
    }
};

struct iq2_s : type<block_iq2_s, QK_K, 16, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 32; ++i) {
            write_8(q + 8*i, iq2s_grid[b.qs[i] | (b.qh[i/4] >> i%4*2 & 3) << 8]);
        }
        negate(b.qs + QK_K/8, QK_K, q);
        from_whole<iq2_s>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 16; ++i) {
            scales[i] = 2*(b.scales[i/2] >> i%2*4 & 15) + 1;
        }
        by[0] = from_half(b.d)*0.125f;
    }
};

struct iq3_xxs : type<block_iq3_xxs, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        uint8_t signs[QK_K/8];
        for (int i = 0; i < 8; ++i) {
            uint32_t rest;
            memcpy(&rest, b.qs + QK_K/4 + 4*i, 4);
            for (int j = 0; j < 4; ++j) {
                const uint8_t * index = b.qs + 8*i + 2*j;
                write_8(q + 32*i + 8*j, iq3xxs_grid[index[0]] | (uint64_t) iq3xxs_grid[index[1]] << 32);
                signs[4*i + j] = ksigns_iq2xs[rest >> 7*j & 127];
            }
        }
        negate(signs, QK_K, q);
        from_whole<iq3_xxs>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 8; ++i) {
            scales[i] = 2*(b.qs[QK_K/4 + 4*i + 3] >> 4) + 1;
        }
        by[0] = from_half(b.d)*0.25f;
    }
};

struct iq3_s : type<block_iq3_s, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 8; ++i) {
            const uint32_t high = b.qh[i] << 8;
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                memcpy(q + 32*i + 4*j, &iq3s_grid[b.qs[8*i + j] | (high >> j & 256)], 4);
            }
        }
        negate(b.signs, QK_K, q);
        from_whole<iq3_s>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 8; ++i) {
            scales[i] = 1 + 2*(b.scales[i/2] >> i%2*4 & 15);
        }
        by[0] = from_half(b.d);
    }
};

// numbers of -1, 0 and 1 with an eighth added or taken off: eight times as large
static inline uint64_t eighths(uint64_t grid, bool less) {
    const uint64_t x = grid << 3 & ONES*0xf8;
    return less ? less_one(x) : x | ONES;
}

struct iq1_s : type<block_iq1_s, QK_K, 32, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        static_assert(IQ1S_DELTA == 0.125f);
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 4; ++j) {
                write_8(q + 32*i + 8*j, eighths(iq1s_grid[b.qs[4*i + j] | (b.qh[i] >> 3*j & 7) << 8], b.qh[i] & 0x8000));
            }
        }
        from_whole<iq1_s>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        for (int i = 0; i < 8; ++i) {
            scales[i] = 2*(b.qh[i] >> 12 & 7) + 1;
        }
        by[0] = from_half(b.d)*IQ1S_DELTA;
    }
};

struct iq1_m : type<block_iq1_m, QK_K, 16, false> {
    static void unpack(const block & b, int8_t * q, float * d, float *) {
        for (int i = 0; i < 32; ++i) {
            const int high = b.qh[i/2] >> i%2*4;
            write_8(q + 8*i, eighths(iq1s_grid[b.qs[i] | (high & 7) << 8], high & 8));
        }
        from_whole<iq1_m>(b, d, nullptr);
    }
    static void whole(const block & b, int32_t * scales, int32_t *, float * by) {
        static_assert(IQ1M_DELTA == 0.125f);
        uint16_t x[4];
        memcpy(x, b.scales, 8);
        for (int i = 0; i < 16; ++i) {
            scales[i] = 2*(x[i/4] >> i%4*3 & 7) + 1;
        }
        by[0] = from_half((ggml_half) (x[0] >> 12 | (x[1] >> 8 & 0xf0) | (x[2] >> 4 & 0xf00) | (x[3] & 0xf000)))*IQ1M_DELTA;
    }
};

} // namespace clex_weights
