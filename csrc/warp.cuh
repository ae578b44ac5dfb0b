// What the CUDA kernel is made of: the tensor-core product of a warp, exchanges between its lanes, pairs of 16-bit
// numbers. All that is not plain C++ is in this file, so that a C++ compiler which is given another (AVF_WARP) can run
// the very source of the kernel on a CPU.
#pragma once
#include <cmath>
#include <cstdint>

struct Bf16 {};
struct Fp16 {};

#ifdef __CUDACC__

// d += a b for a [16, 16], b [16, 8], d [16, 8], spread over the lanes as mma.m16n8k16 wants them: with g = lane / 4
// and t = lane % 4, a0 holds row g, columns 2t and 2t + 1; a1 the same of row g + 8; a2, a3 these rows' columns 2t + 8,
// 2t + 9; b0 rows 2t, 2t + 1 of column g, b1 rows 2t + 8, 2t + 9; d row g, columns 2t, 2t + 1, then row g + 8's.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);
#define AVF_MMA(T, type)                                                                                        \
    template <>                                                                                                 \
    __device__ __forceinline__ void mma<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,   \
                                           uint32_t b0, uint32_t b1) {                                          \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                              \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                            \
    }
AVF_MMA(Bf16, "bf16")
AVF_MMA(Fp16, "f16")
#undef AVF_MMA

// Transposes an 8 x 8 matrix of 16-bit numbers; lane 4g + t holds columns 2t, 2t + 1 of row g.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }

// 2^x; 0 for -inf.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
template <>
__device__ __forceinline__ uint32_t pack<Fp16>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t x, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<Bf16>(uint32_t x, float& low, float& high) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ void unpack<Fp16>(uint32_t x, float& low, float& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(x));
}

// The product of two pairs, each rounded once. For bf16, sm_80 has it as a fused addition of -0.
template <class T>
__device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y);
template <>
__device__ __forceinline__ uint32_t multiply<Bf16>(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(0x80008000u));
    return z;
}
template <>
__device__ __forceinline__ uint32_t multiply<Fp16>(uint32_t x, uint32_t y) {
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

__device__ __forceinline__ float* shared_memory() {
    extern __shared__ float4 shared[];
    return reinterpret_cast<float*>(shared);
}

template <class... Args>
inline cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                          Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, args...);
}

#else
#include AVF_WARP
#endif

// The maximum and the sum over the four lanes of a quad.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
