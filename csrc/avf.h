// The C ABI of libavfkernels (CPU) and libavfkernels_cuda: raw pointers, sizes, strides in elements, a stream, an error
// code. No PyTorch headers. avfkernels/native.py holds the same structures for ctypes.
#pragma once
#include <cstdint>

#define AVF_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or a struct below changes; the loader refuses a library of another version or size.
#define AVF_ABI_VERSION 3
AVF_API int avf_abi_version();
AVF_API int avf_pair_bytes();  // sizeof(AvfPair)

// What the kernels run with: "avx512", "avx2" or "portable" (AVF_CPU_ISA asks for a lower one), or "cuda".
AVF_API const char* avf_isa();
// What a code other than 0 means.
AVF_API const char* avf_error(int code);

enum AvfDtype : int32_t { AVF_F32 = 0, AVF_BF16 = 1, AVF_F16 = 2 };
enum AvfInteraction : int32_t { AVF_SUM = 0, AVF_PRODUCT = 1 };

// A tensor [B, H, tokens, width] with unit last stride; strides in elements.
struct AvfTensor {
    void* data;
    int64_t stride_b, stride_h, stride_n;
};

// Pair attention, forward and backward (csrc/pair.h has the mathematics). `dtype` is that of every AvfTensor; what is
// declared float is fp32 and contiguous. Side 0 is tokens 1 of the Python API, side 1 tokens 2.
struct AvfPair {
    AvfTensor q, k[2], v[2];                // [B, H, F, dk], [B, H, N, dk], [B, H, N, dv]
    const uint8_t* mask[2];                 // [B, N], nonzero = attend, contiguous; null = attend to all
    AvfTensor out;                          // [B, H, F, dv]                                     written by forward
    float* lse;                             // [B, H, F]                                         written by forward
    float* saved;                           // what backward needs, or null: [S, 2, B, H, F], S = 2 for sums (a softmax a
                                            // side), 1 for products; behind it, for products on a CPU, out in fp32
    AvfTensor grad_out;                     // [B, H, F, dv]                                     backward only
    const float* grad_lse;                  // [B, H, F] or null                                 backward only
    AvfTensor grad_q, grad_k[2], grad_v[2]; //                                                   written by backward
    int64_t B, H, F, N[2], dk, dv;
    uint64_t seed;                          // of the dropout mask
    void* stream;                           // CUDA
    float scale, dropout_p;
    int32_t dtype, interaction;
};
AVF_API int avf_pair_forward(const AvfPair*);
AVF_API int avf_pair_backward(const AvfPair*);  // CPU
