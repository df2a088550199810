#pragma once

// One GGML_OP_FLASH_ATTN_EXT node, as both kernels read it: its tensors, sizes and parameters.
//
//   q    [dk][n_query][n_head][n_stream]       F32
//   k    [dk][n_kv][n_head_kv][n_stream]       a type of a KV cache; query head h reads KV head h/(n_head/n_head_kv)
//   v    [dv][n_kv][n_head_kv][n_stream]
//   mask [n_kv][n_query][1 or n_head][1 or n_stream]  F16, added to the logits times the slope of the head; may be null
//   sinks [n_head]                             F32, one more logit of each head, which has no value; may be null
//   dst  [dv][n_head][n_query][n_stream]       F32
//
// The first number lies closest together. Strides are the tensors' own.

#include "ggml-impl.h"

#include <cmath>
#include <cstdint>
#include <cstring>

struct ggml_clex_node {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    int64_t n_kv;
    int     n_stream, n_head, n_head_kv, n_query;
    int     dk, dv; // sizes of a head

    float scale;    // of the products of query and key, before the soft cap
    float max_bias; // ALiBi's, 0 where there is none
    float softcap;  // logits are softcap*tanh(product*scale), 0 where there is none

    explicit ggml_clex_node(const ggml_tensor * dst)
        : q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), mask(dst->src[3]), sinks(dst->src[4]), dst(dst),
          n_kv(k->ne[1]), n_stream((int) q->ne[3]), n_head((int) q->ne[2]), n_head_kv((int) k->ne[2]), n_query((int) q->ne[1]),
          dk((int) k->ne[0]), dv((int) v->ne[0]) {
        memcpy(&scale,    (const float *) dst->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
        memcpy(&softcap,  (const float *) dst->op_params + 2, sizeof(float));
        if (softcap != 0.0f) {
            scale /= softcap;
        }
    }

    int group() const { return n_head/n_head_kv; }

    const float * query(int stream, int head, int64_t query) const {
        return (const float *) ((const char *) q->data + query*q->nb[1] + head*q->nb[2] + stream*q->nb[3]);
    }

    // K or V of a position
    static const char * row(const ggml_tensor * x, int stream, int head_kv, int64_t position) {
        return (const char *) x->data + position*x->nb[1] + head_kv*x->nb[2] + stream*x->nb[3];
    }

    float * result(int stream, int head, int64_t query) const {
        return (float *) ((char *) dst->data + head*dst->nb[1] + query*dst->nb[2] + stream*dst->nb[3]);
    }

    // there is a mask
    const ggml_fp16_t * mask_row(int stream, int head, int64_t query) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + query*mask->nb[1] + head % mask->ne[2]*mask->nb[2] +
                stream % mask->ne[3]*mask->nb[3]);
    }

    // what the mask is multiplied by: ALiBi, https://arxiv.org/abs/2108.12409
    float slope(int head) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int n_log2 = 1 << (int) floor(log2(n_head));
        return head < n_log2 ? powf(powf(2.0f, -max_bias/n_log2), head + 1)
                             : powf(powf(2.0f, -max_bias/2.0f/n_log2), 2*(head - n_log2) + 1);
    }

    bool has_sink() const { return sinks != nullptr; }
    float sink(int head) const { return ((const float *) sinks->data)[head]; }
};

// -INFINITY as F16: a position that a query does not see
static const ggml_fp16_t GGML_CLEX_HIDDEN = 0xFC00;
