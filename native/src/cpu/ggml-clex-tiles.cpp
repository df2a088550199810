#include "ggml-clex-tiles.h"

#if defined(GGML_CLEX_TILES)

#include "ggml-impl.h"

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace clex_tiles {

//
// software
//

struct tile {
    int  rows, row_bytes;
    char data[16][64];
};

struct registers {
    bool configured;
    tile tiles[8];

    // rows above those of the configuration do not exist
    tile & at(int t) {
        GGML_ASSERT(configured && tiles[t].rows > 0 && tiles[t].row_bytes > 0);
        return tiles[t];
    }
};

static thread_local registers state;

void software::begin() {
    const config c;
    GGML_ASSERT(c.palette == 1 && c.start_row == 0);
    for (uint8_t x : c.reserved) {
        GGML_ASSERT(x == 0);
    }
    for (int i = 0; i < 16; ++i) {
        GGML_ASSERT(i < 8 ? c.rows[i] <= 16 && c.row_bytes[i] <= 64 : c.rows[i] == 0 && c.row_bytes[i] == 0);
    }
    memset(&state, 0, sizeof(state));
    state.configured = true;
    for (int i = 0; i < 8; ++i) {
        state.tiles[i].rows      = c.rows[i];
        state.tiles[i].row_bytes = c.row_bytes[i];
    }
}

void software::end() {
    state.configured = false;
}

void software::zero(int t) {
    memset(state.at(t).data, 0, sizeof(tile::data));
}

void software::load(int t, const void * p, int64_t stride) {
    tile & x = state.at(t);
    memset(x.data, 0, sizeof(x.data));
    for (int i = 0; i < x.rows; ++i) {
        memcpy(x.data[i], (const char *) p + i*stride, x.row_bytes);
    }
}

void software::store(int t, void * p, int64_t stride) {
    const tile & x = state.at(t);
    for (int i = 0; i < x.rows; ++i) {
        memcpy((char *) p + i*stride, x.data[i], x.row_bytes);
    }
}

// the units take and make no subnormal numbers
static inline float flush(float x) {
    return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x;
}

static inline float from_bf16(uint32_t bits) {
    float x;
    bits <<= 16;
    memcpy(&x, &bits, 4);
    return flush(x);
}

// Sums of the even and of the odd terms, then both together: the order in Intel's manual.
void software::dot(int c, int a, int b) {
    tile & z = state.at(c);
    const tile & x = state.at(a);
    const tile & y = state.at(b);
    GGML_ASSERT(c != a && c != b && a != b);
    GGML_ASSERT(x.rows == z.rows && y.row_bytes == z.row_bytes && x.row_bytes == 4*y.rows);
    for (int m = 0; m < z.rows; ++m) {
        float sum[2][16] = {};
        float result[16];
        for (int k = 0; k < y.rows; ++k) {
            uint32_t pair, other[16];
            memcpy(&pair, x.data[m] + 4*k, 4);
            memcpy(other, y.data[k], 64);
            const float even = from_bf16(pair & 0xffff), odd = from_bf16(pair >> 16);
            for (int n = 0; n < 16; ++n) {
                sum[0][n] = flush(std::fma(even, from_bf16(other[n] & 0xffff), sum[0][n]));
                sum[1][n] = flush(std::fma(odd,  from_bf16(other[n] >> 16),    sum[1][n]));
            }
        }
        memcpy(result, z.data[m], 64);
        for (int n = 0; n < 16; ++n) {
            result[n] = flush(flush(result[n]) + flush(sum[0][n] + sum[1][n]));
        }
        memcpy(z.data[m], result, z.row_bytes);
    }
}

//
// which
//

static bool processor_has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & 1u << 27)) { // the system keeps extended states
        return false;
    }
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    static constexpr uint32_t TILE_STATE = 1u << 17 | 1u << 18; // configuration and data
    if ((low & TILE_STATE) != TILE_STATE) {
        return false;
    }
    static constexpr unsigned AMX = 1u << 22 | 1u << 24; // bf16, tiles
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX) != AMX) {
        return false;
    }
    return __get_cpuid_count(0x1d, 1, &a, &b, &c, &d) && (b & 0xffff) >= 64 && b >> 16 >= 8 && (c & 0xffff) >= 16; // the palette
}

// Of the whole process, and of what it forks. Refused where a thread's signal stack has no room for the tiles.
static bool system_permits_tiles() {
    static constexpr int REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// numbers from 0.25 to 1 and their negatives, as bf16
static void fill(uint16_t * x, int n, uint32_t seed) {
    for (int i = 0; i < n; ++i) {
        seed = seed*1664525u + 1013904223u;
        x[i] = (uint16_t) (0x3e80 + (seed >> 16 & 0xff) + (seed >> 8 & 0x8000));
    }
}

template <typename Tiles>
GGML_CLEX_TILE_CODE static void sample(const uint16_t * a, const uint16_t * b, float * c) {
    Tiles::begin();
    Tiles::template load<4>(a, 128);
    Tiles::template load<6>(b, 64);
    Tiles::template zero<1>();
    Tiles::template dot<1, 4, 6>();
    Tiles::template store<1>(c, 128);
    Tiles::template load<0>(c, 128);
    Tiles::template dot<0, 4, 6>();
    Tiles::template store<0>(c, 128);
    Tiles::end();
}

// A product by the processor against the same in software: where they differ, these kernels are not for that processor.
static bool processor_computes_as_expected() {
    alignas(64) uint16_t a[16*64], b[16*32];
    alignas(64) float expected[16*32] = {}, found[16*32] = {};
    fill(a, 16*64, 1);
    fill(b, 16*32, 2);
    sample<software>(a, b, expected);
    sample<hardware>(a, b, found);
    for (int i = 0; i < 16*32; ++i) {
        if (!(std::fabs(found[i] - expected[i]) <= 1e-4f)) { // of sums of 64 products
            return false;
        }
    }
    return true;
}

static units decide() {
    const char * wanted = getenv("GGML_CLEX_TILES");
    if (wanted && strcmp(wanted, "software") == 0) {
        return units::software;
    }
    if (getenv("GGML_AMX_DISABLE") || !processor_has_tiles() || !system_permits_tiles()) {
        return units::none;
    }
    if (!processor_computes_as_expected()) {
        GGML_LOG_WARN("ggml-clex: the AMX units of this processor compute something else than is expected, and are not used\n");
        return units::none;
    }
    return units::hardware;
}

units available() {
    static const units found = decide();
    return found;
}

} // namespace clex_tiles

#endif
