// What Python hands over: the arguments of one call, laid out as timm_ssm/ops/backends/native.py packs them.
//
// Every field is 8 bytes wide. Strides count elements; channels, or states for B and C, are contiguous.
#pragma once
#include <stdint.h>

// Python asks for these, and for the sizes of Scan and Conv, when it loads the library, and refuses one that differs
// from its own. Count ABI_VERSION up whenever a field's place or meaning changes.
constexpr int ABI_VERSION = 1;
constexpr int CHUNK_SIZE = 32;  // tokens between saved states

struct Tensor {
    void* data;  // null if absent
    int64_t batch_stride, token_stride, group_stride;
};

struct Direction {
    Tensor u, delta, B, C;
    const void *A, *D, *bias;  // (channels, d_state), (channels,), (channels,); D and bias may be null
    void* states;  // (batch, chunks, d_state, channels), or null if a forward pass shall not save them
    int64_t reverse, mask_diagonal;
    // gradients: of B and C (parts * batch, length, groups, d_state), to be summed over parts, and of parameters
    // (batch, ...), to be summed over the batch
    Tensor du, ddelta, dB, dC;
    void *dA, *dD, *dbias;
};

struct Scan {
    int64_t isa, threads, is_double;
    int64_t batch, length, channels, groups, d_state, directions, softplus, residual, parts;
    Tensor z, y, out;  // out's gradient in a backward pass
    Tensor dz;
    Direction direction[2];
};

struct ConvDirection {
    const void *weight, *bias;  // (channels, kernel size), (channels,) or null
    int64_t reverse;
    Tensor out;  // its gradient in a backward pass
    void *dweight, *dbias;  // (batch, ...): gradients to be summed over the batch
};

struct Conv {
    int64_t isa, threads, is_double;
    int64_t batch, length, channels, kernel_size, directions, silu, centered;
    Tensor x, dx;
    ConvDirection direction[2];
};

// What one instruction set offers, for float and double: how many tasks a call has, which may run in any order, the
// scratch memory that a task needs, and running one.
struct Kernel {
    int64_t (*tasks)(const void* call);
    int64_t (*scratch)(const void* call);
    void (*run)(const void* call, int64_t task, void* scratch);
};

struct Kernels {
    Kernel scan_forward[2], scan_backward[2], conv_forward[2], conv_backward[2];
};
