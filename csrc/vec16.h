// Sixteen floats: one AVX-512 register, two AVX2 registers, four of SSE or NEON, by the compiler's vector types.
// Included only by *_kernel.cpp, which is compiled once for each instruction set; everything is static for that reason.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
// GCC 12 takes the undefined operand of its own AVX-512 headers for an uninitialised variable.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));

static inline v16i bits(v16 x) { return (v16i)x; }
static inline v16i bits(v16u x) { return (v16i)x; }
static inline v16 floats(v16i x) { return (v16)x; }
static inline v16 to_float(v16i x) { return __builtin_convertvector(x, v16); }
static inline v16 splat(float x) { return v16{} + x; }
static inline v16u splat(uint32_t x) { return v16u{} + x; }
static inline v16 select(v16i condition, v16 a, v16 b) {
    return (v16)((condition & (v16i)a) | (~condition & (v16i)b));
}
// NaN in a is dropped here; it comes back through exp2(a - max).
static inline v16 max(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)a, (__m512)b); }
#else

// The same in registers of a smaller size. (GCC takes a vector type wider than a register through memory.)
#if defined(__AVX2__)
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif

namespace AVF_ISA {  // its constructor is no static function
template <class T>
struct Vector {
    typedef T Part __attribute__((vector_size(REGISTER)));
    static constexpr int PARTS = 64 / REGISTER;
    Part p[PARTS];

    Vector() = default;
    Vector(T x) {
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) p[i] = Part{} + x;
    }
};
}  // namespace AVF_ISA
typedef AVF_ISA::Vector<float> v16;
typedef AVF_ISA::Vector<int32_t> v16i;
typedef AVF_ISA::Vector<uint32_t> v16u;

#define AVF_EACH(result, expression)                                       \
    result r;                                                              \
    _Pragma("GCC unroll 4") for (int i = 0; i < result::PARTS; ++i) r.p[i] = (typename result::Part)(expression); \
    return r;
#define AVF_BINARY(type, op)                                                                  \
    static inline type operator op(type a, type b) { AVF_EACH(type, a.p[i] op b.p[i]) }
#define AVF_COMPARE(type, op)                                                                 \
    static inline v16i operator op(type a, type b) { AVF_EACH(v16i, a.p[i] op b.p[i]) }
#define AVF_ASSIGN(type, op)                                                                  \
    static inline type& operator op##=(type& a, type b) { return a = a op b; }
AVF_BINARY(v16, +) AVF_BINARY(v16, -) AVF_BINARY(v16, *) AVF_BINARY(v16, /)
AVF_ASSIGN(v16, +) AVF_ASSIGN(v16, -) AVF_ASSIGN(v16, *)
AVF_COMPARE(v16, <) AVF_COMPARE(v16, >) AVF_COMPARE(v16, ==) AVF_COMPARE(v16i, >=)
AVF_BINARY(v16i, +) AVF_BINARY(v16i, -) AVF_BINARY(v16i, &) AVF_BINARY(v16i, |) AVF_ASSIGN(v16i, -)
AVF_BINARY(v16u, ^) AVF_BINARY(v16u, &) AVF_BINARY(v16u, *) AVF_BINARY(v16u, +)
static inline v16 operator-(v16 a) { AVF_EACH(v16, -a.p[i]) }
static inline v16i operator<<(v16i a, int n) { AVF_EACH(v16i, a.p[i] << n) }
static inline v16i operator>>(v16i a, int n) { AVF_EACH(v16i, a.p[i] >> n) }
static inline v16u operator>>(v16u a, int n) { AVF_EACH(v16u, a.p[i] >> n) }

static inline v16i bits(v16 x) { AVF_EACH(v16i, x.p[i]) }
static inline v16i bits(v16u x) { AVF_EACH(v16i, x.p[i]) }
static inline v16 floats(v16i x) { AVF_EACH(v16, x.p[i]) }
static inline v16 to_float(v16i x) { AVF_EACH(v16, __builtin_convertvector(x.p[i], v16::Part)) }
static inline v16i to_int(v16 x) { AVF_EACH(v16i, __builtin_convertvector(x.p[i], v16i::Part)) }
static inline v16 splat(float x) { return v16(x); }
static inline v16u splat(uint32_t x) { return v16u(x); }
static inline v16 select(v16i condition, v16 a, v16 b) {
    AVF_EACH(v16, (condition.p[i] & (v16i::Part)a.p[i]) | (~condition.p[i] & (v16i::Part)b.p[i]))
}
// NaN in a is dropped here; it comes back through exp2(a - max).
static inline v16 max(v16 a, v16 b) { return select(a > b, a, b); }
#endif

static inline v16 load(const float* p) {
    v16 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float* p, v16 x) { std::memcpy(p, &x, sizeof x); }

// x[k] = 2^x[k] for N vectors of values <= 0 or so, to 1 ulp; 0 below 2^-126; NaN stays NaN. Several at a time, step
// by step, so that the processor finds independent work next to each other.
template <int N>
static inline __attribute__((always_inline)) void exp2(v16* x) {
    // 1 + f r(f), r interpolating (2^f - 1) / f in six Chebyshev points of [0, 1]: within 1e-8 of the result.
    const float coefficients[] = {0.000208179146f, 0.00126921665f, 0.0096521955f, 0.0554960221f, 0.240227208f, 0.693147182f, 1.f};
    v16 n[N], f[N], p[N];  // n = floor(x) or, where an instruction floors by itself, x
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
#if defined(__AVX512F__)
        n[k] = x[k];
        f[k] = (v16)_mm512_reduce_ps((__m512)x[k], _MM_FROUND_TO_NEG_INF);
#else
        const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
        const v16 nearest = (x[k] + magic) - magic;
        n[k] = nearest - select(nearest > x[k], splat(1.f), v16{});
        f[k] = x[k] - n[k];
#endif
        p[k] = splat(coefficients[0]);
    }
#pragma GCC unroll 8
    for (int c = 1; c < 7; ++c)
#pragma GCC unroll 8
        for (int k = 0; k < N; ++k) p[k] = p[k] * f[k] + coefficients[c];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) {
#if defined(__AVX512F__)
        const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x[k], _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
        x[k] = (v16)_mm512_maskz_scalef_ps(keep, (__m512)p[k], (__m512)n[k]);
#else
        const v16i exponent = (to_int(max(n[k], splat(-126.f))) + 127) << 23;
        x[k] = select(x[k] < -126.f, v16{}, p[k] * floats(exponent));
#endif
    }
}

static inline v16 exp2(v16 x) {
    exp2<1>(&x);
    return x;
}

// log2(x) of positive normal numbers, to 1 ulp of max(1, |log2(x)|); NaN stays NaN.
static inline v16 log2(v16 x) {
    v16i exponent = (bits(x) >> 23) - 127;
    v16 m = floats((bits(x) & 0x007FFFFF) | 0x3F800000);  // in [1, 2)
    const v16i upper = m > 1.41421356f;
    m = select(upper, m * 0.5f, m);
    exponent -= upper;  // true is -1
    // log((1 + t) / (1 - t)) = 2 (t + t^3 / 3 + t^5 / 5 + ...), |t| < 0.172
    const v16 t = (m - 1.f) / (m + 1.f), t2 = t * t;
    const v16 series = 1.f + t2 * (1.f / 3 + t2 * (1.f / 5 + t2 * (1.f / 7 + t2 * (1.f / 9))));
    const v16 result = to_float(exponent) + 2.88539008f * t * series;
    return select(x == x, result, x);
}

// The transpose of a 16 x 16 block.
static inline void transpose(v16* rows) {
#if defined(__AVX512F__)  // four rounds of interleaving row r with row r + 8
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
        v16 next[16];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
            next[2 * r] = (v16)_mm512_permutex2var_ps((__m512)rows[r], low, (__m512)rows[r + 8]);
            next[2 * r + 1] = (v16)_mm512_permutex2var_ps((__m512)rows[r], high, (__m512)rows[r + 8]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) rows[r] = next[r];
    }
#else
    float from[16][16], to[16][16];
    std::memcpy(from, rows, sizeof from);
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) to[c][r] = from[r][c];
    std::memcpy(rows, to, sizeof to);
#endif
}

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Rounds to nearest, ties to even, as torch does; every NaN becomes the quiet one.
static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
