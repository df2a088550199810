#pragma once

// Saved states, whole and of one sequence, in memory and in files.

#include "llama-clex-sum.h"

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <functional>

struct llama_context;
struct llama_file;

class clex_state_reader;
class llama_kv_cache;

// Saved states as the C API hands them out and takes them. Those of a model with tables end with a checksum. Whatever the
// model, a state is looked at whole before anything changes, and one that is refused has changed nothing; of memories other
// than KV caches llama.cpp finds out while it reads.
class llama_clex_state {
public:
    explicit llama_clex_state(llama_context & ctx);                                 // whole
    llama_clex_state(llama_context & ctx, llama_seq_id seq_id, uint32_t flags = 0); // of one sequence

    void check_seq() const; // throws where the context has no such sequence

    // llama.cpp's functions are called with the size that they get; refusals are logged and give 0
    size_t size (                                   const std::function<size_t()>       & get)   const;
    size_t write(uint8_t * dst,       size_t size,  const std::function<size_t(size_t)> & write) const;
    size_t read (const uint8_t * src, size_t size,  const std::function<size_t(size_t)> & read)  const;

    void check_file(const char * path) const; // throws where the file is refused

    // behind a file that is being written; sum is that of the bytes behind the tokens, returns the bytes written
    size_t seal_file(const llama_file & file, llama_clex_sum & sum, uint32_t magic, uint32_t version,
            const llama_token * tokens, size_t n_tokens) const;

    size_t sum_size() const; // bytes of the checksum behind a state

private:
    void check_front  (clex_state_reader & io)  const; // what llama.cpp writes in front of the memory
    void check_version(clex_state_reader && io) const; // that the state has a checksum
    void check_words  (clex_state_reader && io, bool exact) const;

    bool has_tag() const; // a version, model and tables in front of the cells

    size_t device_size(const uint8_t * data, size_t size) const; // bytes that the device keeps for the state

    llama_context & ctx;

    const bool         is_seq;
    const llama_seq_id seq_id;
    const bool         on_device; // keys and values stay there
    const bool         partial;   // only what a sliding window or recurrent layers hold

    llama_kv_cache * kv; // null for a model without tables
};
