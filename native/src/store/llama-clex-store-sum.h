#pragma once

#include <cstddef>
#include <cstdint>

// Checksum of a section: XXH3, in the fastest form that this processor has. It finds damage; it is no defence against a forger.
// after: the sum of what comes before, 0 where nothing does
uint64_t clex_sum(const void * data, size_t size, uint64_t after = 0);

#ifdef CLEX_SUM_AVX2
uint64_t clex_sum_avx2(const void * data, size_t size, uint64_t after);
#endif
