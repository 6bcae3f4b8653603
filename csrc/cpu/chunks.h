/* Chunks of a batch, treated one after the other: without noise, with random bits that were drawn before, or drawing those
 * of the chunks to come in between.
 */
#ifndef QAD_CHUNKS_H
#define QAD_CHUNKS_H

#include "elements.h"
#include "kernels.h"
#include "random.h"
#include "scales.h"
#include "simd.h"

namespace {

constexpr int most_chunks = QAD_BATCH / chunk;

struct Chunk {
    uint16_t first, block; /* its first element and its block */
};

/* Chunks of a batch that are treated alike, whole blocks of them. Filled a vector at a time. */
struct Chunks {
    int count;
    Chunk list[most_chunks + width];
    uint64_t products[most_chunks + width]; /* for the random numbers, from the batch's first; see fill_random */
};

/* Some blocks on their way through the stages. */
struct Batch {
    int64_t block, element; /* the first ones */
    int blocks, count;      /* of blocks and of elements */
    const void *weights;    /* of the dtype that is worked on */
    Scales scales;
    Chunks hard, soft; /* without noise and with it, where there are both */
    alignas(64) float staged[QAD_BATCH];
};

QAD_INLINE int chunks_per_block_log2(const qad_grid &grid) { return grid.block == 32 ? 0 : grid.block == 64 ? 1 : 2; }

/* Chunks of a batch and what is to become of them. */
struct Step {
    const Batch &batch;
    const Chunk *list;
    int chunks;
    const uint16_t *random;   /* given: of all of them, one after the other, or null */
    const uint64_t *products; /* to draw them: see Draw */
    const Random *generator;
    void *to; /* the whole batch */
    bool past;
    /* For the first chunk, and then one after the other, in the order of memory and not of the list: processors that
     * foresee streams fetch more at a time then (half hard, out of memory, on a Zen 4: 346 ps an element instead of 439). */
    const char *weights_ahead, *out_ahead;
    bool far; /* what is ahead is wanted later: see ask_for_weights */
};

template <typename Stored> QAD_INLINE void ask_for_weights(const char *p, int first, bool far) {
    if (__builtin_expect(far, 0))
        ask<Stored>(p, first, to_read_later);
    else
        ask<Stored>(p, first, to_read);
}

/* Where chunks have their random bits from: they need none, were given them, or draw them. */
enum Randomness { not_random, given_random, drawn_random };

/* Whether chunks can draw their random bits themselves, each group those of the next one in between its own arithmetic: that
 * wants registers. On a Zen 4, out of a cache, uniform noise in fp32 took 243 instead of 269 ps an element. */
constexpr bool can_draw = width == 16;
static_assert(!can_draw || chunks_side_by_side == 8, "a chunk for each time that `meanwhile` is called");

/* Call one(chunk, its random bits, what asks for weights ahead) for the chunks of a step, which stores Targets. It should ask
 * before it stores: after that, out of memory, uniform noise took 300 instead of 250 ps an element in bf16 on a Zen 4. */
template <int dtype, typename Target, Randomness randomness, typename One>
QAD_INLINE void each_chunk(const Step &step, One one) {
    typedef typename Elements<dtype>::Stored Stored;
    const bool far = step.far;
    const char *next = step.weights_ahead;
    const auto treat = [&](const Chunk *c, const uint16_t *random) QAD_INLINED {
        one(*c, random, [&]() QAD_INLINED {
            ask_for_weights<Stored>(next, 0, far);
            next += chunk * sizeof(Stored);
        });
    };
    const Chunk *c = step.list;
    int left = step.chunks;
    if constexpr (randomness == drawn_random) {
        constexpr int group = chunks_side_by_side;
        alignas(64) uint16_t bits[2][group * chunk];
        const uint64_t call = (uint64_t)step.batch.element / 8, *products = step.products;
        const Draw<Elements<dtype>::to_unpack> drawing(call, *step.generator);
        /* For what a group writes, while its bits are drawn (and for something, past the last one). That helped a Xeon in
         * fp32 (338 -> 328 ps an element, before chunks drew their bits), and does a Zen 4 no harm; 16 bits are too little
         * to matter. */
        const bool asks = sizeof(Target) == 4 && !step.past;
        for (int i = 0; asks && i < group; ++i) ask<Target>((const char *)step.to, c[i].first, to_write);
        fill_random<Elements<dtype>::to_unpack>(bits[0], call, products, group, *step.generator);
        int now = 0;
        for (; left > group; left -= group, now ^= 1) {
            const uint16_t *random = bits[now];
            products += group;
            drawing.draw(bits[now ^ 1], products, 0, [&]() QAD_INLINED {
                if (asks) ask<Target>((const char *)step.to, c[group].first, to_write);
                treat(c++, random);
                random += chunk;
            });
        }
        for (const uint16_t *random = bits[now]; left > 0; --left, random += chunk) treat(c++, random);
    } else {
        const uint16_t *random = step.random;
        for (; left; --left, ++c) {
            treat(c, random);
            if (randomness == given_random) random += chunk;
        }
    }
}

} // namespace
#endif
