// What the pair attention kernels share: where the queries, the tokens and the saved softmaxes of a head lie.
#pragma once
#include "pair.h"
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

static inline int64_t blocks_of(const AvfPair& a) { return (a.F + LANES - 1) / LANES; }
static inline int64_t widest(const AvfPair& a) { return padded(a.dk > a.dv ? a.dk : a.dv); }

// One head of a batch entry.
struct Head {
    const AvfPair& a;
    int64_t b, h;

    int64_t lanes(int64_t block) const { return min(a.F - block * LANES, LANES); }
    // Where the queries of a block begin in what is declared [..., B, H, F].
    int64_t row(int64_t leading, int64_t block) const {
        return ((leading * a.B + b) * a.H + h) * a.F + block * LANES;
    }
    const uint8_t* mask(int s, int64_t n0) const { return a.mask[s] ? a.mask[s] + b * a.N[s] + n0 : nullptr; }
    Rows rows(const AvfTensor& t, int64_t n0, int64_t n, int64_t width, float* widened,
              const uint8_t* mask = nullptr) const {
        return rows_of(t, a.dtype, b, h, n0, n, width, widened, mask);
    }
    Rows keys(int s, int64_t n0, int64_t n, float* widened) const {
        return rows(a.k[s], n0, n, a.dk, widened, mask(s, n0));
    }
    Rows values(int s, int64_t n0, int64_t n, float* widened) const {
        return rows(a.v[s], n0, n, a.dv, widened, mask(s, n0));
    }
    void write(const float* rows, int64_t stride, const AvfTensor& t, int64_t n0, int64_t n, int64_t width) const {
        write_rows(rows, stride, t, a.dtype, b, h, n0, n, width);
    }
    // A block of queries as lanes, times `factor`, and back.
    void load(const AvfTensor& t, int64_t block, int64_t width, float factor, float* widened, v16* to) const {
        to_lanes(rows(t, block * LANES, lanes(block), width, widened), lanes(block), width, factor, to);
    }
    void store(const v16* from, const AvfTensor& t, int64_t block, int64_t width, float* rows) const {
        from_lanes(from, width, rows);
        write(rows, padded(width), t, block * LANES, lanes(block), width);
    }
    // A block's floats of a tensor that may be null; 0 in the lanes without a query.
    v16 read(const float* tensor, int64_t leading, int64_t block) const {
        v16 x{};
        if (tensor) std::memcpy(&x, tensor + row(leading, block), lanes(block) * sizeof(float));
        return x;
    }
    void put(float* tensor, int64_t leading, int64_t block, v16 x) const {
        if (tensor) std::memcpy(tensor + row(leading, block), &x, lanes(block) * sizeof(float));
    }
    // Saves the softmax of side s as its offset and the factor that normalises e^logit / 2^offset. Weights recomputed
    // from those two are as exact as the first time; from their log-sum-exp they would carry its rounding error. Where
    // there is no pair, every weight is 0.
    void save(int64_t s, int64_t block, v16 offset, v16 factor, v16i empty) const {
        put(a.saved, 2 * s, block, select(empty, splat(INFINITY), offset));
        put(a.saved, 2 * s + 1, block, factor);
    }
    float* saved_out() const { return a.saved + 2 * a.B * a.H * a.F; }  // of products, [B, H, F, dv]
};

// Calls visit(j0, n) for every tile of n tokens.
template <class Visit>
AVF_INLINE void for_tiles(int64_t N, Visit visit) {
    const int64_t tile = tile_of(N);
    for (int64_t j0 = 0; j0 < N; j0 += tile) visit(j0, min(N - j0, tile));
}

// Where the gradient of a tile of tokens is summed: in its tensor if whole vectors fit there, otherwise in `buffer`.
struct GradientTile {
    const AvfTensor& tensor;
    const Head& head;
    int64_t n0, width;
    float* rows;
    int64_t stride;
    bool in_place;

    GradientTile(const AvfTensor& t, const Head& head, int64_t n0, int64_t width, float* buffer)
        : tensor(t), head(head), n0(n0), width(width), rows(buffer), stride(padded(width)),
          in_place(head.a.dtype == AVF_F32 && width % LANES == 0) {
        if (!in_place) return;
        rows = static_cast<float*>(t.data) + head.b * t.stride_b + head.h * t.stride_h + n0 * t.stride_n;
        stride = t.stride_n;
    }
    void finish(int64_t n) const {
        if (!in_place) head.write(rows, stride, tensor, n0, n, width);
    }
};

// The queries of a whole head and the gradient of its output, in both layouts that backward needs.
struct HeadQueries {
    v16 *q, *grad_out, *grad_q;       // lanes: q times scale [blocks, dk]; [blocks, dv]; [blocks, dk]
    float *q_rows, *grad_out_rows;    // [blocks, 16, padded]: q times scale; grad_out
    v16 *offset, *factor;             // [S, blocks]: see Head::save
    v16* grad_lse;                    // [blocks]
    float* widened;                   // [16, padded(max(dk, dv))]

    HeadQueries(const AvfPair& a, int sides, Scratch& scratch) {
        const int64_t blocks = blocks_of(a);
        q = scratch.vectors(blocks * a.dk);
        grad_out = scratch.vectors(blocks * a.dv);
        grad_q = scratch.vectors(blocks * a.dk);
        q_rows = scratch.floats(blocks * LANES * padded(a.dk));
        grad_out_rows = scratch.floats(blocks * LANES * padded(a.dv));
        offset = scratch.vectors(sides * blocks);
        factor = scratch.vectors(sides * blocks);
        grad_lse = scratch.vectors(blocks);
        widened = scratch.floats(LANES * widest(a));
    }

    void load(const Head& head, int sides) {
        const AvfPair& a = head.a;
        const int64_t blocks = blocks_of(a);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t n = head.lanes(block), f0 = block * LANES;
            Rows rows = head.rows(a.q, f0, n, a.dk, widened);
            to_lanes(rows, n, a.dk, a.scale, q + block * a.dk);
            float* to = q_rows + f0 * padded(a.dk);
            pad_rows(rows, n, a.dk, to);
            for (int64_t i = 0; i < LANES * padded(a.dk); ++i) to[i] *= a.scale;

            rows = head.rows(a.grad_out, f0, n, a.dv, widened);
            to_lanes(rows, n, a.dv, 1.f, grad_out + block * a.dv);
            pad_rows(rows, n, a.dv, grad_out_rows + f0 * padded(a.dv));

            for (int s = 0; s < sides; ++s) {  // a lane without a query has weights 0
                offset[s * blocks + block] = head.read(a.saved, 2 * s, block);
                factor[s * blocks + block] = head.read(a.saved, 2 * s + 1, block);
            }
            grad_lse[block] = head.read(a.grad_lse, 0, block);
        }
        for (int64_t d = 0; d < blocks * a.dk; ++d) grad_q[d] = v16{};
    }

    void write_grad_q(const Head& head) {
        const AvfPair& a = head.a;
        for (int64_t block = 0; block < blocks_of(a); ++block) {
            v16* lanes = grad_q + block * a.dk;
            for (int64_t d = 0; d < a.dk; ++d) lanes[d] *= a.scale;
            head.store(lanes, a.grad_q, block, a.dk, widened);
        }
    }
};

}  // namespace AVF_ISA
