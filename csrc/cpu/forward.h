/* Fake quantization of a range of blocks.
 *
 * Weights and outputs of one dtype are worked on as they are. Of two, weights that are not fp32 are staged as that, and
 * outputs are stored as they are found.
 */
#ifndef QAD_FORWARD_H
#define QAD_FORWARD_H

#include "look_up.h"
#include "rounding.h"
#include "walk.h"

namespace {

/* Whether chunks draw their random bits as they are treated. Each function that does takes a tenth of a second to compile:
 * those do that gain most. (Stochastic rounding would gain 6 % in fp32 and 3 in bf16; uniform noise in fp16 2 % out of
 * a cache, and lose 12 out of memory.) */
template <int out> constexpr bool draws_itself(int mode) {
    return can_draw && mode == QAD_NOISE_UNIFORM && out != QAD_F16;
}

template <int out> constexpr Randomness randomness_of(int mode) {
    return !draws_elements(mode) ? not_random : draws_itself<out>(mode) ? drawn_random : given_random;
}

template <int in, int out, int mode> void forward_chunks(const Step &step) {
    typedef typename Inputs<in, out, mode>::Type From;
    typedef typename Outputs<in, out, mode>::Type To;
    const typename From::Stored *values = (const typename From::Stored *)step.batch.weights;
    typename To::Stored *to = (typename To::Stored *)step.to;
    const Scales &scales = step.batch.scales;
    const bool past = step.past;
    const auto one = [&](const Chunk &c, const uint16_t *random, auto ask_ahead) QAD_INLINED {
        const int first = c.first, b = c.block;
        const Ends ends = {set_words(scales.low[b]), set_words(scales.high[b])};
        ask_ahead();
#pragma GCC unroll 4
        for (int i = 0; i < chunk; i += pair) {
            const Pair loaded = From::load_pair(values + first + i);
            Pair unclamped;
            if constexpr (mode == QAD_NOISE_UNIFORM) {
                unclamped = move_by<From>(loaded, random + i, set(scales.noise_step[b]));
            } else {
                const Pair moved = move<From, mode>(loaded.times(set(scales.inverse[b])),
                                                    draws_elements(mode) ? random + i : nullptr);
                const Pair codes = {code_of<mode>(moved.first), code_of<mode>(moved.second)};
                unclamped = codes.times(set(scales.scale[b]));
            }
            To::store_pair(to + first + i, unclamped, ends, past);
        }
    };
    each_chunk<in, typename To::Stored, randomness_of<out>(mode)>(step, one);
}

#ifdef QAD_HAS_LOOK_UP
/* A sum that ends in the code. */
template <int mode> QAD_INLINE F rounding_sum(F moved) {
    return mode == QAD_NOISE_STOCHASTIC ? add_down(moved, set(rounding_magic)) : add(moved, set(rounding_magic));
}

template <int in, int out, int mode, typename Tables>
QAD_CALLED void look_up_chunks(const Step &step, const Tables &look_up) {
    typedef Elements<in> From;
    typedef typename Outputs<in, out, mode>::Type To;
    const typename From::Stored *values = (const typename From::Stored *)step.batch.weights;
    typename To::Stored *to = (typename To::Stored *)step.to;
    const Scales &scales = step.batch.scales;
    const bool past = step.past;
    const Tables tables = look_up;
    const auto one = [&](const Chunk &c, const uint16_t *random, auto ask_ahead) QAD_INLINED {
        const int first = c.first, b = c.block;
        const typename Tables::Table table = tables.table_of(set(scales.scale[b]));
        ask_ahead();
        const Pair moved = move<From, mode>(From::load_pair(values + first).times(set(scales.inverse[b])), random);
        tables.store_pair(to + first, table, rounding_sum<mode>(moved.first), rounding_sum<mode>(moved.second), past);
    };
    each_chunk<in, typename To::Stored, randomness_of<out>(mode)>(step, one);
}
#endif

template <int in, int out> void (*forward_for(int mode))(const Step &) {
    switch (mode) {
    case QAD_NOISE_UNIFORM:
        return forward_chunks<in, out, QAD_NOISE_UNIFORM>;
    case QAD_NOISE_STOCHASTIC:
        return forward_chunks<in, out, QAD_NOISE_STOCHASTIC>;
    case QAD_NOISE_PARTIAL:
        return forward_chunks<in, out, QAD_NOISE_PARTIAL>;
    default:
        return forward_chunks<in, out, QAD_NOISE_NONE>;
    }
}

template <int in, int out> int64_t forward(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    typedef typename Outputs<in, out, QAD_NOISE_NONE>::Type To;
    typedef typename To::Stored Target;
    /* Small batches where codes take little time: all lines of one, asked for early, can then be on their way at once. Where
     * more are asked for at a time they should be large: on a Zen 4, out of memory, bf16 151 -> 135 ps an element, fp16
     * 191 -> 168. */
    const bool small_batches = Mode(job.noise).mode == QAD_NOISE_NONE && !job.scales && !job.many_lines;
    Walk<in> walk(job, small_batches ? QAD_BATCH / 2 : batch_of<in>());
    const auto hard = forward_for<in, out>(QAD_NOISE_NONE), soft = forward_for<in, out>(walk.mode.mode);
    const int block = job.grid.block;
    Target *const all = (Target *)job.out;
    /* Past the caches, no line is read only to be overwritten: a third less to move. */
    const bool past = can_stream && job.streams && (uintptr_t)(all + begin * block) % (4 * width) == 0;
#ifdef QAD_HAS_LOOK_UP
    const LookUp<To> look_up(job.grid);
    const HalfTables<QAD_F16, false> rounded(job.grid);
    const bool small = job.grid.code_min >= -table_size / 4 && job.grid.code_max < table_size / 4;
#else
    const bool small = false;
#endif
    /* Out of a cache, and where codes take little time. Of fp32 it took longer: 248 ps an element instead of 238. */
    static_assert(in == QAD_F32 || in == out, "what is asked for early is of the weights' dtype");
    walk.asks_early = in != QAD_F32 && !job.streams && (walk.mode.hard_below || walk.mode.mode == QAD_NOISE_NONE);
    const int64_t damaged = walk(begin, end, [&](Batch &batch) {
        Target *to = all + batch.element;
        const bool looks_up = small && batch.scales.in_range;
        if (!looks_up || walk.mode.mode == QAD_NOISE_UNIFORM || walk.mode.mode == QAD_NOISE_PARTIAL)
            find_ends<out>(batch.scales, batch.blocks, job.grid);
        if (walk.mode.mode == QAD_NOISE_UNIFORM) find_noise_steps(batch.scales, batch.blocks);
        walk.template treat<Target>(
            batch, to, past, draws_itself<out>(walk.mode.mode),
            [&](const Step &step) {
#ifdef QAD_HAS_LOOK_UP
                if constexpr (out == QAD_F16)
                    if (looks_up && job.rounds_tables) return look_up_chunks<in, out, QAD_NOISE_NONE>(step, rounded);
                if (looks_up) return look_up_chunks<in, out, QAD_NOISE_NONE>(step, look_up);
#endif
                hard(step);
            },
            [&](const Step &step) {
#ifdef QAD_HAS_LOOK_UP
                if (looks_up && walk.mode.mode == QAD_NOISE_STOCHASTIC)
                    return look_up_chunks<in, out, QAD_NOISE_STOCHASTIC>(step, look_up);
#endif
                soft(step);
            });
        if (batch.scales.damaged_count) {
            if (past) end_of_stream();
            fill_damaged<out>(to, batch, block, true);
        }
    });
    if (past) end_of_stream();
    return damaged;
}

} // namespace
#endif
