#pragma once

// How long attention takes here, from which follows how much slower prompts are read the more there is before them.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// attention of one layer: heads for queries and for keys and values, their sizes, ggml's types of the cache
struct llama_clex_attention {
    int32_t n_head;
    int32_t n_head_kv;
    int32_t size_k;
    int32_t size_v;
    int32_t type_k;
    int32_t type_v;
};

// Compute it on the CPU, for n_tokens that all look back at n_kv positions, a multiple of 256, as the context would: with
// flash attention or without, and with its threads for prompts. Nothing of the context is used or changed.
// Returns seconds, the mean of some runs; 0 where it cannot be computed.
LLAMA_API double llama_clex_attention_time(const struct llama_context * ctx, struct llama_clex_attention shape, int32_t n_tokens, int32_t n_kv);

#ifdef __cplusplus
}
#endif
