#pragma once

// What the document store has to know of a context.

#include "llama.h"

#include "llama-clex-store-name.h"

#include <cstdint>
#include <string>
#include <vector>

class llama_kv_cache;

class llama_clex_store_context {
public:
    explicit llama_clex_store_context(llama_context & ctx) : ctx(ctx) {}

    // why its sequences cannot be stored, empty if they can
    std::string refusal() const;

    // its caches: that of layers that see everything, and where there are such that of layers with a sliding window; none
    // where its memory is of another kind
    std::vector<llama_kv_cache *> caches() const;

    // forget the tokens of a sequence from a position on
    void truncate(llama_seq_id seq_id, llama_pos pos);

    // of all that keys and values depend on besides tokens and tables
    clex_digest config(const std::string & model_digest, llama_seq_id seq_id) const;

    // restored parts end at multiples of so many tokens, where a ubatch of the whole text would end
    int32_t step() const;

    int32_t n_seq_max() const;

    // wait for what is being computed, and apply what is pending
    void settle();

private:
    llama_context & ctx;
};
