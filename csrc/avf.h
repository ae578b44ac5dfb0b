// The C ABI of libavfkernels: raw pointers, sizes, strides in elements, an error code. No PyTorch headers.
#pragma once
#include <cstdint>

#define AVF_API extern "C" __attribute__((visibility("default")))

enum AvfError : int {
    AVF_OK = 0,
    AVF_OUT_OF_MEMORY = 1,
};

// Raised whenever a signature or a struct below changes; the loader refuses a library of another version.
#define AVF_ABI_VERSION 2
AVF_API int avf_abi_version();

// The instruction set that the kernels run with: "avx512", "avx2" or "portable" (AVF_CPU_ISA overrides).
AVF_API const char* avf_isa();

enum AvfDtype : int32_t { AVF_F32 = 0, AVF_BF16 = 1 };
enum AvfInteraction : int32_t { AVF_SUM = 0, AVF_PRODUCT = 1 };

// A tensor [B, H, tokens, width] with unit last stride; strides in elements.
struct AvfTensor {
    void* data;
    int64_t stride_b, stride_h, stride_n;
};

// Pair attention, forward and backward (see csrc/pair_attention.h for the mathematics). `dtype` is that of every
// AvfTensor; what is declared float is fp32 and contiguous. Side 0 is tokens 1 of the Python API, side 1 tokens 2.
struct AvfPairAttention {
    AvfTensor q, k[2], v[2];                // [B, H, F, dk], [B, H, N, dk], [B, H, N, dv]
    const uint8_t* mask[2];                 // [B, N], nonzero = attend, contiguous; null = attend to all
    AvfTensor out;                          // [B, H, F, dv]                                     written by forward
    float* lse;                             // [B, H, F]                                         written by forward
    float* saved_softmax;                   // [S, 2, B, H, F], S = 2 for sums (one a side) and 1 for products: what
    float* saved_out;                       // backward needs; for products also [B, H, F, dv]; null if nobody wants it
    AvfTensor grad_out;                     // [B, H, F, dv]                                     backward only
    const float* grad_lse;                  // [B, H, F] or null                                 backward only
    AvfTensor grad_q, grad_k[2], grad_v[2]; //                                                   written by backward
    int64_t B, H, F, N[2], dk, dv;
    uint64_t seed;                          // of the dropout mask
    float scale, dropout_p;
    int32_t dtype, interaction;
};
AVF_API int avf_pair_attention_forward(const AvfPairAttention*);
AVF_API int avf_pair_attention_backward(const AvfPairAttention*);

// FLOP/s of fused multiply-adds on registers alone, all threads together: the best of runs that fill `seconds`.
AVF_API double avf_fma_flops(double seconds);
