// libavfkernels_cuda: pair attention with multiplied interactions, forward (csrc/pair.h). For one token i of side 0 it is
// attention over side 1 with the queries q * a_i, its output multiplied by u_i. Backward is Triton's.
//
// A block has 16 queries of one head, the rows of mma.m16n8k16, and a warp every so many tokens i. Tokens of side 1 stay
// in registers while it goes over its i: a pair costs no memory access.
#include <initializer_list>

#include "avf.h"
#include "warp.cuh"

constexpr int QUERIES = 16, MAX_WARPS = 8;  // of a block
constexpr int STEP = 32;                    // tokens of side 1 that a warp takes at once
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// A row of D numbers lies in the four lanes of a quad as words of two, D / 8 a lane; a lane reads 16 bytes at once (8 if
// D is 16). Word w of lane t holds column<D>(w, t) and the next. A contraction may take its index in any order, and a
// product has its columns in the order of its right operand, so words are fragments of mma as they come.
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
    __device__ Task(const AvfPair& a, int blocks)
        : b(blockIdx.x / blocks / a.H), h(blockIdx.x / blocks % a.H), f0(QUERIES * int(blockIdx.x % blocks)) {}
    // Query f in what is declared [..., B, H, F].
    __device__ __forceinline__ int64_t row(const AvfPair& a, int leading, int f) const {
        return ((leading * a.B + b) * a.H + h) * a.F + f;
    }
};

// One batch entry and head of a tensor.
struct Rows {
    uint16_t* data;
    int64_t stride;
    __device__ Rows(const AvfTensor& x, const Task& task)
        : data(static_cast<uint16_t*>(x.data) + task.b * x.stride_b + task.h * x.stride_h), stride(x.stride_n) {}

    template <int D>  // row n, or zeros: what is hidden, a NaN too, must meet no weight of 0
    __device__ __forceinline__ void load(int64_t n, bool visible, uint32_t (&row)[D / 8]) const {
        constexpr int V = VECTOR<D>;
#pragma unroll
        for (int i = 0; i < D / 8; i += V) {
            Words<V> words = {};
            if (visible)
                words = *reinterpret_cast<const Words<V>*>(data + n * stride + column<D>(i, threadIdx.x % 4));
#pragma unroll
            for (int j = 0; j < V; ++j) row[i + j] = words.word[j];
        }
    }
};

// The tokens of one side of a batch entry.
struct Tokens {
    int count;
    const uint8_t* mask;
    __device__ Tokens(const AvfPair& a, int side, int64_t b)
        : count(int(a.N[side])), mask(a.mask[side] ? a.mask[side] + b * count : nullptr) {}
    __device__ __forceinline__ bool attended(int n) const { return n < count && (!mask || mask[n]); }
};

// Online softmax of a warp over its pairs, and the unnormalised output, of 16 queries: a lane has rows g and g + 8.
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

// Joins the partial softmaxes that the warps have shared, in their order; writes output, lse and what backward needs.
template <class T, int DV>
__device__ __forceinline__ void write_merged(const AvfPair& a, const Task& task) {
    const Rows out(a.out, task);
    for (int at = threadIdx.x; at < QUERIES * DV / 2; at += blockDim.x) {
        const int row = at / (DV / 2), d = at % (DV / 2) * 2, f = task.f0 + row, warps = blockDim.x / 32;
        if (f >= a.F) break;
        const float* partial = shared_memory() + row;
        float max = -INFINITY, sum = 0, sums[2] = {0, 0};
        for (int w = 0; w < warps; ++w) max = fmaxf(max, partial[w * Partial<DV>::FLOATS]);
        for (int w = 0; w < warps; ++w) {
            const float* x = partial + w * Partial<DV>::FLOATS;
            const float factor = power_of_2(x[0] - (max == -INFINITY ? 0.f : max));
            sum += x[QUERIES] * factor;
            for (int e = 0; e < 2; ++e) sums[e] += x[2 * QUERIES + row * (DV - 1) + d + e] * factor;
        }
        const bool empty = sum == 0;  // otherwise the largest logit has added 1
        const float factor = empty ? 0.f : 1.f / sum;
        *reinterpret_cast<uint32_t*>(out.data + f * out.stride + d) =
            pack<T>(empty ? 0.f : sums[0] * factor, empty ? 0.f : sums[1] * factor);
        if (d) continue;
        if (a.lse) a.lse[task.row(a, 0, f)] = empty ? -INFINITY : LN2 * (max + log2f(sum));
        if (!a.saved) continue;
        a.saved[task.row(a, 0, f)] = empty ? 0.f : LN2 * max;
        a.saved[task.row(a, 1, f)] = factor;
    }
}

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1) pair_product_forward_kernel(const AvfPair a, int blocks) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task(a, blocks);
    uint32_t q[2][DK / 8];  // rows g and g + 8
    for (int r = 0; r < 2; ++r) {
        const int f = task.f0 + g + 8 * r;
        Rows(a.q, task).load<DK>(f, f < a.F, q[r]);
    }
    const Rows key_factors(a.k[0], task), value_factors(a.v[0], task), keys(a.k[1], task), values(a.v[1], task);
    const Tokens tokens1(a, 0, task.b), tokens2(a, 1, task.b);
    const float scale = a.scale * LOG2E;
    Partial<DV> partial;

    for (int j0 = 0; j0 < tokens2.count; j0 += STEP) {
        uint32_t k[STEP / 8][DK / 8], v[STEP / 8][DV / 8];  // tokens j0 + 8n + g; v transposed
        float bias[STEP / 8][2];                            // tokens j0 + 8n + 2t + e
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
            const int j = j0 + 8 * n;
            keys.load<DK>(j + g, tokens2.attended(j + g), k[n]);
            values.load<DV>(j + g, tokens2.attended(j + g), v[n]);
#pragma unroll
            for (int w = 0; w < DV / 8; ++w) v[n][w] = transpose(v[n][w]);
#pragma unroll
            for (int e = 0; e < 2; ++e) bias[n][e] = tokens2.attended(j + 2 * t + e) ? 0.f : -INFINITY;
        }
        for (int i = warp; i < tokens1.count; i += warps) {
            if (!tokens1.attended(i)) continue;
            uint32_t row[DK / 8], qa[2][DK / 8];
            key_factors.load<DK>(i, true, row);
#pragma unroll
            for (int w = 0; w < DK / 8; ++w)
#pragma unroll
                for (int r = 0; r < 2; ++r) qa[r][w] = multiply<T>(q[r][w], row[w]);
            float p[STEP / 8][4] = {};
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int c = 0; c < DK / 8; c += 2)
                    mma<T>(p[n], qa[0][c], qa[1][c], qa[0][c + 1], qa[1][c + 1], k[n][c], k[n][c + 1]);
#pragma unroll
                for (int e = 0; e < 4; ++e) p[n][e] = p[n][e] * scale + bias[n][e % 2];
            }
            float rescale[2];
            partial.add(p, rescale);

            uint32_t u[DV / 8];
            value_factors.load<DV>(i, true, u);
#pragma unroll
            for (int w = 0; w < DV / 8; ++w) {
                float context[4] = {}, factor[2];
#pragma unroll
                for (int n = 0; n < STEP / 8; n += 2)
                    mma<T>(context, pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                           pack<T>(p[n + 1][0], p[n + 1][1]), pack<T>(p[n + 1][2], p[n + 1][3]), v[n][w], v[n + 1][w]);
                unpack<T>(u[w], factor[0], factor[1]);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    partial.out[w][e] = partial.out[w][e] * rescale[e / 2] + context[e] * factor[e % 2];
            }
        }
    }
    partial.share();
    __syncthreads();
    write_merged<T, DV>(a, task);
}

template <class T, int DK, int DV>
static cudaError_t forward(const AvfPair& a) {
    const int blocks = int((a.F + QUERIES - 1) / QUERIES);
    const int warps = a.N[0] < 1 ? 1 : a.N[0] > MAX_WARPS ? MAX_WARPS : int(a.N[0]);
    return launch(pair_product_forward_kernel<T, DK, DV>, a.B * a.H * blocks, 32 * warps,
                  warps * Partial<DV>::FLOATS * sizeof(float), a.stream, a, blocks);
}

template <class T>
static cudaError_t forward(const AvfPair& a) {
    if ((a.dk != 16 && a.dk != 32) || (a.dv != 16 && a.dv != 32)) return cudaErrorInvalidValue;
    if (a.dk == 16) return a.dv == 16 ? forward<T, 16, 16>(a) : forward<T, 16, 32>(a);
    return a.dv == 16 ? forward<T, 32, 16>(a) : forward<T, 32, 32>(a);
}

AVF_API int avf_pair_forward(const AvfPair* a) {
    for (const AvfTensor& x : {a->q, a->k[0], a->k[1], a->v[0], a->v[1], a->out})
        if (reinterpret_cast<uintptr_t>(x.data) % 16) return cudaErrorMisalignedAddress;
    return a->dtype == AVF_BF16 ? forward<Bf16>(*a) : forward<Fp16>(*a);
}
AVF_API const char* avf_isa() { return "cuda"; }
AVF_API int avf_abi_version() { return AVF_ABI_VERSION; }
AVF_API int avf_pair_bytes() { return sizeof(AvfPair); }
AVF_API const char* avf_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
