/* Philox4x32-7, one call per 64-bit lane: only the low word of a lane counts, so that a multiplication of low words
 * needs no masking and its product is both of the words that the next round wants. */
#ifndef QAD_RANDOM_H
#define QAD_RANDOM_H

#include "../numerics.h"
#include "kernels.h"
#include "simd.h"

namespace {

/* What is the same for all calls of a stream. Of the first two rounds, only one product each differs between calls. The
 * last round's keys are in the high words; what is in their low words flips bits of what the call gives. */
struct Random {
    D keys[2 * QAD_PHILOX_ROUNDS];
    D first, second, third, fourth; /* what those rounds combine it with; the last is a word as it is */

    /* With a sign, 16 bits are the number that they are without one less 2^15: their highest bit is flipped. */
    QAD_CALLED_MEMBER Random(uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step, uint32_t stream,
                             bool with_sign = false) {
        for (int round = 0; round < QAD_PHILOX_ROUNDS; ++round) {
            keys[2 * round] = set_long(seed_low + (uint32_t)round * QAD_PHILOX_WEYL_0);
            keys[2 * round + 1] = set_long(seed_high + (uint32_t)round * QAD_PHILOX_WEYL_1);
        }
        const uint64_t signs = with_sign ? 0x8000800080008000u : 0;
        for (D *last = keys + 2 * (QAD_PHILOX_ROUNDS - 1); last < keys + 2 * QAD_PHILOX_ROUNDS; ++last)
            *last = xor_2(low_as_high(*last), set_long(signs));
        const uint64_t by_step = (uint64_t)step * QAD_PHILOX_MULTIPLIER_1;
        const uint32_t word = (uint32_t)(by_step >> 32) ^ tensor ^ seed_low;
        const uint64_t by_word = (uint64_t)word * QAD_PHILOX_MULTIPLIER_0;
        first = set_long(stream ^ seed_high);
        second = set_long((uint32_t)by_step ^ (seed_low + QAD_PHILOX_WEYL_0));
        third = set_long((uint32_t)(by_word >> 32) ^ (seed_high + QAD_PHILOX_WEYL_1));
        fourth = set_long((uint32_t)by_word);
    }
};

/* Vectors of calls that are worked on side by side, so that one's multiplication hides the latency of another's: as
 * many as the registers hold. */
constexpr int lanes_of_calls = width == 16 ? 4 : 2;

constexpr int calls_per_chunk = chunk / 8; /* each serves 8 elements */

/* Chunks that those vectors serve. */
constexpr int chunks_side_by_side = lanes_of_calls * 4 * width / chunk;

/* The first product of a call, which is 64 bits long: that of a sum is a sum, so that it costs no multiplication. */
constexpr uint64_t product_of_call(uint64_t call) { return call * QAD_PHILOX_MULTIPLIER_0; }

/* What draws 16 random bits for each element of some chunks, in order or so that unpack brings them in order. The calls that
 * serve them begin at `first` plus those whose products are given. */
template <bool to_unpack> struct Draw {
    const D multiplier_0, multiplier_1, start;
    const Random &random;

    QAD_MEMBER Draw(uint64_t first, const Random &of)
        : multiplier_0(set_long(QAD_PHILOX_MULTIPLIER_0)), multiplier_1(set_long(QAD_PHILOX_MULTIPLIER_1)),
          start(mul_low_words(add_long(set_long(first), calls_in_chunk<to_unpack>()), multiplier_0)), random(of) {}

    /* Draw for chunks_side_by_side of them, from a vector of calls on, and call `meanwhile` eight times in between: its
     * instructions are independent of those here, and a processor sees too few of them ahead to mix them itself. */
    template <typename Meanwhile>
    QAD_MEMBER void draw(uint16_t *out, const uint64_t *products, int vector, Meanwhile meanwhile) const {
        D words[lanes_of_calls][4];
#pragma GCC unroll 4
        for (int lane = 0; lane < lanes_of_calls; ++lane) {
            D *c = words[lane];
            const D product = add_long(start, spread_chunks(products, vector + lane, product_of_call(1)));
            c[2] = xor_2(high_word(product), random.first);
            c[1] = mul_low_words(c[2], multiplier_1);
            c[0] = xor_2(high_word(c[1]), random.second);
            c[2] = xor_2(product, random.third);
            c[3] = random.fourth;
        }
        meanwhile();
#pragma GCC unroll 7
        for (int round = 2; round + 1 < QAD_PHILOX_ROUNDS; ++round) {
#pragma GCC unroll 4
            for (int lane = 0; lane < lanes_of_calls; ++lane) {
                D *c = words[lane];
                const D product_0 = mul_low_words(c[0], multiplier_0), product_1 = mul_low_words(c[2], multiplier_1);
                c[0] = xor_3(high_word(product_1), c[1], random.keys[2 * round]);
                c[1] = product_1;
                c[2] = xor_3(high_word(product_0), c[3], random.keys[2 * round + 1]);
                c[3] = product_0;
                if (round == 3 && lane == lanes_of_calls / 2 - 1) meanwhile();
            }
            meanwhile();
        }
        /* The last round's products hold the words in pairs, the second one in the low word. */
        const D *last = random.keys + 2 * (QAD_PHILOX_ROUNDS - 1);
#pragma GCC unroll 4
        for (int lane = 0; lane < lanes_of_calls; ++lane) {
            const D *c = words[lane];
            const D product_0 = mul_low_words(c[0], multiplier_0), product_1 = mul_low_words(c[2], multiplier_1);
            interleave<to_unpack>(out + 4 * width * (vector + lane), xor_3(product_1, low_as_high(c[1]), last[0]),
                                  xor_3(product_0, low_as_high(c[3]), last[1]));
            if (lane == lanes_of_calls / 2 - 1) meanwhile();
        }
        meanwhile();
    }
};
static_assert(QAD_PHILOX_ROUNDS == 7, "meanwhile is called eight times");

/* Fill out with the random bits of some chunks; see Draw. Both buffers must have room for a multiple of 8 chunks. */
template <bool to_unpack>
QAD_CALLED void fill_random(uint16_t *out, uint64_t first, const uint64_t *products, int chunks, const Random &random) {
    const Draw<to_unpack> drawing(first, random);
    for (int vector = 0; vector * 4 * width < chunks * chunk; vector += lanes_of_calls)
        drawing.draw(out, products, vector, [] {});
}

} // namespace
#endif
