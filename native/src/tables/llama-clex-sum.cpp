#include "llama-clex-sum.h"

#include <algorithm>
#include <cstring>

static constexpr uint64_t CLEX_SUM_FACTOR = 0x9e3779b97f4a7c15ull;

static inline uint64_t clex_sum_step(uint64_t lane, uint64_t word) {
    lane = (lane ^ word)*CLEX_SUM_FACTOR;
    return lane << 29 | lane >> 35;
}

llama_clex_sum::llama_clex_sum(uint64_t seed) {
    for (uint64_t & lane : lanes) {
        lane = seed = clex_sum_step(seed, CLEX_SUM_FACTOR);
    }
}

void llama_clex_sum::blocks(const uint8_t * data, size_t n) {
    uint64_t cur[8];
    memcpy(cur, lanes, sizeof(cur));

    for (; n > 0; --n, data += sizeof(cur)) {
        for (int i = 0; i < 8; ++i) {
            uint64_t word;
            memcpy(&word, data + 8*i, sizeof(word));
            cur[i] = clex_sum_step(cur[i], word);
        }
    }

    memcpy(lanes, cur, sizeof(cur));
}

void llama_clex_sum::update(const void * data, size_t size) {
    const auto * ptr = static_cast<const uint8_t *>(data);

    const size_t n_rest = n_bytes%sizeof(rest);
    n_bytes += size;

    if (n_rest > 0) {
        const size_t n = std::min(size, sizeof(rest) - n_rest);
        memcpy(rest + n_rest, ptr, n);
        ptr  += n;
        size -= n;
        if (n_rest + n < sizeof(rest)) {
            return;
        }
        blocks(rest, 1);
    }

    blocks(ptr, size/sizeof(rest));
    memcpy(rest, ptr + size - size%sizeof(rest), size%sizeof(rest));
}

uint64_t llama_clex_sum::get() const {
    llama_clex_sum end = *this;

    const uint8_t zeros[sizeof(rest)] = {};
    end.update(zeros, sizeof(rest) - n_bytes%sizeof(rest));

    uint64_t res = n_bytes;
    for (const uint64_t lane : end.lanes) {
        res = clex_sum_step(res, lane);
    }
    return res ^ res >> 32;
}
