#include "ggml-clex-attn.h"
#include "ggml-clex-vec.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-cpu-impl.h"
#include "ops.h"
#include "vec.h"

#include <algorithm>
#include <cstdlib>

// All query rows of one KV head - the heads of its group, times the tokens of the batch - share one conversion of each
// K and V row. Positions go through in blocks: scores, one vectorised exponential, weighted sum, all in F32.
static constexpr int BLOCK       = 64; // positions; a multiple of VEC
static constexpr int MAX_QUERIES = 8;  // tokens per stream
static constexpr int MAX_ROWS    = 64; // query rows that share a converted block

// query rows per pass over a converted block; their four accumulators each stay in registers
static constexpr int MAX_R = VEC_REGISTERS == 32 ? 4 : 3;

static const ggml_fp16_t MASKED = 0xFC00; // -INFINITY

//
// types of a cache: load(row, i, x) makes the i-th N vectors of a row
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
        for (int j = 0; j < N; ++j) {
            x[j] = vec_mul(vec_from_i8(b->qs + j*VEC), d);
        }
    }
};

// x*d + m, where x has four bits, or five where the block has qh
template <typename B, bool HAS_MIN, bool HAS_QH>
struct type_q {
    static constexpr int N = 32/VEC;
    static void load(const char * row, int i, vec * x) {
        const B * b = (const B *) row + i;
        const ggml_half * dm = (const ggml_half *) b; // each type has d first, then m
        const vec d = vec_set_f16(dm);
        const vec m = HAS_MIN ? vec_set_f16(dm + 1) : vec_mul(d, vec_set(HAS_QH ? -16.0f : -8.0f));
        uint32_t high_bits = 0;
        if constexpr (HAS_QH) {
            memcpy(&high_bits, b->qh, sizeof(high_bits));
        }
        for (int j = 0; j < N/2; ++j) {
            vec & low  = x[j];
            vec & high = x[j + N/2];
            vec_from_nibbles(b->qs + j*VEC, d, m, low, high);
            if constexpr (HAS_QH) {
                low  = vec_fma(vec_from_bits(high_bits >> j*VEC), d, low);
                high = vec_fma(vec_from_bits(high_bits >> (j*VEC + 16)), d, high);
            }
        }
    }
};

//
// the two products of a block of positions
//

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
            case 3: dot_rows<T, 3>(q + i, k, d, n, s + i); break;
            case 4: dot_rows<T, 4>(q + i, k, d, n, s + i); break;
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
    for (; i + 4*VEC <= d; i += 4*VEC) {
        add_columns<T, R, 4>(p, v, i, n, acc, decay);
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
            case 3: add_rows<T, 3>(p + i, v, d, n, acc + i, decay + i); break;
            case 4: add_rows<T, 4>(p + i, v, d, n, acc + i, decay + i); break;
        }
    }
}

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

struct kernels {
    bool direct; // whether dot and add take rows as the cache has them; they are converted once for all anyway where
                 // more than MAX_R query rows share them
    decltype(&dot<type_f32>)     dot;
    decltype(&add<type_f32>)     add;
    decltype(&convert<type_f32>) convert;
};

template <typename T>
static constexpr kernels make_kernels() {
    if constexpr (T::N <= 2) {
        return { true, dot<T>, add<T>, convert<T> };
    } else {
        return { false, nullptr, nullptr, convert<T> };
    }
}

static const kernels * get_kernels(ggml_type type) {
    static constexpr kernels f32  = make_kernels<type_f32>();
    static constexpr kernels f16  = make_kernels<type_f16>();
    static constexpr kernels bf16 = make_kernels<type_bf16>();
    static constexpr kernels q8_0 = make_kernels<type_q8_0>();
    static constexpr kernels q4_0 = make_kernels<type_q<block_q4_0, false, false>>();
    static constexpr kernels q4_1 = make_kernels<type_q<block_q4_1, true,  false>>();
    static constexpr kernels q5_0 = make_kernels<type_q<block_q5_0, false, true>>();
    static constexpr kernels q5_1 = make_kernels<type_q<block_q5_1, true,  true>>();
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
    ggml_tensor       * dst;

    int64_t n_kv;
    int     n_stream, n_head, n_head_kv, n_q;
    int     n_row;      // query rows per stream: head*n_q + token
    int     n_group;    // query rows per KV head
    int     n_mask_row; // mask rows per stream
    int     dk, dv;     // padded to vectors

    float scale, max_bias, softcap;

    explicit attention(const ggml_tensor * node);

    // Positions [begin, begin + n) of a row of the mask, which has one for each of the first n_mask_row query rows.
    const ggml_fp16_t * mask_row(int stream, int row, int64_t begin) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + (row % n_q)*mask->nb[1] + (row / n_q)*mask->nb[2] +
            (stream % mask->ne[3])*mask->nb[3]) + begin;
    }

    // Whether any query of the stream sees any of the positions.
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

    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int   n_log2 = 1 << (int) floor(log2(n_head));
        return head < n_log2 ? powf(powf(2.0f, -max_bias/n_log2), head + 1)
                             : powf(powf(2.0f, -max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
    }

    // One thread's sums over its part of a stream: per query row the maximum, the sum of exponentials, the weighted V.
    size_t slot_size() const { return GGML_PAD((size_t) n_row*(dv + 2), 16); }
    // Scratch of one thread: queries, a converted block, masks, scores, and where each stream's work begins.
    size_t scratch_size() const {
        return GGML_PAD((size_t) n_row*dk + (size_t) BLOCK*(std::max(dk, dv) + n_mask_row + MAX_ROWS) + 2*(n_stream + 1), 16);
    }
    size_t work_size(int nth) const {
        return sizeof(float)*((nth + n_stream - 1)*slot_size() + nth*scratch_size()) + 64;
    }
};

int padded(int64_t n) {
    return (int) GGML_PAD(n, VEC);
}

attention::attention(const ggml_tensor * node)
    : q(node->src[0]), k(node->src[1]), v(node->src[2]), mask(node->src[3]), sinks(node->src[4]),
      dst(const_cast<ggml_tensor *>(node)),
      n_kv(k->ne[1]), n_stream((int) q->ne[3]), n_head((int) q->ne[2]), n_head_kv((int) k->ne[2]), n_q((int) q->ne[1]),
      n_row(n_head*n_q), n_group(n_row/n_head_kv), n_mask_row(mask ? n_q*(int) mask->ne[2] : 1),
      dk(padded(k->ne[0])), dv(padded(v->ne[0])) {
    memcpy(&scale,    (const float *) node->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(float));
    memcpy(&softcap,  (const float *) node->op_params + 2, sizeof(float));
    if (softcap != 0.0f) {
        scale /= softcap;
    }
}

// One thread at work.
struct worker {
    const attention & a;

    float   * q;      // [n_row][dk] of the stream
    float   * tile;   // [BLOCK][dk or dv]: K, then V
    float   * bias;   // [n_mask_row][BLOCK]
    float   * s;      // [MAX_ROWS][BLOCK]
    int64_t * starts; // first unit of each stream, and the end

    const kernels * f32;
    const kernels * kernels_k;
    const kernels * kernels_v;

    int     n_live = 0;  // positions of the block that some query sees
    int     live[BLOCK]; // in order, from the block's first
    int64_t block;       // positions from one block to the next

    worker(const attention & a, float * scratch)
        : a(a), q(scratch), tile(q + (size_t) a.n_row*a.dk), bias(tile + (size_t) BLOCK*std::max(a.dk, a.dv)),
          s(bias + (size_t) BLOCK*a.n_mask_row), starts((int64_t *) (s + BLOCK*MAX_ROWS)),
          f32(get_kernels(GGML_TYPE_F32)), kernels_k(get_kernels(a.k->type)), kernels_v(get_kernels(a.v->type)) {}

    // Units of work are the KV heads of the blocks that some query sees. Few units make small blocks.
    void count(int nth) {
        for (block = BLOCK; ; block /= 2) {
            starts[0] = 0;
            for (int stream = 0; stream < a.n_stream; ++stream) {
                int64_t n = 0;
                for (int64_t begin = 0; begin < a.n_kv; begin += block) {
                    n += a.visible(stream, begin, (int) std::min<int64_t>(block, a.n_kv - begin));
                }
                starts[stream + 1] = starts[stream] + n*a.n_head_kv;
            }
            if (block == 16 || nth == 1 || starts[a.n_stream] >= 4*nth) {
                return;
            }
        }
    }

    int64_t unit(int ith, int nth) const { return starts[a.n_stream]*ith/nth; }

    void run(float * slots, int ith, int nth) {
        const int64_t u0 = unit(ith, nth);
        const int64_t u1 = unit(ith + 1, nth);
        for (int stream = 0; stream < a.n_stream; ++stream) {
            if (std::max(u0, starts[stream]) >= std::min(u1, starts[stream + 1])) {
                continue;
            }
            float * slot = slots + (ith + stream)*a.slot_size();
            begin_stream(slot, stream);
            int64_t u = starts[stream]; // of the block's first head
            for (int64_t begin = 0; u < std::min(u1, starts[stream + 1]); begin += block) {
                const int n = (int) std::min<int64_t>(block, a.n_kv - begin);
                if (!a.visible(stream, begin, n)) {
                    continue;
                }
                const int head0 = (int) std::max<int64_t>(u0 - u, 0);
                const int head1 = (int) std::min<int64_t>(u1 - u, a.n_head_kv);
                if (head0 < head1) {
                    begin_block(stream, begin, n);
                }
                for (int head = head0; head < head1; ++head) {
                    for (int row = 0; row < a.n_group; row += MAX_ROWS) {
                        attend(slot, stream, begin, head, row, std::min(a.n_group - row, MAX_ROWS));
                    }
                }
                u += a.n_head_kv;
            }
        }
    }

    void begin_stream(float * slot, int stream) {
        memset(slot, 0, (size_t) a.n_row*a.dv*sizeof(float));
        for (int row = 0; row < a.n_row; ++row) {
            maximum(slot)[row] = -INFINITY;
            sum(slot)[row] = 0.0f;
            float * x = q + (size_t) row*a.dk;
            memcpy(x, (const char *) a.q->data + (row % a.n_q)*a.q->nb[1] + (row / a.n_q)*a.q->nb[2] + stream*a.q->nb[3],
                a.q->ne[0]*sizeof(float));
            std::fill(x + a.q->ne[0], x + a.dk, 0.0f);
        }
    }

    float * maximum(float * slot) const { return slot + (size_t) a.n_row*a.dv; }
    float * sum    (float * slot) const { return maximum(slot) + a.n_row; }

    // Gather the positions that some query sees, and the mask there.
    void begin_block(int stream, int64_t begin, int n) {
        uint16_t seen[BLOCK];
        std::fill(seen, seen + n, a.mask ? 0 : 1);
        for (int row = 0; a.mask && row < a.n_mask_row; ++row) {
            const ggml_fp16_t * m = a.mask_row(stream, row, begin);
            for (int j = 0; j < n; ++j) {
                seen[j] |= m[j] ^ MASKED;
            }
        }
        n_live = 0;
        for (int j = 0; j < n; ++j) {
            live[n_live] = j;
            n_live += seen[j] != 0;
        }
        for (int row = 0; row < a.n_mask_row; ++row) {
            float * b = bias + row*BLOCK;
            std::fill(b, b + n_live, 0.0f);
            std::fill(b + n_live, b + BLOCK, -INFINITY);
            if (a.mask) {
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
    }

    static const char * row_of(const ggml_tensor * x, int stream, int64_t position, int head) {
        return (const char *) x->data + position*x->nb[1] + head*x->nb[2] + stream*x->nb[3];
    }

    // Ask for the rows that come next: the heads of a position lie beside each other, so that those of one head are too
    // far apart for the processor to guess.
    void prefetch(const ggml_tensor * x, int stream, int64_t begin, int head) const {
#if defined(__GNUC__)
        const char * data = row_of(x, stream, begin, head);
        const int    size = (int) ggml_row_size(x->type, x->ne[0]);
        for (int j = 0; j < n_live; ++j) {
            for (int i = 0; i < size; i += CACHE_LINE_SIZE) {
                __builtin_prefetch(data + live[j]*x->nb[1] + i);
            }
        }
#endif
    }

    // Where the block's rows of K or V are, converted first where that pays; the last one counts for those up to n_pad.
    const kernels * fetch(const ggml_tensor * x, const kernels * own, int n_rows, int d, int stream, int64_t begin, int head,
            int n_pad, const char ** rows) {
        const char * data = row_of(x, stream, begin, head);
        const bool direct = own->direct && (n_rows <= MAX_R || own == f32);
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

    // n_rows query rows of a KV head, from the given one on, over the block's positions
    void attend(float * slot, int stream, int64_t begin, int head, int first_row, int n_rows) {
        const float * qs[MAX_ROWS];
        float       * ss[MAX_ROWS];
        float       * acc[MAX_ROWS];
        float         decay[MAX_ROWS];
        int           rows[MAX_ROWS];

        for (int i = 0; i < n_rows; ++i) {
            rows[i] = head*a.n_group + first_row + i;
            qs[i] = q + (size_t) rows[i]*a.dk;
            ss[i] = s + i*BLOCK;
        }

        const int n4 = GGML_PAD(n_live, 4);
        const int nv = GGML_PAD(n_live, 16);

        prefetch(a.v, stream, begin, head);
        const char * positions[BLOCK];
        fetch(a.k, kernels_k, n_rows, a.dk, stream, begin, head, n4, positions)->dot(n_rows, qs, positions, a.dk, n4, ss);

        int n = 0; // rows that see some of the positions
        for (int i = 0; i < n_rows; ++i) {
            const int row = rows[i];
            std::fill(ss[i] + n4, ss[i] + nv, 0.0f);
            const float top = finish(ss[i], row, nv);
            if (top == -INFINITY) {
                continue;
            }
            float & max = maximum(slot)[row];
            const float new_max = std::max(max, top);
            decay[n] = max == new_max ? 1.0f : expf(max - new_max);
            max = new_max;
            sum(slot)[row] = sum(slot)[row]*decay[n] + (float) ggml_vec_soft_max_f32(nv, ss[i], ss[i], max);
            acc[n] = slot + (size_t) row*a.dv;
            ss[n] = ss[i];
            ++n;
        }

        if (n == 0) {
            return;
        }
        if (head + 1 < a.n_head_kv) {
            prefetch(a.k, stream, begin, head + 1);
        } else {
            prefetch(a.k, stream, begin + block, 0);
        }
        fetch(a.v, kernels_v, n, a.dv, stream, begin, head, n_live, positions)->add(n, ss, positions, a.dv, n_live, acc, decay);
    }

    // Products of query and key to logits; returns the largest.
    float finish(float * x, int row, int n) const {
        const int   head  = row / a.n_q;
        const float * b   = bias + (row % a.n_mask_row)*BLOCK;
        const vec   slope = vec_set(a.slope(head));
        float scale = a.scale;
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

    // Merge what the threads found out about every nth row.
    void reduce(const float * slots, int ith, int nth) const {
        for (int i = ith; i < a.n_stream*a.n_row; i += nth) {
            const int stream = i / a.n_row;
            const int row    = i % a.n_row;
            const int head   = row / a.n_q;

            float * out = (float *) ((char *) a.dst->data + head*a.dst->nb[1] + (row % a.n_q)*a.dst->nb[2] + stream*a.dst->nb[3]);
            const int n = (int) a.dst->ne[0];

            float max = a.sinks ? ((const float *) a.sinks->data)[head] : -INFINITY;
            float sum = a.sinks ? 1.0f : 0.0f;
            memset(out, 0, n*sizeof(float));

            for (int t = 0; t < nth; ++t) {
                if (std::max(unit(t, nth), starts[stream]) >= std::min(unit(t + 1, nth), starts[stream + 1])) {
                    continue;
                }
                const float * slot = slots + (t + stream)*a.slot_size();
                const float   m    = slot[(size_t) a.n_row*a.dv + row];
                if (m == -INFINITY) {
                    continue;
                }
                const float new_max = std::max(max, m);
                const float decay   = expf(max - new_max);
                const float weight  = expf(m - new_max);
                const float * acc   = slot + (size_t) row*a.dv;
                for (int d = 0; d < n; ++d) {
                    out[d] = out[d]*decay + acc[d]*weight;
                }
                sum = sum*decay + slot[(size_t) a.n_row*a.dv + a.n_row + row]*weight;
                max = new_max;
            }
            if (sum != 0.0f) {
                ggml_vec_scale_f32(n, out, 1.0f/sum);
            }
        }
    }
};

bool disabled() {
    static const bool value = getenv("GGML_CLEX_ATTN_DISABLE") != nullptr;
    return value;
}

bool supported(const ggml_tensor * node) {
    const ggml_tensor * q = node->src[0];
    const ggml_tensor * k = node->src[1];
    const ggml_tensor * v = node->src[2];

    return !disabled() && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[1] <= MAX_QUERIES &&
        k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
        get_kernels(k->type) && get_kernels(v->type) &&
        k->ne[0] % VEC == 0 && v->ne[0] % VEC == 0 &&
        k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0;
}

} // namespace

size_t ggml_clex_attn_work_size(const ggml_tensor * dst, int n_threads) {
    return supported(dst) ? attention(dst).work_size(n_threads) : 0;
}

bool ggml_clex_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    if (params->use_ref || !supported(dst)) {
        return false;
    }
    const attention a(dst);
    const int ith = params->ith;
    const int nth = params->nth;
    GGML_ASSERT(params->wsize >= a.work_size(nth));

    float * slots = (float *) GGML_PAD((uintptr_t) params->wdata, 64);
    worker  w(a, slots + (nth + a.n_stream - 1)*a.slot_size() + ith*a.scratch_size());

    w.count(nth);
    w.run(slots, ith, nth);
    if (nth > 1) {
        ggml_barrier(params->threadpool);
    }
    w.reduce(slots, ith, nth);
    return true;
}
