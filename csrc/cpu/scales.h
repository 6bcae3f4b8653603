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

/* Elements that are worked on at a time. */
template <int dtype> constexpr int batch_of() { return dtype == QAD_F32 ? QAD_BATCH / 2 : QAD_BATCH; }
constexpr uint32_t quiet_nan = 0x7fc00000u;

/* Ask for memory that will be wanted, a chunk at a time while something else is computed: stages that only compute
 * would else leave the memory idle. To ask for what lies beyond the end is harmless, and so is to ask for too much,
 * where memory holds another dtype than is worked on. */
template <typename Stored> QAD_INLINE void ask(const char *p, int first, bool to_write) {
    p += first * (int)sizeof(Stored);
    for (int i = 0; i < chunk * (int)sizeof(Stored); i += 64) {
        if (to_write)
            __builtin_prefetch(p + i, 1, 2);
        else
            __builtin_prefetch(p + i, 0, 3);
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
QAD_INLINE void find_largest(const typename Elements<dtype>::Stored *values, int blocks, int block, const char *to_write,
                             typename Elements<dtype>::Key *keys) {
    typedef Elements<dtype> E;
    constexpr int side_by_side = E::per_part * E::parts;
    int b = 0;
    for (; b + side_by_side <= blocks; b += side_by_side) {
        U partial[E::parts];
        if (to_write)
            for (int i = 0; i < side_by_side * block; i += chunk)
                ask<typename E::Stored>(to_write, b * block + i, true);
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

/* The key of each block, padded with zeros to whole vectors, which make no scale large. What will be written meanwhile
 * is asked for; or null. */
template <int dtype>
QAD_CALLED void find_keys(const typename Elements<dtype>::Stored *values, int blocks, int block, const char *to_write,
                          uint32_t *keys) {
    typedef typename Elements<dtype>::Key Key;
    Key narrow[most_blocks + width], *largest = narrow;
    if constexpr (sizeof(Key) == 4) largest = keys;
    if (block == 32) /* the most common, as a constant */
        find_largest<dtype>(values, blocks, 32, to_write, largest);
    else
        find_largest<dtype>(values, blocks, block, to_write, largest);
    for (int b = blocks; b % width; ++b) largest[b] = 0;
    if constexpr (sizeof(Key) != 4)
        for (int b = 0; b < blocks; b += width) store_words(keys + b, Elements<dtype>::widen_keys(largest + b));
}

template <int dtype> QAD_INLINE bool all_finite(const typename Elements<dtype>::Stored *values, int count) {
    return Elements<dtype>::max_key(largest_keys<dtype>(values, count)) < Elements<dtype>::not_finite;
}

/* The scales of a batch, and which of its blocks are damaged. Arrays are padded to whole vectors. */
struct alignas(64) Scales {
    float scale[most_blocks + width], inverse[most_blocks + width];
    uint32_t low[most_blocks + width], high[most_blocks + width]; /* see Ends */
    bool damaged[most_blocks];
    int damaged_count;
    bool in_range; /* absmax scales, none of them cut off: no element lies far beyond the last codes */
};

/* What grids can store; a NaN comes out as anything. */
QAD_INLINE F round_scales(F value, const qad_grid &grid) {
    const int drop = 24 - grid.scale_bits;
    const U bits = bit_and(bits_of(value), set_words(0x7fffffffu));
    const U odd = bit_and(shift_right(bits, drop), set_words(1));
    const U carried = add_words(bits, add_words(odd, set_words((1u << (drop - 1)) - 1u)));
    F magnitude = float_of(shift_left(shift_right(carried, drop), drop));
    magnitude = min_of(set(grid.scale_ceiling), max_of(set(grid.scale_floor), magnitude));
    if (grid.signed_scale) {
        const F sign = keep_if(less(value, set(0.0f)), float_of(set_words(0x80000000u)));
        magnitude = float_of(bit_or(bits_of(magnitude), bits_of(sign)));
    }
    return magnitude;
}

/* From the scales that are given or, if they are null, from the blocks' keys, which may be null if all is finite. */
QAD_CALLED void find_scales(const uint32_t *keys, const float *given, int blocks, const qad_grid &grid, Scales &out) {
    float padded[most_blocks + width];
    if (given) {
        memcpy(padded, given, (size_t)blocks * 4);
        for (int b = blocks; b % width; ++b) padded[b] = 1.0f;
    }
    const float end = (float)(grid.signed_scale ? grid.code_min : grid.code_max);
    /* Where a product is the quotient, which is faster. */
    const float factor = end == -8.0f ? -0x1p-3f : end == -128.0f ? -0x1p-7f : 0.0f;
    const F zero = set(0.0f), nan = float_of(set_words(quiet_nan));
    U largest = set_words(0);
    for (int b = 0; b < blocks; b += width) {
        F scale;
        if (given) {
            const F value = load(padded + b);
            scale = choose(less_equal(value, value), round_scales(value, grid), nan);
        } else {
            const U key = load_words(keys + b);
            const U sign = shift_left(bit_xor(key, set_words(1)), 31);
            U bits = shift_right(key, 1);
            if (grid.signed_scale) bits = bit_or(bits, sign);
            const F extreme = float_of(bits);
            scale = round_scales(factor != 0 ? mul(extreme, set(factor)) : div(extreme, set(end)), grid);
            /* An infinity minus itself is a NaN. */
            scale = choose(less_equal(sub(extreme, extreme), zero), scale, nan);
        }
        largest = max_words(largest, bit_and(bits_of(scale), set_words(0x7fffffffu)));
        store(out.scale + b, scale);
        store(out.inverse + b, div(set(1.0f), scale));
    }
    const float ceiling = grid.scale_ceiling;
    uint32_t ceiling_bits;
    memcpy(&ceiling_bits, &ceiling, 4);
    const uint32_t largest_bits = reduce_max(largest);
    out.in_range = !given && largest_bits < ceiling_bits;
    out.damaged_count = 0;
    const bool look = given && keys;
    if (!look && largest_bits < quiet_nan) return;
    for (int b = 0; b < blocks; ++b) {
        out.damaged[b] = !(out.scale[b] <= 3.0e38f) || (look && keys[b] >= QAD_KEY_NOT_FINITE);
        out.damaged_count += out.damaged[b];
    }
}

template <int dtype>
QAD_CALLED void find_scales_of(const typename Elements<dtype>::Stored *values, const float *given, int blocks,
                               const qad_grid &grid, const char *to_write, Scales &out) {
    uint32_t keys[most_blocks + width];
    const bool look = !given || !all_finite<dtype>(values, blocks * grid.block);
    if (look) find_keys<dtype>(values, blocks, grid.block, to_write, keys);
    find_scales(look ? keys : nullptr, given, blocks, grid, out);
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

} // namespace
#endif
