#include <initializer_list>

#include "pair_attention.cuh"

AVF_CUDA_API int avf_cuda_abi_version() { return AVF_CUDA_ABI_VERSION; }

AVF_CUDA_API const char* avf_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

static bool aligned(const AvfCudaPairAttention& a) {
    for (const AvfCudaTensor& x : {a.q, a.k[0], a.k[1], a.v[0], a.v[1], a.out, a.grad_out, a.grad_q, a.grad_k[0],
                                   a.grad_k[1], a.grad_v[0], a.grad_v[1]})
        if (reinterpret_cast<uintptr_t>(x.data) % 16) return false;
    return true;
}

AVF_CUDA_API int avf_cuda_pair_attention_forward(const AvfCudaPairAttention* a) {
    if (!aligned(*a)) return cudaErrorMisalignedAddress;
    return a->interaction == AVF_CUDA_PRODUCT ? pair_product_forward(*a) : pair_sum_forward(*a);
}

AVF_CUDA_API int avf_cuda_pair_attention_backward(const AvfCudaPairAttention* a) {
    if (!aligned(*a)) return cudaErrorMisalignedAddress;
    return a->interaction == AVF_CUDA_PRODUCT ? pair_product_backward(*a) : pair_sum_backward(*a);
}
