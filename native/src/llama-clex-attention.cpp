#include "llama-clex-attention.h"

#include "llama-context.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <new>

//
// how long attention takes here
//

static const int    N_RUNS  = 3;     // that count, at most
static const double ENOUGH  = 50e-3; // seconds that are measured
static const size_t N_NODES = 16;

static bool clex_is_usable(const llama_clex_attention & shape, int32_t n_tokens, int32_t n_kv) {
    const auto holds = [](int32_t type, int32_t size) {
        return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type) > 0 && size > 0 &&
            size % ggml_blck_size((ggml_type) type) == 0;
    };
    return n_tokens > 0 && n_kv > 0 && n_kv % 256 == 0 && shape.n_head > 0 && shape.n_head_kv > 0 && shape.n_head % shape.n_head_kv == 0 &&
        holds(shape.type_k, shape.size_k) && holds(shape.type_v, shape.size_v);
}

// as llm_graph_context::build_attn_mha does it; K and V lie as in a cache, all heads of a token side by side
static ggml_tensor * clex_build(ggml_context * ctx, const llama_clex_attention & shape, bool flash_attn, int64_t n_tokens, int64_t n_kv) {
    const auto cached = [&](int32_t type, int64_t size) {
        return ggml_permute(ctx, ggml_new_tensor_3d(ctx, (ggml_type) type, size, shape.n_head_kv, n_kv), 0, 2, 1, 3);
    };
    ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, shape.size_k, shape.n_head, n_tokens), 0, 2, 1, 3);
    ggml_tensor * k = cached(shape.type_k, shape.size_k);

    const float scale = 1.0f/sqrtf((float) shape.size_k);

    if (!flash_attn) {
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_kv, n_tokens);
        ggml_tensor * v    = ggml_new_tensor_3d(ctx, (ggml_type) shape.type_v, n_kv, shape.size_v, shape.n_head_kv);
        ggml_tensor * kq   = ggml_mul_mat(ctx, k, q);
        return ggml_mul_mat(ctx, v, ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f));
    }
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_tokens);
    ggml_tensor * v    = cached(shape.type_v, shape.size_v);
    k = k->type == GGML_TYPE_F32 ? ggml_cast(ctx, k, GGML_TYPE_F16) : k;
    v = v->type == GGML_TYPE_F32 ? ggml_cast(ctx, v, GGML_TYPE_F16) : v;

    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    return cur;
}

static double clex_measure(const llama_clex_attention & shape, bool flash_attn, int n_threads, int64_t n_tokens, int64_t n_kv) {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend) {
        return 0.0;
    }
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    if (auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(backend.get(), n_threads);
    }

    const ggml_init_params params = { 2*N_NODES*ggml_tensor_overhead() + ggml_graph_overhead_custom(N_NODES, false), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));
    if (!ctx) {
        return 0.0;
    }
    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), N_NODES, false);
    ggml_build_forward_expand(graph, clex_build(ctx.get(), shape, flash_attn, n_tokens, n_kv));

    // all positions are seen, and all numbers are 0: how long it takes does not depend on them
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buffer) {
        return 0.0;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);

    int64_t measured = 0;
    int     n_runs   = -1; // the first one brings memory and threads where they are needed
    for (; n_runs < N_RUNS && measured < ENOUGH*1e6; ++n_runs) {
        const int64_t start = ggml_time_us();
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return 0.0;
        }
        measured += n_runs < 0 ? 0 : ggml_time_us() - start;
    }
    return measured*1e-6/n_runs;
}

double llama_clex_attention_time(const llama_context * ctx, llama_clex_attention shape, int32_t n_tokens, int32_t n_kv) {
    const auto & cparams = ctx->get_cparams();
    if (!clex_is_usable(shape, n_tokens, n_kv)) {
        return 0.0;
    }
    try {
        return clex_measure(shape, cparams.flash_attn, cparams.n_threads_batch, n_tokens, n_kv);
    } catch (const std::exception &) { // there is no memory for it
        return 0.0;
    }
}
