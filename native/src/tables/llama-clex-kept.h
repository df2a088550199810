#pragma once

#include "llama.h"

#include "ggml.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class llama_kv_cache;

// Keys of a quantized cache as they were computed, from the first time that they are rotated on. Every later rotation
// starts from them: however often a sequence changes its table, a key has been rounded twice. Rounding it each time adds
// up: to 40 times the Kullback-Leibler divergence of a q4_0 cache after 46 tables.
struct llama_clex_kept {
    struct key {
        int32_t   bucket = -1; // table of the kept key, -1 where none is kept
        llama_pos pos    =  0;
    };

    std::vector<key>           keys; // of each cell of all streams; empty where keys are not kept
    std::vector<ggml_tensor *> k;    // [n_embd_k, cells] of each layer of the cache, null where they are never rotated

    // memory as large as the keys of the cache, where they are quantized; on a CPU the system provides it when a row is
    // first written
    void init(const llama_kv_cache & kv);

    bool enabled() const { return !keys.empty(); }

    const key * find(int32_t row) const { return enabled() && keys[row].bucket >= 0 ? &keys[row] : nullptr; }

    void clear();

    // the cell gets another key
    void drop(uint32_t row);

    // the cells of a stream were copied to another one
    void copy_stream(uint32_t src, uint32_t dst, uint32_t n_cells);

    void add_memory(std::map<ggml_backend_buffer_type_t, size_t> & memory) const;

private:
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};
