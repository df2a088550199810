#include "ggml-clex-attn.h"
#include "ggml-clex-prefill.h"
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

// query rows per pass over a converted block; their four accumulators each stay in registers
static constexpr int MAX_R = VEC_REGISTERS == 32 ? 4 : 3;

static const ggml_fp16_t MASKED = 0xFC00; // -INFINITY

//
// the two products of a block of positions
//

// Of rows that are converted on the way, as many as leave registers for a block of the type.
template <typename T>
static constexpr int most_rows(int n) {
    return T::N <= 2 || n < 2 ? n : 2;
}

// Split n rows evenly into chunks of at most MAX_R.
static int chunk(int n) {
    const int n_chunks = (n + MAX_R - 1)/MAX_R;
    return (n + n_chunks - 1)/n_chunks;
}

// s[r][j] = q[r] . k[j] for R rows; n is a multiple of 4, d of N*VEC
template <typename T, int R>
static void dot_rows(const float * const * q, const char * const * k, int d, int n, float * const * s) {
    for (int j = 0; j < n; j += 4) {
        vec acc[R][4];
        for (int r = 0; r < R; ++r) {
            for (int p = 0; p < 4; ++p) {
                acc[r][p] = vec_set(0.0f);
            }
        }
        for (int i = 0; i < d; i += T::N*VEC) {
            for (int p = 0; p < 4; ++p) {
                vec x[T::N];
                T::load(k[j + p], i/(T::N*VEC), x);
                for (int e = 0; e < T::N; ++e) {
                    for (int r = 0; r < R; ++r) {
                        acc[r][p] = vec_fma(x[e], vec_load(q[r] + i + e*VEC), acc[r][p]);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            vec_sum4(acc[r], s[r] + j);
        }
    }
}

template <typename T>
static void dot(int n_rows, const float * const * q, const char * const * k, int d, int n, float * const * s) {
    for (int i = 0, r; i < n_rows; i += r) {
        r = chunk(n_rows - i);
        switch (r) {
            case 1: dot_rows<T, 1>(q + i, k, d, n, s + i); break;
            case 2: dot_rows<T, 2>(q + i, k, d, n, s + i); break;
            case 3: dot_rows<T, most_rows<T>(3)>(q + i, k, d, n, s + i); break;
            case 4: dot_rows<T, most_rows<T>(4)>(q + i, k, d, n, s + i); break;
        }
    }
}

// acc[r] = acc[r]*decay[r] + sum of p[r][j]*v[j] for R rows, in the C vectors from the i-th number on
template <typename T, int R, int C>
static void add_columns(const float * const * p, const char * const * v, int i, int n, float * const * acc, const float * decay) {
    vec a[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            a[r][c] = vec_mul(vec_load(acc[r] + i + c*VEC), vec_set(decay[r]));
        }
    }
    for (int j = 0; j < n; ++j) {
        for (int c = 0; c < C; c += T::N) {
            vec x[T::N];
            T::load(v[j], i/(T::N*VEC) + c/T::N, x);
            for (int e = 0; e < T::N; ++e) {
                for (int r = 0; r < R; ++r) {
                    a[r][c + e] = vec_fma(x[e], vec_set(p[r][j]), a[r][c + e]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            vec_store(acc[r] + i + c*VEC, a[r][c]);
        }
    }
}

template <typename T, int R>
static void add_rows(const float * const * p, const char * const * v, int d, int n, float * const * acc, const float * decay) {
    int i = 0;
    for (constexpr int C = T::N > 4 ? T::N : 4; i + C*VEC <= d; i += C*VEC) {
        add_columns<T, R, C>(p, v, i, n, acc, decay);
    }
    for (; i < d; i += T::N*VEC) {
        add_columns<T, R, T::N>(p, v, i, n, acc, decay);
    }
}

template <typename T>
static void add(int n_rows, const float * const * p, const char * const * v, int d, int n, float * const * acc, const float * decay) {
    for (int i = 0, r; i < n_rows; i += r) {
        r = chunk(n_rows - i);
        switch (r) {
            case 1: add_rows<T, 1>(p + i, v, d, n, acc + i, decay + i); break;
            case 2: add_rows<T, 2>(p + i, v, d, n, acc + i, decay + i); break;
            case 3: add_rows<T, most_rows<T>(3)>(p + i, v, d, n, acc + i, decay + i); break;
            case 4: add_rows<T, most_rows<T>(4)>(p + i, v, d, n, acc + i, decay + i); break;
        }
    }
}

struct kernels {
    int most_rows; // for how many query rows dot and add take rows as they are; more share a conversion
    decltype(&dot<type_f32>)     dot;
    decltype(&add<type_f32>)     add;
    decltype(&convert<type_f32>) convert;
};

template <typename T>
static constexpr kernels make_kernels() {
    return { most_rows<T>(MAX_R), dot<T>, add<T>, convert<T> };
}

static const kernels * get_kernels(ggml_type type) {
    static constexpr kernels f32  = make_kernels<type_f32>();
    static constexpr kernels f16  = make_kernels<type_f16>();
    static constexpr kernels bf16 = make_kernels<type_bf16>();
    static constexpr kernels q8_0 = make_kernels<type_q8_0>();
    static constexpr kernels q4_0 = make_kernels<type_q4_0>();
    static constexpr kernels q4_1 = make_kernels<type_q4_1>();
    static constexpr kernels q5_0 = make_kernels<type_q5_0>();
    static constexpr kernels q5_1 = make_kernels<type_q5_1>();
    switch (type) {
        case GGML_TYPE_F32:  return &f32;
        case GGML_TYPE_F16:  return &f16;
        case GGML_TYPE_BF16: return &bf16;
        case GGML_TYPE_Q8_0: return &q8_0;
        case GGML_TYPE_Q4_0: return &q4_0;
        case GGML_TYPE_Q4_1: return &q4_1;
        case GGML_TYPE_Q5_0: return &q5_0;
        case GGML_TYPE_Q5_1: return &q5_1;
        default:             return nullptr;
    }
}

//
// the operation
//

namespace {

// What all threads agree on.
struct attention {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    int64_t n_kv;
    int     n_stream, n_head, n_head_kv, n_q;
    int     n_row;      // query rows per stream: head*n_q + token
    int     n_group;    // query rows per KV head
    int     n_mask_row; // mask rows per stream: those of the first query rows, then again
    int     dk, dv;     // sizes of a head

    float scale, max_bias, softcap;

    explicit attention(const ggml_tensor * dst)
        : q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4]), dst(dst),
          n_kv(k->ne[1]), n_stream((int) q->ne[3]), n_head((int) q->ne[2]), n_head_kv((int) k->ne[2]), n_q((int) q->ne[1]),
          n_row(n_head*n_q), n_group(n_row/n_head_kv), n_mask_row(mask ? n_q*(int) mask->ne[2] : 1),
          dk((int) k->ne[0]), dv((int) v->ne[0]) {
        memcpy(&scale,    (const float *) dst->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
        memcpy(&softcap,  (const float *) dst->op_params + 2, sizeof(float));
        if (softcap != 0.0f) {
            scale /= softcap;
        }
    }

    // Positions from `begin` on of a row of the mask.
    const ggml_fp16_t * mask_row(int stream, int row, int64_t begin) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + (row % n_q)*mask->nb[1] + (row / n_q)*mask->nb[2] +
            (stream % mask->ne[3])*mask->nb[3]) + begin;
    }

    // Whether any query of the stream sees any of the n positions.
    bool visible(int stream, int64_t begin, int n) const {
        if (!mask) {
            return true;
        }
        for (int row = 0; row < n_mask_row; ++row) {
            const ggml_fp16_t * m = mask_row(stream, row, begin);
            int any = 0;
            for (int j = 0; j < n; ++j) {
                any |= m[j] ^ MASKED;
            }
            if (any) {
                return true;
            }
        }
        return false;
    }

    // ALiBi
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int n_log2 = 1 << (int) floor(log2(n_head));
        return head < n_log2 ? powf(powf(2.0f, -max_bias/n_log2), head + 1)
                             : powf(powf(2.0f, -max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
    }

    // The sums over a share of a stream: the weighted V of each query row, then the largest logits, then the
    // sums of the exponentials.
    size_t slot_size() const { return GGML_PAD((size_t) n_row*(dv + 2), 16); }
    // One thread's scratch, see worker.
    size_t scratch_size() const {
        return GGML_PAD((size_t) n_row*dk + BLOCK*(std::max(dk, dv) + n_mask_row + MAX_ROWS) + 2*(n_stream + 1) + n_mask_row, 16);
    }
    // A share's parts of streams follow each other, so that share + stream numbers the slots.
    size_t n_slots(int n_shares) const { return n_shares + n_stream - 1; }
    size_t work_size(int n_threads) const {
        return sizeof(float)*(n_slots(n_threads)*slot_size() + n_threads*scratch_size()) + CACHE_LINE_SIZE;
    }
};

// One thread at work.
struct worker {
    const attention & a;
    const int ith;
    const int nth;
    const int n_shares;  // of the work: one for each planned thread, also where fewer compute

    float   * slots;
    float   * queries;   // [n_row][dk] of the stream, where vectors do not straddle cache lines
    float   * tile;      // [BLOCK][dk or dv]: K, then V
    float   * bias;      // [n_mask_row][BLOCK]
    float   * scores;    // [MAX_ROWS][BLOCK]
    int64_t * starts;    // [n_stream + 1]: the first unit of each stream, and the end
    bool    * seeing;    // [n_mask_row]: whether the queries of that row see some of the block

    int     block;       // positions from one block to the next

    // where we are
    int     share;
    int     stream;
    int64_t begin;       // first position of the block
    int     head;        // KV head
    int     n_live;      // positions of the block that some query sees
    int     live[BLOCK]; // which, from `begin` on

    worker(const attention & a, const ggml_compute_params * params) : a(a), ith(params->ith), nth(params->nth),
            n_shares(ggml_clex_planned_threads(params->threadpool)) {
        slots   = (float *) GGML_PAD((uintptr_t) params->wdata, CACHE_LINE_SIZE);
        queries = slots + a.n_slots(n_shares)*a.slot_size() + ith*a.scratch_size();
        tile    = queries + (size_t) a.n_row*a.dk;
        bias    = tile + (size_t) BLOCK*std::max(a.dk, a.dv);
        scores  = bias + (size_t) BLOCK*a.n_mask_row;
        starts  = (int64_t *) (scores + (size_t) BLOCK*MAX_ROWS);
        seeing  = (bool *) (starts + a.n_stream + 1);
    }

    // Units of work are the KV heads of the blocks that some query sees. Blocks are smaller where there are few.
    void count() {
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

    int size(int64_t first) const { return (int) std::min<int64_t>(block, a.n_kv - first); }

    // The units [first, end) of a share in a stream.
    int64_t first_unit(int of, int i) const { return std::max(starts[i],     starts[a.n_stream]*of/n_shares); }
    int64_t end_unit  (int of, int i) const { return std::min(starts[i + 1], starts[a.n_stream]*(of + 1)/n_shares); }

    float * weighted(int of, int i, int row) const { return slots + (of + i)*a.slot_size() + (size_t) row*a.dv; }
    float & largest (int of, int i, int row) const { return weighted(of, i, a.n_row)[row]; }
    float & sum     (int of, int i, int row) const { return weighted(of, i, a.n_row)[a.n_row + row]; }

    void run() {
        for (share = n_shares*ith/nth; share < n_shares*(ith + 1)/nth; ++share) {
            run_share();
        }
    }

    void run_share() {
        for (stream = 0; stream < a.n_stream; ++stream) {
            const int64_t first = first_unit(share, stream);
            const int64_t end   = end_unit(share, stream);
            if (first >= end) {
                continue;
            }
            for (int row = 0; row < a.n_row; ++row) {
                memcpy(queries + (size_t) row*a.dk, address(a.q, row % a.n_q, row / a.n_q), a.dk*sizeof(float));
                std::fill_n(weighted(share, stream, row), a.dv, 0.0f);
                largest(share, stream, row) = -INFINITY;
                sum    (share, stream, row) = 0.0f;
            }
            int64_t unit = starts[stream]; // of the block's first head
            for (begin = 0; unit < end; begin += block) {
                if (!a.visible(stream, begin, size(begin))) {
                    continue;
                }
                if (unit + a.n_head_kv > first) {
                    begin_block();
                    const int end_head = (int) std::min<int64_t>(end - unit, a.n_head_kv);
                    for (head = (int) std::max<int64_t>(first - unit, 0); head < end_head; ++head) {
                        attend_head();
                    }
                }
                unit += a.n_head_kv;
            }
        }
    }

    // Gather the positions that some query sees, and the mask there.
    void begin_block() {
        const int n = size(begin);
        uint16_t seen[BLOCK];
        std::fill_n(seen, n, a.mask ? 0 : 1);
        for (int row = 0; a.mask && row < a.n_mask_row; ++row) {
            const ggml_fp16_t * m = a.mask_row(stream, row, begin);
            uint16_t any = 0;
            for (int j = 0; j < n; ++j) {
                const uint16_t differs = m[j] ^ MASKED;
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
        for (int row = 0; row < a.n_mask_row; ++row) {
            float * b = bias + (size_t) row*BLOCK;
            std::fill(b + n_live, b + BLOCK, -INFINITY);
            if (!a.mask) {
                std::fill_n(b, n_live, 0.0f);
                seeing[row] = true;
                continue;
            }
            const ggml_fp16_t * m = a.mask_row(stream, row, begin);
            int j = 0;
            for (; n_live == n && j + VEC <= n; j += VEC) {
                vec_store(b + j, vec_from_f16(m + j));
            }
            for (; j < n_live; ++j) {
                b[j] = GGML_CPU_FP16_TO_FP32(m[live[j]]);
            }
        }
    }

    // The query rows of the KV head that see some of the block, MAX_ROWS at a time.
    void attend_head() {
        int rows[MAX_ROWS];
        int n = 0;
        for (int row = head*a.n_group; row < (head + 1)*a.n_group; ++row) {
            if (seeing[row % a.n_mask_row]) {
                rows[n++] = row;
            }
            if (n == MAX_ROWS || (n > 0 && row + 1 == (head + 1)*a.n_group)) {
                attend(rows, n);
                n = 0;
            }
        }
    }

    void attend(const int * rows, int n) {
        const float * q[MAX_ROWS];
        float       * s[MAX_ROWS];
        float       * acc[MAX_ROWS];
        float         decay[MAX_ROWS];
        const char  * positions[BLOCK];

        for (int i = 0; i < n; ++i) {
            q[i]   = queries + (size_t) rows[i]*a.dk;
            s[i]   = scores + i*BLOCK;
            acc[i] = weighted(share, stream, rows[i]);
        }
        const int n_dot  = GGML_PAD(n_live, 4);
        const int n_logit = GGML_PAD(n_live, VEC);

        prefetch(a.v, begin, head);
        fetch(a.k, n, n_dot, positions)->dot(n, q, positions, a.dk, n_dot, s);

        for (int i = 0; i < n; ++i) {
            std::fill(s[i] + n_dot, s[i] + n_logit, 0.0f);
            float & max     = largest(share, stream, rows[i]);
            const float top = std::max(max, logits(s[i], rows[i], n_logit));
            decay[i] = max == top ? 1.0f : expf(max - top);
            max = top;
            float & total = sum(share, stream, rows[i]);
            total = total*decay[i] + (float) ggml_vec_soft_max_f32(n_logit, s[i], s[i], top);
        }

        prefetch(a.k, head + 1 < a.n_head_kv ? begin : begin + block, (head + 1) % a.n_head_kv);
        fetch(a.v, n, n_live, positions)->add(n, s, positions, a.dv, n_live, acc, decay);
    }

    // Make logits of the products of query and key; returns the largest.
    float logits(float * x, int row, int n) const {
        const float * b     = bias + (size_t) (row % a.n_mask_row)*BLOCK;
        const vec     slope = vec_set(a.slope(row / a.n_q));
        float         scale = a.scale;
        if (a.softcap != 0.0f) {
            for (int j = 0; j < n; ++j) {
                x[j] = tanhf(x[j]*scale);
            }
            scale = a.softcap;
        }
        vec top = vec_set(-INFINITY);
        for (int j = 0; j < n; j += VEC) {
            const vec y = vec_fma(vec_load(x + j), vec_set(scale), vec_mul(vec_load(b + j), slope));
            vec_store(x + j, y);
            top = vec_max(top, y);
        }
        return vec_hmax(top);
    }

    const char * address(const ggml_tensor * x, int64_t i1, int64_t i2) const {
        return (const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + stream*x->nb[3];
    }

    // Ask early for the rows that come next: the heads of a position lie beside each other, so that the rows of one head
    // are too far apart for the processor to guess.
    void prefetch(const ggml_tensor * x, int64_t first, int of_head) const {
#if defined(__GNUC__)
        const char * data = address(x, first, of_head);
        const int    size = (int) ggml_row_size(x->type, x->ne[0]);
        for (int j = 0; j < n_live; ++j) {
            for (int i = 0; i < size; i += CACHE_LINE_SIZE) {
                __builtin_prefetch(data + live[j]*x->nb[1] + i);
            }
        }
#endif
    }

    // Where to find the block's rows of K or V for n query rows, and with which kernels: as they are, or converted once
    // for all. Up to n_pad, the last one is repeated.
    const kernels * fetch(const ggml_tensor * x, int n, int n_pad, const char ** rows) {
        const kernels * own = get_kernels(x->type);
        const kernels * f32 = get_kernels(GGML_TYPE_F32);
        const bool   direct = own == f32 || n <= own->most_rows;
        const char * data   = address(x, begin, head);
        const int    d      = (int) x->ne[0];
        for (int j = 0; j < n_live; ++j) {
            rows[j] = data + live[j]*x->nb[1];
            if (!direct) {
                own->convert(rows[j], tile + j*d, d);
                rows[j] = (const char *) (tile + j*d);
            }
        }
        std::fill(rows + n_live, rows + n_pad, rows[n_live - 1]);
        return direct ? own : f32;
    }

    // Merge what the shares say of every nth query row.
    void reduce() const {
        for (int i = ith; i < a.n_stream*a.n_row; i += nth) {
            const int i3  = i / a.n_row;
            const int row = i % a.n_row;

            float * out = (float *) ((char *) a.dst->data + (row / a.n_q)*a.dst->nb[1] + (row % a.n_q)*a.dst->nb[2] + i3*a.dst->nb[3]);
            float   max = a.sinks ? ((const float *) a.sinks->data)[row / a.n_q] : -INFINITY;
            float   total = a.sinks ? 1.0f : 0.0f;
            std::fill_n(out, a.dv, 0.0f);

            for (int t = 0; t < n_shares; ++t) {
                if (first_unit(t, i3) >= end_unit(t, i3) || sum(t, i3, row) == 0.0f) {
                    continue;
                }
                const float   top    = std::max(max, largest(t, i3, row));
                const float   decay  = expf(max - top);
                const float   weight = expf(largest(t, i3, row) - top);
                const float * acc    = weighted(t, i3, row);
                for (int d = 0; d < a.dv; ++d) {
                    out[d] = out[d]*decay + acc[d]*weight;
                }
                total = total*decay + sum(t, i3, row)*weight;
                max   = top;
            }
            if (total != 0.0f) {
                ggml_vec_scale_f32(a.dv, out, 1.0f/total);
            }
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
    GGML_ASSERT(params->wsize >= a.work_size(ggml_clex_planned_threads(params->threadpool)));

    worker w(a, params);
    w.count();
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
