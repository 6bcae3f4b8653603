/* Philox4x32-7, one call per 64-bit lane: only the low word of a lane counts, so that a multiplication of low words
 * needs no masking and its product is both of the words that the next round wants. */
#ifndef QAD_RANDOM_H
#define QAD_RANDOM_H

#include "../numerics.h"
#include "simd.h"

namespace {

struct Random {
    D keys[2 * QAD_PHILOX_ROUNDS];
    D tensor, step, stream;

    Random(uint32_t seed_low, uint32_t seed_high, uint32_t tensor_word, uint32_t step_word, uint32_t stream_word)
        : tensor(set_long(tensor_word)), step(set_long(step_word)), stream(set_long(stream_word)) {
        for (int round = 0; round < QAD_PHILOX_ROUNDS; ++round) {
            keys[2 * round] = set_long(seed_low + (uint32_t)round * QAD_PHILOX_WEYL_0);
            keys[2 * round + 1] = set_long(seed_high + (uint32_t)round * QAD_PHILOX_WEYL_1);
        }
    }
};

/* Vectors of calls that are worked on side by side, so that one's multiplication hides the latency of another's: as
 * many as the registers hold. */
constexpr int lanes_of_calls = width == 16 ? 4 : 2;

/* Elements of one step of fill_random: 8 per call. Buffers must have room for a multiple of it. */
constexpr int random_step(int lanes) { return 4 * width * lanes; }

/* Fill out with 16 random bits for `count` elements, the first of which is `first` (a multiple of 8). */
template <int lanes = lanes_of_calls>
QAD_CALLED void fill_random(uint16_t *out, int64_t first, int count, const Random &random) {
    const D multiplier_0 = set_long(QAD_PHILOX_MULTIPLIER_0), multiplier_1 = set_long(QAD_PHILOX_MULTIPLIER_1);
    D call = add_long(set_long((uint64_t)first / 8), first_calls());
    const D calls_per_vector = set_long(width / 2);
    for (int element = 0; element < count; element += random_step(lanes)) {
        D words[lanes][4];
#pragma GCC unroll 4
        for (int lane = 0; lane < lanes; ++lane) {
            words[lane][0] = call;
            words[lane][1] = random.tensor;
            words[lane][2] = random.step;
            words[lane][3] = random.stream;
            call = add_long(call, calls_per_vector);
        }
#pragma GCC unroll 7
        for (int round = 0; round + 1 < QAD_PHILOX_ROUNDS; ++round) {
#pragma GCC unroll 4
            for (int lane = 0; lane < lanes; ++lane) {
                D *c = words[lane];
                const D product_0 = mul_low_words(c[0], multiplier_0), product_1 = mul_low_words(c[2], multiplier_1);
                c[0] = xor_3(high_word(product_1), c[1], random.keys[2 * round]);
                c[1] = product_1;
                c[2] = xor_3(high_word(product_0), c[3], random.keys[2 * round + 1]);
                c[3] = product_0;
            }
        }
        /* The last round's products hold the words in pairs, but for their order. */
        const D *last = random.keys + 2 * (QAD_PHILOX_ROUNDS - 1);
#pragma GCC unroll 4
        for (int lane = 0; lane < lanes; ++lane) {
            const D *c = words[lane];
            const D product_0 = mul_low_words(c[0], multiplier_0), product_1 = mul_low_words(c[2], multiplier_1);
            interleave(out + element + 4 * width * lane, xor_low_words(swap_words(product_1), c[1], last[0]),
                       xor_low_words(swap_words(product_0), c[3], last[1]));
        }
    }
}

/* r -> (r + 0.5) / 65536 + offset, exact for the offsets 0 and -1/2. */
QAD_INLINE F uniform_from(U random, float offset) {
    return fused_add(convert(random), set(0x1p-16f), set(0x1p-17f + offset));
}

} // namespace
#endif
