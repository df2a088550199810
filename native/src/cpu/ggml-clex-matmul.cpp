#include "ggml-clex-matmul.h"

#include "ggml-clex-kinds.h"

#if defined(GGML_CLEX_PANEL)

#include "ggml-backend-impl.h"
#include "ggml-clex-threads.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

using namespace clex_kinds;

static constexpr int64_t TOGETHER = 576; // tokens, at most, whose results stay in the second level of cache

//
// the shape of the work
//

// Tokens that the same weights are multiplied with are a group: all of a matrix product, or of one expert. Groups are divided into tiles of
// some tokens. A unit of work is ROWS rows, which are some panels, with some tiles of a group.
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
    size_t table_start, thread_start, panels_size, thread_size, size;

    matmul_plan(const ggml_tensor * dst, const weight_kind * kind, int n_threads) :
            weights(dst->src[0]), x(dst->src[1]), ids(dst->src[2]), dst(dst), kind(kind) {
        k        = weights->ne[0];
        n_rows   = weights->ne[1];
        n_groups = ids ? weights->ne[2] : x->ne[2]*x->ne[3];
        n_tokens = ids ? ids->ne[0]*ids->ne[1] : x->ne[1];
        n_tiles  = ids ? n_tokens/kind->tokens + std::min(n_groups, n_tokens) : n_groups*tiles(n_tokens);

        n_row_units    = (n_rows + ROWS - 1)/ROWS;
        tiles_per_unit = TOGETHER/kind->tokens;
        const int64_t n_together = ids ? n_tiles : tiles(n_tokens);
        const int64_t n_apart    = ids ? 1 : n_groups;
        while (tiles_per_unit > 48/kind->tokens && n_apart*n_row_units*((n_together + tiles_per_unit - 1)/tiles_per_unit) < 4*n_threads) {
            tiles_per_unit /= 2;
        }

        table_start  = GGML_PAD(n_tiles*blocks(k)*kind->act_size, 64);
        thread_start = table_start + (ids ? GGML_PAD((3*(n_groups + 1) + n_tokens)*sizeof(int32_t), 64) : 0);
        panels_size  = ROWS/kind->rows*kind->panel_size;
        thread_size  = panels_size + tiles_per_unit*kind->tokens*ROWS*sizeof(float);
        size         = thread_start + n_threads*thread_size + 64;
    }

    // where the activations of a tile lie from term k on: chunk by chunk, and tile by tile in a chunk, as they are read
    size_t act(int64_t tile, int64_t k) const { return (k/32*n_tiles + tile*blocks(terms(k)))*kind->act_size; }
    int64_t terms(int64_t k) const { return std::min<int64_t>(kind->chunk, this->k - k); } // of a chunk
    static int64_t blocks(int64_t n) { return (n + 31)/32; } // of activations

    int64_t tiles(int64_t n) const { return (n + kind->tokens - 1)/kind->tokens; }
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
        return plan.n_row_units*((plan.tiles(n) + plan.tiles_per_unit - 1)/plan.tiles_per_unit);
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
            tile[g + 1] = tile[g] + (int32_t) plan.tiles(column[g + 1]);
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
    int64_t tile0  (int64_t g) const { return plan.ids ? tile[g] : g*plan.tiles(plan.n_tokens); }
    int64_t unit0  (int64_t g) const { return plan.ids ? unit[g] : g*units_of(plan.n_tokens); }

    weight_rows weights(int64_t g) const {
        const ggml_tensor * w = plan.weights;
        const char * data = (const char *) w->data;
        const size_t row  = plan.kind->packed ? plan.k/plan.kind->block*plan.kind->block_bytes : w->nb[1];
        if (plan.ids) {
            return { data + g*w->nb[2], row };
        }
        const int64_t i2 = g % plan.x->ne[2], i3 = g / plan.x->ne[2];
        return { data + i2/(plan.x->ne[2]/w->ne[2])*w->nb[2] + i3/(plan.x->ne[3]/w->ne[3])*w->nb[3], row };
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
    const int64_t n_tokens = plan.kind->tokens;
    for (int64_t g = 0; g < plan.n_groups; ++g) {
        const int64_t n = groups.n(g), tile0 = groups.tile0(g);
        for (int64_t t = 0; t < plan.tiles(n); ++t) {
            if ((tile0 + t) % nth != ith) {
                continue;
            }
            const float * rows[TOKENS_MAX] = {};
            for (int64_t i = 0; i < std::min<int64_t>(n_tokens, n - t*n_tokens); ++i) {
                float * to;
                groups.find(g, t*n_tokens + i, rows + i, &to);
            }
            for (int64_t k = 0; k < plan.k; k += plan.kind->chunk) {
                plan.kind->pack(rows, k, plan.terms(k), work + plan.act(tile0 + t, k));
            }
        }
    }
}

// Rows of weights with some tiles of a group.
struct matmul_unit {
    const matmul_plan   & plan;
    const matmul_groups & groups;
    const weight_kind   & kind;
    const weight_rows     weights;

    int64_t g, row0, n_rows; // of weights
    int64_t tile0, n;        // tokens
    int64_t next_row;        // of the next unit: a guess, since other threads take units as well

    matmul_unit(const matmul_plan & plan, const matmul_groups & groups, int64_t g, int64_t index, int nth) :
            plan(plan), groups(groups), kind(*plan.kind), weights(groups.weights(g)), g(g) {
        row0     = index % plan.n_row_units * ROWS;
        tile0    = index / plan.n_row_units * plan.tiles_per_unit;
        n        = std::min(groups.n(g) - tile0*kind.tokens, plan.tiles_per_unit*kind.tokens);
        n_rows   = std::min<int64_t>(plan.n_rows - row0, ROWS);
        next_row = row0 + nth*ROWS;
    }

    // Terms from k on of rows `first` to `last`, which are unpacked next; they are a row apart, which processors do not follow.
    void fetch_weights(int64_t k, int64_t first, int64_t last) const {
        const size_t  chunk_bytes = plan.terms(0)/kind.block*kind.block_bytes;
        const bool    is_next = k >= plan.k;
        const int64_t from    = is_next ? next_row : row0;
        const int64_t start   = is_next ? 0 : k/kind.block*kind.block_bytes;
        const int64_t n_near  = kind.together;
        for (int64_t r = from + first; r < std::min(from + last, plan.n_rows); ++r) {
            const char * x = weights.data + r/n_near*n_near*weights.row + start*n_near + r%n_near*chunk_bytes;
            for (size_t i = 0; i < chunk_bytes; i += 64) {
                __builtin_prefetch(x + i, 0, 2);
            }
        }
    }

    // where the results of a tile go; they come into the cache while those of the tiles before are computed
    void find_tile(int64_t t, float ** to) const {
        for (int64_t i = t*kind.tokens; i < std::min(n, (t + 1)*kind.tokens); ++i) {
            const float * from;
            groups.find(g, tile0*kind.tokens + i, &from, to + i%kind.tokens);
            for (int64_t j = 0; j < n_rows; j += 16) {
                __builtin_prefetch(to[i%kind.tokens] + row0 + j, 1);
            }
        }
    }

    // panels and c: room of this thread
    void run(const char * work, char * panels, float * c) const {
        float * to[2][TOKENS_MAX];
        for (int64_t k = 0; k < plan.k; k += kind.chunk) {
            const int64_t n_terms = plan.terms(k);
            const bool    is_last = k + n_terms >= plan.k;
            for (int64_t r = 0; r < n_rows; r += kind.rows) {
                kind.unpack(weights, row0 + r, std::min<int64_t>(n_rows - r, kind.rows), k, n_terms, panels + r/kind.rows*kind.panel_size);
            }
            if (is_last) {
                find_tile(0, to[0]);
            }
            const int64_t n_tiles = plan.tiles(n);
            for (int64_t t = 0; t < n_tiles; ++t) {
                const char * a = work + plan.act(groups.tile0(g) + tile0 + t, k);
                float * y = c + t*kind.tokens*ROWS;
                const int64_t tokens = std::min<int64_t>(kind.tokens, n - t*kind.tokens);
                if (is_last) {
                    find_tile(t + 1, to[(t + 1)%2]);
                }
                fetch_weights(k + n_terms, t*ROWS/n_tiles, (t + 1)*ROWS/n_tiles);
                for (int64_t r = 0; r < n_rows; r += kind.rows) {
                    kind.product((int) tokens, panels + r/kind.rows*kind.panel_size, a, y + r, ROWS, (int) matmul_plan::blocks(n_terms), k == 0);
                }
                for (int64_t i = 0; is_last && i < tokens; ++i) {
                    memcpy(to[t%2][i] + row0, y + i*ROWS, n_rows*sizeof(float));
                }
            }
        }
    }
};

static constexpr int64_t TOKENS_MIN = 9; // fewer are decoding

// Tokens from which on unpacking pays with vectors, by measurement; ggml's products are for fewer. n_terms: of a sum.
static int64_t tokens_min(ggml_type type, int64_t n_terms) {
#if !defined(GGML_CLEX_PANEL_512)
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
        case GGML_TYPE_F16:
#if defined(GGML_CLEX_PANEL_PAIRS)
            return n_terms > 256 ? 48 : 16;
#else // at best the units multiply F32, and with long sums ggml's products are as near to what they can do
            return n_terms > 256 ? INT64_MAX : 64;
#endif
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
            return TOKENS_MIN;
    }
}

static constexpr int64_t TOKENS_OF_EXPERT = 6; // on average

// Tiles have 16 tokens or nothing; with fewer, what has them in vectors does not wait for the rest.
static constexpr int64_t TILE_TOKENS_MIN = 16;

static bool is_disabled() {
    static const bool disabled = getenv("GGML_CLEX_MATMUL_DISABLE") != nullptr;
    return disabled;
}

static bool has_right_shape(const ggml_tensor * dst) {
    const ggml_tensor * w = dst->src[0];
    const ggml_tensor * x = dst->src[1];
    if (dst->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(dst, 1) == GGML_HINT_SRC0_IS_HADAMARD) {
        return false; // which ggml does with additions alone
    }
    return x->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float) &&
        w->nb[0] == ggml_type_size(w->type);
}

// of a plain product, or of each expert on average where their number decides
struct token_counts {
    int64_t all, of_expert;

    explicit token_counts(const ggml_tensor * dst) {
        const ggml_tensor * ids = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr;
        all       = ids ? ids->ne[1] : dst->src[1]->ne[1];
        of_expert = ids ? ids->ne[0]*ids->ne[1]/dst->src[0]->ne[2] : INT64_MAX;
    }
};

// What computes a node: null where it is ggml, whose name is told then.
static const weight_kind * choose_kind(const ggml_tensor * dst, const char ** otherwise = nullptr) {
    if (is_disabled() || (dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID)) {
        return nullptr;
    }
    const ggml_tensor * w = dst->src[0];
    const token_counts tokens(dst);
    if (tokens.all < TOKENS_MIN || !has_right_shape(dst)) {
        return nullptr;
    }
    const weight_kinds kinds = weight_kinds_of(w);
    if (otherwise) {
        *otherwise = kinds.otherwise;
    }
    if (tokens.of_expert < TOKENS_OF_EXPERT) {
        return nullptr;
    }
    if (kinds.tiles && w->ne[0] % kinds.tiles->block == 0 && tokens.all >= TILE_TOKENS_MIN) {
        return kinds.tiles;
    }
    if (!kinds.vectors || w->ne[0] % kinds.vectors->block != 0) {
        return nullptr;
    }
    return tokens.all >= tokens_min(w->type, w->ne[0]) ? kinds.vectors : nullptr;
}

// Once for each type of weights and what computes it.
static void tell(const ggml_tensor * weights, const char * name) {
    static std::atomic<const char *> said[GGML_TYPE_COUNT][4];
    for (auto & slot : said[weights->type]) {
        const char * before = slot.load();
        if (!before && !slot.compare_exchange_strong(before, name)) {
            before = slot.load();
        }
        if (before && strcmp(before, name) == 0) {
            return;
        }
        if (!before) {
            GGML_LOG_INFO("ggml_clex_matmul: batches with weights of type %s: %s\n", ggml_type_name(weights->type), name);
            return;
        }
    }
}

size_t ggml_clex_matmul_work_size(const ggml_tensor * dst, int n_threads) {
    const weight_kind * kind = choose_kind(dst);
    return kind ? matmul_plan(dst, kind, n_threads).size : 0;
}

static void run_units(const ggml_compute_params * params, const matmul_plan & plan, const matmul_groups & groups, char * work) {
    char * room = work + plan.thread_start + params->ith*plan.thread_size;
    int64_t group = 0;
    for (int64_t unit = params->ith;; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        while (group < plan.n_groups && unit >= groups.unit0(group + 1)) {
            ++group;
        }
        if (group == plan.n_groups) {
            return;
        }
        matmul_unit(plan, groups, group, unit - groups.unit0(group), params->nth).run(work, room, (float *) (room + plan.panels_size));
    }
}

bool ggml_clex_matmul(const ggml_compute_params * params, ggml_tensor * dst) {
    const char * name = nullptr;
    const weight_kind * kind = params->use_ref ? nullptr : choose_kind(dst, &name);
    if (params->ith == 0 && (kind || name) && dst->src[0]->buffer && dst->src[0]->buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
        tell(dst->src[0], kind ? kind->name : name);
    }
    if (!kind) {
        return false;
    }
    const matmul_plan plan(dst, kind, ggml_clex_planned_threads(params->threadpool));
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

    if (kind->begin) {
        kind->begin();
    }
    run_units(params, plan, groups, work);
    if (kind->end) {
        kind->end();
    }
    return true;
}

const char * ggml_clex_matmul_units(void) {
    return is_disabled() ? "ggml" : name_of_units();
}

#else

const char * ggml_clex_matmul_units(void) {
    return "ggml";
}

size_t ggml_clex_matmul_work_size(const ggml_tensor *, int) {
    return 0;
}

bool ggml_clex_matmul(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
