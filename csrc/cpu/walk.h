/* A range of blocks, a batch of elements at a time.
 *
 * A batch runs in stages over memory that is in the first-level cache by then: scales of all its blocks (scales.h),
 * then codes, a chunk of 32 elements at a time. The scales of the next batch are found before the codes of this one, so
 * that the latency of their divisions has something to hide behind. Chunks with noise and without are told apart first,
 * and each kind is treated in one go (chunks.h); or those with noise in groups, each after its random numbers, so that the
 * memory can work for one group while the arithmetic works on another.
 */
#ifndef QAD_WALK_H
#define QAD_WALK_H

#include "../numerics.h"
#include "chunks.h"
#include "elements.h"
#include "kernels.h"
#include "random.h"
#include "rounding.h"
#include "scales.h"
#include "simd.h"

namespace {

/* How the noise of a job works out. */
struct Mode {
    int mode;
    uint16_t hard_below; /* a block is hard if its 16 bits are fewer, (bits + 1/2) / 65536 < hard_share */

    explicit Mode(const qad_noise &noise) : mode(noise.mode), hard_below(0) {
        const double exact = (double)noise.hard_share * 65536 - 0.5;
        if (exact > 65535) mode = QAD_NOISE_NONE;
        if (exact > 0 && mode != QAD_NOISE_NONE) hard_below = (uint16_t)((int)exact + ((int)exact < exact));
    }
};

/* Overwrite the damaged blocks of a batch. */
template <int dtype> void fill_damaged(void *to, const Batch &batch, int block, bool with_nan) {
    const uint32_t word = with_nan ? quiet_nan : 0u;
    const uint16_t half = (uint16_t)(!with_nan ? 0u : dtype == QAD_BF16 ? 0x7fc0u : 0x7e00u);
    for (int b = 0; b < batch.blocks; ++b) {
        if (!batch.scales.damaged[b]) continue;
        for (int i = b * block; i < (b + 1) * block; ++i) {
            if (dtype == QAD_F32)
                memcpy((float *)to + i, &word, 4);
            else
                memcpy((uint16_t *)to + i, &half, 2);
        }
    }
}

/* Blocks for which random numbers are drawn at a time. */
constexpr int most_drawn = 256;

/* Chunks that are given random bits at a time, if not twice as many; where fp32 is written fewer, because its lines
 * are asked for at the same time, and only so many can be on their way. */
template <typename Target> constexpr int group_of() { return sizeof(Target) == 4 ? 8 : 16; }

/* A job, and what it takes to walk over its batches. */
template <int dtype> struct Walk {
    typedef typename Elements<dtype>::Stored Stored;

    const qad_fake_quantize_job &job;
    const Mode mode;
    const ScaleRule rule;
    const Random elements, hardness;
    const int batch_size, per_batch; /* elements that are worked on at a time, and blocks of them */
    bool asks_early = false;         /* for what a batch writes, while the next one's keys are found */
    Batch batches[2];                /* this one and the next */
    Chunks all;                      /* of a batch, in the order in which they are treated */
    uint64_t hardness_products[most_drawn / chunk];
    uint16_t hardness_bits[most_drawn];

    QAD_CALLED_MEMBER explicit Walk(const qad_fake_quantize_job &of, int size = batch_of<dtype>())
        : job(of), mode(of.noise), rule(of.grid),
          elements(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_ELEMENT,
                   of.noise.mode == QAD_NOISE_UNIFORM),
          hardness(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_BLOCK),
          batch_size(size), per_batch(size / of.grid.block) {
        arrange(size / chunk);
        for (int i = 0; i < most_drawn / chunk; ++i)
            hardness_products[i] = product_of_call((uint64_t)i * calls_per_chunk);
    }

    /* Fill `all` for a batch of so many chunks. Only the last batch has fewer than the others. */
    QAD_CALLED_MEMBER void arrange(int chunks) {
        all.count = chunks;
        /* What lies behind is asked for, but not used. */
        for (int i = chunks; i < chunks + chunks_side_by_side; ++i) all.list[i] = {0, 0};
        for (int i = 0; i < chunks; ++i) {
            const int c = job.backwards ? chunks - 1 - i : i;
            all.list[i] = {(uint16_t)(c * chunk), (uint16_t)(c >> chunks_per_block_log2(job.grid))};
            all.products[i] = product_of_call((uint64_t)c * calls_per_chunk);
        }
    }

    /* The weights of the batch after the next, whose scales will be found first; or of the one after that. */
    QAD_MEMBER const char *weights_ahead(const Batch &batch) const {
        const int batches = job.many_lines ? 3 : 2;
        return (const char *)job.weights + size_of(job.weights_dtype) * (batch.element + batches * batch_size);
    }

    /* What the next batch writes. This is asked for only where it comes from memory: out of a cache, that gets in the
     * way (of a copy's rate, fp32 forward: 0.97 without and 0.93 with it at 1536 x 576). */
    QAD_MEMBER const char *out_ahead(const Batch &batch) const {
        return job.streams ? (const char *)job.out + size_of(job.out_dtype) * (batch.element + batch_size) : nullptr;
    }

    /* Part the chunks of a batch into those with noise and those without. */
    QAD_CALLED_MEMBER void choose(Batch &batch, int64_t begin) {
        const int drawn = (int)((batch.block - begin) % most_drawn), more = chunks_per_block_log2(job.grid);
        if (drawn == 0)
            fill_random<false>(hardness_bits, (uint64_t)batch.block / 8, hardness_products, most_drawn / chunk, hardness);
        const uint16_t *bits = hardness_bits + drawn;
        uint16_t spread[most_chunks];
        const int chunks = batch.count / chunk;
        if (more || job.backwards) {
            for (int c = 0; c < chunks; ++c) spread[c] = bits[(job.backwards ? chunks - 1 - c : c) >> more];
            bits = spread;
        }
        if (chunks != all.count) arrange(chunks);
        int hard = 0, soft = 0;
        for (int c = 0; c < chunks; c += width) {
            const uint32_t present = chunks - c < width ? (1u << (chunks - c)) - 1 : (1u << width) - 1;
            const uint32_t below = halves_below(bits + c, mode.hard_below) & present;
            pack_words(batch.hard.list + hard, all.list + c, below);
            pack_words(batch.soft.list + soft, all.list + c, present & ~below);
            pack_longs(batch.soft.products + soft, all.products + c, present & ~below);
            hard += __builtin_popcount(below);
            soft += __builtin_popcount(present & ~below);
        }
        batch.hard.count = hard;
        batch.soft.count = soft;
    }

    /* Find the scales of the batch that begins with a block. */
    QAD_CALLED_MEMBER void prepare(Batch &batch, int64_t block, int64_t begin, int64_t end) {
        batch.block = block;
        batch.element = block * job.grid.block;
        batch.blocks = (int)(end - block < per_batch ? end - block : per_batch);
        batch.count = batch.blocks * job.grid.block;
        batch.weights = dtype == QAD_F32
                            ? load_elements(job.weights, job.weights_dtype, batch.element, batch.count, batch.staged)
                            : (const void *)((const Stored *)job.weights + batch.element);
        /* Outputs are of the weights' dtype then. */
        const char *now = asks_early && block > begin
                              ? (const char *)job.out + (batch.element - batch_size) * (int)sizeof(Stored)
                              : nullptr;
        find_scales_of<dtype>((const Stored *)batch.weights, job.scales ? job.scales + block : nullptr,
                              job.used_scales ? job.used_scales + block : nullptr, batch.blocks, job.grid.block, rule,
                              now, batch.scales);
        if (mode.hard_below) choose(batch, begin);
    }

    /* Call hard and soft for the chunks of a batch, soft for a group at a time if it is given random bits and does not draw them
     * itself. They store Targets at `to`. */
    template <typename Target, typename Hard, typename Soft>
    void treat(const Batch &batch, void *to, bool past, bool draws_itself, Hard hard, Soft soft) {
        constexpr int most = 2 * group_of<Target>();
        alignas(64) uint16_t random[most * chunk];
        const int group = job.many_lines ? most : most / 2;
        const char *in = weights_ahead(batch), *out = out_ahead(batch);
        if (!mode.hard_below && batch.count / chunk != all.count) arrange(batch.count / chunk);
        const Chunks &without = mode.hard_below ? batch.hard : all, &with = mode.hard_below ? batch.soft : all;
        if (without.count && (mode.hard_below || mode.mode == QAD_NOISE_NONE))
            hard(Step{batch, without.list, without.count, nullptr, nullptr, nullptr, to, past, in, out, job.many_lines});
        if (mode.mode == QAD_NOISE_NONE) return;
        if (mode.hard_below) {
            in += without.count * chunk * (int)sizeof(Stored);
            if (out) out += without.count * chunk * (int)sizeof(Target);
        }
        if (draws_itself || !draws_elements(mode.mode)) {
            if (with.count)
                soft(Step{batch, with.list, with.count, nullptr, with.products, &elements, to, past, in, out,
                          job.many_lines});
            return;
        }
        for (int done = 0, chunks; done < with.count; done += chunks) {
            chunks = with.count - done < group ? with.count - done : group;
            /* While random numbers keep the arithmetic busy, the memory can fetch what will be written. In 16 bits that is
             * too little to matter. */
            if (sizeof(Target) == 4 && !past)
                for (int c = 0; c < chunks; ++c) ask<Target>((const char *)to, with.list[done + c].first, to_write);
            fill_random<Elements<dtype>::to_unpack>(random, (uint64_t)batch.element / 8, with.products + done, chunks,
                                                    elements);
            soft(Step{batch, with.list + done, chunks, random, nullptr, nullptr, to, past, in, out, job.many_lines});
            in += chunks * chunk * (int)sizeof(Stored);
            if (out) out += chunks * chunk * (int)sizeof(Target);
        }
    }

    /* Call body for each batch of the blocks [begin, end). Returns how many of them were damaged. */
    template <typename Body> int64_t operator()(int64_t begin, int64_t end, Body body) {
        int64_t damaged = 0;
        int now = 0;
        if (begin < end) prepare(batches[0], begin, begin, end);
        for (int64_t block = begin; block < end; block += per_batch, now ^= 1) {
            if (block + per_batch < end) prepare(batches[now ^ 1], block + per_batch, begin, end);
            body(batches[now]);
            damaged += batches[now].scales.damaged_count;
        }
        return damaged;
    }
};

} // namespace
#endif
