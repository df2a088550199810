#include "ggml-clex-kinds.h"

#if defined(GGML_CLEX_PANEL)

#include "amx/amx.h"
#include "ggml-backend-impl.h"
#include "ggml-clex-tile-products.h"
#include "ggml-clex-weights.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "repack.h"

#include <algorithm>
#include <type_traits>

#if defined(GGML_CLEX_TILES) && defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#define GGML_CLEX_AMX_ORDER // that of ggml's AMX buffer type may be met
#endif

namespace clex_kinds {

using namespace clex_panel;

static_assert(ROWS % clex_panel::ROWS == 0 && TOKENS <= TOKENS_MAX, "panels fit");

static constexpr const char * INT8_NAME =
#if defined(GGML_CLEX_PANEL_512)
    "avx512-vnni";
#elif defined(__AVXVNNI__)
    "avx-vnni";
#elif defined(__AVX2__)
    "avx2";
#else
    "neon-dotprod";
#endif

//
// rows in memory, block by block
//

// as they are
template <typename Block>
struct plain_rows {
    using block = Block;
    static constexpr int  TOGETHER = 1;
    static constexpr bool PACKED   = false;

    const char * data;
    size_t       row;

    plain_rows(const weight_rows & rows, int64_t first) : data(rows.data + first*rows.row), row(rows.row) {}

    const block & operator()(int64_t r, int64_t i) { return ((const block *) (data + r*row))[i]; }
};

#if defined(__AVX2__)

// as ggml repacks them when it loads them: blocks of 8 rows, 8 bytes of each row in turn
template <typename Block, typename B8>
struct rows_8x8 {
    using block = Block;
    static constexpr int  TOGETHER = 8;
    static constexpr bool PACKED   = true;

    const weight_rows & rows;
    int64_t             first;
    block               one;

    rows_8x8(const weight_rows & rows, int64_t first) : rows(rows), first(first) {}

    const block & operator()(int64_t r, int64_t i) {
        const int64_t row = first + r;
        const B8 & b = ((const B8 *) (rows.data + row/8*8*rows.row))[i];
        for (size_t j = 0; j < sizeof(one.qs)/8; ++j) {
            memcpy(one.qs + 8*j, b.qs + 8*(8*j + row%8), 8);
        }
        take_scales(b, row%8, one);
        return one;
    }

    static void take_scales(const block_q4_0x8 & b, int64_t row, block_q4_0 & one) {
        one.d = b.d[row];
        for (auto & x : one.qs) {
            x ^= 0x88;
        }
    }
    static void take_scales(const block_iq4_nlx8 & b, int64_t row, block_iq4_nl & one) {
        one.d = b.d[row];
    }
    static void take_scales(const block_mxfp4x8 & b, int64_t row, block_mxfp4 & one) {
        one.e = b.e[row];
    }
    static void take_scales(const block_q2_Kx8 & b, int64_t row, block_q2_K & one) {
        one.data.data.d    = b.d[row];
        one.data.data.dmin = b.dmin[row];
        for (int i = 0; i < 16; ++i) {
            one.scales[i] = b.scales[i/2*16 + 2*row + i%2];
        }
    }
    // those of one block of 32 numbers of eight rows lie together as those of eight blocks of one row do otherwise
    static void take_scales(const block_q4_Kx8 & b, int64_t row, block_q4_K & one) {
        one.data.data.d    = b.d[row];
        one.data.data.dmin = b.dmin[row];
        uint8_t s[8], m[8];
        for (int i = 0; i < 8; ++i) {
            const uint8_t * x = b.scales + 12*i;
            s[i] = row < 4 ? x[row] & 63     : (x[row + 4] & 15) | (x[row - 4] >> 6 << 4);
            m[i] = row < 4 ? x[row + 4] & 63 : (x[row + 4] >> 4) | (x[row] >> 6 << 4);
        }
        for (int i = 0; i < 4; ++i) {
            one.scales[i]     = s[i] | s[i + 4] >> 4 << 6;
            one.scales[i + 4] = m[i] | m[i + 4] >> 4 << 6;
            one.scales[i + 8] = (s[i + 4] & 15) | (m[i + 4] & 15) << 4;
        }
    }
};

#endif

//
// numbers of 8 bits with a scale for each block of 32 or 16
//

template <typename Weights, typename Rows = plain_rows<typename Weights::block>>
struct int8_rows {
    using W = Weights;
    using L = layout<32/W::PART, W::MIN>;
    static constexpr int    PARTS       = 32/W::PART;
    static constexpr int    TOGETHER    = Rows::TOGETHER;
    static constexpr bool   PACKED      = Rows::PACKED;
    static constexpr size_t BLOCK_BYTES = sizeof(typename W::block);

    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        Rows from(rows, first);
        alignas(64) int8_t q[LANES][CHUNK];
        const int64_t n_scales = n_terms/W::PART;
        for (int64_t v = 0; v < VECTORS; ++v) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t r = v*LANES + lane;
                float d[CHUNK/16], m[CHUNK/16];
                if (r < n) {
                    for (int64_t i = 0; i < n_terms; i += W::N) {
                        W::unpack(from(r, (k + i)/W::N), q[lane] + i, d + i/W::PART, m + i/W::PART);
                    }
                } else {
                    memset(d, 0, sizeof(d));
                    memset(m, 0, sizeof(m));
                    memset(q[lane], 0, CHUNK);
                }
                for (int64_t i = 0; i < n_scales; ++i) {
                    p.d[i][r] = d[i];
                    if (W::MIN) {
                        p.m[i][r] = m[i];
                    }
                }
            }
            transpose(q, p, v, n_terms, UNSIGNED ? 0x80 : 0);
        }
    }

    static void pack(const float * const * x, int64_t k, int64_t n_terms, char * y) {
        pack_activations<PARTS, W::MIN, W::WIDE>(x, k, n_terms, y);
    }

    template <int T>
    static void product(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        clex_panel::product<T, PARTS, W::MIN, W::WIDE>(p, a, c, c_row, n, first);
    }
};

#if defined(GGML_CLEX_PANEL_FOLDED)

// blocks of 256 with whole scales and minima, see product_whole
template <typename Weights, bool FOLDED, typename Rows>
struct whole_rows {
    using W = Weights;
    using L = whole_layout;
    static constexpr int    PARTS       = 32/W::PART;
    static constexpr int    N           = W::N/W::PART;
    static constexpr int    TOGETHER    = Rows::TOGETHER;
    static constexpr bool   PACKED      = Rows::PACKED;
    static constexpr size_t BLOCK_BYTES = sizeof(typename W::block);
    static_assert(W::N == CHUNK && W::WIDE && N/2 <= SCALE, "a chunk is a block");

    // by: the scale of the block, and that of its minima
    static void put_scales(panel & p, int64_t r, const int32_t * scales, const int16_t * mins, const float * by) {
        for (int i = 0; !FOLDED && i < N; ++i) {
            p.d[i][r] = (float) scales[i];
        }
        for (int i = 0; W::MIN && i < N/2; ++i) {
            memcpy(&p.m[i][r], mins + 2*i, 4);
        }
        p.m[SCALE][r]           = by[0];
        p.m[SCALE_OF_MINIMA][r] = by[1];
    }

    static void unpack_row(const typename W::block & b, int8_t * q, panel & p, int64_t r) {
        int32_t scales[N] = {}, whole_mins[N];
        int16_t mins[N] = {};
        float   by[2] = {};
        if constexpr (FOLDED) {
            W::folded(b, q, by, mins);
        } else {
            float d[N], m[N];
            W::unpack(b, q, d, m);
            W::whole(b, scales, whole_mins, by);
            std::copy_n(whole_mins, N, mins);
        }
        put_scales(p, r, scales, mins, by);
    }

    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        Rows from(rows, first);
        alignas(64) int8_t q[LANES][CHUNK];
        for (int64_t v = 0; v < VECTORS; ++v) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t r = v*LANES + lane;
                if (r < n) {
                    unpack_row(from(r, k/W::N), q[lane], p, r);
                } else {
                    static constexpr int32_t zeros[N] = {};
                    memset(q[lane], 0, CHUNK);
                    put_scales(p, r, zeros, (const int16_t *) zeros, (const float *) zeros);
                }
            }
            transpose(q, p, v, n_terms, W::MIN ? 0 : 0x80);
        }
    }

    static void pack(const float * const * x, int64_t k, int64_t n_terms, char * y) {
        pack_whole<PARTS, W::MIN>(x, k, n_terms, y);
    }

    template <int T>
    static void product(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        product_whole<T, PARTS, W::MIN, FOLDED>(p, a, c, c_row, n, first);
    }
};

#endif

#if defined(GGML_CLEX_AMX_ORDER)

//
// weights in the order of ggml's AMX buffer type: 16 rows of a block together, four terms of each row in turn, as panels have them
//

// 16 rows of 64 terms of numbers of 4 bits, two groups of four terms in each byte: numbers n and n + 1 of 16
static inline __m512i amx_nibbles(const char * x, int i) {
    const __m512i bytes = _mm512_loadu_si512((const void *) (x + i/2*64));
    return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

static inline __m512 amx_halves(const char * x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x));
}

static inline __m512 amx_scales(const char * x, bool is_signed) { // 16 bytes
    const __m128i y = _mm_loadu_si128((const __m128i *) x);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(y) : _mm512_cvtepu8_epi32(y));
}

// scales and minima of q4_K and q5_K: eight of each row, then those of the block
static inline void amx_scales_and_mins(const char * x, panel & p, int64_t v) {
    const __m512 d = amx_halves(x + 256), dmin = amx_halves(x + 288);
    for (int i = 0; i < 8; ++i) {
        int8_t mins[16];
        for (int r = 0; r < 16; ++r) {
            mins[r] = (int8_t) x[128 + i/2*32 + 2*r + i%2];
        }
        _mm512_storeu_ps(p.d[i] + v*LANES, _mm512_mul_ps(d, amx_scales(x + 16*i, false)));
        _mm512_storeu_ps(p.m[i] + v*LANES, _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), dmin), amx_scales((const char *) mins, false)));
    }
}

template <typename W> struct amx_block {};

template <> struct amx_block<clex_weights::q8_0> {
    static constexpr size_t BYTES = 16*32 + 32 + 64; // the last are for ggml
    static __m512i number(const char * x, int i) { return _mm512_loadu_si512((const void *) (x + 64*i)); }
    static void scales(const char * x, panel & p, int64_t part, int64_t v) { _mm512_storeu_ps(p.d[part] + v*LANES, amx_halves(x + 512)); }
};

template <> struct amx_block<clex_weights::q4_0> {
    static constexpr size_t BYTES = 16*16 + 32;
    static __m512i number(const char * x, int i) { return _mm512_sub_epi8(amx_nibbles(x, i), _mm512_set1_epi8(8)); }
    static void scales(const char * x, panel & p, int64_t part, int64_t v) { _mm512_storeu_ps(p.d[part] + v*LANES, amx_halves(x + 256)); }
};

template <> struct amx_block<clex_weights::q4_1> {
    static constexpr size_t BYTES = 16*16 + 64;
    static __m512i number(const char * x, int i) { return amx_nibbles(x, i); }
    static void scales(const char * x, panel & p, int64_t part, int64_t v) {
        _mm512_storeu_ps(p.d[part] + v*LANES, amx_halves(x + 256));
        _mm512_storeu_ps(p.m[part] + v*LANES, amx_halves(x + 288));
    }
};

template <> struct amx_block<clex_weights::q4_K> {
    static constexpr size_t BYTES = 16*128 + 128 + 128 + 64;
    static __m512i number(const char * x, int i) { return amx_nibbles(x, i); }
    static void scales(const char * x, panel & p, int64_t, int64_t v) { amx_scales_and_mins(x + 2048, p, v); }
};

template <> struct amx_block<clex_weights::q5_K> {
    static constexpr size_t BYTES = 16*128 + 512 + 128 + 128 + 64;
    static __m512i number(const char * x, int i) { // of eight, each has a bit of each byte
        const __m512i high = _mm512_loadu_si512((const void *) (x + 2048 + i/8*64));
        const __mmask64 set = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char) (1 << i%8)));
        const __m512i low = amx_nibbles(x, i);
        return _mm512_mask_add_epi8(low, set, low, _mm512_set1_epi8(16));
    }
    static void scales(const char * x, panel & p, int64_t, int64_t v) { amx_scales_and_mins(x + 2048 + 512, p, v); }
};

template <> struct amx_block<clex_weights::q6_K> {
    static constexpr size_t BYTES = 16*128 + 1024 + 256 + 32;
    static __m512i number(const char * x, int i) { // of four, each has two bits of each byte
        const __m512i high = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512((const void *) (x + 2048 + i/4*64)), _mm_cvtsi32_si128(i%4*2)),
            _mm512_set1_epi8(3));
        return _mm512_sub_epi8(_mm512_or_si512(amx_nibbles(x, i), _mm512_slli_epi16(high, 4)), _mm512_set1_epi8(32));
    }
    static void scales(const char * x, panel & p, int64_t, int64_t v) {
        const char * scale = x + 2048 + 1024;
        for (int i = 0; i < 16; ++i) {
            _mm512_storeu_ps(p.d[i] + v*LANES, _mm512_mul_ps(amx_halves(scale + 256), amx_scales(scale + 16*i, true)));
        }
    }
};

template <> struct amx_block<clex_weights::iq4_xs> {
    static constexpr size_t BYTES = 16*128 + 128 + 32;
    static __m512i number(const char * x, int i) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) kvalues_iq4nl)), amx_nibbles(x, i));
    }
    static void scales(const char * x, panel & p, int64_t, int64_t v) {
        const char * scale = x + 2048;
        for (int i = 0; i < 8; ++i) {
            _mm512_storeu_ps(p.d[i] + v*LANES, _mm512_mul_ps(amx_halves(scale + 128), amx_scales(scale + 16*i, true)));
        }
    }
};

template <typename Weights>
struct amx_rows {
    using W = Weights;
    static constexpr int    TOGETHER    = 16;
    static constexpr bool   PACKED      = true;
    static constexpr size_t BLOCK_BYTES = amx_block<W>::BYTES/16;
    static_assert(amx_block<W>::BYTES % 16 == 0 && LANES == 16);

    // whole panels: such weights have multiples of 32 rows
    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        for (int64_t v = 0; v < VECTORS; ++v) {
            GGML_ASSERT((v + 1)*LANES <= n);
            for (int64_t i = 0; i < n_terms; i += W::N) {
                const char * x = rows.data + (first + v*LANES)*rows.row + (k + i)/W::N*amx_block<W>::BYTES;
                for (int j = 0; j < W::N/4; ++j) {
                    _mm512_storeu_si512((void *) p.w[i/4 + j][v*LANES], _mm512_xor_si512(amx_block<W>::number(x, j), _mm512_set1_epi8((char) 0x80)));
                }
                amx_block<W>::scales(x, p, i/W::PART, v);
            }
        }
    }
};

#endif

//
// weights that are floats: they stay what they are, or become F32
//

static void to_f32(const float * x, float * y, int64_t n) {
    memcpy(y, x, n*sizeof(float));
}

static void to_f32(const ggml_fp16_t * x, float * y, int64_t n) {
    ggml_cpu_fp16_to_fp32(x, y, n);
}

static void to_f32(const ggml_bf16_t * x, float * y, int64_t n) {
    ggml_cpu_bf16_to_fp32(x, y, n);
}

template <typename X, typename Dot>
struct float_rows {
    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        alignas(64) int8_t q[LANES][CHUNK] = {};
        for (int64_t v = 0; v < VECTORS; ++v) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t r = v*LANES + lane;
                const X * x = (const X *) (rows.data + (first + r)*rows.row) + k;
                if (r >= n) {
                    memset(q[lane], 0, CHUNK);
                } else if (Dot::SIZE == sizeof(X)) {
                    memcpy(q[lane], x, n_terms*sizeof(X));
                } else {
                    to_f32(x, (float *) q[lane], n_terms);
                }
            }
            transpose(q, p, v, GGML_PAD(n_terms, 32)*Dot::SIZE, 0);
        }
    }

    static void pack(const float * const * x, int64_t k, int64_t n_terms, char * y) {
        const int64_t padded = GGML_PAD(n_terms, 32);
        for (int t = 0; t < TOKENS; ++t, y += padded*Dot::SIZE) {
            float padding[32] = {};
            const int64_t whole = x[t] ? n_terms/32*32 : 0;
            if (x[t]) {
                memcpy(padding, x[t] + k + whole, (n_terms - whole)*sizeof(float));
                put(x[t] + k, whole, y);
            }
            for (int64_t i = whole; i < padded; i += 32) {
                put(padding, 32, y + i*Dot::SIZE);
            }
        }
    }

    static void put(const float * x, int64_t n, char * y) {
#if defined(GGML_CLEX_PANEL_BF16)
        if (Dot::SIZE == 2) {
            for (int64_t i = 0; i < n; i += LANES) {
                round_bf16(x + i, y + 2*i);
            }
            return;
        }
#endif
        memcpy(y, x, n*sizeof(float));
    }

    template <int T>
    static void product(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        product_of_floats<T, Dot>(p, a, c, c_row, n, first);
    }
};

#if defined(GGML_CLEX_PANEL_PAIRS)

// F16 as numbers of 16 bits, see product_of_pairs
struct pair_rows {
    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        alignas(64) int8_t q[LANES][CHUNK] = {};
        for (int64_t v = 0; v < VECTORS; ++v) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t r = v*LANES + lane;
                float x[CHUNK/2];
                if (r < n) {
                    to_f32((const ggml_fp16_t *) (rows.data + (first + r)*rows.row) + k, x, n_terms);
                } else {
                    memset(x, 0, sizeof(x));
                }
                for (int64_t i = 0; i < n_terms; i += 32) {
                    p.d[i/32][r] = round_pairs(x + i, std::min<int64_t>(32, n_terms - i), (int16_t *) q[lane] + i);
                }
            }
            transpose(q, p, v, GGML_PAD(n_terms, 32)*sizeof(int16_t), 0);
        }
    }

    static void pack(const float * const * x, int64_t k, int64_t n_terms, char * y) {
        using L = pair_layout;
        for (int64_t i = 0; i < n_terms; i += 32, y += L::SIZE) {
            for (int t = 0; t < TOKENS; ++t) {
                static constexpr float zeros[32] = {};
                ((float *) (y + L::D))[t] = x[t] ? round_pairs(x[t] + k + i, std::min<int64_t>(32, n_terms - i), (int16_t *) y + 32*t) :
                    round_pairs(zeros, 32, (int16_t *) y + 32*t);
            }
        }
    }

    template <int T>
    static void product(const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        product_of_pairs<T>(p, a, c, c_row, n, first);
    }
};

#endif

//
// tables of what is above
//

// Rows unpacks, packs and multiplies
template <typename Rows>
struct vector_functions {
    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, void * p) {
        Rows::unpack(rows, first, n, k, n_terms, *(panel *) p);
    }

    template <int T = TOKENS>
    static void product(int tokens, const void * p, const char * a, float * c, int64_t c_row, int n, bool first) {
        if (tokens == T) {
            Rows::template product<T>(*(const panel *) p, a, c, c_row, n, first);
        } else if constexpr (T > 1) {
            product<T - 1>(tokens, p, a, c, c_row, n, first);
        }
    }
};

template <typename Rows>
static const weight_kind * vector_kind() {
    using F = vector_functions<Rows>;
    static const weight_kind kind = { INT8_NAME, Rows::W::N, Rows::BLOCK_BYTES, CHUNK, Rows::TOGETHER, clex_panel::ROWS, TOKENS, Rows::L::SIZE,
        sizeof(panel), Rows::PACKED, F::unpack, Rows::pack, F::template product<>, nullptr, nullptr };
    return &kind;
}

template <typename X, typename Dot>
static const weight_kind * float_vector_kind(const char * name) {
    using Rows = float_rows<X, Dot>;
    using F    = vector_functions<Rows>;
    static const weight_kind kind = { name, 1, sizeof(X), CHUNK/Dot::SIZE, 1, clex_panel::ROWS, TOKENS, 32*TOKENS*Dot::SIZE,
        sizeof(panel), false, F::unpack, Rows::pack, F::template product<>, nullptr, nullptr };
    return &kind;
}

#if defined(GGML_CLEX_TILES)

static_assert(clex_tiles::TOKENS <= TOKENS_MAX && ROWS % clex_tiles::ROWS == 0 && clex_tiles::ROWS % clex_panel::ROWS == 0, "tiles fit");

// what is alike for all weights: by the processor or in software
template <bool SPLIT>
static void finish(weight_kind & kind) {
    kind.tokens   = clex_tiles::TOKENS;
    kind.rows     = clex_tiles::ROWS;
    kind.act_size = clex_tiles::step_bytes(SPLIT);
    kind.panel_size = (size_t) kind.chunk/clex_tiles::STEP*clex_tiles::step_bytes(SPLIT);
    if (clex_tiles::available() == clex_tiles::units::hardware) {
        kind.name    = "amx-bf16";
        kind.product = clex_tiles::product<clex_tiles::hardware, SPLIT>;
        kind.begin   = clex_tiles::hardware::begin;
        kind.end     = clex_tiles::hardware::end;
    } else {
        kind.name    = "software tiles";
        kind.product = clex_tiles::product<clex_tiles::software, SPLIT>;
        kind.begin   = clex_tiles::software::begin;
        kind.end     = clex_tiles::software::end;
    }
}

template <typename Rows>
static void unpack_tiles(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, void * w) {
    panel p;
    for (int64_t row0 = 0; row0 < clex_tiles::ROWS; row0 += clex_panel::ROWS) {
        Rows::unpack(rows, first + row0, n - row0, k, n_terms, p);
        clex_tiles::weights_of_panel<Rows::W::PART, Rows::W::MIN>(p, n_terms, (char *) w, row0);
    }
}

// F16 is split, BF16 is taken as it is
template <typename X>
static void unpack_float_tiles(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, void * w) {
    static constexpr bool SPLIT = !std::is_same_v<X, ggml_bf16_t>;
    const int64_t padded = GGML_PAD(n_terms, clex_tiles::STEP);
    alignas(64) char high[LANES][2*CHUNK], low[LANES][2*CHUNK];
    alignas(64) float x[CHUNK] = {}, rest[CHUNK];
    for (int64_t row0 = 0; row0 < clex_tiles::ROWS; row0 += LANES) {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t r = row0 + lane;
            const X * from = (const X *) (rows.data + (first + r)*rows.row) + k;
            if (r >= n) {
                memset(high[lane], 0, sizeof(high[lane]));
                memset(low[lane], 0, sizeof(low[lane]));
            } else if (SPLIT) {
                to_f32(from, x, n_terms);
                clex_tiles::rest_row(x, padded, rest);
                clex_tiles::round_row(x, padded, high[lane]);
                clex_tiles::round_row(rest, padded, low[lane]);
            } else {
                memset(high[lane] + n_terms*sizeof(X), 0, (padded - n_terms)*sizeof(X));
                memcpy(high[lane], from, n_terms*sizeof(X));
            }
        }
        clex_tiles::weights_of_rows(high[0], sizeof(high[0]), padded, (char *) w, row0, SPLIT, false);
        if (SPLIT) {
            clex_tiles::weights_of_rows(low[0], sizeof(low[0]), padded, (char *) w, row0, SPLIT, true);
        }
    }
}

template <typename Rows>
static const weight_kind * tile_kind() {
    static const weight_kind kind = [] {
        weight_kind one = { nullptr, Rows::W::N, Rows::BLOCK_BYTES, CHUNK, Rows::TOGETHER, 0, 0, 0, 0, Rows::PACKED,
            unpack_tiles<Rows>, clex_tiles::pack_activations<false>, nullptr, nullptr, nullptr };
        finish<false>(one);
        return one;
    }();
    return clex_tiles::available() == clex_tiles::units::none ? nullptr : &kind;
}

template <typename X, bool SPLIT>
static const weight_kind * float_tile_kind() {
    static const weight_kind kind = [] {
        weight_kind one = { nullptr, 1, sizeof(X), SPLIT ? CHUNK/2 : CHUNK, 1, 0, 0, 0, 0, false,
            unpack_float_tiles<X>, clex_tiles::pack_activations<SPLIT>, nullptr, nullptr, nullptr };
        finish<SPLIT>(one);
        return one;
    }();
    return clex_tiles::available() == clex_tiles::units::none ? nullptr : &kind;
}

#else

template <typename Rows>
static const weight_kind * tile_kind() {
    return nullptr;
}

template <typename X, bool SPLIT>
static const weight_kind * float_tile_kind() {
    return nullptr;
}

#endif

template <typename Rows>
static weight_kinds kinds() {
    return { vector_kind<Rows>(), tile_kind<Rows>(), "ggml" };
}

// Where vectors take whole scales, and tiles those of each part; FOLDED: there are none.
template <typename W, bool FOLDED = false, typename Rows = plain_rows<typename W::block>>
static weight_kinds whole_kinds() {
#if defined(GGML_CLEX_PANEL_FOLDED)
    return { vector_kind<whole_rows<W, FOLDED, Rows>>(), tile_kind<int8_rows<W, Rows>>(), "ggml" };
#else
    return kinds<int8_rows<W, Rows>>();
#endif
}

static weight_kinds f16_kinds() {
    const weight_kind * tiles = float_tile_kind<ggml_fp16_t, true>();
#if defined(GGML_CLEX_PANEL_PAIRS)
    using F = vector_functions<pair_rows>;
    static const weight_kind kind = { INT8_NAME, 1, sizeof(ggml_fp16_t), CHUNK/2, 1, clex_panel::ROWS, TOKENS, pair_layout::SIZE,
        sizeof(panel), false, F::unpack, pair_rows::pack, F::product<>, nullptr, nullptr };
    return { &kind, tiles, "ggml" };
#else
    return { float_vector_kind<ggml_fp16_t, float_dot>("float"), tiles, "ggml" };
#endif
}

static weight_kinds bf16_kinds() {
#if defined(GGML_CLEX_PANEL_BF16) // as ggml does
    return { float_vector_kind<ggml_bf16_t, bf16_dot>("avx512-bf16"), float_tile_kind<ggml_bf16_t, false>(), "ggml" };
#else
    return { float_vector_kind<ggml_bf16_t, float_dot>("float"), float_tile_kind<ggml_bf16_t, false>(), "ggml" };
#endif
}

static weight_kinds plain_kinds(ggml_type type) {
    using namespace clex_weights;
    switch (type) {
        case GGML_TYPE_F32:     return { float_vector_kind<float, float_dot>("float"), nullptr, "ggml" };
        case GGML_TYPE_F16:     return f16_kinds();
        case GGML_TYPE_BF16:    return bf16_kinds();
        case GGML_TYPE_Q4_0:    return kinds<int8_rows<q4_0>>();
        case GGML_TYPE_Q4_1:    return kinds<int8_rows<q4_1>>();
        case GGML_TYPE_Q5_0:    return kinds<int8_rows<q5_0>>();
        case GGML_TYPE_Q5_1:    return kinds<int8_rows<q5_1>>();
        case GGML_TYPE_Q8_0:    return kinds<int8_rows<q8_0>>();
        case GGML_TYPE_Q1_0:    return kinds<int8_rows<q1_0>>();
        case GGML_TYPE_Q2_0:    return kinds<int8_rows<q2_0>>();
        case GGML_TYPE_Q2_K:    return whole_kinds<q2_K, true>();
        case GGML_TYPE_Q3_K:    return whole_kinds<q3_K, true>();
        case GGML_TYPE_Q4_K:    return whole_kinds<q4_K>();
        case GGML_TYPE_Q5_K:    return whole_kinds<q5_K>();
        case GGML_TYPE_Q6_K:    return kinds<int8_rows<q6_K>>();
        case GGML_TYPE_TQ1_0:   return whole_kinds<tq1_0, true>();
        case GGML_TYPE_TQ2_0:   return whole_kinds<tq2_0, true>();
        case GGML_TYPE_IQ1_S:   return kinds<int8_rows<iq1_s>>();
        case GGML_TYPE_IQ1_M:   return kinds<int8_rows<iq1_m>>();
        case GGML_TYPE_IQ2_XXS: return kinds<int8_rows<iq2_xxs>>();
        case GGML_TYPE_IQ2_XS:  return kinds<int8_rows<iq2_xs>>();
        case GGML_TYPE_IQ2_S:   return kinds<int8_rows<iq2_s>>();
        case GGML_TYPE_IQ3_XXS: return kinds<int8_rows<iq3_xxs>>();
        case GGML_TYPE_IQ3_S:   return kinds<int8_rows<iq3_s>>();
        case GGML_TYPE_IQ4_NL:  return kinds<int8_rows<iq4_nl>>();
        case GGML_TYPE_IQ4_XS:  return kinds<int8_rows<iq4_xs>>();
        case GGML_TYPE_MXFP4:   return kinds<int8_rows<mxfp4>>();
        case GGML_TYPE_NVFP4:   return kinds<int8_rows<nvfp4>>();
        default:                return { nullptr, nullptr, "ggml" };
    }
}

// in the order of ggml's own buffer type of repacked weights
static weight_kinds repacked_kinds(ggml_type type) {
#if defined(__AVX2__)
    using namespace clex_weights;
    switch (type) {
        case GGML_TYPE_Q4_0:   return kinds<int8_rows<q4_0,   rows_8x8<block_q4_0,   block_q4_0x8>>>();
        case GGML_TYPE_IQ4_NL: return kinds<int8_rows<iq4_nl, rows_8x8<block_iq4_nl, block_iq4_nlx8>>>();
        case GGML_TYPE_MXFP4:  return kinds<int8_rows<mxfp4,  rows_8x8<block_mxfp4,  block_mxfp4x8>>>();
        case GGML_TYPE_Q2_K:   return whole_kinds<q2_K, true, rows_8x8<block_q2_K, block_q2_Kx8>>();
        case GGML_TYPE_Q4_K:   return whole_kinds<q4_K, false, rows_8x8<block_q4_K, block_q4_Kx8>>();
        default:               break;
    }
#endif
    GGML_UNUSED(type);
    return { nullptr, nullptr, "ggml, repacked" };
}

#if defined(GGML_CLEX_AMX_ORDER)

// What tiles do not compute is ggml's, which computes decode in this order.
static weight_kinds amx_kinds(ggml_type type) {
    using namespace clex_weights;
    const auto only_tiles = [](const weight_kind * kind) { return weight_kinds{ nullptr, kind, "ggml, amx-int8" }; };
    switch (type) {
        case GGML_TYPE_F16:    return only_tiles(float_tile_kind<ggml_fp16_t, true>());
        case GGML_TYPE_Q8_0:   return only_tiles(tile_kind<amx_rows<q8_0>>());
        case GGML_TYPE_Q4_0:   return only_tiles(tile_kind<amx_rows<q4_0>>());
        case GGML_TYPE_Q4_1:   return only_tiles(tile_kind<amx_rows<q4_1>>());
        case GGML_TYPE_Q4_K:   return only_tiles(tile_kind<amx_rows<q4_K>>());
        case GGML_TYPE_Q5_K:   return only_tiles(tile_kind<amx_rows<q5_K>>());
        case GGML_TYPE_Q6_K:   return only_tiles(tile_kind<amx_rows<q6_K>>());
        case GGML_TYPE_IQ4_XS: return only_tiles(tile_kind<amx_rows<iq4_xs>>());
        default:               return only_tiles(nullptr);
    }
}

static bool is_amx_buffer(const ggml_backend_buffer * buffer) {
    static ggml_backend_buffer_type * const type = ggml_backend_amx_buffer_type(); // each call asks the system
    return type && buffer->buft == type;
}

#endif

weight_kinds weight_kinds_of(const ggml_tensor * t) {
    if (!t->buffer || ggml_backend_buffer_is_host(t->buffer)) {
        return plain_kinds(t->type);
    }
#if defined(GGML_CLEX_AMX_ORDER)
    if (is_amx_buffer(t->buffer)) {
        return t->ne[2]*t->ne[3] == 1 && t->ne[1] % 32 == 0 ? amx_kinds(t->type) : weight_kinds{ nullptr, nullptr, "ggml, amx-int8" };
    }
#endif
    if (t->buffer->buft == ggml_backend_cpu_repack_buffer_type() && t->extra) {
        return repacked_kinds(t->type);
    }
    return { nullptr, nullptr, "ggml" };
}

const char * name_of_units() {
    const weight_kinds kinds = plain_kinds(GGML_TYPE_Q8_0);
    return (kinds.tiles ? kinds.tiles : kinds.vectors)->name;
}

} // namespace clex_kinds

#endif
