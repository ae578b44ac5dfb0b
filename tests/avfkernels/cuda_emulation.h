// CUDA on a CPU, as far as csrc/*.cu needs it: csrc/warp.cuh includes this (AVF_WARP) in place of its own primitives. A block's threads are fibers that switch wherever lanes or threads have to meet, so that the kernels'
// source runs unchanged, deadlocks are noticed, and another order of the threads (AVF_EMULATION_ORDER) exposes races.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
};
inline const char* cudaGetErrorString(cudaError_t code) {
    if (code == cudaErrorMisalignedAddress) return "misaligned address";
    return code == cudaErrorInvalidValue ? "invalid argument" : "another error";
}

namespace emulation {

struct Index {
    unsigned x;
};

// A place where `size` threads meet and show each other up to six words. Two sets of words: who is through early may
// already write the next while others still read.
struct Meeting {
    unsigned size, arrived = 0, round = 0;
    const char* what = nullptr;
    uint32_t words[2][32][6];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    ucontext_t scheduler;
    std::vector<float> shared;
    std::function<void()> body;
    bool progress;
};
inline Block block;
inline Index thread_index, block_index, block_size;

[[noreturn]] inline void fail(const char* message, const char* detail) {
    std::fprintf(stderr, "emulation: block %u, thread %u: %s %s\n", block_index.x, thread_index.x, message, detail);
    std::abort();
}

inline void meet(Meeting& meeting, const char* what) {
    if (meeting.arrived && std::strcmp(meeting.what, what)) fail("meets others that do not want to", what);
    meeting.what = what;
    block.progress = true;
    const unsigned round = meeting.round;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    while (meeting.round == round) swapcontext(&block.fibers[thread_index.x].context, &block.scheduler);
}

// Shows `words` to the lanes of the warp and returns what they all show.
template <class... Word>
const uint32_t (*exchange(const char* what, Word... word))[6] {
    Meeting& warp = block.warps[thread_index.x / 32];
    auto* shown = warp.words[warp.round % 2];
    unsigned i = 0;
    ((shown[thread_index.x % 32][i++] = word), ...);
    meet(warp, what);
    return shown;
}

inline void run_fiber() {
    block.body();
    block.progress = block.fibers[thread_index.x].done = true;
    setcontext(&block.scheduler);
}

inline void run_block(unsigned threads, size_t shared_bytes) {
    constexpr size_t STACK = 1 << 16;
    constexpr float CANARY = 1234567.f;
    const char* order = std::getenv("AVF_EMULATION_ORDER");
    const bool backwards = order && !std::strcmp(order, "backwards");
    block.fibers.resize(std::max(size_t(threads), block.fibers.size()));
    block.warps.assign(threads / 32, {});
    for (Meeting& warp : block.warps) warp.size = 32;
    block.all = {};
    block.all.size = threads;
    block.shared.assign(shared_bytes / sizeof(float), NAN);
    block.shared.insert(block.shared.end(), 64, CANARY);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run_fiber, 0);
    }
    // Each warp runs as far as it can before the next one does: whoever relies on a barrier that is missing is late.
    for (bool any = true; any;) {
        any = false;
        for (unsigned i = 0; i < threads; i += 32)
            for (block.progress = true; block.progress; any |= block.progress) {
                block.progress = false;
                for (unsigned lane = i; lane < i + 32; ++lane) {
                    thread_index.x = backwards ? threads - 1 - lane : lane;
                    Fiber& fiber = block.fibers[thread_index.x];
                    if (!fiber.done) swapcontext(&block.scheduler, &fiber.context);
                }
            }
    }
    for (unsigned i = 0; i < threads; ++i)
        if (!block.fibers[i].done)
            fail("waits for ever:", block.all.arrived ? block.all.what : block.warps[i / 32].what);
    for (size_t i = 0; i < 64; ++i)
        if (block.shared[shared_bytes / sizeof(float) + i] != CANARY) fail("writes beyond", "shared memory");
}

inline uint32_t bits(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float from_bits(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

inline uint16_t round_to(Bf16, float x) {
    const uint32_t y = bits(x);
    return x != x ? 0x7FFF : uint16_t((y + 0x7FFF + (y >> 16 & 1)) >> 16);
}
inline float widen(Bf16, uint16_t x) { return from_bits(uint32_t(x) << 16); }
inline uint16_t round_to(Fp16, float x) {
    const _Float16 y = _Float16(x);
    uint16_t z;
    std::memcpy(&z, &y, 2);
    return z;
}
inline float widen(Fp16, uint16_t x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return float(y);
}

inline uint16_t half_of(uint32_t word, unsigned i) { return uint16_t(word >> 16 * i); }

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size

inline void __syncthreads() { emulation::meet(emulation::block.all, "__syncthreads"); }
inline float* shared_memory() { return emulation::block.shared.data(); }

inline float shuffle_xor(float x, int lanes) {
    return emulation::from_bits(emulation::exchange("shuffle", emulation::bits(x))[threadIdx.x % 32 ^ lanes][0]);
}

// As PTX defines the fragments of mma.m16n8k16 (a: row, b: column) and of movmatrix.
template <class T>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const auto* shown = emulation::exchange("mma", a0, a1, a2, a3, b0, b1);
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = g + i / 2 * 8, n = 2 * t + i % 2;
        double sum = d[i];
        for (unsigned k = 0; k < 16; ++k) {
            const uint32_t a = shown[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const uint32_t b = shown[n * 4 + k % 8 / 2][4 + k / 8];
            sum += double(emulation::widen(T{}, emulation::half_of(a, k % 2))) *
                   double(emulation::widen(T{}, emulation::half_of(b, k % 2)));
        }
        d[i] = float(sum);
    }
}

inline uint32_t transpose(uint32_t x) {
    const auto* shown = emulation::exchange("movmatrix", x);
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto element = [&](unsigned row, unsigned column) {
        return uint32_t(emulation::half_of(shown[row * 4 + column / 2][0], column % 2));
    };
    return element(2 * t, g) | element(2 * t + 1, g) << 16;
}

inline float power_of_2(float x) { return std::exp2(x); }

template <class T>
uint32_t pack(float low, float high) {
    return emulation::round_to(T{}, low) | uint32_t(emulation::round_to(T{}, high)) << 16;
}
template <class T>
void unpack(uint32_t x, float& low, float& high) {
    low = emulation::widen(T{}, emulation::half_of(x, 0));
    high = emulation::widen(T{}, emulation::half_of(x, 1));
}
template <class T>
uint32_t multiply(uint32_t x, uint32_t y) {
    float low[2], high[2];
    unpack<T>(x, low[0], high[0]);
    unpack<T>(y, low[1], high[1]);
    return pack<T>(low[0] * low[1], high[0] * high[1]);
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared_bytes, void*, Args... args) {
    if (threads % 32 || threads > 1024 || shared_bytes > 48 * 1024) return cudaErrorInvalidConfiguration;
    blockDim.x = unsigned(threads);
    emulation::block.body = [=] { kernel(args...); };
    for (int64_t i = 0; i < blocks; ++i) {
        blockIdx.x = unsigned(i);
        emulation::run_block(unsigned(threads), shared_bytes);
    }
    return cudaSuccess;
}
