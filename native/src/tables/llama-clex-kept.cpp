#include "llama-clex-kept.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <stdexcept>

void llama_clex_kept::init(const llama_kv_cache & kv) {
    const auto & clex = kv.clex;

    // in the first bucket alone nothing is ever re-rotated
    if (!ggml_is_quantized(kv.type_k()) || clex.tables.bucket_for(std::min(clex.n_ctx, clex.tables.n_ctx_max())) <= 0) {
        return;
    }

    const int64_t n_cells = (int64_t) kv.get_size()*kv.n_stream;

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctxs;

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const auto & layer = kv.layers[i];

        if (clex.layers.ropes[i].n_dims == 0) {
            k.push_back(nullptr);
            continue;
        }

        auto & ctx = ctxs[ggml_backend_buffer_get_type(layer.k->buffer)];
        if (!ctx) {
            ctx = ggml_init({ /*.mem_size =*/ kv.layers.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true });
        }

        k.push_back(ggml_new_tensor_2d(ctx, layer.k->type, kv.hparams.n_embd_k_gqa(layer.il), n_cells));
        ggml_format_name(k.back(), "kept_k_l%d", (int) layer.il);
    }

    size_t size = 0;

    for (const auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_t buf;
        if (kv.hparams.no_alloc) {
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (auto * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft); // not cleared: rows are written before they are read
        }

        ctxs_bufs.emplace_back(ctx, buf);

        if (!buf) {
            throw std::runtime_error("not enough memory to keep the keys of a quantized cache, which re-rotations start from");
        }
        size += ggml_backend_buffer_get_size(buf);
    }

    keys.resize(n_cells);

    LLAMA_LOG_INFO("%s: up to %.2f MiB for keys that re-rotations start from\n", __func__, size/1024.0/1024.0);
}

void llama_clex_kept::clear() {
    std::fill(keys.begin(), keys.end(), key {});
}

void llama_clex_kept::drop(uint32_t row) {
    if (enabled()) {
        keys[row] = {};
    }
}

void llama_clex_kept::copy_stream(uint32_t src, uint32_t dst, uint32_t n_cells) {
    if (!enabled()) {
        return;
    }

    const auto first = keys.begin() + (size_t) src*n_cells;
    std::copy(first, first + n_cells, keys.begin() + (size_t) dst*n_cells);

    std::vector<uint8_t> data;

    for (uint32_t i0 = 0; i0 < n_cells;) {
        if (first[i0].bucket < 0) {
            ++i0;
            continue;
        }

        uint32_t i1 = i0;
        while (i1 < n_cells && first[i1].bucket >= 0 && i1 - i0 < 1024) {
            ++i1;
        }

        for (auto * t : k) {
            if (t) {
                data.resize((i1 - i0)*t->nb[1]);
                ggml_backend_tensor_get(t, data.data(), ((size_t) src*n_cells + i0)*t->nb[1], data.size());
                ggml_backend_tensor_set(t, data.data(), ((size_t) dst*n_cells + i0)*t->nb[1], data.size());
            }
        }

        i0 = i1;
    }
}

void llama_clex_kept::add_memory(std::map<ggml_backend_buffer_type_t, size_t> & memory) const {
    for (const auto & [ctx, buf] : ctxs_bufs) {
        auto * buft = ggml_backend_buffer_get_type(buf.get());

        memory[buft] += ggml_backend_buffer_get_base(buf.get()) ?
            ggml_backend_buffer_get_size(buf.get()) : ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft);
    }
}
