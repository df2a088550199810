#pragma once

// The two products of a block of n positions for the R query rows of one KV head, while the rows of K and V become vectors.
//
//   dot:  s[r][j] = q[r] . k[j]                      add:  acc[r] = acc[r]*decay[r] + sum of p[r][j]*v[j]
//
//            k[0]    k[1]    k[2]    k[3]                      v, C vectors at a time
//           |....|  |....|  |....|  |....|  d               v[0] |....|....|
//                                                           v[1] |....|....|  each row read once for all R
//   q[0]     acc     acc     acc     acc    in              ...
//   q[1]     acc     acc     acc     acc    registers       p[0]  acc  acc    in registers
//   ...                                                     p[1]  acc  acc
//
//   s, p: [R][n], a score and then a weight for each position; q: [R][d], acc: [R][d] in memory. Rows lie anywhere: q, k, v,
//   s, p and acc are pointers to each.

#include "ggml-clex-vec.h"

#ifndef GGML_CLEX_NO_VEC

// query rows per pass over a converted block; their four accumulators each stay in registers
static constexpr int MAX_R = VEC_REGISTERS == 32 ? 4 : 3;

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

#endif
