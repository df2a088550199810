#include "llama-clex-store-sum.h"

#include "hash/xxhash/xxhash.h"

uint64_t clex_sum(const void * data, size_t size, uint64_t after) {
#ifdef CLEX_SUM_AVX2
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) {
        return clex_sum_avx2(data, size, after);
    }
#endif
    return XXH3_64bits_withSeed(data, size, after);
}
