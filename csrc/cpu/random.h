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

/* Elements of one step of fill_random: 8 per call. Buffers must have room for a multiple of it. */
constexpr int random_step = 4 * width;

/* Fill out with 16 random bits for `count` elements, the first of which is `first` (a multiple of 8). `next` and
 * `next_out`: memory that is wanted after this, asked for while the multipliers are busy; null for none. */
QAD_INLINE void fill_random(uint16_t *out, int64_t first, int count, const Random &random, const char *next,
                            int next_bytes, const char *next_out, int next_out_bytes) {
    const D multiplier_0 = set_long(QAD_PHILOX_MULTIPLIER_0), multiplier_1 = set_long(QAD_PHILOX_MULTIPLIER_1);
    D call = add_long(set_long((uint64_t)first / 8), first_calls());
    const D calls_per_step = set_long(width / 2);
    const int bytes_per_step = next_bytes * random_step / QAD_BATCH, out_per_step = next_out_bytes * random_step / QAD_BATCH;
    for (int element = 0; element < count; element += random_step) {
        D c0 = call, c1 = random.tensor, c2 = random.step, c3 = random.stream;
#pragma GCC unroll 7
        for (int round = 0; round < QAD_PHILOX_ROUNDS; ++round) {
            const D product_0 = mul_low_words(c0, multiplier_0), product_1 = mul_low_words(c2, multiplier_1);
            c0 = xor_3(high_word(product_1), c1, random.keys[2 * round]);
            c1 = product_1;
            c2 = xor_3(high_word(product_0), c3, random.keys[2 * round + 1]);
            c3 = product_0;
        }
        interleave(out + element, join(c0, c1), join(c2, c3));
        call = add_long(call, calls_per_step);
        for (int byte = 0; byte < bytes_per_step; byte += 64) __builtin_prefetch(next + byte, 0);
        for (int byte = 0; byte < out_per_step; byte += 64) __builtin_prefetch(next_out + byte, 1);
        next += bytes_per_step;
        next_out += out_per_step;
    }
}

/* r -> (r + 0.5) / 65536 + offset, exact for the offsets 0 and -1/2. */
QAD_INLINE F uniform_from(U random, float offset) {
    return fused_add(convert(random), set(0x1p-16f), set(0x1p-17f + offset));
}

} // namespace
#endif
