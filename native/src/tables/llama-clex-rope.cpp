#include "llama-clex-rope.h"

#include <algorithm>
#include <iterator>

bool llama_clex_rope::operator==(const llama_clex_rope & other) const {
    return n_dims == other.n_dims && mode == other.mode && std::equal(std::begin(sections), std::end(sections), other.sections);
}

ggml_tensor * llama_clex_rope::apply(
        ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, ggml_tensor * factors, float attn_factor) const {
    if (is_multi()) {
        int sec[GGML_MROPE_SECTIONS];
        std::copy(std::begin(sections), std::end(sections), sec);
        return ::ggml_rope_multi(ctx, cur, pos, factors, n_dims, sec, mode, 0, 1.0f, 1.0f, 0.0f, attn_factor, 0.0f, 0.0f);
    }
    return ::ggml_rope_ext(ctx, cur, pos, factors, n_dims, mode, 0, 1.0f, 1.0f, 0.0f, attn_factor, 0.0f, 0.0f);
}
