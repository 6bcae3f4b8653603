/* Fake quantization, quantization and dequantization of a range of blocks, a batch of elements at a time.
 *
 * A batch runs in stages over memory that is in the first-level cache by then: scales of all its blocks (scales.h),
 * then codes, a chunk of 32 elements at a time. The scales of the next batch are found before the codes of this one, so
 * that the latency of their divisions has something to hide behind. Chunks with noise and without are told apart first,
 * and each kind is treated in one go; those with noise in groups, each after its random numbers, so that the memory can
 * work for one group while the arithmetic works on another. Rounding adds and subtracts 1.5 x 2^23, which rounds half
 * to even on every instruction set; it also turns -0 into the one zero that a code has.
 *
 * Weights and outputs of one dtype are worked on as they are; of two, they are staged as fp32.
 */
#ifndef QAD_FAKE_QUANT_H
#define QAD_FAKE_QUANT_H

#include "../numerics.h"
#include "elements.h"
#include "kernels.h"
#include "look_up.h"
#include "random.h"
#include "scales.h"
#include "simd.h"

namespace {

constexpr int pair = 2 * width;

/* The weights of the batch after the next, whose scales are being found by then. */
template <int dtype> QAD_INLINE const char *weights_ahead(const qad_fake_quantize_job &job, int64_t first) {
    return (const char *)job.weights + size_of(job.weights_dtype) * (first + 2 * batch_of<dtype>());
}

/* What the next batch writes. This is asked for only where it comes from memory: out of a cache, that gets in the way
 * (of a copy's rate, fp32 forward: 0.97 without and 0.93 with it at 1536 x 576). */
template <int dtype> QAD_INLINE const char *out_ahead(const qad_fake_quantize_job &job, int64_t first) {
    return job.streams ? (const char *)job.out + size_of(job.out_dtype) * (first + batch_of<dtype>()) : nullptr;
}

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

constexpr float rounding_magic = 0x1.8p23f;

constexpr bool draws_elements(int mode) { return mode == QAD_NOISE_UNIFORM || mode == QAD_NOISE_STOCHASTIC; }

template <int dtype, int mode> QAD_INLINE WordPair random_pair_for(const uint16_t *p) {
    return draws_elements(mode) ? Elements<dtype>::random_pair(p) : WordPair{set_words(0), set_words(0)};
}

/* A scaled weight moved by its noise. The product is exact. A sum with noise is never -0: the noise is never zero, and
 * what cancels gives +0. */
template <int mode> QAD_INLINE F move(F scaled, U random) {
    const float offset = mode == QAD_NOISE_UNIFORM ? 0x1p-17f - 0.5f : 0x1p-17f;
    return add(scaled, fused_add(convert(random), set(0x1p-16f), set(offset)));
}

/* The (fractional, unless hard) code of a scaled weight, not yet clamped to the ends of the range: that commutes with
 * rounding, because the ends are integers, and with a product, which only turns round what is in order. */
template <int mode> QAD_INLINE F code_of(F scaled, U random) {
    if (mode == QAD_NOISE_UNIFORM) return move<mode>(scaled, random);
    if (mode == QAD_NOISE_STOCHASTIC) return floor_of(move<mode>(scaled, random));
    if (mode == QAD_NOISE_PARTIAL) return add(scaled, set(0.0f));
    return sub(add(scaled, set(rounding_magic)), set(rounding_magic));
}

QAD_INLINE F clamp(F code, F low, F high) { return min_of(high, max_of(low, code)); }

/* Chunks of a batch and what is to become of them. */
struct Step {
    const Batch &batch;
    const Chunk *list;
    int chunks;
    const uint16_t *random; /* one after another, without those of other chunks between them */
    void *to;               /* the whole batch */
    bool past;
    const char *weights_ahead, *out_ahead;
};

template <int dtype, int mode> void forward_chunks(const Step &step) {
    typedef Elements<dtype> E;
    const typename E::Stored *values = (const typename E::Stored *)step.batch.weights;
    typename E::Stored *out = (typename E::Stored *)step.to;
    const Scales &scales = step.batch.scales;
    const uint16_t *random = step.random;
    const char *next = step.weights_ahead;
    const bool past = step.past;
    for (const Chunk *c = step.list, *end = c + step.chunks; c != end; ++c) {
        const int first = c->first, b = c->block;
        const F scale = set(scales.scale[b]), inverse = set(scales.inverse[b]);
        const Ends ends = {set_words(scales.low[b]), set_words(scales.high[b])};
        ask<typename E::Stored>(next, first, false);
#pragma GCC unroll 4
        for (int i = 0; i < chunk; i += pair) {
            const Pair scaled = E::load_pair(values + first + i).times(inverse);
            const WordPair bits = random_pair_for<dtype, mode>(random + i);
            const Pair codes = {code_of<mode>(scaled.first, bits.first), code_of<mode>(scaled.second, bits.second)};
            E::store_pair(out + first + i, codes.times(scale), ends, past);
        }
        if (draws_elements(mode)) random += chunk;
    }
}

#ifdef QAD_HAS_LOOK_UP
/* A sum that ends in the code. */
template <int mode> QAD_INLINE F rounding_sum(F scaled, U random) {
    if (mode == QAD_NOISE_STOCHASTIC) return add_down(move<mode>(scaled, random), set(rounding_magic));
    return add(scaled, set(rounding_magic));
}

template <int dtype, int mode> QAD_CALLED void look_up_chunks(const Step &step, const LookUp<dtype> &look_up) {
    typedef Elements<dtype> E;
    const typename E::Stored *values = (const typename E::Stored *)step.batch.weights;
    typename E::Stored *out = (typename E::Stored *)step.to;
    const Scales &scales = step.batch.scales;
    const uint16_t *random = step.random;
    const char *next = step.weights_ahead;
    const bool past = step.past;
    const LookUp<dtype> tables = look_up;
    for (const Chunk *c = step.list, *end = c + step.chunks; c != end; ++c) {
        const int first = c->first, b = c->block;
        const typename LookUp<dtype>::Table table = tables.table_of(set(scales.scale[b]));
        ask<typename E::Stored>(next, first, false);
        const Pair scaled = E::load_pair(values + first).times(set(scales.inverse[b]));
        const WordPair bits = random_pair_for<dtype, mode>(random);
        tables.store_pair(out + first, table, rounding_sum<mode>(scaled.first, bits.first),
                          rounding_sum<mode>(scaled.second, bits.second), past);
        if (draws_elements(mode)) random += chunk;
    }
}
#endif

/* Whether a gradient passes: the weight is at most half a step beyond the last code. */
struct Inside {
    F first, last;
    explicit Inside(const qad_grid &grid)
        : first(set((float)grid.code_min - 0.5f)), last(set((float)grid.code_max + 0.5f)) {}
    M operator()(F scaled) const { return both(less_equal(first, scaled), less_equal(scaled, last)); }
};

template <int dtype>
void mask_batch(const Batch &batch, void *to, const qad_grid &grid, const char *weights_ahead, const char *out_ahead) {
    typedef Elements<dtype> E;
    const Inside inside(grid);
    const typename E::Stored *values = (const typename E::Stored *)batch.weights;
    typename E::Stored *grad = (typename E::Stored *)to;
    const int more = chunks_per_block_log2(grid), chunks = batch.count / chunk;
    for (int c = 0; c < chunks; ++c) {
        const F inverse = set(batch.scales.inverse[c >> more]);
        ask<typename E::Stored>(weights_ahead, c * chunk, false);
        if (out_ahead) ask<typename E::Stored>(out_ahead, c * chunk, true);
#pragma GCC unroll 4
        for (int i = c * chunk; i < (c + 1) * chunk; i += pair) {
            const Pair scaled = E::load_pair(values + i).times(inverse);
            E::keep_pair_if(grad + i, inside(scaled.first), inside(scaled.second));
        }
    }
}

template <int mode> void learn_chunks(const Step &step, const qad_grid &grid, float *grad_scales) {
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    const Inside inside(grid);
    const uint16_t *random = step.random;
    const int per_block = grid.block / chunk;
    for (int k = 0; k < step.chunks; k += per_block) {
        const int first = step.list[k].first, b = step.list[k].block;
        const F inverse = set(step.batch.scales.inverse[b]);
        const float *values = (const float *)step.batch.weights + first;
        float *grad = (float *)step.to + first;
        F products[128 / width];
        int count = per_block * (chunk / width);
        for (int i = 0; i < count; ++i) {
            const F scaled = mul(load(values), inverse), slope = load(grad);
            const M passes = inside(scaled);
            const U bits = draws_elements(mode) ? widen(random) : set_words(0);
            const F code = clamp(code_of<mode>(scaled, bits), low, high);
            products[i] = mul(sub(code, keep_if(passes, scaled)), slope);
            store(grad, keep_if(passes, slope));
            values += width;
            grad += width;
            if (draws_elements(mode)) random += width;
        }
        for (int i = 0; i < grid.block; i += chunk) {
            ask<float>(step.weights_ahead, first + i, false);
            if (step.out_ahead) ask<float>(step.out_ahead, first + i, true);
        }
        for (; count > 1; count /= 2)
            for (int i = 0; i < count / 2; ++i) products[i] = add(products[i], products[i + count / 2]);
        grad_scales[b] = fold(products[0]);
    }
}

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

/* Chunks for which random numbers are drawn at a time; of fp32 fewer, because the lines that are written are asked for
 * at the same time, and only so many can be on their way. */
template <int dtype> constexpr int group_of() { return dtype == QAD_F32 ? 8 : 16; }

/* A job, and what it takes to walk over its batches. */
template <int dtype> struct Walk {
    typedef typename Elements<dtype>::Stored Stored;

    const qad_fake_quantize_job &job;
    const Mode mode;
    const Random elements, hardness;
    const int per_batch;
    bool asks_early = false; /* for what a batch writes, while the next one's keys are found */
    Batch batches[2];        /* this one and the next */
    Chunks all;              /* of a batch that need not be parted */
    uint16_t hardness_bits[most_drawn];

    QAD_CALLED_MEMBER explicit Walk(const qad_fake_quantize_job &of)
        : job(of), mode(of.noise),
          elements(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_ELEMENT),
          hardness(of.noise.seed_low, of.noise.seed_high, of.noise.tensor, of.noise.step, QAD_STREAM_BLOCK),
          per_batch(batch_of<dtype>() / of.grid.block) {
        for (int c = 0; c < most_chunks; ++c) {
            all.list[c] = {(uint16_t)(c * chunk), (uint16_t)(c >> chunks_per_block_log2(of.grid))};
            all.products[c] = product_of_call((uint64_t)c * calls_per_chunk);
        }
    }

    /* Part the chunks of a batch into those with noise and those without. */
    QAD_CALLED_MEMBER void choose(Batch &batch, int64_t begin) {
        const int drawn = (int)((batch.block - begin) % most_drawn), more = chunks_per_block_log2(job.grid);
        if (drawn == 0)
            fill_random(hardness_bits, (uint64_t)batch.block / 8, all.products, most_drawn / chunk, hardness);
        const uint16_t *bits = hardness_bits + drawn;
        uint16_t spread[most_chunks];
        const int chunks = batch.count / chunk;
        if (more) {
            for (int c = 0; c < chunks; ++c) spread[c] = bits[c >> more];
            bits = spread;
        }
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
        const char *now = asks_early && block > begin
                              ? (const char *)job.out + (batch.element - batch_of<dtype>()) * (int)sizeof(Stored)
                              : nullptr;
        find_scales_of<dtype>((const Stored *)batch.weights, job.scales ? job.scales + block : nullptr, batch.blocks,
                              job.grid, now, batch.scales);
        if (mode.hard_below) choose(batch, begin);
    }

    /* Call hard and soft for the chunks of a batch, soft for a group at a time. */
    template <typename Hard, typename Soft>
    void treat(const Batch &batch, void *to, bool past, Hard hard, Soft soft) {
        constexpr int group = group_of<dtype>();
        alignas(64) uint16_t random[group * chunk];
        const char *in = weights_ahead<dtype>(job, batch.element), *out = out_ahead<dtype>(job, batch.element);
        all.count = batch.count / chunk;
        const Chunks &without = mode.hard_below ? batch.hard : all, &with = mode.hard_below ? batch.soft : all;
        if (mode.hard_below || mode.mode == QAD_NOISE_NONE)
            hard(Step{batch, without.list, without.count, random, to, past, in, out});
        if (mode.mode == QAD_NOISE_NONE) return;
        for (int k = 0; k < with.count; k += group) {
            const int chunks = with.count - k < group ? with.count - k : group;
            if (draws_elements(mode.mode)) {
                /* While random numbers keep the arithmetic busy, the memory can fetch what will be written. In 16 bits
                 * that is too little to matter. */
                if (dtype == QAD_F32 && !past)
                    for (int c = 0; c < chunks; ++c) ask<Stored>((const char *)to, with.list[k + c].first, true);
                fill_random(random, (uint64_t)batch.element / 8, with.products + k, chunks, elements);
            }
            soft(Step{batch, with.list + k, chunks, random, to, past, in, out});
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

template <int dtype> void (*forward_for(int mode))(const Step &) {
    switch (mode) {
    case QAD_NOISE_UNIFORM:
        return forward_chunks<dtype, QAD_NOISE_UNIFORM>;
    case QAD_NOISE_STOCHASTIC:
        return forward_chunks<dtype, QAD_NOISE_STOCHASTIC>;
    case QAD_NOISE_PARTIAL:
        return forward_chunks<dtype, QAD_NOISE_PARTIAL>;
    default:
        return forward_chunks<dtype, QAD_NOISE_NONE>;
    }
}

template <int dtype> int64_t forward(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<dtype> walk(job);
    const auto hard = forward_for<dtype>(QAD_NOISE_NONE), soft = forward_for<dtype>(walk.mode.mode);
    const int size = size_of(job.out_dtype), block = job.grid.block;
    const bool converts = job.out_dtype != dtype;
    /* Past the caches, no line is read only to be overwritten: a third less to move. */
    const bool past =
        can_stream && job.streams && ((uintptr_t)job.out + (uintptr_t)(begin * block * size)) % (4 * width) == 0;
    alignas(64) float computed[QAD_BATCH];
    alignas(64) uint16_t converted[QAD_BATCH];
#ifdef QAD_HAS_LOOK_UP
    const LookUp<dtype> look_up(job.grid);
    const bool small = job.grid.code_min >= -table_size / 4 && job.grid.code_max < table_size / 4;
#else
    const bool small = false;
#endif
    /* Out of a cache, and where codes take little time. Of fp32 and fp16 it took longer. */
    walk.asks_early = dtype == QAD_BF16 && !job.streams && (walk.mode.hard_below || walk.mode.mode == QAD_NOISE_NONE);
    const int64_t damaged = walk(begin, end, [&](Batch &batch) {
        char *out = (char *)job.out + batch.element * size;
        void *to = converts ? (void *)computed : out;
        const bool looks_up = small && batch.scales.in_range;
        if (!looks_up || walk.mode.mode == QAD_NOISE_UNIFORM || walk.mode.mode == QAD_NOISE_PARTIAL)
            find_ends<dtype>(batch.scales, batch.blocks, job.grid);
        walk.treat(
            batch, to, past && !converts,
            [&](const Step &step) {
#ifdef QAD_HAS_LOOK_UP
                if (looks_up) return look_up_chunks<dtype, QAD_NOISE_NONE>(step, look_up);
#endif
                hard(step);
            },
            [&](const Step &step) {
#ifdef QAD_HAS_LOOK_UP
                if (looks_up && walk.mode.mode == QAD_NOISE_STOCHASTIC)
                    return look_up_chunks<dtype, QAD_NOISE_STOCHASTIC>(step, look_up);
#endif
                soft(step);
            });
        if (batch.scales.damaged_count) {
            if (past) end_of_stream();
            fill_damaged<dtype>(to, batch, block, true);
        }
        if (converts) store_elements(past ? (void *)converted : out, job.out_dtype, 0, batch.count, computed);
        if (past && converts) stream_out(out, converted, batch.count * size);
        if (job.used_scales) memcpy(job.used_scales + batch.block, batch.scales.scale, (size_t)batch.blocks * 4);
    });
    if (past) end_of_stream();
    return damaged;
}

int64_t fake_quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (job->weights_dtype != job->out_dtype || job->out_dtype == QAD_F32) return forward<QAD_F32>(*job, begin, end);
    return job->out_dtype == QAD_BF16 ? forward<QAD_BF16>(*job, begin, end) : forward<QAD_F16>(*job, begin, end);
}

void (*learn_for(int mode))(const Step &, const qad_grid &, float *) {
    switch (mode) {
    case QAD_NOISE_UNIFORM:
        return learn_chunks<QAD_NOISE_UNIFORM>;
    case QAD_NOISE_STOCHASTIC:
        return learn_chunks<QAD_NOISE_STOCHASTIC>;
    case QAD_NOISE_PARTIAL:
        return learn_chunks<QAD_NOISE_PARTIAL>;
    default:
        return learn_chunks<QAD_NOISE_NONE>;
    }
}

/* Backward with gradients by the scales: sums want fp32, and its elements in order. */
int64_t learn(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<QAD_F32> walk(job);
    const auto hard = learn_for(QAD_NOISE_NONE), soft = learn_for(walk.mode.mode);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        float *grad = (float *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged);
        float *slopes = job.grad_scales + batch.block;
        walk.treat(
            batch, grad, false,
            [&](const Step &step) { hard(step, job.grid, slopes); },
            [&](const Step &step) { soft(step, job.grid, slopes); });
        if (batch.scales.damaged_count) {
            fill_damaged<QAD_F32>(grad, batch, job.grid.block, false);
            for (int i = 0; i < batch.blocks; ++i)
                if (batch.scales.damaged[i]) slopes[i] = 0.0f;
        }
        if (job.out_dtype != QAD_F32) store_elements(job.out, job.out_dtype, batch.element, batch.count, grad);
    });
}

template <int dtype> int64_t mask(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<dtype> walk(job);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        void *grad = dtype == QAD_F32
                         ? (void *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged)
                         : (void *)((typename Elements<dtype>::Stored *)job.out + batch.element);
        mask_batch<dtype>(batch, grad, job.grid, weights_ahead<dtype>(job, batch.element),
                          out_ahead<dtype>(job, batch.element));
        if (batch.scales.damaged_count) fill_damaged<dtype>(grad, batch, job.grid.block, false);
        if (dtype != job.out_dtype) store_elements(job.out, job.out_dtype, batch.element, batch.count, (float *)grad);
    });
}

int64_t backward(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (job->grad_scales) return learn(*job, begin, end);
    if (job->weights_dtype != job->out_dtype || job->out_dtype == QAD_F32) return mask<QAD_F32>(*job, begin, end);
    return job->out_dtype == QAD_BF16 ? mask<QAD_BF16>(*job, begin, end) : mask<QAD_F16>(*job, begin, end);
}

int64_t quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const int per_batch = batch_of<QAD_F32>() / grid.block;
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    alignas(64) float in_buffer[QAD_BATCH];
    uint16_t halves[most_blocks + width];
    Scales scales;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        int8_t *codes = job->codes + first;
        find_scales_of<QAD_F32>(values, job->scales ? job->scales + b : nullptr, blocks, grid, nullptr,
                               scales);
        for (int i = 0; i < blocks; i += width) store_half(halves + i, load(scales.scale + i));
        for (int i = 0; i < blocks; ++i) {
            const F inverse = set(scales.inverse[i]);
            if (scales.damaged_count && scales.damaged[i]) {
                halves[i] = 0x7e00;
                memset(codes + i * grid.block, 0, (size_t)grid.block);
                continue;
            }
            for (int j = i * grid.block; j < (i + 1) * grid.block; j += width) {
                const F scaled = mul(load(values + j), inverse);
                store_codes(codes + j, clamp(code_of<QAD_NOISE_NONE>(scaled, set_words(0)), low, high));
            }
        }
        memcpy(job->half_scales + b, halves, (size_t)blocks * 2);
        damaged += scales.damaged_count;
    }
    return damaged;
}

int64_t dequantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const int block = job->grid.block, per_batch = batch_of<QAD_F32>() / block;
    alignas(64) float out_buffer[QAD_BATCH];
    float scales[most_blocks + width];
    uint16_t halves[most_blocks + width] = {0};
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * block;
        const int64_t first = b * block;
        float *out = job->out_dtype == QAD_F32 ? (float *)job->out + first : out_buffer;
        memcpy(halves, job->stored_scales + b, (size_t)blocks * 2);
        for (int i = 0; i < blocks; i += width) {
            const F scale = load_half(halves + i);
            store(scales + i, choose(less_equal(scale, scale), scale, float_of(set_words(quiet_nan))));
        }
        const int8_t *codes = job->codes + first;
        for (int i = 0; i < blocks; ++i) {
            const F scale = set(scales[i]);
            for (int j = i * block; j < (i + 1) * block; j += width) store(out + j, mul(load_codes(codes + j), scale));
        }
        if (job->out_dtype != QAD_F32) store_elements(job->out, job->out_dtype, first, count, out);
    }
    return 0;
}

void uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
               uint32_t stream) {
    const Random random(seed_low, seed_high, tensor, step, stream);
    constexpr int group = group_of<QAD_F32>();
    alignas(64) uint16_t bits[group * chunk];
    uint64_t products[group];
    for (int i = 0; i < group; ++i) products[i] = product_of_call((uint64_t)i * calls_per_chunk);
    for (int64_t first = 0; first < count; first += group * chunk) {
        fill_random(bits, (uint64_t)first / 8, products, group, random);
        for (int i = 0; i < group * chunk && first + i < count; ++i)
            out[first + i] = ((float)bits[i] + 0.5f) * 0x1p-16f;
    }
}

} // namespace
#endif
