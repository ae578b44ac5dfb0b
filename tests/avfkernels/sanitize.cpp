// Runs every task of csrc/ on buffers of exactly the promised size, so that the address sanitizer sees a step beyond.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "avf.h"

struct Buffers {
    std::vector<std::unique_ptr<char[]>> kept;
    template <class T>
    T* make(int64_t n) {
        kept.emplace_back(new char[n * sizeof(T)]);
        return reinterpret_cast<T*>(kept.back().get());
    }
    AvfTensor tensor(int32_t dtype, int64_t B, int64_t H, int64_t N, int64_t d) {
        const int64_t n = B * H * N * d;
        void* data;
        if (dtype == AVF_F32) {
            float* x = make<float>(n);
            for (int64_t i = 0; i < n; ++i) x[i] = float(std::rand() % 200 - 100) / 100.f;
            data = x;
        } else {
            uint16_t* x = make<uint16_t>(n);
            for (int64_t i = 0; i < n; ++i) x[i] = uint16_t(0x3F80 + std::rand() % 64);
            data = x;
        }
        return {n ? data : nullptr, N * H * d, d, H * d};  // tokens outermost: [B, N, H, d]
    }
};

int main() {
    // Odd numbers of tokens, tiles that end in the middle, several blocks of queries, empty sides, more tokens than a tile.
    const int64_t shapes[][7] = {{2, 2, 16, 19, 49, 16, 16}, {1, 3, 5, 3, 7, 9, 23},   {1, 1, 1, 1, 1, 1, 1},
                                 {1, 1, 33, 17, 70, 16, 64}, {1, 2, 17, 33, 8, 33, 5}, {1, 1, 16, 0, 9, 16, 16},
                                 {1, 1, 16, 257, 20, 16, 16}, {1, 1, 5, 9, 140, 16, 16}};
    int runs = 0;
    for (auto& s : shapes)
        for (int32_t dtype : {AVF_F32, AVF_BF16})
            for (int32_t interaction : {AVF_SUM, AVF_PRODUCT})
                for (float dropout_p : {0.f, 0.3f})
                    for (int masked = 0; masked < 2; ++masked) {
                        Buffers m;
                        AvfPair a{};
                        a.B = s[0], a.H = s[1], a.F = s[2], a.N[0] = s[3], a.N[1] = s[4], a.dk = s[5], a.dv = s[6];
                        a.q = m.tensor(dtype, a.B, a.H, a.F, a.dk), a.grad_q = m.tensor(dtype, a.B, a.H, a.F, a.dk);
                        a.out = m.tensor(dtype, a.B, a.H, a.F, a.dv), a.grad_out = m.tensor(dtype, a.B, a.H, a.F, a.dv);
                        for (int i = 0; i < 2; ++i) {
                            a.k[i] = m.tensor(dtype, a.B, a.H, a.N[i], a.dk);
                            a.v[i] = m.tensor(dtype, a.B, a.H, a.N[i], a.dv);
                            a.grad_k[i] = m.tensor(dtype, a.B, a.H, a.N[i], a.dk);
                            a.grad_v[i] = m.tensor(dtype, a.B, a.H, a.N[i], a.dv);
                            uint8_t* mask = m.make<uint8_t>(a.B * a.N[i]);
                            for (int64_t j = 0; j < a.B * a.N[i]; ++j) mask[j] = std::rand() % 3 != 0;
                            if (masked) a.mask[i] = mask;
                        }
                        const int64_t sides = interaction == AVF_SUM ? 2 : 1, rows = a.B * a.H * a.F;
                        float* grad_lse = m.make<float>(rows);
                        for (int64_t i = 0; i < rows; ++i) grad_lse[i] = 1.f;
                        a.lse = m.make<float>(rows), a.grad_lse = grad_lse;
                        a.saved = m.make<float>((2 * sides + (interaction == AVF_PRODUCT ? a.dv : 0)) * rows);
                        a.seed = 5, a.scale = 0.25f, a.dropout_p = dropout_p, a.dtype = dtype;
                        a.interaction = interaction;
                        if (avf_pair_forward(&a) || avf_pair_backward(&a)) return 1;
                        ++runs;
                    }
    std::printf("%s %d\n", avf_isa(), runs);
}
