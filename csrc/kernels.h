// All kernels of one instruction set: included inside its namespace and target, with VECTOR_BYTES defined.
#include "simd.h"
// in this order
#include "scan.h"
#include "conv.h"

template <class R>
static void conv_forward_any(const Conv& c, int64_t task, void* scratch) {
    c.kernel_size == 4 ? conv_forward_task<R, 4>(c, task, scratch)
        : c.kernel_size == 3 ? conv_forward_task<R, 3>(c, task, scratch)
        : conv_forward_task<R, 0>(c, task, scratch);
}

template <class R>
static void conv_backward_any(const Conv& c, int64_t task, void* scratch) {
    c.kernel_size == 4 ? conv_backward_task<R, 4>(c, task, scratch)
        : c.kernel_size == 3 ? conv_backward_task<R, 3>(c, task, scratch)
        : conv_backward_task<R, 0>(c, task, scratch);
}

template <class Call, int64_t (*COUNT)(const Call&), int64_t (*SCRATCH)(const Call&),
          void (*RUN)(const Call&, int64_t, void*)>
constexpr Kernel kernel() {
    return {
        [](const void* call) { return COUNT(*static_cast<const Call*>(call)); },
        [](const void* call) { return SCRATCH(*static_cast<const Call*>(call)); },
        [](const void* call, int64_t task, void* scratch) { RUN(*static_cast<const Call*>(call), task, scratch); },
    };
}

static const Kernels KERNELS = {
    {kernel<Scan, forward_tasks<float>, Scratch<float>::bytes, forward_task<float>>(),
     kernel<Scan, forward_tasks<double>, Scratch<double>::bytes, forward_task<double>>()},
    {kernel<Scan, backward_tasks<float>, BackwardScratch<float>::bytes, backward_task<float>>(),
     kernel<Scan, backward_tasks<double>, BackwardScratch<double>::bytes, backward_task<double>>()},
    {kernel<Conv, conv_forward_tasks<float>, ConvBlocks<float>::bytes, conv_forward_any<float>>(),
     kernel<Conv, conv_forward_tasks<double>, ConvBlocks<double>::bytes, conv_forward_any<double>>()},
    {kernel<Conv, conv_backward_tasks<float>, ConvGradientTile<float>::bytes, conv_backward_any<float>>(),
     kernel<Conv, conv_backward_tasks<double>, ConvGradientTile<double>::bytes, conv_backward_any<double>>()},
};

#undef INLINE
#undef INLINE_MEMBER
#undef VECTOR_BYTES
