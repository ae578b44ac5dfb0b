// The C ABI of libavfkernels: raw pointers, sizes, strides in elements, an error code. No PyTorch headers.
#pragma once
#include <cstdint>

#define AVF_API extern "C" __attribute__((visibility("default")))

enum AvfError : int {
    AVF_OK = 0,
    AVF_OUT_OF_MEMORY = 1,
};

// Raised whenever a signature below changes; the loader refuses a library of another version.
#define AVF_ABI_VERSION 1
AVF_API int avf_abi_version();

// The instruction set that the kernels run with: "avx512", "avx2" or "portable" (AVF_CPU_ISA overrides).
AVF_API const char* avf_isa();

// Pair attention with summed interactions, forward (see csrc/pair_attention.h for the mathematics).
//   q [B, H, F, dk], k1 [B, H, N1, dk], v1 [B, H, N1, dv], k2, v2 likewise with N2; unit last stride
//   mask1 [B, N1], mask2 [B, N2]: bytes, nonzero = attend; contiguous; null = attend to all
//   out [B, H, F, dv], unit last stride; lse [B, H, F], contiguous
//   sizes: B, H, F, N1, N2, dk, dv
//   strides: (batch, head, token) of q, k1, v1, k2, v2, out
AVF_API int avf_pair_attention_sum_fwd_f32(
    const float* q, const float* k1, const float* v1, const float* k2, const float* v2,
    const uint8_t* mask1, const uint8_t* mask2, float* out, float* lse,
    const int64_t* sizes, const int64_t* strides, float scale);
