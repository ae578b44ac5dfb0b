// Sixteen floats: one AVX-512 register, two AVX2 registers, four of SSE or NEON. The compiler lowers the vector type.
// Included only by *_kernel.cpp, which is compiled once for each instruction set; everything is static for that reason.
#pragma once
#include <cstdint>
#include <cstring>

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

static inline v16 splat(float x) { return v16{} + x; }
static inline v16 select(v16i condition, v16 a, v16 b) { return (v16)((condition & (v16i)a) | (~condition & (v16i)b)); }
// NaN in a is dropped here; it comes back through exp2(a - max).
static inline v16 max(v16 a, v16 b) { return select(a > b, a, b); }

// 2^x for x <= 0, to 1 ulp or so; 0 below 2^-126; NaN stays NaN.
static inline v16 exp2_nonpositive(v16 x) {
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
    const v16i underflow = x < -126.f;
    x = select(underflow, splat(-126.f), x);
    const v16 shifted = x + magic;
    const v16 f = x - (shifted - magic);  // in [-1/2, 1/2]
    // Taylor series of 2^f: the first omitted term is below 6e-9 of the result.
    v16 p = splat(1.5252733804059840e-5f);
    p = p * f + 1.5403530393381609e-4f;
    p = p * f + 1.3333558146428443e-3f;
    p = p * f + 9.6181291076284772e-3f;
    p = p * f + 5.5504108664821580e-2f;
    p = p * f + 2.4022650695910071e-1f;
    p = p * f + 6.9314718055994531e-1f;
    p = p * f + 1.f;
    const v16i exponent = ((v16i)shifted - 0x4B400000 + 127) << 23;
    return select(underflow, splat(0.f), p * (v16)exponent);
}
