#include "ggml-clex-attn.h"
#include "ggml-clex-node.h"
#include "ggml-clex-prefill.h"
#include "ggml-clex-products.h"
#include "ggml-clex-threads.h"
#include "ggml-clex-vec.h"

#include "ggml-cpu-impl.h"
#include "ops.h"
#include "vec.h"

#include <algorithm>
#include <cstdlib>

#ifndef GGML_CLEX_NO_VEC

// All query rows of one KV head - the heads of its group, times the tokens of the batch - share one conversion of each
// K and V row. Positions go through in blocks: scores, one vectorised exponential, weighted sum, all in F32.
static constexpr int BLOCK       = 64; // positions; a multiple of VEC
static constexpr int MAX_QUERIES = 8;  // tokens per stream
static constexpr int MAX_ROWS    = 64; // query rows that share a converted block

// One thread computes a share of the units of work, a unit being one KV head of one block of positions:
//
//   stream 0                                     stream 1
//   block 0          block 2          block 3    block 0           blocks that no query sees are no units
//   h0 h1 h2 h3      h0 h1 h2 h3      h0 h1 ..   h0 h1 h2 h3
//   |--- share 0 ---------|--- share 1 ------------|--- share 2 ... one share per planned thread
//
// and keeps its sums in a slot of the work buffer, one for each stream that the share has a part of; reduce() merges them.
//
//   | slot 0 | slot 1 | ... | scratch of thread 0 | scratch of thread 1 | ...
//
//   slot:    weighted [n_row][dv] | largest [n_row] | sum [n_row]
//   scratch: queries [n_row][dk] | tile [BLOCK][max(dk, dv)] | bias [n_mask_row][BLOCK] | scores [MAX_ROWS][BLOCK] |
//            starts [n_stream + 1] | seeing [n_mask_row]

namespace {

struct attention : ggml_clex_node {
    int n_row;      // query rows per stream: head*n_query + token
    int n_group;    // query rows per KV head
    int n_mask_row; // mask rows per stream: those of the first query rows, then again

    explicit attention(const ggml_tensor * dst) : ggml_clex_node(dst),
        n_row(n_head*n_query), n_group(n_row/n_head_kv), n_mask_row(mask ? n_query*(int) mask->ne[2] : 1) {}

    // Positions from `begin` on of a row of the mask.
    const ggml_fp16_t * mask_from(int stream, int row, int64_t begin) const {
        return mask_row(stream, row / n_query, row % n_query) + begin;
    }

    // Whether any query of the stream sees any of the n positions.
    bool visible(int stream, int64_t begin, int n) const {
        if (!mask) {
            return true;
        }
        for (int row = 0; row < n_mask_row; ++row) {
            const ggml_fp16_t * m = mask_from(stream, row, begin);
            int any = 0;
            for (int j = 0; j < n; ++j) {
                any |= m[j] ^ GGML_CLEX_HIDDEN;
            }
            if (any) {
                return true;
            }
        }
        return false;
    }

    size_t slot_size() const { return GGML_PAD((size_t) n_row*(dv + 2), 16); }
    size_t scratch_size() const {
        return GGML_PAD((size_t) n_row*dk + BLOCK*(std::max(dk, dv) + n_mask_row + MAX_ROWS) + 2*(n_stream + 1) + n_mask_row, 16);
    }
    // A share's parts of streams follow each other, so that share + stream numbers the slots.
    size_t n_slots(int n_shares) const { return n_shares + n_stream - 1; }
    size_t work_size(int n_threads) const {
        return sizeof(float)*(n_slots(n_threads)*slot_size() + n_threads*scratch_size()) + CACHE_LINE_SIZE;
    }
};

// How the work is divided: the same for every thread, which each finds out for itself.
struct division {
    const attention & a;
    const int n_shares; // one for each planned thread, also where fewer compute
    int64_t * starts;   // [n_stream + 1]: the first unit of each stream, and the end
    int       block;    // positions from one block to the next; fewer where there are few units

    division(const attention & a, int n_shares, int64_t * starts) : a(a), n_shares(n_shares), starts(starts) {
        for (block = BLOCK; ; block /= 2) {
            starts[0] = 0;
            for (int i = 0; i < a.n_stream; ++i) {
                starts[i + 1] = starts[i];
                for (int64_t j = 0; j < a.n_kv; j += block) {
                    starts[i + 1] += a.visible(i, j, size(j)) ? a.n_head_kv : 0;
                }
            }
            if (n_shares == 1 || block == BLOCK/4 || starts[a.n_stream] >= 4*n_shares) {
                return;
            }
        }
    }

    // Positions of the block that begins there.
    int size(int64_t begin) const { return (int) std::min<int64_t>(block, a.n_kv - begin); }

    // The units [first, end) of a share in a stream.
    int64_t first_unit(int share, int stream) const { return std::max(starts[stream],     starts[a.n_stream]*share/n_shares); }
    int64_t end_unit  (int share, int stream) const { return std::min(starts[stream + 1], starts[a.n_stream]*(share + 1)/n_shares); }
};

// The sums of a share over its part of a stream, for each query row.
struct partial_sums {
    const attention & a;
    float * slot;

    partial_sums(const attention & a, float * slots, int share, int stream) : a(a), slot(slots + (share + stream)*a.slot_size()) {}

    float * weighted(int row) const { return slot + (size_t) row*a.dv; }       // V times the exponentials
    float & largest (int row) const { return weighted(a.n_row)[row]; }           // of the logits
    float & sum     (int row) const { return weighted(a.n_row)[a.n_row + row]; } // of the exponentials of logits less the largest

    void clear(int row) const {
        std::fill_n(weighted(row), a.dv, 0.0f);
        largest(row) = -INFINITY;
        sum    (row) = 0.0f;
    }
};

// Some positions, and who sees which of them.
struct block {
    int     stream;
    int64_t begin;
    int     n_live;      // positions that some query sees
    int     live[BLOCK]; // which, from `begin` on
    float * bias;        // [n_mask_row][BLOCK]: the mask at the live positions, -INFINITY after them
    bool  * seeing;      // [n_mask_row]: whether the queries of that row see some of the block

    void read(const attention & a, int n) {
        find_live(a, n);
        for (int row = 0; row < a.n_mask_row; ++row) {
            float * b = bias + (size_t) row*BLOCK;
            std::fill(b + n_live, b + BLOCK, -INFINITY);
            if (!a.mask) {
                std::fill_n(b, n_live, 0.0f);
                continue;
            }
            const ggml_fp16_t * m = a.mask_from(stream, row, begin);
            int j = 0;
            for (; n_live == n && j + VEC <= n; j += VEC) {
                vec_store(b + j, vec_from_f16(m + j));
            }
            for (; j < n_live; ++j) {
                b[j] = GGML_CPU_FP16_TO_FP32(m[live[j]]);
            }
        }
    }

private:
    void find_live(const attention & a, int n) {
        uint16_t seen[BLOCK];
        std::fill_n(seen, n, a.mask ? 0 : 1);
        std::fill_n(seeing, a.n_mask_row, true);
        for (int row = 0; a.mask && row < a.n_mask_row; ++row) {
            const ggml_fp16_t * m = a.mask_from(stream, row, begin);
            uint16_t any = 0;
            for (int j = 0; j < n; ++j) {
                const uint16_t differs = m[j] ^ GGML_CLEX_HIDDEN;
                seen[j] |= differs;
                any     |= differs;
            }
            seeing[row] = any != 0;
        }
        n_live = 0;
        for (int j = 0; j < n; ++j) {
            live[n_live] = j;
            n_live += seen[j] != 0;
        }
    }
};

// Make logits of the products of query and key; returns the largest.
float logits(const attention & a, const float * bias, int head, float * x, int n) {
    const vec slope = vec_set(a.slope(head));
    float     scale = a.scale;
    if (a.softcap != 0.0f) {
        for (int j = 0; j < n; ++j) {
            x[j] = tanhf(x[j]*scale);
        }
        scale = a.softcap;
    }
    vec top = vec_set(-INFINITY);
    for (int j = 0; j < n; j += VEC) {
        const vec y = vec_fma(vec_load(x + j), vec_set(scale), vec_mul(vec_load(bias + j), slope));
        vec_store(x + j, y);
        top = vec_max(top, y);
    }
    return vec_hmax(top);
}

// Ask early for the rows that come next: the heads of a position lie beside each other, so that the rows of one head
// are too far apart for the processor to guess. From `begin` on, those that are live in the block at hand.
void prefetch(const block & b, const ggml_tensor * x, int64_t begin, int head_kv) {
#if defined(__GNUC__)
    const char * data = ggml_clex_node::row(x, b.stream, head_kv, begin);
    const int    size = (int) ggml_row_size(x->type, x->ne[0]);
    for (int j = 0; j < b.n_live; ++j) {
        for (int i = 0; i < size; i += CACHE_LINE_SIZE) {
            __builtin_prefetch(data + b.live[j]*x->nb[1] + i);
        }
    }
#endif
}

// Where to find the block's rows of K or V for n query rows, and with which kernels: as they are, or converted once
// for all into the tile. Up to n_pad, the last one is repeated.
const kernels * fetch(const block & b, const ggml_tensor * x, int head_kv, int n, int n_pad, float * tile, const char ** rows) {
    const kernels * own = get_kernels(x->type);
    const kernels * f32 = get_kernels(GGML_TYPE_F32);
    const bool   direct = own == f32 || n <= own->most_rows;
    const char * data   = ggml_clex_node::row(x, b.stream, head_kv, b.begin);
    const int    d      = (int) x->ne[0];
    for (int j = 0; j < b.n_live; ++j) {
        rows[j] = data + b.live[j]*x->nb[1];
        if (!direct) {
            own->convert(rows[j], tile + j*d, d);
            rows[j] = (const char *) (tile + j*d);
        }
    }
    std::fill(rows + b.n_live, rows + n_pad, rows[b.n_live - 1]);
    return direct ? own : f32;
}

// One thread at work.
struct worker {
    const attention & a;
    const int ith;
    const int nth;

    float   * slots;
    float   * queries; // of the stream, where vectors do not straddle cache lines
    float   * tile;    // K, then V
    float   * bias;
    float   * scores;
    int64_t * starts;
    bool    * seeing;

    const division units;

    worker(const attention & a, const ggml_compute_params * params, int n_shares) : a(a), ith(params->ith), nth(params->nth),
        slots  ((float *) GGML_PAD((uintptr_t) params->wdata, CACHE_LINE_SIZE)),
        queries(slots + a.n_slots(n_shares)*a.slot_size() + ith*a.scratch_size()),
        tile   (queries + (size_t) a.n_row*a.dk),
        bias   (tile + (size_t) BLOCK*std::max(a.dk, a.dv)),
        scores (bias + (size_t) BLOCK*a.n_mask_row),
        starts ((int64_t *) (scores + (size_t) BLOCK*MAX_ROWS)),
        seeing ((bool *) (starts + a.n_stream + 1)),
        units  (a, n_shares, starts) {}

    void run() {
        for (int share = units.n_shares*ith/nth; share < units.n_shares*(ith + 1)/nth; ++share) {
            for (int stream = 0; stream < a.n_stream; ++stream) {
                if (units.first_unit(share, stream) < units.end_unit(share, stream)) {
                    run_part(share, stream);
                }
            }
        }
    }

    // The share's units of one stream, block by block.
    void run_part(int share, int stream) {
        const int64_t      first = units.first_unit(share, stream);
        const int64_t      end   = units.end_unit  (share, stream);
        const partial_sums sums(a, slots, share, stream);

        for (int row = 0; row < a.n_row; ++row) {
            memcpy(queries + (size_t) row*a.dk, a.query(stream, row / a.n_query, row % a.n_query), a.dk*sizeof(float));
            sums.clear(row);
        }
        block b { stream, 0, 0, {}, bias, seeing };

        int64_t unit = units.starts[stream]; // of the block's first head
        for (b.begin = 0; unit < end; b.begin += units.block) {
            const int n = units.size(b.begin);
            if (!a.visible(stream, b.begin, n)) {
                continue;
            }
            if (unit + a.n_head_kv > first) {
                b.read(a, n);
                const int end_head = (int) std::min<int64_t>(end - unit, a.n_head_kv);
                for (int head_kv = (int) std::max<int64_t>(first - unit, 0); head_kv < end_head; ++head_kv) {
                    attend_head(b, head_kv, sums);
                }
            }
            unit += a.n_head_kv;
        }
    }

    // The query rows of the KV head that see some of the block, MAX_ROWS at a time.
    void attend_head(const block & b, int head_kv, const partial_sums & sums) {
        int rows[MAX_ROWS];
        int n = 0;
        for (int row = head_kv*a.n_group; row < (head_kv + 1)*a.n_group; ++row) {
            if (b.seeing[row % a.n_mask_row]) {
                rows[n++] = row;
            }
            if (n == MAX_ROWS || (n > 0 && row + 1 == (head_kv + 1)*a.n_group)) {
                attend(b, head_kv, rows, n, sums);
                n = 0;
            }
        }
    }

    void attend(const block & b, int head_kv, const int * rows, int n, const partial_sums & sums) {
        const float * q[MAX_ROWS];
        float       * s[MAX_ROWS];
        float       * acc[MAX_ROWS];
        float         decay[MAX_ROWS];
        const char  * positions[BLOCK];

        for (int i = 0; i < n; ++i) {
            q[i]   = queries + (size_t) rows[i]*a.dk;
            s[i]   = scores + i*BLOCK;
            acc[i] = sums.weighted(rows[i]);
        }
        const int n_dot   = GGML_PAD(b.n_live, 4);
        const int n_logit = GGML_PAD(b.n_live, VEC);

        prefetch(b, a.v, b.begin, head_kv);
        fetch(b, a.k, head_kv, n, n_dot, tile, positions)->dot(n, q, positions, a.dk, n_dot, s);

        for (int i = 0; i < n; ++i) {
            std::fill(s[i] + n_dot, s[i] + n_logit, 0.0f);
            const float * row_bias = b.bias + (size_t) (rows[i] % a.n_mask_row)*BLOCK;
            float & max     = sums.largest(rows[i]);
            const float top = std::max(max, logits(a, row_bias, rows[i] / a.n_query, s[i], n_logit));
            decay[i] = max == top ? 1.0f : expf(max - top);
            max = top;
            float & total = sums.sum(rows[i]);
            total = total*decay[i] + (float) ggml_vec_soft_max_f32(n_logit, s[i], s[i], top);
        }

        prefetch(b, a.k, head_kv + 1 < a.n_head_kv ? b.begin : b.begin + units.block, (head_kv + 1) % a.n_head_kv);
        fetch(b, a.v, head_kv, n, b.n_live, tile, positions)->add(n, s, positions, a.dv, b.n_live, acc, decay);
    }

    // Merge what the shares say of every nth query row.
    void reduce() const {
        for (int i = ith; i < a.n_stream*a.n_row; i += nth) {
            reduce_row(i / a.n_row, i % a.n_row);
        }
    }

    void reduce_row(int stream, int row) const {
        const int head = row / a.n_query;
        float * out   = a.result(stream, head, row % a.n_query);
        float   max   = a.has_sink() ? a.sink(head) : -INFINITY;
        float   total = a.has_sink() ? 1.0f : 0.0f;
        std::fill_n(out, a.dv, 0.0f);

        for (int share = 0; share < units.n_shares; ++share) {
            const partial_sums sums(a, slots, share, stream);
            if (units.first_unit(share, stream) >= units.end_unit(share, stream) || sums.sum(row) == 0.0f) {
                continue;
            }
            const float   top    = std::max(max, sums.largest(row));
            const float   decay  = expf(max - top);
            const float   weight = expf(sums.largest(row) - top);
            const float * acc    = sums.weighted(row);
            for (int d = 0; d < a.dv; ++d) {
                out[d] = out[d]*decay + acc[d]*weight;
            }
            total = total*decay + sums.sum(row)*weight;
            max   = top;
        }
        if (total != 0.0f) {
            ggml_vec_scale_f32(a.dv, out, 1.0f/total);
        }
    }
};

bool disabled() {
    static const bool value = getenv("GGML_CLEX_ATTN_DISABLE") != nullptr;
    return value;
}

bool has_few_queries(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    return q->ne[1] <= MAX_QUERIES && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) &&
        get_kernels(k->type) && k->nb[0] == ggml_type_size(k->type) && k->ne[0] % VEC == 0 &&
        get_kernels(v->type) && v->nb[0] == ggml_type_size(v->type) && v->ne[0] % VEC == 0 &&
        k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0;
}

} // namespace

size_t ggml_clex_attn_work_size(const ggml_tensor * dst, int n_threads) {
    if (disabled()) {
        return 0;
    }
    return has_few_queries(dst) ? attention(dst).work_size(n_threads) : ggml_clex_attn_prefill_work_size(dst, n_threads);
}

bool ggml_clex_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (disabled() || params->use_ref) {
        return false;
    }
    if (!has_few_queries(dst)) {
        return ggml_clex_attn_prefill(params, dst);
    }
    const attention a(dst);
    const int n_shares = ggml_clex_planned_threads(params->threadpool);
    GGML_ASSERT(params->wsize >= a.work_size(n_shares));

    worker w(a, params, n_shares);
    w.run();
    if (params->nth > 1) {
        ggml_barrier(params->threadpool);
    }
    w.reduce();
    return true;
}

#else

size_t ggml_clex_attn_work_size(const ggml_tensor *, int) {
    return 0;
}

bool ggml_clex_attn(const ggml_compute_params *, ggml_tensor *) {
    return false;
}

#endif
