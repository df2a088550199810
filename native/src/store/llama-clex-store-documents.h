#pragma once

// The documents of a store: what its blocks are together.

#include "llama-clex-store-block.h"
#include "llama-clex-store-folder.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

class clex_store_documents {
public:
    // reads the header of every block
    explicit clex_store_documents(const clex_store_folder & folder);

    std::vector<llama_clex_store_document> list() const;

    int64_t remove(const std::string & name) const;

    llama_clex_store_check_result check() const;

private:
    struct block {
        clex_store_entry  entry;
        clex_block_header header;
        int32_t           n_children = 0;
    };

    // from a block to the first of its text; ends early where one is missing
    std::vector<const block *> chain(const block & last) const;

    bool is_whole(const std::vector<const block *> & chain) const { return chain.back()->header.index == 0; }

    std::map<clex_digest, block>  blocks;
    std::vector<clex_store_entry> damaged;
};
