// What the CUDA kernels of pair attention share: rows of tokens as fragments, masks, who computes what, and the merge
// of the partial softmaxes of several warps.
#pragma once
#include "avf_cuda.h"
#include "warp.cuh"

constexpr int QUERIES = 16;   // of a block: the rows of mma.m16n8k16
constexpr int MAX_WARPS = AVF_CUDA_MAX_WARPS;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// A row of D numbers lies in the four lanes of a quad as words of two, D / 8 a lane; a lane reads and writes 16 bytes
// at once (8 if D is 16). Word w of lane t holds column<D>(w, t) and the next. A contraction may take its index in any
// order, and a product has its columns in the order of its right operand, so words are fragments of mma as they come.
template <int D>
constexpr int VECTOR = D < 32 ? 2 : 4;  // words
template <int D>
__device__ __forceinline__ int column(int word, int t) {
    constexpr int V = VECTOR<D>;
    return word / V * 8 * V + t * 2 * V + word % V * 2;
}

template <int N>
struct alignas(4 * N) Words {
    uint32_t word[N];
};

// What a block computes: 16 queries, from f0, of head h of batch entry b.
struct Task {
    int64_t b, h;
    int f0;
    __device__ Task(const AvfCudaPairAttention& a, int blocks)
        : b(blockIdx.x / blocks / a.H), h(blockIdx.x / blocks % a.H), f0(QUERIES * int(blockIdx.x % blocks)) {}
};

// One batch entry and head of a tensor.
struct Rows {
    uint16_t* data;
    int64_t stride;
    __device__ Rows(const AvfCudaTensor& x, const Task& task)
        : data(static_cast<uint16_t*>(x.data) + task.b * x.stride_b + task.h * x.stride_h), stride(x.stride_n) {}

    template <int D>
    __device__ __forceinline__ Words<VECTOR<D>>* at(int n, int word) const {
        return reinterpret_cast<Words<VECTOR<D>>*>(data + n * stride + column<D>(word, threadIdx.x % 4));
    }
    template <int D>  // row n, or zeros if there is none
    __device__ __forceinline__ void load(int n, int count, uint32_t (&row)[D / 8]) const {
        constexpr int V = VECTOR<D>;
#pragma unroll
        for (int i = 0; i < D / 8; i += V) {
            Words<V> words = {};
            if (n < count) words = *at<D>(n, i);
#pragma unroll
            for (int j = 0; j < V; ++j) row[i + j] = words.word[j];
        }
    }
    template <int D>
    __device__ __forceinline__ void store(int n, int count, const uint32_t (&row)[D / 8]) const {
        constexpr int V = VECTOR<D>;
#pragma unroll
        for (int i = 0; i < D / 8; i += V) {
            Words<V> words;
#pragma unroll
            for (int j = 0; j < V; ++j) words.word[j] = row[i + j];
            if (n < count) *at<D>(n, i) = words;
        }
    }
    // Columns d, d + 1 of row n.
    __device__ __forceinline__ void write(int64_t n, int d, uint32_t word) const {
        *reinterpret_cast<uint32_t*>(data + n * stride + d) = word;
    }
};

// The tokens of one side of a batch entry.
struct Tokens {
    int count;
    const uint8_t* mask;
    __device__ Tokens(const AvfCudaPairAttention& a, int side, int64_t b)
        : count(int(a.N[side])), mask(a.mask[side] ? a.mask[side] + b * count : nullptr) {}
    __device__ __forceinline__ bool attended(int n) const { return n < count && (!mask || mask[n]); }
};

// The row of query f in what is declared [..., B, H, F].
__device__ __forceinline__ int64_t row_of(const AvfCudaPairAttention& a, const Task& task, int leading, int f) {
    return ((leading * a.B + task.b) * a.H + task.h) * a.F + f;
}

inline int query_blocks(const AvfCudaPairAttention& a) { return int((a.F + QUERIES - 1) / QUERIES); }

// Both sides are divided among the warps of a block, in proportion to their tokens: warps [0, first) belong to side 0.
// That depends on the numbers of tokens alone, so what a batch entry gives does not depend on the batch it is in.
struct Split {
    int warps, first;
};
inline Split split_warps(const AvfCudaPairAttention& a, int step) {
    const int64_t steps[2] = {(a.N[0] + step - 1) / step, (a.N[1] + step - 1) / step}, all = steps[0] + steps[1];
    const int64_t warps = all < 2 ? 2 : all > MAX_WARPS ? MAX_WARPS : all;
    const int64_t first = all ? (warps * steps[0] + all / 2) / all : 1;
    return {int(warps), int(first < 1 ? 1 : first > warps - 1 ? warps - 1 : first)};
}

// Online softmax of a warp over its tokens, and the unnormalised output, of 16 queries: a lane has rows g and g + 8.
template <int DV>
struct Partial {
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // max in powers of 2; sum: that of this lane's tokens
    float out[DV / 8][4] = {};

    // logits [16, 8 * TILES] become their weights. Returns what the previous sums and output have to be scaled by.
    template <int TILES>
    __device__ __forceinline__ void add(float (&logits)[TILES][4], float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float highest = max[r];
#pragma unroll
            for (int n = 0; n < TILES; ++n) highest = fmaxf(highest, fmaxf(logits[n][2 * r], logits[n][2 * r + 1]));
            highest = quad_max(highest);
            const float offset = highest == -INFINITY ? 0.f : highest;
            rescale[r] = power_of_2(max[r] - offset);
            max[r] = highest;
            float added = 0;
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) added += logits[n][e] = power_of_2(logits[n][e] - offset);
            sum[r] = sum[r] * rescale[r] + added;
        }
    }

    static constexpr int FLOATS = QUERIES * (DV + 2);  // of shared memory, a warp: max [16], sum [16], out [16, DV]

    __device__ __forceinline__ void share() const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float* to = shared_memory() + threadIdx.x / 32 * FLOATS;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int f = g + 8 * r;
            const float total = quad_sum(sum[r]);
            if (t == 0) to[f] = max[r], to[QUERIES + f] = total;
#pragma unroll
            for (int w = 0; w < DV / 8; ++w)
#pragma unroll
                for (int e = 0; e < 2; ++e) to[2 * QUERIES + f * DV + column<DV>(w, t) + e] = out[w][2 * r + e];
        }
    }
};

// Merges the partial softmaxes that warps [begin, end) have shared, in this order, for query f and columns d, d + 1.
template <int DV>
struct Merged {
    float offset = -INFINITY, sum = 0, out[2] = {0, 0};
    __device__ __forceinline__ Merged(int begin, int end, int f, int d) {
        const float* partial = shared_memory() + f;
        for (int w = begin; w < end; ++w) offset = fmaxf(offset, partial[w * Partial<DV>::FLOATS]);
        for (int w = begin; w < end; ++w) {
            const float* x = partial + w * Partial<DV>::FLOATS;
            const float factor = power_of_2(x[0] - (offset == -INFINITY ? 0.f : offset));
            sum += x[QUERIES] * factor;
            for (int e = 0; e < 2; ++e) out[e] += x[2 * QUERIES + f * (DV - 1) + d + e] * factor;
        }
    }
    __device__ __forceinline__ bool empty() const { return sum == 0; }  // otherwise the largest logit has added 1
    __device__ __forceinline__ float lse() const { return LN2 * (offset + log2f(sum)); }
};

// Writes output, lse and what backward needs from the partial softmaxes of `warps`, of which side 0 has the first.
// SIDES is 2 for sums; a side without any token leaves no pair: the output is 0 and lse is -inf.
template <class T, int DV, int SIDES>
__device__ __forceinline__ void write_merged(const AvfCudaPairAttention& a, const Task& task, int first) {
    const int warps = blockDim.x / 32;
    const Rows out(a.out, task);
    for (int i = threadIdx.x; i < QUERIES * DV / 2; i += blockDim.x) {
        const int row = i / (DV / 2), d = i % (DV / 2) * 2;
        const int f = task.f0 + row;
        if (f >= a.F) break;
        float lse = 0, sums[2] = {0, 0};
        bool empty = false;
        const int middle = SIDES == 1 ? warps : first;
        const Merged<DV> sides[2] = {{0, middle, row, d}, {middle, warps, row, d}};
        for (int s = 0; s < SIDES; ++s) empty |= sides[s].empty();
        for (int s = 0; s < SIDES; ++s) {
            const float factor = empty ? 0.f : 1.f / sides[s].sum;
            for (int e = 0; e < 2; ++e) sums[e] += empty ? 0.f : sides[s].out[e] * factor;
            lse += empty ? -INFINITY : sides[s].lse();
            if (d == 0 && a.saved_softmax) {  // weights of 0 where there is no pair
                a.saved_softmax[row_of(a, task, 2 * s, f)] = empty ? INFINITY : sides[s].offset;
                a.saved_softmax[row_of(a, task, 2 * s + 1, f)] = factor;
            }
        }
        out.write(f, d, pack<T>(sums[0], sums[1]));
        if (d == 0 && a.lse) a.lse[row_of(a, task, 0, f)] = lse;
    }
}

template <int D>
struct Width {
    static constexpr int value = D;
};

// run(T{}, Width<dk>{}, Width<dv>{}) for the dtype and the widths of the arguments.
template <class Run>
cudaError_t with_types(const AvfCudaPairAttention& a, Run run) {
    const auto width = [](int64_t d, auto next) {
        switch (d) {
            case 16: return next(Width<16>{});
            case 32: return next(Width<32>{});
            case 64: return next(Width<64>{});
            default: return cudaErrorInvalidValue;
        }
    };
    const auto widths = [&](auto type) {
        return width(a.dk, [&](auto dk) { return width(a.dv, [&](auto dv) { return run(type, dk, dv); }); });
    };
    return a.dtype == AVF_CUDA_BF16 ? widths(Bf16{}) : widths(Fp16{});
}

cudaError_t pair_sum_forward(const AvfCudaPairAttention& a);
cudaError_t pair_sum_backward(const AvfCudaPairAttention& a);
cudaError_t pair_product_forward(const AvfCudaPairAttention& a);
cudaError_t pair_product_backward(const AvfCudaPairAttention& a);
