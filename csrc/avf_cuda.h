// The C ABI of libavfkernels_cuda: as csrc/avf.h, with device pointers and a stream. No PyTorch headers.
#pragma once
#include <cstdint>

#define AVF_CUDA_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or a struct below changes; the loader refuses a library of another version.
#define AVF_CUDA_ABI_VERSION 2
AVF_CUDA_API int avf_cuda_abi_version();

// What a code other than 0 means; the codes are those of cudaError_t.
AVF_CUDA_API const char* avf_cuda_error(int code);

enum AvfCudaDtype : int32_t { AVF_CUDA_BF16 = 0, AVF_CUDA_FP16 = 1 };
enum AvfCudaInteraction : int32_t { AVF_CUDA_SUM = 0, AVF_CUDA_PRODUCT = 1 };

// A tensor [B, H, tokens, width] of 16-bit numbers: unit last stride, everything else a multiple of 16 bytes.
struct AvfCudaTensor {
    void* data;
    int64_t stride_b, stride_h, stride_n;  // in elements
};

// The most warps of a block. Backward of products gives each a token of side 0 and adds up what they find of grad_q.
#define AVF_CUDA_MAX_WARPS 8

// Pair attention (see csrc/pair_attention.h for the mathematics). What is declared float is fp32 and contiguous.
// Widths are 16, 32 or 64. S, the number of softmaxes, is 2 for sums and 1 for products.
struct AvfCudaPairAttention {
    AvfCudaTensor q, k[2], v[2];                // [B, H, F, dk], [B, H, N, dk], [B, H, N, dv]
    const uint8_t* mask[2];                     // [B, N], nonzero = attend, contiguous; null = attend to all
    AvfCudaTensor out;                          // [B, H, F, dv]                          written by forward
    float* lse;                                 // [B, H, F] or null                      written by forward
    float* saved_softmax;                       // [S, 2, B, H, F] or null: what backward needs
    AvfCudaTensor grad_out;                     // [B, H, F, dv]                          backward only
    const float* grad_lse;                      // [B, H, F] or null                      backward only
    float* delta;                               // [S, B, H, F]: scratch of backward
    float* grad_q_parts;                        // [ceil(N[0] / AVF_CUDA_MAX_WARPS), B, H, F, dk]: the same, of products
    AvfCudaTensor grad_q, grad_k[2], grad_v[2]; //                                        written by backward
    int64_t B, H, F, N[2], dk, dv;
    void* stream;
    float scale;
    int32_t dtype, interaction;
};
AVF_CUDA_API int avf_cuda_pair_attention_forward(const AvfCudaPairAttention*);
AVF_CUDA_API int avf_cuda_pair_attention_backward(const AvfCudaPairAttention*);
