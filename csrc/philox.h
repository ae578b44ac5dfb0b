// Which pairs attention dropout drops: Philox4x32-10 (Salmon et al., SC 2011), a random function of a counter, so that
// backward, another tiling and another device meet the same mask without it ever being stored.
//
// Counter (j / 8, i, query, b * H + h), key = seed. The call gives 128 bits: word w of the four holds the 16-bit
// numbers of the pairs j = 8 * (j / 8) + 2 w (low half) and + 2 w + 1 (high half). A pair is kept if its number is at
// least round(p * 65536); what is kept is scaled by the exact inverse of that probability.
#pragma once
#include <cmath>

#include "vec16.h"

namespace AVF_ISA {

// The high and low halves of x * m in every lane.
static inline void multiply(v16u x, uint32_t m, v16u& high, v16u& low) {
    low = x * m;
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
    high = (v16u)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#else
    uint32_t lanes[16];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int lane = 0; lane < 16; ++lane) lanes[lane] = uint32_t(uint64_t(lanes[lane]) * m >> 32);
    std::memcpy(&high, lanes, sizeof lanes);
#endif
}

struct PairDropout {
    uint32_t key[2], threshold;
    float keep;  // 1 / probability of being kept

    PairDropout(uint64_t seed, float p)
        : key{uint32_t(seed), uint32_t(seed >> 32)},
          threshold(uint32_t(std::lround(double(p) * 65536))),
          keep(threshold < 65536 ? 65536.f / float(65536 - threshold) : 0.f) {}

    // factors[0..8): 0 or `keep`, for the pairs (i, j0 .. j0 + 7), j0 a multiple of 8, of the queries f0 .. f0 + 15.
    void factors(int64_t i, int64_t j0, int64_t f0, int64_t head, v16* factors) const {
        static const uint32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        v16u c2;
        std::memcpy(&c2, lane, sizeof c2);
        v16u c0 = splat(uint32_t(j0 / 8)), c1 = splat(uint32_t(i)), c3 = splat(uint32_t(head));
        c2 = c2 + uint32_t(f0);
        uint32_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < 10; ++round) {
            v16u high0, low0, high1, low1;
            multiply(c0, 0xD2511F53u, high0, low0);
            multiply(c2, 0xCD9E8D57u, high1, low1);
            c0 = high1 ^ c1 ^ k0;
            c1 = low1;
            c2 = high0 ^ c3 ^ k1;
            c3 = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const v16u words[4] = {c0, c1, c2, c3};
        for (int w = 0; w < 4; ++w) {
            factors[2 * w] = select(bits(words[w] & 0xFFFFu) >= int32_t(threshold), splat(keep), v16{});
            factors[2 * w + 1] = select(bits(words[w] >> 16) >= int32_t(threshold), splat(keep), v16{});
        }
    }
};

}  // namespace AVF_ISA
