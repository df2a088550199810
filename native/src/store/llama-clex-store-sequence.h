#pragma once

// One sequence of a context and a store: what restoring and saving begin with.

#include "llama-clex-store-cells.h"
#include "llama-clex-store-context.h"
#include "llama-clex-store-name.h"
#include "llama-clex-store-open.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class clex_store_sequence {
public:
    clex_store_sequence(llama_clex_store & store, llama_context & lctx, llama_seq_id seq_id, const std::string & digest);

protected:
    // a block of a text
    struct link {
        std::string path;
        clex_digest name;
    };

    link make_link(const clex_digest & key, uint32_t index, const std::string & label) const;

    llama_clex_store       & store;
    llama_context          & lctx;
    llama_clex_store_context context;

    const llama_seq_id seq_id;
    const std::string  digest;
    const std::string  model_id;
    const clex_digest  config;

    llama_clex_store_cache      cache;
    const std::vector<uint64_t> sizes; // of the sections of a block

    std::unique_ptr<llama_clex_store_cache> window; // of layers with a sliding window; null where there are none
    std::vector<uint64_t>                   window_sizes;
};
