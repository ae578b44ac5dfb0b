// What the pair attention kernels share: where the queries and the saved statistics of a head lie.
#pragma once
#include "pair_attention.h"
#include "tile.h"

namespace AVF_ISA {

// Hands out 64-byte aligned pieces of the scratch; with a null base it only counts.
class Scratch {
   public:
    explicit Scratch(float* base) : base(base) {}
    float* floats(int64_t n) {
        const int64_t at = used;
        used += padded(n);
        return base ? base + at : nullptr;
    }
    v16* vectors(int64_t n) { return reinterpret_cast<v16*>(floats(n * LANES)); }
    int64_t used = 0;

   private:
    float* base;
};

static inline int64_t blocks_of(const AvfPairAttention& a) { return (a.F + LANES - 1) / LANES; }
static inline int64_t lanes_of(const AvfPairAttention& a, int64_t block) { return min(a.F - block * LANES, LANES); }
static inline int64_t row_of(const AvfPairAttention& a, int64_t s, int64_t b, int64_t h, int64_t block) {
    return ((s * a.B + b) * a.H + h) * a.F + block * LANES;
}

static inline const uint8_t* mask_of(const AvfPairAttention& a, int s, int64_t b, int64_t n0) {
    return a.mask[s] ? a.mask[s] + b * a.N[s] + n0 : nullptr;
}

// n of the floats at `row` of a tensor that may be null, as lanes; 0 in the others.
static inline v16 read_row(const float* tensor, int64_t row, int64_t n) {
    v16 lanes{};
    if (tensor) std::memcpy(&lanes, tensor + row, n * sizeof(float));
    return lanes;
}

// A block of queries as lanes, times `factor`.
static void load_lanes(const AvfTensor& t, const AvfPairAttention& a, int64_t b, int64_t h, int64_t block,
                       int64_t width, float factor, float* widened, v16* lanes) {
    const int64_t n = lanes_of(a, block);
    to_lanes(rows_of(t, a.dtype, b, h, block * LANES, n, width, widened), n, width, factor, lanes);
}

static void write_lanes(const v16* lanes, const AvfTensor& t, const AvfPairAttention& a, int64_t b, int64_t h,
                        int64_t block, int64_t width, float* rows) {
    from_lanes(lanes, width, rows);
    write_rows(rows, padded(width), t, a.dtype, b, h, block * LANES, lanes_of(a, block), width);
}

// Where the gradient of a tile of tokens is summed: in its tensor if whole vectors fit there, otherwise in `buffer`.
struct GradientTile {
    const AvfTensor& tensor;
    const AvfPairAttention& a;
    int64_t b, h, n0, width;
    float* rows;
    int64_t stride;
    bool in_place;

    GradientTile(const AvfTensor& tensor, const AvfPairAttention& a, int64_t b, int64_t h, int64_t n0, int64_t width,
                 float* buffer)
        : tensor(tensor), a(a), b(b), h(h), n0(n0), width(width), rows(buffer), stride(padded(width)),
          in_place(a.dtype == AVF_F32 && width % LANES == 0) {
        if (!in_place) return;
        rows = static_cast<float*>(tensor.data) + b * tensor.stride_b + h * tensor.stride_h + n0 * tensor.stride_n;
        stride = tensor.stride_n;
    }
    void finish(int64_t n) const {
        if (!in_place) write_rows(rows, stride, tensor, a.dtype, b, h, n0, n, width);
    }
};

// The queries of a whole head and the gradient of its output, in both layouts that backward needs.
struct HeadQueries {
    v16 *q, *grad_out, *grad_q;       // lanes: q times scale [blocks, dk]; [blocks, dv]; [blocks, dk]
    float *q_rows, *grad_out_rows;    // [blocks, 16, padded]: q times scale; grad_out
    v16 *offset, *factor;             // [S, blocks]: see `save`
    v16* grad_lse;                    // [blocks]
    float* widened;                   // [16, padded(max(dk, dv))]

    HeadQueries(const AvfPairAttention& a, int sides, Scratch& scratch) {
        const int64_t blocks = blocks_of(a);
        q = scratch.vectors(blocks * a.dk);
        grad_out = scratch.vectors(blocks * a.dv);
        grad_q = scratch.vectors(blocks * a.dk);
        q_rows = scratch.floats(blocks * LANES * padded(a.dk));
        grad_out_rows = scratch.floats(blocks * LANES * padded(a.dv));
        offset = scratch.vectors(sides * blocks);
        factor = scratch.vectors(sides * blocks);
        grad_lse = scratch.vectors(blocks);
        widened = scratch.floats(LANES * padded(a.dk > a.dv ? a.dk : a.dv));
    }

    void load(const AvfPairAttention& a, int sides, int64_t b, int64_t h) {
        const int64_t blocks = blocks_of(a);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t n = lanes_of(a, block), f0 = block * LANES;
            Rows rows = rows_of(a.q, a.dtype, b, h, f0, n, a.dk, widened);
            to_lanes(rows, n, a.dk, a.scale, q + block * a.dk);
            float* to = q_rows + f0 * padded(a.dk);
            pad_rows(rows, n, a.dk, to);
            for (int64_t i = 0; i < LANES * padded(a.dk); ++i) to[i] *= a.scale;

            rows = rows_of(a.grad_out, a.dtype, b, h, f0, n, a.dv, widened);
            to_lanes(rows, n, a.dv, 1.f, grad_out + block * a.dv);
            pad_rows(rows, n, a.dv, grad_out_rows + f0 * padded(a.dv));

            for (int s = 0; s < sides; ++s) {  // a lane without a query has weights 0
                offset[s * blocks + block] = read_row(a.saved_softmax, row_of(a, 2 * s, b, h, block), n);
                factor[s * blocks + block] = read_row(a.saved_softmax, row_of(a, 2 * s + 1, b, h, block), n);
            }
            grad_lse[block] = read_row(a.grad_lse, row_of(a, 0, b, h, block), n);
        }
        for (int64_t d = 0; d < blocks * a.dk; ++d) grad_q[d] = v16{};
    }

    void write_grad_q(const AvfPairAttention& a, int64_t b, int64_t h) {
        for (int64_t block = 0; block < blocks_of(a); ++block) {
            v16* lanes = grad_q + block * a.dk;
            for (int64_t d = 0; d < a.dk; ++d) lanes[d] *= a.scale;
            write_lanes(lanes, a.grad_q, a, b, h, block, a.dk, widened);
        }
    }
};

// Saves the softmax of side s as its offset and the factor that normalises e^logit / 2^offset.
// Weights recomputed from those two are as exact as the first time; from their log-sum-exp they would carry its rounding
// error. Where there is no pair, every weight is 0.
static void save(const AvfPairAttention& a, int64_t s, int64_t b, int64_t h, int64_t block, v16 offset, v16 factor,
                 v16i empty) {
    const int64_t bytes = lanes_of(a, block) * sizeof(float);
    offset = select(empty, splat(INFINITY), offset);
    std::memcpy(a.saved_softmax + row_of(a, 2 * s, b, h, block), &offset, bytes);
    std::memcpy(a.saved_softmax + row_of(a, 2 * s + 1, b, h, block), &factor, bytes);
}

static void write_lse(const AvfPairAttention& a, int64_t b, int64_t h, int64_t block, v16 lse) {
    if (a.lse) std::memcpy(a.lse + row_of(a, 0, b, h, block), &lse, lanes_of(a, block) * sizeof(float));
}

}  // namespace AVF_ISA
