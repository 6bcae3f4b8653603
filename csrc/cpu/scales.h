/* The scales of a batch's blocks, found from their largest elements or given, and what follows from them.
 *
 * A block is found by its key, the largest that any of its elements has; keys order like magnitudes and keep the sign.
 */
#ifndef QAD_SCALES_H
#define QAD_SCALES_H

#include "../numerics.h"
#include "elements.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int most_blocks = QAD_BATCH / 32;

/* Elements that are worked on at a time, at most. */
template <int dtype> constexpr int batch_of() { return dtype == QAD_F32 ? QAD_BATCH / 2 : QAD_BATCH; }
constexpr uint32_t quiet_nan = 0x7fc00000u;

enum Purpose { to_read, to_read_later, to_write, to_write_later };

/* Ask for memory that will be wanted, a chunk at a time while something else is computed: stages that only compute
 * would else leave the memory idle. To ask for what lies beyond the end is harmless, and so is to ask for too much,
 * where memory holds another dtype than is worked on. */
template <typename Stored> QAD_INLINE void ask(const char *p, int first, Purpose purpose) {
    p += first * (int)sizeof(Stored);
    for (int i = 0; i < chunk * (int)sizeof(Stored); i += 64) {
        if (purpose == to_read)
            __builtin_prefetch(p + i, 0, 3);
        else if (purpose == to_read_later)
            __builtin_prefetch(p + i, 0, 2);
        else if (purpose == to_write)
            __builtin_prefetch(p + i, 1, 3);
        else
            __builtin_prefetch(p + i, 1, 2);
    }
}

template <int dtype>
QAD_INLINE U largest_keys(const typename Elements<dtype>::Stored *values, int count) {
    typedef Elements<dtype> E;
    constexpr int step = 4 * width / (int)sizeof(typename E::Stored);
    U keys = E::keys_at(values);
    for (int i = step; i < count; i += step) keys = E::max_keys(keys, E::keys_at(values + i));
    return keys;
}

template <int dtype>
QAD_INLINE void find_largest(const typename Elements<dtype>::Stored *values, int blocks, int block, const char *asked,
                             typename Elements<dtype>::Key *keys) {
    typedef Elements<dtype> E;
    constexpr int side_by_side = E::per_part * E::parts;
    /* More lines than there are buffers for would have to wait for one another on their way to the first level. */
    const Purpose purpose = blocks * block > QAD_BATCH / 2 ? to_write_later : to_write;
    int b = 0;
    for (; b + side_by_side <= blocks; b += side_by_side) {
        U partial[E::parts];
        if (asked)
            for (int i = 0; i < side_by_side * block; i += chunk)
                ask<typename E::Stored>(asked, b * block + i, purpose);
        const typename E::Stored *of = values + b * block;
#pragma GCC unroll 4
        for (int k = 0; k < E::parts; ++k) {
            U largest[E::per_part];
#pragma GCC unroll 8
            for (int i = 0; i < E::per_part; ++i) largest[i] = largest_keys<dtype>(of + i * block, block);
            partial[k] = E::partial_max_keys(largest);
            of += E::per_part * block;
        }
        E::store_max_keys(keys + b, partial);
    }
    for (; b < blocks; ++b) keys[b] = E::max_key(largest_keys<dtype>(values + b * block, block));
}

/* The key of each block, padded with zeros to whole vectors. What will be written is `asked` for meanwhile, unless null. */
template <int dtype>
QAD_CALLED void find_keys(const typename Elements<dtype>::Stored *values, int blocks, int block, const char *asked,
                          typename Elements<dtype>::Key *keys) {
    if (block == 32) /* the most common, as a constant */
        find_largest<dtype>(values, blocks, 32, asked, keys);
    else
        find_largest<dtype>(values, blocks, block, asked, keys);
    for (int b = blocks; b % width; ++b) keys[b] = 0;
}

template <int dtype> QAD_INLINE bool all_finite(const typename Elements<dtype>::Stored *values, int count) {
    typedef Elements<dtype> E;
    U keys = set_words(0);
    for (int i = 0; i < count; i += 4 * width / (int)sizeof(typename E::Stored))
        keys = E::max_keys(keys, E::signless_keys_at(values + i));
    return E::max_key(keys) < E::not_finite;
}

/* The scales of a batch, and which of its blocks are damaged. Arrays of numbers are padded to whole vectors. */
struct alignas(64) Scales {
    float scale[most_blocks + width], inverse[most_blocks + width];
    uint32_t low[most_blocks + width], high[most_blocks + width]; /* see Ends */
    float noise_step[most_blocks + width]; /* see find_noise_steps */
    bool damaged[most_blocks];
    int damaged_count;
    bool in_range; /* absmax scales, none of them cut off: no element lies far beyond the last codes */

    /* Store the scales of a vector of blocks, also to `used` unless that is null. */
    QAD_MEMBER void put(int b, F value, float *used, int blocks) {
        store(scale + b, value);
        store(inverse + b, div(set(1.0f), value));
        if (!used) return;
        if (b + width <= blocks)
            store(used + b, value);
        else
            memcpy(used + b, scale + b, (size_t)(blocks - b) * 4);
    }
};

/* How a grid makes scales of magnitudes. */
struct alignas(64) ScaleRule {
    U kept, almost_half;
    F end, floor, ceiling;
    int drop;
    bool has_sign, multiplies;
    /* At this magnitude or beyond it, a scale may be cut off: half of what the ceiling allows, to be on the safe side
     * of rounding; or infinity, where that overflows. */
    uint32_t far_bits;

    QAD_CALLED_MEMBER explicit ScaleRule(const qad_grid &grid)
        : floor(set(grid.scale_floor)), ceiling(set(grid.scale_ceiling)), drop(24 - grid.scale_bits),
          has_sign(grid.signed_scale != 0) {
        const float last = (float)(has_sign ? -grid.code_min : grid.code_max), far = 0.5f * grid.scale_ceiling * last;
        kept = set_words(~0u << drop);
        almost_half = set_words((1u << (drop - 1)) - 1u);
        /* Where a product is the quotient, which is faster. */
        multiplies = last == 8.0f || last == 128.0f;
        end = set(multiplies ? 1.0f / last : last);
        memcpy(&far_bits, &far, 4);
    }

    QAD_MEMBER F unrounded(F extreme) const { return multiplies ? mul(extreme, end) : div(extreme, end); }
    /* What the grid can store; a NaN comes out as anything. */
    QAD_MEMBER F round(F magnitude) const {
        const U bits = bits_of(magnitude), odd = bit_and(shift_right(bits, drop), set_words(1));
        /* The lowest bit decides nothing but whether a tie is one: set, it makes the tie round up. */
        const U rounded = bit_and(add_words(bit_or(bits, odd), almost_half), kept);
        return min_of(ceiling, max_of(floor, float_of(rounded)));
    }
};

QAD_INLINE F with_sign_if(M m, F magnitude, U sign) {
    return float_of(bit_or(bits_of(magnitude), bits_of(keep_if(m, float_of(sign)))));
}

/* From the blocks' keys. */
template <int dtype>
QAD_CALLED void find_scales(const typename Elements<dtype>::Key *keys, float *used, int blocks, const ScaleRule &shared,
                            Scales &out) {
    typedef Elements<dtype> E;
    const ScaleRule rule = shared;
    const F zero = set(0.0f);
    U largest = set_words(0);
    for (int b = 0; b < blocks; b += width) {
        const F extreme = E::magnitudes_at(keys + b);
        largest = max_words(largest, bits_of(extreme));
        const F exact = rule.unrounded(extreme);
        F scale = rule.round(exact);
        /* The largest element becomes the first code, which is negative. */
        if (rule.has_sign) scale = with_sign_if(less(zero, exact), scale, E::pluses_at(keys + b));
        out.put(b, scale, used, blocks);
    }
    const uint32_t largest_bits = reduce_max(largest);
    out.in_range = largest_bits < rule.far_bits;
    out.damaged_count = 0;
    if (largest_bits < 0x7f800000u) return;
    for (int b = 0; b < blocks; ++b) {
        out.damaged[b] = keys[b] >= E::not_finite;
        if (out.damaged[b] && used) memcpy(used + b, &quiet_nan, 4);
        out.damaged_count += out.damaged[b];
    }
}

/* From scales that are given, which are rounded, and from the blocks' keys, unless all of these are finite. */
template <int dtype>
QAD_CALLED void round_given(const float *given, const typename Elements<dtype>::Key *keys, float *used, int blocks,
                            const ScaleRule &rule, Scales &out) {
    float padded[most_blocks + width];
    memcpy(padded, given, (size_t)blocks * 4);
    for (int b = blocks; b % width; ++b) padded[b] = 1.0f;
    U largest = set_words(0);
    for (int b = 0; b < blocks; b += width) {
        const F value = load(padded + b), magnitude = float_of(bit_and(bits_of(value), set_words(0x7fffffffu)));
        largest = max_words(largest, bits_of(magnitude));
        F scale = rule.round(magnitude);
        if (rule.has_sign) scale = with_sign_if(less(value, set(0.0f)), scale, set_words(0x80000000u));
        out.put(b, scale, used, blocks);
    }
    out.in_range = false;
    out.damaged_count = 0;
    if (!keys && reduce_max(largest) <= 0x7f800000u) return;
    for (int b = 0; b < blocks; ++b) {
        const bool number = padded[b] == padded[b];
        if (!number && used) memcpy(used + b, &quiet_nan, 4);
        out.damaged[b] = !number || (keys && keys[b] >= Elements<dtype>::not_finite);
        out.damaged_count += out.damaged[b];
    }
}

/* `used` receives the scales, if it is not null; it may be where they are given. */
template <int dtype>
QAD_CALLED void find_scales_of(const typename Elements<dtype>::Stored *values, const float *given, float *used, int blocks,
                               int block, const ScaleRule &rule, const char *asked, Scales &out) {
    typename Elements<dtype>::Key keys[most_blocks + width];
    const bool look = !given || !all_finite<dtype>(values, blocks * block);
    if (look) find_keys<dtype>(values, blocks, block, asked, keys);
    if (given)
        round_given<dtype>(given, look ? keys : nullptr, used, blocks, rule, out);
    else
        find_scales<dtype>(keys, used, blocks, rule, out);
}

/* What an element of each block may become, at least and at most. */
template <int dtype> QAD_CALLED void find_ends(Scales &scales, int blocks, const qad_grid &grid) {
    const F first = set((float)grid.code_min), last = set((float)grid.code_max);
    for (int b = 0; b < blocks; b += width) {
        const F scale = load(scales.scale + b), one = mul(first, scale), other = mul(last, scale);
        store_words(scales.low + b, Elements<dtype>::end_from(min_of(one, other)));
        store_words(scales.high + b, Elements<dtype>::end_from(max_of(one, other)));
    }
}

/* By how much a word of uniform noise moves elements: a scale cut to 8 significand bits, whose product with 16 random bits
 * is exact, over 2^32. */
QAD_CALLED void find_noise_steps(Scales &scales, int blocks) {
    for (int b = 0; b < blocks; b += width) {
        const F cut = float_of(bit_and(bits_of(load(scales.scale + b)), set_words(0xffff0000u)));
        store(scales.noise_step + b, mul(cut, set(0x1p-32f)));
    }
}

} // namespace
#endif
