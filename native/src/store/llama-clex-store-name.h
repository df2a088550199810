#pragma once

// What names a block: SHA-256 over all that its keys and values depend on.

#include "llama.h"

#include <array>
#include <cstdint>
#include <string>

using clex_digest = std::array<uint8_t, 32>;

std::string clex_hex(const uint8_t * data, size_t size);

inline std::string clex_hex(const clex_digest & digest) { return clex_hex(digest.data(), digest.size()); }

// SHA-256 of what is added; strings with their lengths, so that no two series of parts are alike
class clex_hasher {
public:
    clex_hasher();

    clex_hasher & add(const void * data, size_t size);
    clex_hasher & add(const std::string & text);
    clex_hasher & add(const clex_digest & digest) { return add(digest.data(), digest.size()); }

    template <typename T>
    clex_hasher & number(T value) {
        return add(std::to_string(value));
    }

    clex_digest get() const;

private:
    struct state {
        uint32_t words[8];
        uint64_t count;
        uint8_t  buffer[64];
    } sha; // sha256_t, whose header is C
};

// this library: its sources and its compiler
std::string clex_store_build();

// what computes: the backends and the units of the processor that they use
std::string clex_store_devices();

// the block of these tokens behind another, whatever tables they were computed with
clex_digest clex_block_key(const clex_digest & config, const clex_digest & parent, const llama_token * tokens);

// how the tokens of a block were computed
enum clex_block_flags : uint32_t {
    CLEX_BLOCK_AS_COMPUTED = 1, // keys are in the tables that the tokens were computed with, not rotated to others
    CLEX_BLOCK_ALONE       = 2, // some were computed by themselves or with few others, as an answer is: not to the last bit what a prompt gives
};

// The same as a part of a name: the number of the table of all tokens, with a letter where some were computed one by one; or
// a hash where it is not that simple. tables: of each token
std::string clex_block_label(const int32_t * tables, const int32_t * buckets, uint32_t flags);

// the block, as the next one names it
clex_digest clex_block_name(const clex_digest & key, const std::string & label);
