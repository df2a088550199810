// Flash attention on the CPU for batches of many queries.
//
// A unit of work is some queries of some of the heads that share a KV head: the columns. K and V are converted to F32
// 64 positions at a time, once for all columns of the unit. The scores of a tile are kept transposed, [position][column]:
// K then needs no transposition, and the softmax has a column in each lane of its vectors.

#include "ggml-clex-prefill.h"
#include "ggml-clex-node.h"
#include "ggml-clex-pair-attn.h"
#include "ggml-clex-threads.h"
#include "ggml-clex-tile-attn.h"
#include "ggml-clex-vec.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstdlib>

#ifndef GGML_CLEX_NO_VEC

static const int64_t N_QUERIES_MIN = 9;   // fewer are decoding
static const int64_t TILE          = 64;  // positions, and columns, of a tile of scores
static const int64_t COLUMNS       = 512; // of a unit, at most
static const int64_t COLUMN_BYTES  = 256 << 10; // of their queries and results, which stay in the L2 cache

// of the block of results that stays in registers
static const int VEC_ROWS    = VEC_REGISTERS == 32 && VEC == 16 ? 8 : 4;
static const int VEC_COLUMNS = VEC_REGISTERS == 32 && VEC == 4 ? 4 : 2;
static_assert(TILE % (VEC_COLUMNS*VEC) == 0 && TILE % VEC_ROWS == 0, "a tile is made of whole blocks");
static_assert(VEC % VEC_ROWS == 0, "the rows of the second product are columns of the first");

// Brings the rows of K and V that are converted next near, a few lines of the cache at a time while a product is computed: they are as far apart as
// all heads are long, which processors do not follow.
class row_fetcher {
    static constexpr size_t LINE = 64;

    struct rows {
        const char * data;
        size_t       stride;
        size_t       bytes; // of a row
        int64_t      n;
    };
    rows    from[2] = {};
    int     which   = 2;
    int64_t row     = 0;
    size_t  at      = 0;

public:
    // n positions from `first` on
    void begin(const ggml_clex_node & node, int64_t head, int64_t stream, int64_t first, int64_t n) {
        int i = 0;
        for (const ggml_tensor * t : { node.k, node.v }) {
            from[i++] = { ggml_clex_node::row(t, stream, head, first), t->nb[1], ggml_row_size(t->type, t->ne[0]), n };
        }
        which = n > 0 ? 0 : 2;
        row   = 0;
        at    = 0;
    }

    void fetch(int n) {
        for (; n > 0 && which < 2; --n) {
            const rows & x = from[which];
            __builtin_prefetch(x.data + row*x.stride + at, 0, 2);
            at += LINE;
            if (at >= x.bytes) {
                at = 0;
                if (++row == x.n) {
                    row = 0;
                    ++which;
                }
            }
        }
    }
};

static const int LINES = 8; // that are fetched with each block of results

// C[ROWS x N*VEC] (+)= A * B over k terms; A(i, p) is a[i*a_row + p*a_term]
//
//                        b  [k][N*VEC], rows b_row apart
//                      |....|....|  <- one row at a time in N registers
//   a [ROWS][k]        |....|....|
//   x x x x  ->  c     |....|....|  ROWS*N registers of sums: ROWS products for each number of B that is loaded
//   x x x x            |....|....|
//
//   scores = K Q: a is the tile of K, row by row        b is q,      [size_k][TILE]     c is [positions][TILE]
//   o     += P V: a is the scores, column by column     b is V's tile, [positions][size_v]  c is [columns][size_v]
template <int ROWS, int N>
static void product_block(float * c, int64_t c_row, const float * a, int64_t a_row, int64_t a_term, const float * b,
        int64_t b_row, int64_t k, bool add) {
    vec sum[ROWS][N];
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            sum[i][j] = add ? vec_load(c + i*c_row + j*VEC) : vec_set(0.0f);
        }
    }
    for (int64_t p = 0; p < k; ++p) {
        vec row[N];
        for (int j = 0; j < N; ++j) {
            row[j] = vec_load(b + p*b_row + j*VEC);
        }
        for (int i = 0; i < ROWS; ++i) {
            const vec x = vec_set(a[i*a_row + p*a_term]);
            for (int j = 0; j < N; ++j) {
                sum[i][j] = vec_fma(x, row[j], sum[i][j]);
            }
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int j = 0; j < N; ++j) {
            vec_store(c + i*c_row + j*VEC, sum[i][j]);
        }
    }
}

// the same for any multiples of VEC_ROWS rows and VEC columns; N vectors at a time, then half as many
template <int N = VEC_COLUMNS>
static void product(float * c, int64_t c_row, const float * a, int64_t a_row, int64_t a_term, const float * b,
        int64_t b_row, int64_t k, int64_t rows, int64_t columns, bool add, row_fetcher & next) {
    const int64_t whole = columns / (N*VEC) * (N*VEC);
    for (int64_t j = 0; j < whole; j += N*VEC) {
        for (int64_t i = 0; i < rows; i += VEC_ROWS) {
            next.fetch(LINES);
            product_block<VEC_ROWS, N>(c + i*c_row + j, c_row, a + i*a_row, a_row, a_term, b + j, b_row, k, add);
        }
    }
    if constexpr (N > 1) {
        if (whole < columns) {
            product<N/2>(c + whole, c_row, a, a_row, a_term, b + whole, b_row, k, rows, columns - whole, add, next);
        }
    }
}

//
// rows of K and V as F32
//

typedef void (*row_to_float)(const char * row, float * y, int n);

static void row_from_f32(const char * row, float * y, int n) {
    memcpy(y, row, n*sizeof(float));
}

static void row_from_f16(const char * row, float * y, int n) {
    if (n % VEC == 0) {
        convert<type_f16>(row, y, n);
    } else {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, y, n);
    }
}

static void row_from_bf16(const char * row, float * y, int n) {
    ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) row, y, n);
}

// those of floats take any number of them, rows of blocks are whole vectors
static row_to_float row_converter(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return row_from_f32;
        case GGML_TYPE_F16:  return row_from_f16;
        case GGML_TYPE_BF16: return row_from_bf16;
        case GGML_TYPE_Q8_0: return convert<type_q8_0>;
        case GGML_TYPE_Q4_0: return convert<type_q4_0>;
        case GGML_TYPE_Q4_1: return convert<type_q4_1>;
        case GGML_TYPE_Q5_0: return convert<type_q5_0>;
        case GGML_TYPE_Q5_1: return convert<type_q5_1>;
        default:             return nullptr;
    }
}

// rows from `first` on of one KV head, with stride y_row; the rows up to a multiple of VEC_ROWS are 0
static void convert_tile(const ggml_tensor * t, row_to_float convert, int64_t first, int64_t n, int64_t head, int64_t stream,
        float * y, int64_t y_row) {
    const char * data = ggml_clex_node::row(t, stream, head, first);
    for (int64_t i = 0; i < n; ++i) {
        convert(data + i*t->nb[1], y + i*y_row, t->ne[0]);
    }
    memset(y + n*y_row, 0, (GGML_PAD(n, VEC_ROWS) - n)*y_row*sizeof(float));
}

//
// the shape of the work
//

//
// the two products: in F32 by vectors, or in tile registers
//

// The two products of a unit. What they take is packed into a room of the thread's work buffer, and rows are fetched while they compute.
// These are of F32, which is taken where it is.
struct attn_float_products {
    int64_t       size_k, size_v;
    row_fetcher & next;
    const float * q[COLUMNS/TILE] = {}, * k = nullptr, * v = nullptr;

    static size_t size(int64_t, int64_t) { return 0; } // in numbers of 4 bytes

    attn_float_products(int64_t size_k, int64_t size_v, float *, row_fetcher & next) : size_k(size_k), size_v(size_v), next(next) {}

    static void begin() {}
    static void end() {}

    void take_queries(int64_t tile, const float * x) { q[tile] = x; }
    void take_keys   (const float * x, int64_t)      { k = x; }
    void take_values (const float * x, int64_t)      { v = x; }

    void scores(float * c, int64_t tile, int64_t n, int64_t n_columns) const {
        product(c, TILE, k, size_k, 1, q[tile], TILE, size_k, GGML_PAD(n, VEC_ROWS), GGML_PAD(n_columns, VEC), false, next);
    }
    void add_values(float * o, const float * weights, int64_t n, int64_t n_columns) {
        product(o, size_v, weights, 1, TILE, v, size_v, n, GGML_PAD(n_columns, VEC_ROWS), size_v, true, next);
    }
};

// Both other kinds of products keep 12 to 16 bits of a number, and F16 has 11: they lose less than the cache has lost already. A cache of F32 has lost nothing.
[[maybe_unused]] static bool wants_sixteen_bits(const ggml_clex_node & node) {
    static const bool wants_f32 = getenv("GGML_CLEX_ATTN_F32") != nullptr;
    return !wants_f32 && node.k->type != GGML_TYPE_F32 && node.v->type != GGML_TYPE_F32;
}

#if defined(GGML_CLEX_PANEL) && defined(GGML_CLEX_TILES)

static bool takes_tiles(const ggml_clex_node & node) {
    return node.dk % 16 == 0 && wants_sixteen_bits(node) && clex_tiles::available() != clex_tiles::units::none;
}

struct attn_tile_products {
    int64_t size_k, size_v;
    clex_tiles::operand q[COLUMNS/TILE], k, p, v;

    static int64_t k_bytes(int64_t size_k) { return 2*GGML_PAD(size_k, 32); } // of a row

    static size_t size(int64_t size_k, int64_t size_v) {
        using clex_tiles::operand;
        return (operand::bytes(COLUMNS/TILE*GGML_PAD(size_k, 32)/2, 4*TILE) + operand::bytes(TILE, k_bytes(size_k)) +
            operand::bytes(TILE, 2*TILE) + operand::bytes(TILE/2, 4*size_v) + 64)/sizeof(float);
    }

    attn_tile_products(int64_t size_k, int64_t size_v, float * room, row_fetcher &) : size_k(size_k), size_v(size_v) {
        char * next = (char *) GGML_PAD((uintptr_t) room, 64);
        const auto take = [&](int64_t rows, int64_t stride) {
            char * x = next;
            next += clex_tiles::operand::bytes(rows, stride);
            return clex_tiles::operand::at(x, rows, stride);
        };
        for (auto & tile : q) {
            tile = take(GGML_PAD(size_k, 32)/2, 4*TILE);
        }
        k = take(TILE, k_bytes(size_k));
        p = take(TILE, 2*TILE);
        v = take(TILE/2, 4*size_v);
    }

    static bool in_software() { return clex_tiles::available() == clex_tiles::units::software; }
    static void begin() { in_software() ? clex_tiles::software::begin() : clex_tiles::hardware::begin(); }
    static void end()   { in_software() ? clex_tiles::software::end()   : clex_tiles::hardware::end(); }

    void take_queries(int64_t tile, const float * x) { clex_tiles::pack_pairs(x, TILE, size_k, TILE, q[tile]); }
    void take_keys   (const float * x, int64_t n)    { clex_tiles::pack_rows (x, size_k, n, size_k, k); }
    void take_values (const float * x, int64_t n)    { clex_tiles::pack_pairs(x, size_v, n, size_v, v); }

    void multiply(float * c, int64_t c_row, const clex_tiles::operand & a, const clex_tiles::operand & b, int64_t k, int64_t rows, int64_t columns,
            bool add) const {
        const auto f = in_software() ? clex_tiles::multiply<clex_tiles::software> : clex_tiles::multiply<clex_tiles::hardware>;
        f(c, c_row, a, b, k, rows, columns, add);
    }
    void scores(float * c, int64_t tile, int64_t n, int64_t n_columns) const { multiply(c, TILE, k, q[tile], size_k, n, n_columns, false); }
    void add_values(float * o, const float * weights, int64_t n, int64_t n_columns) {
        clex_tiles::pack_transposed(weights, TILE, n, GGML_PAD(n_columns, 16), p);
        multiply(o, size_v, p, v, n, n_columns, size_v, true);
    }
};

#else

using attn_tile_products = attn_float_products;

static bool takes_tiles(const ggml_clex_node &) {
    return false;
}

#endif

#if defined(GGML_CLEX_PAIRS)

static bool takes_pairs(const ggml_clex_node & node) {
    return node.dk % clex_pairs::LANES == 0 && wants_sixteen_bits(node);
}

// pairs of numbers of 16 bits, and what brings the sums back
struct attn_pair_products {
    int64_t size_k, size_v;
    row_fetcher & next;
    int32_t * q; // [COLUMNS/TILE][size_k/2][TILE]
    int32_t * k; // [TILE][size_k/2]
    int32_t * p; // [TILE/2][TILE]
    int32_t * v; // [TILE/2][size_v]
    float * q_back, * k_back, * p_back, * v_back;

    static size_t size(int64_t size_k, int64_t size_v) {
        return COLUMNS*(size_k/2 + 1) + TILE*(size_k/2 + 1) + TILE*(TILE/2 + 1) + TILE/2*size_v + TILE;
    }

    attn_pair_products(int64_t size_k, int64_t size_v, float * room, row_fetcher & next) : size_k(size_k), size_v(size_v), next(next) {
        const auto take = [&](int64_t n) { float * x = room; room += n; return x; };
        q = (int32_t *) take(COLUMNS*size_k/2);
        k = (int32_t *) take(TILE*size_k/2);
        p = (int32_t *) take(TILE*TILE/2);
        v = (int32_t *) take(TILE/2*size_v);
        q_back = take(COLUMNS);
        k_back = take(TILE);
        p_back = take(TILE);
        v_back = take(TILE);
    }

    static void begin() {}
    static void end() {}

    void take_queries(int64_t tile, const float * x) {
        for (int64_t j = 0; j < TILE; j += VEC) {
            clex_pairs::pack_columns(x + j, TILE, size_k, q + tile*size_k/2*TILE + j, TILE, q_back + tile*TILE + j);
        }
    }
    void take_keys(const float * x, int64_t n) { // whole blocks of them, as convert_tile leaves them
        for (int64_t i = 0; i < GGML_PAD(n, VEC_ROWS); ++i) {
            k_back[i] = clex_pairs::pack_row(x + i*size_k, size_k, k + i*size_k/2);
        }
    }
    void take_values(const float * x, int64_t n) {
        clex_pairs::pack_values(x, n, size_v, v, v_back);
    }

    void scores(float * c, int64_t tile, int64_t n, int64_t n_columns) const {
        const float * back = q_back + tile*TILE;
        clex_pairs::multiply<VEC_ROWS, VEC_COLUMNS>(k, size_k/2, 1, q + tile*size_k/2*TILE, TILE, size_k/2, GGML_PAD(n, VEC_ROWS), GGML_PAD(n_columns, VEC), 0,
            [&](int64_t i, int64_t j, vec x) { vec_store(c + i*TILE + j, vec_mul(x, vec_mul(vec_set(k_back[i]), vec_load(back + j)))); },
            [&] { next.fetch(LINES); });
    }
    void add_values(float * o, const float * weights, int64_t n, int64_t n_columns) {
        for (int64_t j = 0; j < n_columns; j += VEC) {
            clex_pairs::pack_weights(weights + j, TILE, n, v_back, p + j, TILE, p_back + j);
        }
        clex_pairs::multiply<VEC_ROWS, VEC_COLUMNS>(p, 1, TILE, v, size_v, (n + 1)/2, GGML_PAD(n_columns, VEC_ROWS), size_v, 0,
            [&](int64_t i, int64_t j, vec x) {
                float * y = o + i*size_v + j;
                vec_store(y, vec_fma(x, vec_set(p_back[i]), vec_load(y)));
            },
            [&] { next.fetch(LINES); });
    }
};

#else

using attn_pair_products = attn_float_products;

static bool takes_pairs(const ggml_clex_node &) {
    return false;
}

#endif

// A unit is some heads of one KV head times some queries, its columns: column = head*n_queries + query.
//
//              column tile 0 (TILE)        column tile 1
//   q:         [size_k][TILE], scaled      [size_k][TILE]        one column in each lane of a vector
//   scores:    [TILE positions][TILE], for one column tile at a time
//   o:         [TILE][size_v]              [TILE][size_v]        not yet divided by the sums
//   k_tile, v_tile: [TILE positions][size], converted once for all column tiles
//
// It goes through the positions TILE at a time, skipping those that no column sees.
struct attn_plan {
    int64_t size_k, size_v; // of a head; V padded to whole vectors
    int64_t n_columns;      // of a unit, at most
    int64_t n_heads;        // of a unit
    int64_t n_queries;      // of a unit
    int64_t n_head_blocks, n_query_blocks;
    int64_t n_units;
    bool    in_tiles;       // whether products are computed in tile registers
    bool    in_pairs;       // or with numbers of 16 bits

    attn_plan(const ggml_clex_node & node, int n_threads) {
        in_tiles = takes_tiles(node);
        in_pairs = !in_tiles && takes_pairs(node);
        size_k   = node.dk;
        size_v   = GGML_PAD(node.dv, in_tiles ? 16 : VEC);

        n_columns = std::clamp<int64_t>(COLUMN_BYTES/((size_k + size_v)*sizeof(float))/TILE*TILE, TILE, COLUMNS);
        n_heads   = std::min<int64_t>(node.group(), n_columns);
        n_queries = std::min<int64_t>(node.n_query, n_columns/n_heads);
        if (n_queries > TILE) {
            n_queries = n_queries/TILE*TILE;
        }
        while (true) {
            n_head_blocks  = (node.group() + n_heads - 1)/n_heads;
            n_query_blocks = (node.n_query + n_queries - 1)/n_queries;
            n_units        = n_head_blocks*n_query_blocks*node.n_head_kv*node.n_stream;
            // several for each thread, since a mask makes some of them short
            if (n_units >= 4*n_threads || (n_queries == 1 && n_heads == 1)) {
                break;
            }
            if (n_queries > 16 || n_heads == 1) {
                n_queries = (n_queries + 1)/2;
            } else {
                n_heads = (n_heads + 1)/2;
            }
        }
    }

    // floats for one thread; the same for any number of threads, since there may turn out to be fewer than planned
    size_t size() const {
        return n_columns*(size_k + size_v + 2) + TILE*(size_k + size_v + TILE) + (in_tiles ? attn_tile_products::size(size_k, size_v) :
            in_pairs ? attn_pair_products::size(size_k, size_v) : attn_float_products::size(size_k, size_v));
    }
};

// one thread's part of the work buffer
struct attn_scratch {
    float * k_tile;
    float * v_tile;
    float * scores;
    float * q;   // of the unit, as are the rest
    float * o;
    float * max;
    float * sum;
    float * packed; // what the products have

    attn_scratch(const attn_plan & plan, float * next) {
        const auto take = [&](int64_t n) { float * x = next; next += n; return x; };
        k_tile = take(TILE*plan.size_k);
        v_tile = take(TILE*plan.size_v);
        scores = take(TILE*TILE);
        q      = take(plan.n_columns*plan.size_k);
        o      = take(plan.n_columns*plan.size_v);
        max    = take(plan.n_columns);
        sum    = take(plan.n_columns);
        packed = next;

        memset(v_tile, 0, TILE*plan.size_v*sizeof(float)); // what pads the rows stays 0
    }
};

// which heads and queries of which stream
struct attn_unit {
    int64_t head_kv, stream;
    int64_t head0, query0;
    int64_t n_queries, n_columns;

    attn_unit(const ggml_clex_node & node, const attn_plan & plan, int64_t index) {
        const auto next_index = [&](int64_t n) { const int64_t i = index % n; index /= n; return i; };
        const int64_t head_block = next_index(plan.n_head_blocks);

        head_kv = next_index(node.n_head_kv);
        stream  = next_index(node.n_stream);
        // the last first: with a causal mask they take longest
        query0  = (plan.n_query_blocks - 1 - index)*plan.n_queries;
        head0   = head_kv*node.group() + head_block*plan.n_heads;

        n_queries = std::min(plan.n_queries, node.n_query - query0);
        n_columns = std::min(plan.n_heads, (head_kv + 1)*node.group() - head0)*n_queries;
    }

    int64_t head (int64_t column) const { return head0  + column/n_queries; }
    int64_t query(int64_t column) const { return query0 + column%n_queries; }
};

// How each row of the mask is in each tile of positions. All heads and units look here instead of at the mask, which is longer than they are.
class mask_looks {
    const ggml_clex_node & node;
    uint8_t              * bits;
    const int64_t          n_tiles, n_heads, n_rows; // n_rows: of all heads and streams that have masks

public:
    enum { SEEN = 1, BIASED = 2 };

    mask_looks(const ggml_clex_node & node, void * work) :
        node(node), bits((uint8_t *) work), n_tiles((node.n_kv + TILE - 1)/TILE), n_heads(node.mask ? node.mask->ne[2] : 0),
        n_rows(node.mask ? node.mask->ne[3]*n_heads*node.n_query : 0) {}

    size_t size() const { return n_rows*n_tiles; }

    const uint8_t * row(int64_t stream, int64_t head, int64_t query) const {
        return bits + ((stream % node.mask->ne[3]*n_heads + head % n_heads)*node.n_query + query)*n_tiles;
    }

    void look(int ith, int nth) {
        for (int64_t r = ith; r < n_rows; r += nth) {
            const ggml_fp16_t * mask = node.mask_row(r/node.n_query/n_heads, r/node.n_query % n_heads, r % node.n_query);
            for (int64_t t = 0; t < n_tiles; ++t, mask += TILE) {
                uint16_t seen = 0, biased = 0;
                for (int64_t j = 0; j < std::min(TILE, node.n_kv - t*TILE); ++j) {
                    seen   |= mask[j] ^ GGML_CLEX_HIDDEN;
                    biased |= mask[j];
                }
                bits[r*n_tiles + t] = (seen ? SEEN : 0) | (biased ? BIASED : 0);
            }
        }
    }
};

static bool attn_prefill_applies(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    return q->ne[1] >= N_QUERIES_MIN && q->type == GGML_TYPE_F32 && k->ne[2] == v->ne[2] &&
        row_converter(k->type) && row_converter(v->type);
}

size_t ggml_clex_attn_prefill_work_size(const ggml_tensor * dst, int n_threads) {
    if (!attn_prefill_applies(dst)) {
        return 0;
    }
    const ggml_clex_node node(dst);
    return n_threads*attn_plan(node, n_threads).size()*sizeof(float) + mask_looks(node, nullptr).size();
}

//
// one tile of columns
//

struct attn_columns {
    int64_t n;

    const ggml_fp16_t * mask [TILE];
    const uint8_t     * looks[TILE];
    float               slope[TILE];

    float * q; // [size_k][TILE], scaled
    float * o; // [TILE][size_v], not yet divided by the sum
    float * max;
    float * sum;

    enum { HIDDEN, SEEN, MASKED } tile; // how the mask is where it was last looked at
};

// columns from `first` on of the unit, nothing attended yet
static void begin_columns(attn_columns & c, const ggml_clex_node & node, const attn_plan & plan, const attn_unit & unit,
        const attn_scratch & scratch, const mask_looks & looks, int64_t first) {
    c.n    = std::min(TILE, unit.n_columns - first);
    c.q    = scratch.q + first*plan.size_k;
    c.o    = scratch.o + first*plan.size_v;
    c.max  = scratch.max + first;
    c.sum  = scratch.sum + first;
    c.tile = attn_columns::SEEN;
    memset(c.q, 0, TILE*plan.size_k*sizeof(float));
    memset(c.o, 0, TILE*plan.size_v*sizeof(float));
    std::fill_n(c.max, TILE, -INFINITY);
    std::fill_n(c.sum, TILE, 0.0f);
    for (int64_t i = 0; i < c.n; ++i) {
        const int64_t head = unit.head(first + i), query = unit.query(first + i);
        const float * x = node.query(unit.stream, head, query);
        for (int64_t d = 0; d < plan.size_k; ++d) {
            c.q[d*TILE + i] = x[d]*node.scale;
        }
        c.mask [i] = node.mask ? node.mask_row(unit.stream, head, query) : nullptr;
        c.looks[i] = node.mask ? looks.row(unit.stream, head, query) : nullptr;
        c.slope[i] = node.slope(head);
    }
}

// where a tile of positions is
static void look_at_mask(attn_columns & c, int64_t position) {
    uint8_t any = 0;
    for (int64_t i = 0; i < c.n; ++i) {
        any |= c.looks[i][position/TILE];
    }
    c.tile = !(any & mask_looks::SEEN) ? attn_columns::HIDDEN : any & mask_looks::BIASED ? attn_columns::MASKED : attn_columns::SEEN;
}

// soft cap and mask: scores of n positions from `first` on become logits
static void make_logits(const attn_columns & c, float softcap, float * scores, int64_t first, int64_t n) {
    if (softcap != 0.0f) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < c.n; ++j) {
                scores[i*TILE + j] = softcap*tanhf(scores[i*TILE + j]);
            }
        }
    }
    if (c.tile == attn_columns::MASKED) {
        for (int64_t j = 0; j < c.n; ++j) {
            float bias[TILE];
            ggml_cpu_fp16_to_fp32(c.mask[j] + first, bias, n);
            for (int64_t i = 0; i < n; ++i) {
                scores[i*TILE + j] += c.slope[j]*bias[i];
            }
        }
    }
}

// the softmax as far as it goes with n more positions: scores become weights
static void soft_max(attn_columns & c, float * scores, int64_t n, int64_t size_v) {
    for (int64_t j = 0; j < GGML_PAD(c.n, VEC); j += VEC) {
        vec max = vec_load(c.max + j);
        for (int64_t i = 0; i < n; ++i) {
            max = vec_max(max, vec_load(scores + i*TILE + j));
        }
        float before[VEC], after[VEC];
        vec_store(before, vec_load(c.max + j));
        vec_store(after, max);
        vec_store(c.max + j, max);
        for (int64_t i = 0; i < VEC; ++i) {
            if (after[i] > before[i] && before[i] != -INFINITY) {
                const float scale = expf(before[i] - after[i]);
                c.sum[j + i] *= scale;
                ggml_vec_scale_f32(size_v, c.o + (j + i)*size_v, scale);
            }
            // where nothing is seen yet, every weight shall be 0
            after[i] = after[i] == -INFINITY ? 0.0f : after[i];
        }
        max = vec_load(after);
        vec sum = vec_load(c.sum + j);
        for (int64_t i = 0; i < n; ++i) {
            const vec weight = vec_exp(vec_sub(vec_load(scores + i*TILE + j), max));
            vec_store(scores + i*TILE + j, weight);
            sum = vec_add(sum, weight);
        }
        vec_store(c.sum + j, sum);
    }
}

// write the results of columns from `first` on of the unit
static void end_columns(attn_columns & c, const ggml_clex_node & node, const attn_plan & plan, const attn_unit & unit, int64_t first) {
    for (int64_t i = 0; i < c.n; ++i) {
        const int64_t head = unit.head(first + i);
        float factor = 1.0f;
        if (node.has_sink()) {
            const float sink = node.sink(head);
            const float top  = std::max(c.max[i], sink);
            factor   = expf(c.max[i] - top);
            c.sum[i] = c.sum[i]*factor + expf(sink - top);
        }
        factor = c.sum[i] == 0.0f ? 0.0f : factor/c.sum[i];
        float * out = node.result(unit.stream, head, unit.query(first + i));
        for (int64_t d = 0; d < node.dv; ++d) {
            out[d] = c.o[i*plan.size_v + d]*factor;
        }
    }
}

template <typename Products>
static void run_unit(const ggml_clex_node & node, const attn_plan & plan, const attn_unit & unit, const attn_scratch & scratch,
        const mask_looks & looks) {
    const int64_t size_k = plan.size_k;
    const int64_t size_v = plan.size_v;

    const row_to_float convert_k = row_converter(node.k->type);
    const row_to_float convert_v = row_converter(node.v->type);

    attn_columns columns[COLUMNS/TILE];
    row_fetcher next;
    Products    products(size_k, size_v, scratch.packed, next);
    const int64_t n_tiles = (unit.n_columns + TILE - 1)/TILE;
    for (int64_t t = 0; t < n_tiles; ++t) {
        begin_columns(columns[t], node, plan, unit, scratch, looks, t*TILE);
        products.take_queries(t, columns[t].q);
    }

    for (int64_t first = 0; first < node.n_kv; first += TILE) {
        const int64_t n = std::min(TILE, node.n_kv - first);
        bool all_hidden = true;
        for (int64_t t = 0; t < n_tiles; ++t) {
            if (node.mask) {
                look_at_mask(columns[t], first);
            }
            all_hidden = all_hidden && columns[t].tile == attn_columns::HIDDEN;
        }
        if (all_hidden) {
            continue;
        }
        convert_tile(node.k, convert_k, first, n, unit.head_kv, unit.stream, scratch.k_tile, size_k);
        convert_tile(node.v, convert_v, first, n, unit.head_kv, unit.stream, scratch.v_tile, size_v);
        next.begin(node, unit.head_kv, unit.stream, first + n, std::min(TILE, node.n_kv - first - n));
        products.take_keys(scratch.k_tile, n);
        products.take_values(scratch.v_tile, n);

        for (int64_t t = 0; t < n_tiles; ++t) {
            attn_columns & c = columns[t];
            if (c.tile == attn_columns::HIDDEN) {
                continue;
            }
            products.scores(scratch.scores, t, n, c.n);
            make_logits(c, node.softcap, scratch.scores, first, n);
            soft_max(c, scratch.scores, n, size_v);
            products.add_values(c.o, scratch.scores, n, c.n);
        }
    }

    for (int64_t t = 0; t < n_tiles; ++t) {
        end_columns(columns[t], node, plan, unit, t*TILE);
    }
}

template <typename Products>
static void run_units(const ggml_compute_params * params, const ggml_clex_node & node, const attn_plan & plan, const attn_scratch & scratch,
        const mask_looks & looks) {
    Products::begin();
    for (int64_t unit = params->ith; unit < plan.n_units; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        run_unit<Products>(node, plan, attn_unit(node, plan, unit), scratch, looks);
    }
    Products::end();
}

bool ggml_clex_attn_prefill(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!attn_prefill_applies(dst)) {
        return false;
    }
    const ggml_clex_node node(dst);
    const int            n_planned = ggml_clex_planned_threads(params->threadpool);
    const attn_plan      plan(node, n_planned);
    const attn_scratch   scratch(plan, (float *) params->wdata + params->ith*plan.size());
    mask_looks           looks(node, (float *) params->wdata + n_planned*plan.size());

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    looks.look(params->ith, params->nth);
    ggml_barrier(params->threadpool);

    const auto run = plan.in_tiles ? run_units<attn_tile_products> : plan.in_pairs ? run_units<attn_pair_products> : run_units<attn_float_products>;
    run(params, node, plan, scratch, looks);
    return true;
}

#else

size_t ggml_clex_attn_prefill_work_size(const ggml_tensor *, int) {
    return 0;
}

bool ggml_clex_attn_prefill(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
