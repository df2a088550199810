#pragma once

#include <cstddef>
#include <cstdint>

// Checksum of a state, which may have gigabytes: eight lanes of 64-bit words, each step of which can be undone, so that no
// change of a single word goes unnoticed. It finds damage; it is no defence against a forger.
class llama_clex_sum {
public:
    explicit llama_clex_sum(uint64_t seed = 0);

    void update(const void * data, size_t size); // the sum does not depend on how the data is cut

    uint64_t get() const;

private:
    void blocks(const uint8_t * data, size_t n);

    uint64_t lanes[8];
    uint8_t  rest[64]; // of an incomplete block
    uint64_t n_bytes = 0;
};
