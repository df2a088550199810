#include "ggml-clex-matmul.h"

#include "ggml-clex-panel.h"

#if defined(GGML_CLEX_PANEL)

#include "ggml-backend-impl.h"
#include "ggml-clex-threads.h"
#include "ggml-clex-weights.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "repack.h"

#include <algorithm>
#include <cstdlib>

using namespace clex_panel;

static constexpr int64_t PANELS     = 64/ROWS; // that are unpacked at once, and stay in the first level of cache
static constexpr int64_t TILES_MAX  = 576/TOKENS; // whose results stay in the second level of cache

// Rows of weights as they lie in memory.
struct weight_rows {
    const char * data;
    size_t       row; // bytes
};

//
// types of weights
//

struct weight_kind {
    int     block;    // numbers; the length of a row is a multiple
    int     chunk;    // terms of a sum that a panel has
    int     together; // rows that lie block by block in turn
    size_t  act_size; // bytes of a block of 32 activations of TOKENS tokens
    // fill a panel with n rows from `first` on: terms k to k + n_terms
    void (*unpack)(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p);
    // n_terms activations of a tile from k on; x has TOKENS rows, of which those that are null become 0
    void (*pack)(const float * const * x, int64_t k, int64_t n_terms, char * y);
    void (*product)(int tokens, const panel & p, const char * a, float * c, int64_t c_row, int n, bool first);
};

template <typename W>
struct kind_of {
    static constexpr int PARTS = 32/W::PART;
    using L = layout<PARTS, W::MIN>;

    // Fetch gives the block of a row
    template <typename Fetch>
    static void unpack_with(int64_t n, int64_t k, int64_t n_terms, panel & p, Fetch fetch) {
        alignas(64) int8_t q[LANES][CHUNK];
        const int64_t n_scales = n_terms/W::PART;
        for (int64_t v = 0; v < VECTORS; ++v) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const int64_t r = v*LANES + lane;
                float d[CHUNK/16], m[CHUNK/16];
                if (r < n) {
                    for (int64_t i = 0; i < n_terms; i += W::N) {
                        fetch(r, (k + i)/W::N, q[lane] + i, d + i/W::PART, m + i/W::PART);
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

    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        unpack_with(n, k, n_terms, p, [&](int64_t r, int64_t i, int8_t * q, float * d, float * m) {
            W::unpack(((const typename W::block *) (rows.data + (first + r)*rows.row))[i], q, d, m);
        });
    }

    static void pack(const float * const * x, int64_t k, int64_t n_terms, char * y) {
        pack_activations<PARTS, W::MIN, W::WIDE>(x, k, n_terms, y);
    }

    template <int T = TOKENS>
    static void product(int tokens, const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        if (tokens == T) {
            clex_panel::product<T, PARTS, W::MIN, W::WIDE>(p, a, c, c_row, n, first);
        } else if constexpr (T > 1) {
            product<T - 1>(tokens, p, a, c, c_row, n, first);
        }
    }

    static const weight_kind * get() {
        static const weight_kind kind = { W::N, CHUNK, 1, L::SIZE, unpack, pack, product<> };
        return &kind;
    }
};

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
struct kind_of_floats {
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

    template <int T = TOKENS>
    static void product(int tokens, const panel & p, const char * a, float * c, int64_t c_row, int n, bool first) {
        if (tokens == T) {
            product_of_floats<T, Dot>(p, a, c, c_row, n, first);
        } else if constexpr (T > 1) {
            product<T - 1>(tokens, p, a, c, c_row, n, first);
        }
    }

    static const weight_kind * get() {
        static const weight_kind kind = { 1, CHUNK/Dot::SIZE, 1, 32*TOKENS*Dot::SIZE, unpack, pack, product<> };
        return &kind;
    }
};

// as ggml does
#if defined(GGML_CLEX_PANEL_BF16)
using kind_of_bf16 = kind_of_floats<ggml_bf16_t, bf16_dot>;
#else
using kind_of_bf16 = kind_of_floats<ggml_bf16_t, float_dot>;
#endif

static const weight_kind * plain_kind(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:     return kind_of_floats<float, float_dot>::get();
        case GGML_TYPE_F16:     return kind_of_floats<ggml_fp16_t, float_dot>::get();
        case GGML_TYPE_BF16:    return kind_of_bf16::get();
        case GGML_TYPE_Q4_0:    return kind_of<clex_weights::q4_0>::get();
        case GGML_TYPE_Q4_1:    return kind_of<clex_weights::q4_1>::get();
        case GGML_TYPE_Q5_0:    return kind_of<clex_weights::q5_0>::get();
        case GGML_TYPE_Q5_1:    return kind_of<clex_weights::q5_1>::get();
        case GGML_TYPE_Q8_0:    return kind_of<clex_weights::q8_0>::get();
        case GGML_TYPE_Q1_0:    return kind_of<clex_weights::q1_0>::get();
        case GGML_TYPE_Q2_0:    return kind_of<clex_weights::q2_0>::get();
        case GGML_TYPE_Q2_K:    return kind_of<clex_weights::q2_K>::get();
        case GGML_TYPE_Q3_K:    return kind_of<clex_weights::q3_K>::get();
        case GGML_TYPE_Q4_K:    return kind_of<clex_weights::q4_K>::get();
        case GGML_TYPE_Q5_K:    return kind_of<clex_weights::q5_K>::get();
        case GGML_TYPE_Q6_K:    return kind_of<clex_weights::q6_K>::get();
        case GGML_TYPE_TQ1_0:   return kind_of<clex_weights::tq1_0>::get();
        case GGML_TYPE_TQ2_0:   return kind_of<clex_weights::tq2_0>::get();
        case GGML_TYPE_IQ1_S:   return kind_of<clex_weights::iq1_s>::get();
        case GGML_TYPE_IQ1_M:   return kind_of<clex_weights::iq1_m>::get();
        case GGML_TYPE_IQ2_XXS: return kind_of<clex_weights::iq2_xxs>::get();
        case GGML_TYPE_IQ2_XS:  return kind_of<clex_weights::iq2_xs>::get();
        case GGML_TYPE_IQ2_S:   return kind_of<clex_weights::iq2_s>::get();
        case GGML_TYPE_IQ3_XXS: return kind_of<clex_weights::iq3_xxs>::get();
        case GGML_TYPE_IQ3_S:   return kind_of<clex_weights::iq3_s>::get();
        case GGML_TYPE_IQ4_NL:  return kind_of<clex_weights::iq4_nl>::get();
        case GGML_TYPE_IQ4_XS:  return kind_of<clex_weights::iq4_xs>::get();
        case GGML_TYPE_MXFP4:   return kind_of<clex_weights::mxfp4>::get();
        case GGML_TYPE_NVFP4:   return kind_of<clex_weights::nvfp4>::get();
        default:                return nullptr;
    }
}

#if defined(__AVX2__)

//
// weights that ggml repacks when it loads them: blocks of 8 rows, 8 bytes of each row in turn
//

template <typename W, typename B8>
struct kind_of_8x8 : kind_of<W> {
    using base = kind_of<W>;

    static void unpack(const weight_rows & rows, int64_t first, int64_t n, int64_t k, int64_t n_terms, panel & p) {
        base::unpack_with(n, k, n_terms, p, [&](int64_t r, int64_t i, int8_t * q, float * d, float * m) {
            const int64_t row = first + r;
            const B8 & b = ((const B8 *) (rows.data + row/8*8*rows.row))[i];
            typename W::block one;
            for (size_t j = 0; j < sizeof(one.qs)/8; ++j) {
                memcpy(one.qs + 8*j, b.qs + 8*(8*j + row%8), 8);
            }
            take_scales(b, row%8, one);
            W::unpack(one, q, d, m);
        });
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

    static const weight_kind * get() {
        static const weight_kind kind = { W::N, CHUNK, 8, base::L::SIZE, unpack, base::pack, base::template product<> };
        return &kind;
    }
};

static const weight_kind * repacked_kind(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:   return kind_of_8x8<clex_weights::q4_0,   block_q4_0x8>::get();
        case GGML_TYPE_IQ4_NL: return kind_of_8x8<clex_weights::iq4_nl, block_iq4_nlx8>::get();
        case GGML_TYPE_MXFP4:  return kind_of_8x8<clex_weights::mxfp4,  block_mxfp4x8>::get();
        case GGML_TYPE_Q2_K:   return kind_of_8x8<clex_weights::q2_K,   block_q2_Kx8>::get();
        case GGML_TYPE_Q4_K:   return kind_of_8x8<clex_weights::q4_K,   block_q4_Kx8>::get();
        default:               return nullptr;
    }
}

#else

static const weight_kind * repacked_kind(ggml_type) {
    return nullptr;
}

#endif

static const weight_kind * kind_of_weights(const ggml_tensor * t) {
    if (!t->buffer || ggml_backend_buffer_is_host(t->buffer)) {
        return plain_kind(t->type);
    }
    return t->buffer->buft == ggml_backend_cpu_repack_buffer_type() && t->extra ? repacked_kind(t->type) : nullptr;
}

//
// the shape of the work
//

// Tokens that the same weights are multiplied with are a group: all of a matrix product, or of one expert. Groups are divided into tiles of TOKENS
// tokens. A unit of work is PANELS panels of rows with some tiles of a group.
struct matmul_plan {
    const ggml_tensor * weights;
    const ggml_tensor * x;
    const ggml_tensor * ids; // which expert, null where it is no product with experts
    const ggml_tensor * dst;
    const weight_kind * kind;

    int64_t k, n_rows;
    int64_t n_groups;
    int64_t n_tokens; // of a group, or of all where there are ids
    int64_t n_tiles;  // at most
    int64_t n_row_units;
    int64_t tiles_per_unit;

    // the work buffer: activations, columns of experts, then a part for each thread
    size_t table_start, thread_start, thread_size, size;

    explicit matmul_plan(const ggml_tensor * dst, int n_threads) : weights(dst->src[0]), x(dst->src[1]), ids(dst->src[2]), dst(dst) {
        kind     = kind_of_weights(weights);
        k        = weights->ne[0];
        n_rows   = weights->ne[1];
        n_groups = ids ? weights->ne[2] : x->ne[2]*x->ne[3];
        n_tokens = ids ? ids->ne[0]*ids->ne[1] : x->ne[1];
        n_tiles  = ids ? n_tokens/TOKENS + std::min(n_groups, n_tokens) : n_groups*tiles(n_tokens);

        n_row_units    = (n_rows + PANELS*ROWS - 1)/(PANELS*ROWS);
        tiles_per_unit = TILES_MAX;
        const int64_t n_together = ids ? n_tiles : tiles(n_tokens);
        const int64_t n_apart    = ids ? 1 : n_groups;
        while (tiles_per_unit > 48/TOKENS && n_apart*n_row_units*((n_together + tiles_per_unit - 1)/tiles_per_unit) < 4*n_threads) {
            tiles_per_unit /= 2;
        }

        table_start  = GGML_PAD(n_tiles*blocks(k)*kind->act_size, 64);
        thread_start = table_start + (ids ? GGML_PAD((3*(n_groups + 1) + n_tokens)*sizeof(int32_t), 64) : 0);
        thread_size  = PANELS*sizeof(panel) + tiles_per_unit*TOKENS*PANELS*ROWS*sizeof(float);
        size         = thread_start + n_threads*thread_size + 64;
    }

    // where the activations of a tile lie from term k on: chunk by chunk, and tile by tile in a chunk, as they are read
    size_t act(int64_t tile, int64_t k) const { return (k/32*n_tiles + tile*blocks(terms(k)))*kind->act_size; }
    int64_t terms(int64_t k) const { return std::min<int64_t>(kind->chunk, this->k - k); } // of a chunk
    static int64_t blocks(int64_t n) { return (n + 31)/32; } // of activations

    static int64_t tiles(int64_t n) { return (n + TOKENS - 1)/TOKENS; }
};

// What each group has, and where a column, which is a token that is multiplied, is read and written.
struct matmul_groups {
    const matmul_plan & plan;
    // of experts: sums over the experts before, one more than there are; and the columns: id*n_tokens + token
    int32_t * column;
    int32_t * tile;
    int32_t * unit;
    int32_t * columns;

    matmul_groups(const matmul_plan & plan, char * work) : plan(plan) {
        column  = (int32_t *) (work + plan.table_start);
        tile    = column + plan.n_groups + 1;
        unit    = tile + plan.n_groups + 1;
        columns = unit + plan.n_groups + 1;
    }

    int64_t units_of(int64_t n) const {
        return plan.n_row_units*((matmul_plan::tiles(n) + plan.tiles_per_unit - 1)/plan.tiles_per_unit);
    }

    // one thread does it
    void sort_by_expert() {
        const ggml_tensor * ids = plan.ids;
        const auto each = [&](auto f) {
            for (int64_t t = 0; t < ids->ne[1]; ++t) {
                for (int64_t i = 0; i < ids->ne[0]; ++i) {
                    const int32_t expert = *(const int32_t *) ((const char *) ids->data + t*ids->nb[1] + i*ids->nb[0]);
                    GGML_ASSERT(expert >= 0 && expert < plan.n_groups);
                    f(expert, (int32_t) (i*ids->ne[1] + t));
                }
            }
        };
        std::fill_n(column, plan.n_groups + 1, 0);
        each([&](int32_t expert, int32_t) { ++column[expert + 1]; });
        tile[0] = unit[0] = 0;
        for (int64_t g = 0; g < plan.n_groups; ++g) {
            tile[g + 1] = tile[g] + (int32_t) matmul_plan::tiles(column[g + 1]);
            unit[g + 1] = unit[g] + (int32_t) units_of(column[g + 1]);
            column[g + 1] += column[g];
        }
        each([&](int32_t expert, int32_t c) { columns[column[expert]++] = c; });
        for (int64_t g = plan.n_groups; g > 0; --g) { // each is where the next begins now
            column[g] = column[g - 1];
        }
        column[0] = 0;
    }

    int64_t n      (int64_t g) const { return plan.ids ? column[g + 1] - column[g] : plan.n_tokens; }
    int64_t tile0  (int64_t g) const { return plan.ids ? tile[g] : g*matmul_plan::tiles(plan.n_tokens); }
    int64_t unit0  (int64_t g) const { return plan.ids ? unit[g] : g*units_of(plan.n_tokens); }

    weight_rows weights(int64_t g) const {
        const ggml_tensor * w = plan.weights;
        const char * data = (const char *) w->data;
        if (plan.ids) {
            return { data + g*w->nb[2], w->nb[1] };
        }
        const int64_t i2 = g % plan.x->ne[2], i3 = g / plan.x->ne[2];
        return { data + i2/(plan.x->ne[2]/w->ne[2])*w->nb[2] + i3/(plan.x->ne[3]/w->ne[3])*w->nb[3], w->nb[1] };
    }

    // row of x and of the result for column i of a group
    void find(int64_t g, int64_t i, const float ** from, float ** to) const {
        const ggml_tensor * x = plan.x;
        const ggml_tensor * y = plan.dst;
        int64_t x1 = i, x2, x3 = 0, y1 = i, y2;
        if (plan.ids) {
            const int64_t c = columns[column[g] + i];
            y1 = c / plan.ids->ne[1];
            x2 = y2 = c % plan.ids->ne[1];
            x1 = y1 % x->ne[1];
        } else {
            x2 = y2 = g % x->ne[2];
            x3 = g / x->ne[2];
        }
        *from = (const float *) ((const char *) x->data + x1*x->nb[1] + x2*x->nb[2] + x3*x->nb[3]);
        *to   = (float *) ((char *) y->data + y1*y->nb[1] + y2*y->nb[2] + x3*y->nb[3]);
    }
};

//
// the work
//

static void pack_tiles(const matmul_plan & plan, const matmul_groups & groups, char * work, int ith, int nth) {
    for (int64_t g = 0; g < plan.n_groups; ++g) {
        const int64_t n = groups.n(g), tile0 = groups.tile0(g);
        for (int64_t t = 0; t < matmul_plan::tiles(n); ++t) {
            if ((tile0 + t) % nth != ith) {
                continue;
            }
            const float * rows[TOKENS] = {};
            for (int64_t i = 0; i < std::min<int64_t>(TOKENS, n - t*TOKENS); ++i) {
                float * to;
                groups.find(g, t*TOKENS + i, rows + i, &to);
            }
            for (int64_t k = 0; k < plan.k; k += plan.kind->chunk) {
                plan.kind->pack(rows, k, plan.terms(k), work + plan.act(tile0 + t, k));
            }
        }
    }
}

static void run_unit(const matmul_plan & plan, const matmul_groups & groups, char * work, int64_t g, int64_t index, int ith, int nth) {
    panel * panels = (panel *) (work + plan.thread_start + ith*plan.thread_size);
    float * c      = (float *) (panels + PANELS);

    static constexpr int64_t C_ROW = PANELS*ROWS;

    const int64_t row0  = index % plan.n_row_units * C_ROW;
    const int64_t tile0 = index / plan.n_row_units * plan.tiles_per_unit;
    const int64_t n     = std::min(groups.n(g) - tile0*TOKENS, plan.tiles_per_unit*TOKENS);
    const int64_t rows  = std::min(plan.n_rows - row0, C_ROW);

    const weight_rows weights = groups.weights(g);

    // Terms from k on of some rows, which are unpacked next; they are a row apart, which processors do not follow. Which rows those after
    // the last chunk are is a guess: other threads take units as well.
    const size_t chunk_bytes = ggml_row_size(plan.weights->type, plan.terms(0));
    const auto fetch_weights = [&](int64_t k, int64_t first, int64_t last) {
        const bool    is_next = k >= plan.k;
        const int64_t from    = is_next ? row0 + nth*C_ROW : row0;
        const int64_t start   = is_next ? 0 : ggml_row_size(plan.weights->type, k);
        const int64_t n_near  = plan.kind->together;
        for (int64_t r = from + first; r < std::min(from + last, plan.n_rows); ++r) {
            const char * x = weights.data + r/n_near*n_near*weights.row + start*n_near + r%n_near*chunk_bytes;
            for (size_t i = 0; i < chunk_bytes; i += 64) {
                __builtin_prefetch(x + i, 0, 2);
            }
        }
    };

    // where the results of a tile go; they come into the cache while those of the tiles before are computed
    const auto find_tile = [&](int64_t t, float ** to) {
        for (int64_t i = t*TOKENS; i < std::min(n, (t + 1)*TOKENS); ++i) {
            const float * from;
            groups.find(g, tile0*TOKENS + i, &from, to + i%TOKENS);
            for (int64_t j = 0; j < rows; j += 16) {
                __builtin_prefetch(to[i%TOKENS] + row0 + j, 1);
            }
        }
    };

    float * to[2][TOKENS];
    for (int64_t k = 0; k < plan.k; k += plan.kind->chunk) {
        const int64_t n_terms = plan.terms(k);
        const bool    is_last = k + n_terms >= plan.k;
        for (int64_t p = 0; p*ROWS < rows; ++p) {
            plan.kind->unpack(weights, row0 + p*ROWS, std::min<int64_t>(rows - p*ROWS, ROWS), k, n_terms, panels[p]);
        }
        if (is_last) {
            find_tile(0, to[0]);
        }
        const int64_t n_tiles = matmul_plan::tiles(n);
        for (int64_t t = 0; t < n_tiles; ++t) {
            const char * a = work + plan.act(groups.tile0(g) + tile0 + t, k);
            float * y = c + t*TOKENS*C_ROW;
            const int64_t tokens = std::min<int64_t>(TOKENS, n - t*TOKENS);
            if (is_last) {
                find_tile(t + 1, to[(t + 1)%2]);
            }
            fetch_weights(k + n_terms, t*C_ROW/n_tiles, (t + 1)*C_ROW/n_tiles);
            for (int64_t p = 0; p*ROWS < rows; ++p) {
                plan.kind->product((int) tokens, panels[p], a, y + p*ROWS, C_ROW, (int) matmul_plan::blocks(n_terms), k == 0);
            }
            for (int64_t i = 0; is_last && i < tokens; ++i) {
                memcpy(to[t%2][i] + row0, y + i*C_ROW, rows*sizeof(float));
            }
        }
    }
}

// Tokens from which on unpacking pays, by measurement; ggml's products are for fewer. n_terms: of a sum.
static int64_t tokens_min(ggml_type type, int64_t n_terms) {
#if !defined(__AVX512F__)
    switch (type) { // with shorter vectors ggml's products of floats are faster, or nothing is known
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
            return INT64_MAX;
        default:
            break;
    }
#endif
#if !defined(GGML_CLEX_PANEL_UNITS)
    switch (type) { // what ggml computes in tiles of its own, as fast
        case GGML_TYPE_Q2_K: case GGML_TYPE_Q3_K: case GGML_TYPE_Q4_K: case GGML_TYPE_Q5_K: case GGML_TYPE_Q6_K:
        case GGML_TYPE_IQ1_S: case GGML_TYPE_IQ1_M: case GGML_TYPE_IQ2_XXS: case GGML_TYPE_IQ2_XS: case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS: case GGML_TYPE_IQ3_S: case GGML_TYPE_IQ4_XS:
            return INT64_MAX;
        default:
            break;
    }
#endif
    switch (type) {
        case GGML_TYPE_F32:
            return 16;
        case GGML_TYPE_BF16:
            return 64;
        case GGML_TYPE_F16: // at best the units multiply F32, and with long sums ggml's products are as near to what they can do
            return n_terms > 256 ? INT64_MAX : 64;
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
            return 24;
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ3_S:
            return 16;
        default:
            return 9;
    }
}

static constexpr int64_t TOKENS_OF_EXPERT = 6; // on average

static bool matmul_applies(const ggml_tensor * dst) {
    static const bool disabled = getenv("GGML_CLEX_MATMUL_DISABLE") != nullptr;
    if (disabled || (dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID)) {
        return false;
    }
    const ggml_tensor * w   = dst->src[0];
    const ggml_tensor * x   = dst->src[1];
    const ggml_tensor * ids = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr;
    if ((ids ? ids->ne[1] : x->ne[1]) < tokens_min(w->type, w->ne[0]) ||
            (ids && ids->ne[0]*ids->ne[1] < TOKENS_OF_EXPERT*w->ne[2])) {
        return false;
    }
    if (!ids && ggml_get_op_params_i32(dst, 1) == GGML_HINT_SRC0_IS_HADAMARD) {
        return false; // which ggml does with additions alone
    }
    if (x->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || dst->nb[0] != sizeof(float) ||
            w->nb[0] != ggml_type_size(w->type)) {
        return false;
    }
    const weight_kind * kind = kind_of_weights(w);
    return kind && w->ne[0] % kind->block == 0;
}

size_t ggml_clex_matmul_work_size(const ggml_tensor * dst, int n_threads) {
    return matmul_applies(dst) ? matmul_plan(dst, n_threads).size : 0;
}

bool ggml_clex_matmul(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !matmul_applies(dst)) {
        return false;
    }
    const matmul_plan plan(dst, ggml_clex_planned_threads(params->threadpool));
    char * work = (char *) GGML_PAD((uintptr_t) params->wdata, 64);
    GGML_ASSERT(params->wsize >= plan.size);

    matmul_groups groups(plan, work);
    if (params->ith == 0) {
        if (plan.ids) {
            groups.sort_by_expert();
        }
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    if (plan.ids) {
        ggml_barrier(params->threadpool);
    }
    pack_tiles(plan, groups, work, params->ith, params->nth);
    ggml_barrier(params->threadpool);

    int64_t group = 0;
    for (int64_t unit = params->ith;; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        while (group < plan.n_groups && unit >= groups.unit0(group + 1)) {
            ++group;
        }
        if (group == plan.n_groups) {
            return true;
        }
        run_unit(plan, groups, work, group, unit - groups.unit0(group), params->ith, params->nth);
    }
}

#else

size_t ggml_clex_matmul_work_size(const ggml_tensor *, int) {
    return 0;
}

bool ggml_clex_matmul(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
