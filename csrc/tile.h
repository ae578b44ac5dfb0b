// Small matrix products on tiles in the first-level cache, the building blocks of every attention kernel.
//
// Sixteen queries are the lanes of a vector. A tile of tokens is a block of fp32 rows; a token's feature is broadcast
// against the lanes. Included only by *_kernel.cpp, like vec16.h.
#pragma once
#include <cmath>

#include "avf.h"
#include "vec16.h"

#define AVF_INLINE static inline __attribute__((always_inline))
// Kept apart, so that each has all registers to itself.
#define AVF_NOINLINE static __attribute__((noinline))

namespace AVF_ISA {

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 128;  // tokens of a tile, at most: their features and 16 weights each stay in the cache
// Sums kept in registers at a time: as many as leave room for the operands.
#if defined(__AVX512F__)
constexpr int CHUNK = 16, KEYS = 8;
#elif defined(__AVX2__)
constexpr int CHUNK = 4, KEYS = 4;
#else
constexpr int CHUNK = 2, KEYS = 2;
#endif
constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;

// fp32 rows: row n begins at data + n * stride.
struct Rows {
    const float* data;
    int64_t stride;
    const float* operator[](int64_t n) const { return data + n * stride; }
};

static inline int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// n tokens are cut into tiles of equal size, as nearly as multiples of 8 can be.
static inline int64_t tile_of(int64_t n) {
    const int64_t tiles = (n + TILE - 1) / TILE;
    return tiles > 1 ? ((n + tiles - 1) / tiles + 7) / 8 * 8 : TILE;
}

// Tokens [n0, n0 + n) of head (b, h): in place if they are fp32 and all attended to, otherwise in `scratch` [n, width],
// widened, and 0 where the mask hides them: what is there, a NaN too, must meet no weight of 0.
static Rows rows_of(const AvfTensor& t, int32_t dtype, int64_t b, int64_t h, int64_t n0, int64_t n, int64_t width,
                    float* scratch, const uint8_t* mask = nullptr) {
    const int64_t offset = b * t.stride_b + h * t.stride_h + n0 * t.stride_n;
    const float* wide = static_cast<const float*>(t.data) + offset;
    const uint16_t* narrow = static_cast<const uint16_t*>(t.data) + offset;
    if (dtype == AVF_F32 && !(mask && std::memchr(mask, 0, n))) return {wide, t.stride_n};
    for (int64_t i = 0; i < n; ++i)
        if (mask && !mask[i])
            std::memset(scratch + i * width, 0, width * sizeof(float));
        else if (dtype == AVF_F32)
            std::memcpy(scratch + i * width, wide + i * t.stride_n, width * sizeof(float));
        else
            for (int64_t d = 0; d < width; ++d) scratch[i * width + d] = from_bf16(narrow[i * t.stride_n + d]);
    return {scratch, width};
}

// Writes n rows of `width` floats, `stride` apart, to tokens [n0, n0 + n) of head (b, h), rounding if they are bf16.
static void write_rows(const float* rows, int64_t stride, const AvfTensor& t, int32_t dtype, int64_t b, int64_t h,
                       int64_t n0, int64_t n, int64_t width) {
    const int64_t offset = b * t.stride_b + h * t.stride_h + n0 * t.stride_n;
    for (int64_t i = 0; i < n; ++i) {
        const float* row = rows + i * stride;
        if (dtype == AVF_F32) {
            float* to = static_cast<float*>(t.data) + offset + i * t.stride_n;
            int64_t d = 0;
            for (; d + LANES <= width; d += LANES) store(to + d, load(row + d));
            if (d < width) std::memcpy(to + d, row + d, (width - d) * sizeof(float));
        } else {
            uint16_t* to = static_cast<uint16_t*>(t.data) + offset + i * t.stride_n;
            for (int64_t d = 0; d < width; ++d) to[d] = to_bf16(row[d]);
        }
    }
}

// n <= 16 rows as lanes: lanes[d] holds feature d of every row, times `factor`; 0 in the lanes that have no row.
static void to_lanes(Rows rows, int64_t n, int64_t width, float factor, v16* lanes) {
    for (int64_t d0 = 0; d0 < width; d0 += LANES) {
        const int64_t w = min(width - d0, LANES);
        v16 block[LANES];
        for (int64_t f = 0; f < LANES; ++f) {
            block[f] = v16{};
            if (f >= n) continue;
            if (w == LANES)
                block[f] = load(rows[f] + d0);
            else
                std::memcpy(&block[f], rows[f] + d0, w * sizeof(float));
        }
        transpose(block);
        for (int64_t d = 0; d < w; ++d) lanes[d0 + d] = block[d] * factor;
    }
}

// Back again: rows [16, padded(width)].
static void from_lanes(const v16* lanes, int64_t width, float* rows) {
    for (int64_t d0 = 0; d0 < width; d0 += LANES) {
        v16 block[LANES];
        for (int64_t d = 0; d < LANES; ++d) block[d] = d0 + d < width ? lanes[d0 + d] : v16{};
        transpose(block);
        for (int64_t f = 0; f < LANES; ++f) store(rows + f * padded(width) + d0, block[f]);
    }
}

// n <= 16 rows, copied to [16, padded(width)] with zeros around them.
static void pad_rows(Rows rows, int64_t n, int64_t width, float* to) {
    std::memset(to, 0, LANES * padded(width) * sizeof(float));
    for (int64_t f = 0; f < n; ++f) std::memcpy(to + f * padded(width), rows[f], width * sizeof(float));
}

// products[j] (+)= sum_d lanes[d] * rows[j][d] over D features of K tokens.
template <int K, int D, bool ADD>
AVF_INLINE void dot_block(const v16* lanes, const float* row, int64_t stride, v16* products) {
    const float* rows[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
        rows[k] = row + k * stride;
        asm("" : "+r"(rows[k]));  // one register a row; GCC would otherwise compute all K * D addresses
    }
    v16 sum[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) sum[k] = ADD ? products[k] + lanes[0] * rows[k][0] : lanes[0] * rows[k][0];
#pragma GCC unroll 16
    for (int d = 1; d < D; ++d) {
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) sum[k] += lanes[d] * rows[k][d];
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) products[k] = sum[k];
}

template <int D, bool ADD>
AVF_INLINE void dot_features(const v16* lanes, Rows rows, int64_t n, v16* products) {
    v16 q[D];  // in registers, where there are enough
#pragma GCC unroll 16
    for (int d = 0; d < D; ++d) q[d] = lanes[d];
    int64_t j = 0;
    for (; j + KEYS <= n; j += KEYS) dot_block<KEYS, D, ADD>(q, rows[j], rows.stride, products + j);
    for (; j < n; ++j) dot_block<1, D, ADD>(q, rows[j], rows.stride, products + j);
}

// products[j] = sum_d lanes[d] * rows[j][d] for n tokens: a logit of each of 16 queries.
AVF_NOINLINE void dot(const v16* lanes, Rows rows, int64_t n, int64_t width, v16* products) {
    int64_t d = 0;
    if (width >= 16) {
        dot_features<16, false>(lanes, rows, n, products);
        d = 16;
    } else {
        for (int64_t j = 0; j < n; ++j) products[j] = v16{};
    }
    for (; d + 16 <= width; d += 16) dot_features<16, true>(lanes + d, {rows.data + d, rows.stride}, n, products);
    for (; d < width; ++d) dot_features<1, true>(lanes + d, {rows.data + d, rows.stride}, n, products);
}

// sums[d] = sums[d] * rescale + sum_j weights[j] * rows[j][d]: the weighted mean of n tokens, a lane for each query. A
// tile is summed on its own first, which keeps the rounding error of long sums down.
template <int C>
static inline void weigh_block(const v16* weights, Rows rows, int64_t n, int64_t d, v16 rescale, v16* sums) {
    v16 sum[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[c] = v16{};
    for (int64_t j = 0; j < n; ++j) {
        const v16 weight = weights[j];
        const float* row = rows[j] + d;
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[c] += weight * row[c];
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[d + c] = sums[d + c] * rescale + sum[c];
}

AVF_NOINLINE void weigh(const v16* weights, Rows rows, int64_t n, int64_t width, v16 rescale, v16* sums) {
    int64_t d = 0;
    for (; d + CHUNK <= width; d += CHUNK) weigh_block<CHUNK>(weights, rows, n, d, rescale, sums);
    for (; d < width; ++d) weigh_block<1>(weights, rows, n, d, rescale, sums);
}

// out[j] (+)= sum_f weights[j][f] * rows[f] for K tokens and 16 columns of them; here the lanes are features.
template <int K, int F>  // F queries; 0: `lanes`
AVF_INLINE void spread_block(const float* weights, const v16* rows, int64_t lanes, int64_t stride, bool add, float* out) {
    v16 sum[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) sum[k] = add ? load(out + k * stride) : v16{};
#pragma GCC unroll 16
    for (int64_t f = 0; f < (F ? F : lanes); ++f) {
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) sum[k] += rows[f] * weights[k * LANES + f];
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) store(out + k * stride, sum[k]);
}

template <int F>
AVF_INLINE void spread_columns(const float* weights, const v16* rows, int64_t lanes, int64_t n, int64_t stride, bool add,
                               float* out) {
    v16 row[16];  // in registers, where there are enough
#pragma GCC unroll 16
    for (int f = 0; f < 16; ++f) row[f] = rows[f];
    int64_t j = 0;
    for (; j + KEYS <= n; j += KEYS)
        spread_block<KEYS, F>(weights + j * LANES, row, lanes, stride, add, out + j * stride);
    for (; j < n; ++j) spread_block<1, F>(weights + j * LANES, row, lanes, stride, add, out + j * stride);
}

// out [n, padded(width)], rows `stride` apart, = (out +) weights [n, 16] rows [16, padded(width)], over `lanes` rows.
AVF_NOINLINE void spread(const v16* weights, const float* rows, int64_t lanes, int64_t n, int64_t width, bool add,
                         float* out, int64_t stride) {
    const float* w = reinterpret_cast<const float*>(weights);
    width = padded(width);
    for (int64_t d = 0; d < width; d += LANES) {
        v16 columns[LANES];
        for (int64_t f = 0; f < LANES; ++f) columns[f] = load(rows + f * width + d);
        if (lanes == LANES)
            spread_columns<LANES>(w, columns, lanes, n, stride, add, out + d);
        else
            spread_columns<0>(w, columns, lanes, n, stride, add, out + d);
    }
}

// logits[j] -> e^logits[j] / 2^offset for n tokens, in place; returns their sum. The multiplication by log2(e) is fused
// with the subtraction: were it folded into the queries, its rounding error would grow with the logits.
static inline v16 exponentials(v16* logits, int64_t n, v16 offset) {
    v16 sum{};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        v16 x[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) x[k] = logits[j + k] * LOG2E - offset;
        exp2<4>(x);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) logits[j + k] = x[k];
        sum += (x[0] + x[1]) + (x[2] + x[3]);
    }
    for (; j < n; ++j) sum += logits[j] = exp2(logits[j] * LOG2E - offset);
    return sum;
}

// An online softmax: the maximum of the logits so far, as a base-2 offset, and the sum of e^logit / 2^offset.
struct Softmax {
    v16 maximum = splat(-INFINITY), offset = splat(-INFINITY), sum = v16{};

    // Turns n logits into weights e^logit / 2^offset; returns what earlier sums are to be multiplied with.
    v16 add(v16* logits, int64_t n) {
        v16 top = maximum, other = maximum;
        int64_t j = 0;
        for (; j + 2 <= n; j += 2) top = max(logits[j], top), other = max(logits[j + 1], other);
        if (j < n) top = max(logits[j], top);
        maximum = max(other, top);
        // While every token so far is masked the maximum is -inf; 0 instead keeps the weights 0 rather than NaN. The
        // offset is rounded once and then kept, so that rescaling meets the very number that was subtracted.
        const v16 next = select(empty(), v16{}, maximum * LOG2E);
        const v16 rescale = exp2(offset - next);
        sum = sum * rescale + exponentials(logits, n, next);
        offset = select(empty(), splat(-INFINITY), next);
        return rescale;
    }

    v16i empty() const { return maximum == -INFINITY; }
    v16i no_token() const { return empty() & (sum == 0.f); }  // a logit that is NaN leaves no maximum, but a sum
    v16 lse() const { return LN2 * (offset + log2(sum)); }  // meaningless while empty
};

// e^logit / 2^offset * factor for n tokens, in place.
static void normalised(v16* logits, int64_t n, v16 offset, v16 factor) {
    exponentials(logits, n, offset);
    for (int64_t j = 0; j < n; ++j) logits[j] *= factor;
}

static void apply_mask(const uint8_t* mask, int64_t n, v16* logits) {
    if (mask)
        for (int64_t j = 0; j < n; ++j)
            if (!mask[j]) logits[j] = splat(-INFINITY);
}

}  // namespace AVF_ISA
