// The CPU kernels of the selective scan and the short convolution, behind a C interface that ctypes can call.
//
// The same source is compiled once per instruction set under a target pragma, and the best one is chosen at run time, so
// that one build made without -march serves every machine.
#include "native.h"

#include <stdlib.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baseline {
#define VECTOR_BYTES 16
#include "kernels.h"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#include "kernels.h"
}
#pragma GCC pop_options
#endif

static const struct {
    const char* name;
    const Kernels* kernels;
    bool usable;
} ISAS[] = {
    {"baseline", &baseline::KERNELS, true},
#if defined(__x86_64__)
    {"avx2", &avx2::KERNELS, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
    {"avx512", &avx512::KERNELS,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
         && __builtin_cpu_supports("avx512vl")},
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

// Each function returns 0, or 1 if memory ran out.
extern "C" {
__attribute__((visibility("default"))) int timm_ssm_scan_forward(const Scan* s) {
    return run(ISAS[s->isa].kernels->scan_forward[s->is_double], s, s->threads);
}

__attribute__((visibility("default"))) int timm_ssm_scan_backward(const Scan* s) {
    return run(ISAS[s->isa].kernels->scan_backward[s->is_double], s, s->threads);
}

__attribute__((visibility("default"))) int timm_ssm_conv_forward(const Conv* c) {
    return run(ISAS[c->isa].kernels->conv_forward[c->is_double], c, c->threads);
}

__attribute__((visibility("default"))) int timm_ssm_conv_backward(const Conv* c) {
    return run(ISAS[c->isa].kernels->conv_backward[c->is_double], c, c->threads);
}

// The name of instruction set i, null beyond the last; empty if this machine lacks it.
__attribute__((visibility("default"))) const char* timm_ssm_isa(int i) {
    if (i >= (int)(sizeof(ISAS) / sizeof(*ISAS))) return nullptr;
    return ISAS[i].usable ? ISAS[i].name : "";
}
}
