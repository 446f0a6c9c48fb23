// What this machine can do at most, in the vectors and with the exp2 of csrc/: compiled by scan_cpu.py with -march=native.
#include "../csrc/native.h"

#include <string.h>

#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
constexpr int EXP2_MULTIPLICATIONS = 3;
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
constexpr int EXP2_MULTIPLICATIONS = 4;
#else
#define VECTOR_BYTES 16
constexpr int EXP2_MULTIPLICATIONS = 5;
#endif
#include "../csrc/simd.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int exp2_multiplications() { return EXP2_MULTIPLICATIONS; }

// n times 12 vectors of multiply-adds in every thread, which do not wait for one another. Returns how many numbers that is.
EXPORT double multiply_adds(int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Vf x[12];
        for (int j = 0; j < 12; j++) x[j] = splat(float(j));
        const Vf a = splat(.5f), b = splat(1.f);
        for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 12
            for (int j = 0; j < 12; j++) x[j] = x[j] * a + b;
        __asm__ volatile("" : : "r"(x) : "memory");  // which may read x
    }
    return 12. * n * LANES<float> * threads;
}

// n times 256 powers of two in every thread, from and to the L1 cache.
EXPORT double exps(int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float x[256], y[256];
        for (int j = 0; j < 256; j++) x[j] = -j / 64.f;
        for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
            for (int j = 0; j < 256; j += LANES<float>) store(y + j, exp2(load(x + j)));
            __asm__ volatile("" : : "r"(x), "r"(y) : "memory");
        }
    }
    return 256. * n * threads;
}

// Reads rows of x and writes each to both outputs, as a convolution in two directions at least has to.
EXPORT void read_one_write_two(const float* x, int64_t stride, float* y0, float* y1, int64_t rows, int64_t width,
                               int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        memcpy(y0 + i * width, x + i * stride, width * sizeof(float));
        memcpy(y1 + i * width, x + i * stride, width * sizeof(float));
    }
}
