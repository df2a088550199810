#pragma once

// Tile registers: eight of 16 rows of 64 bytes, and products of two of them that are added to a third. Those of a processor
// (AMX), and the same in software, with which tests compute on every x86-64.
//
// The configuration is loaded where tiles are used and released after: others in the process (oneDNN, PyTorch) load and release theirs on the
// same threads.

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#define GGML_CLEX_TILES

#include <cstdint>

// Clang assembles instructions only in functions of a target that has them.
#if defined(__clang__)
#define GGML_CLEX_TILE_CODE __attribute__((target("amx-tile,amx-bf16")))
#else
#define GGML_CLEX_TILE_CODE
#endif

namespace clex_tiles {

enum class units { none, hardware, software };

// What this process computes with, decided once: the processor's, where it has them, the system lets us, and they compute what they should.
// GGML_AMX_DISABLE in the environment keeps them from being used, GGML_CLEX_TILES=software has them computed in software.
units available();

// What ldtilecfg reads.
struct alignas(64) config {
    uint8_t  palette   = 1;
    uint8_t  start_row = 0;
    uint8_t  reserved[14] = {};
    uint16_t row_bytes[16] = { 64, 64, 64, 64, 64, 64, 64, 64 };
    uint8_t  rows[16]      = { 16, 16, 16, 16, 16, 16, 16, 16 };
};
static_assert(sizeof(config) == 64);

// Assembly, since compilers' own functions say too little of the memory that they read and write: GCC 12 drops stores in front of them.
struct hardware {
    GGML_CLEX_TILE_CODE static void begin() {
        const config c;
        asm volatile("ldtilecfg %0" : : "m"(c));
    }
    GGML_CLEX_TILE_CODE static void end() { asm volatile("tilerelease"); }

    template <int T>
    GGML_CLEX_TILE_CODE static void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }

    // rows are so many bytes apart
    template <int T>
    GGML_CLEX_TILE_CODE static void load(const void * p, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    GGML_CLEX_TILE_CODE static void store(void * p, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }

    // C[m][n] += A[m][2*k]*B[k][2*n] + A[m][2*k + 1]*B[k][2*n + 1] for all k; A and B are bf16, C is float
    template <int C, int A, int B>
    GGML_CLEX_TILE_CODE static void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

// The same, each thread with registers of its own; what a processor refuses ends the process.
struct software {
    static void begin();
    static void end();

    template <int T> static void zero() { zero(T); }
    template <int T> static void load (const void * p, int64_t stride) { load(T, p, stride); }
    template <int T> static void store(void * p, int64_t stride) { store(T, p, stride); }
    template <int C, int A, int B> static void dot() { dot(C, A, B); }

private:
    static void zero(int t);
    static void load(int t, const void * p, int64_t stride);
    static void store(int t, void * p, int64_t stride);
    static void dot(int c, int a, int b);
};

} // namespace clex_tiles

#endif
