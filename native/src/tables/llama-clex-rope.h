#pragma once

// How the keys of a cache are rotated: by this they are re-rotated.

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

// how the keys of a layer are rotated, read from the graph
struct llama_clex_rope {
    int32_t n_dims      = 0; // of each head that are rotated with the table, 0 for none
    int32_t mode        = 0; // GGML_ROPE_TYPE_*
    int32_t sections[4] = {}; // of M-RoPE

    bool operator==(const llama_clex_rope & other) const;

    // the whole angle comes from the factors, F32 [n_dims/2]; pos is I32 [n], for M-RoPE [4*n]
    ggml_tensor * apply(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, ggml_tensor * factors, float attn_factor) const;

    bool is_multi() const { return (mode & GGML_ROPE_TYPE_MROPE) != 0; }
};

// what the first graph of a context says of the layers of its cache, with tables and without
struct llama_clex_layers {
    bool known = false; // there was a graph

    std::vector<llama_clex_rope> ropes; // of each layer of the cache

    int32_t n_windowed = 0; // layers with RoPE and a sliding window, whose keys are in another cache: theirs is the model's

    std::string refusal; // why tables cannot be used, empty if they can
};
