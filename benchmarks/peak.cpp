// Products of two numbers that one core computes from registers alone, 10^9 a second: of 8 bits, of bf16 and of float; 0 where
// it has no units for them. Each is the best of five times.

#include <algorithm>
#include <cstdio>
#include <ctime>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

static double now() {
    return (double) clock()/CLOCKS_PER_SEC;
}

// Nothing happens to x, but the compiler cannot know.
template <typename X>
static void hide(X & x) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(x));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(x));
#endif
}

// Step(sum, x) adds products of x to one of several sums, which do not wait for each other.
template <typename V, typename X, typename Step>
static double speed(int products, V start, X x, Step step) {
    static constexpr int SUMS = 12, TURNS = 1000000;
    double best = 0.0;
    for (int i = 0; i < 5; ++i) {
        V sums[SUMS];
        for (V & sum : sums) {
            sum = start;
            hide(sum);
        }
        const double before = now();
        for (int j = 0; j < TURNS; ++j) {
#pragma GCC unroll 12
            for (int k = 0; k < SUMS; ++k) {
                sums[k] = step(sums[k], x);
            }
            hide(x);
        }
        best = std::max(best, 1e-9*products*SUMS*TURNS/(now() - before));
        for (V & sum : sums) {
            hide(sum);
        }
    }
    return best;
}

int main() {
    double bytes = 0.0, bf16 = 0.0, floats = 0.0;
#if defined(__AVX512F__)
    const __m512 f = _mm512_set1_ps(0.5f);
    floats = speed(16, f, f, [](__m512 sum, __m512 x) { return _mm512_fmadd_ps(x, x, sum); });
#if defined(__AVX512VNNI__)
    const __m512i b = _mm512_set1_epi32(0x01020304);
    bytes = speed(64, b, b, [](__m512i sum, __m512i x) { return _mm512_dpbusd_epi32(sum, x, x); });
#endif
#if defined(__AVX512BF16__)
    bf16 = speed(32, f, f, [](__m512 sum, __m512 x) { return _mm512_dpbf16_ps(sum, (__m512bh) x, (__m512bh) x); });
#endif
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256 f = _mm256_set1_ps(0.5f);
    floats = speed(8, f, f, [](__m256 sum, __m256 x) { return _mm256_fmadd_ps(x, x, sum); });
    const __m256i b = _mm256_set1_epi32(0x01020304);
#if defined(__AVXVNNI__)
    bytes = speed(32, b, b, [](__m256i sum, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, x, x); });
#else
    bytes = speed(32, b, b, [](__m256i sum, __m256i x) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), _mm256_set1_epi16(1)));
    });
#endif
#elif defined(__aarch64__)
    const float32x4_t f = vdupq_n_f32(0.5f);
    floats = speed(4, f, f, [](float32x4_t sum, float32x4_t x) { return vfmaq_f32(sum, x, x); });
#if defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t b = vdupq_n_s8(3);
    bytes = speed(16, vdupq_n_s32(0), b, [](int32x4_t sum, int8x16_t x) { return vdotq_s32(sum, x, x); });
#endif
#endif
    printf("%.1f %.1f %.1f\n", bytes, bf16, floats);
}
