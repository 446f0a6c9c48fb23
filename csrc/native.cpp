// The CPU kernels of the selective scan and the short convolution, behind a C interface that ctypes can call.
//
// The same source is compiled once per instruction set under a target pragma, and the best one is chosen at run time, so
// that one build made without -march serves every machine.
#include "native.h"

#include <stdlib.h>
#include <string.h>

#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PRAGMA(TEXT) _Pragma(#TEXT)
#if defined(__clang__)
#define TARGET(FEATURES) PRAGMA(clang attribute push(__attribute__((target(FEATURES))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define TARGET(FEATURES) _Pragma("GCC push_options") PRAGMA(GCC target(FEATURES))
#define END_TARGET _Pragma("GCC pop_options")
#endif

namespace baseline {
#define VECTOR_BYTES 16
#include "kernels.h"
}

#if defined(__x86_64__)
TARGET("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
}
END_TARGET

TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define VECTOR_BYTES 64
#include "kernels.h"
}
END_TARGET
#endif

// From plain to fast.
static const struct {
    const char* name;
    const Kernels* kernels;
} ISAS[] = {
    {"baseline", &baseline::KERNELS},
#if defined(__x86_64__)
    {"avx2", &avx2::KERNELS},
    {"avx512", &avx512::KERNELS},
#endif
};

static int run(const Kernel& kernel, const void* call, int64_t threads) {
    const int64_t tasks = kernel.tasks(call), size = kernel.scratch(call);
    if (threads > tasks) threads = tasks;
    int failed = 0;
    // one thread must not enter an OpenMP region: in a forked process that would wait for threads that were not forked
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : failed)
    {
        void* scratch = malloc(size + 64);
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++)
            if (scratch) kernel.run(call, task, (char*)scratch + (64 - (uintptr_t)scratch % 64));
        free(scratch);
    }
    return failed;
}

#define EXPORT __attribute__((visibility("default")))

extern "C" {
// What the caller must have been built for: version, sizes of the structs, chunk size; -1 beyond.
EXPORT int64_t timm_ssm_abi(int i) {
    static const int64_t ABI[] = {ABI_VERSION, sizeof(Scan), sizeof(Conv), CHUNK_SIZE};
    return i >= 0 && i < (int)(sizeof(ABI) / sizeof(*ABI)) ? ABI[i] : -1;
}

// The four functions below return 0, or 1 if memory ran out.
EXPORT int timm_ssm_scan_forward(const Scan* s) {
    return run(ISAS[s->isa].kernels->scan_forward[s->is_double], s, s->threads);
}

EXPORT int timm_ssm_scan_backward(const Scan* s) {
    return run(ISAS[s->isa].kernels->scan_backward[s->is_double], s, s->threads);
}

EXPORT int timm_ssm_conv_forward(const Conv* c) {
    return run(ISAS[c->isa].kernels->conv_forward[c->is_double], c, c->threads);
}

EXPORT int timm_ssm_conv_backward(const Conv* c) {
    return run(ISAS[c->isa].kernels->conv_backward[c->is_double], c, c->threads);
}

// The name of instruction set i, empty if this machine lacks it; null beyond the last.
EXPORT const char* timm_ssm_isa(int i) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool usable[] = {
        true,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl"),
    };
#else
    const bool usable[] = {true};
#endif
    if (i >= (int)(sizeof(ISAS) / sizeof(*ISAS))) return nullptr;
    return usable[i] ? ISAS[i].name : "";
}
}
