/* Weights as memory holds them: fp32, bf16 and fp16, loaded and stored two vectors at a time.
 *
 * The two vectors of a pair hold 2 x width neighbours, in an order that is the dtype's own: bf16 comes apart into those
 * at even and those at odd places, which costs one instruction each and no shuffle. A pair's random bits take the same
 * order. The order of a block's elements is nobody's business but that of a sum, which works on fp32.
 */
#ifndef QAD_ELEMENTS_H
#define QAD_ELEMENTS_H

#include "../numerics.h"
#include "../qad.h"
#include "simd.h"

namespace {

struct Pair {
    F first, second;

    Pair times(F factor) const { return {mul(first, factor), mul(second, factor)}; }
};
struct WordPair {
    U first, second;
};

/* 16 random bits for each element of a pair, as words. */
QAD_INLINE WordPair random_in_order(const uint16_t *p) { return {widen(p), widen(p + width)}; }

/* See qad_element_key. */
QAD_INLINE U key_of(F value) { return bit_xor(rotate_left_1(bits_of(value)), set_words(1)); }

/* Store a vector, if need be past the caches; see stream_words. */
QAD_INLINE void put_words(void *p, U a, bool past) {
    if (past)
        stream_words(p, a);
    else
        store_words(p, a);
}

template <int dtype> struct Elements;

template <> struct Elements<QAD_F32> {
    typedef float Stored;
    typedef Elements Order; /* what finds the order of blocks */

    QAD_INLINE Pair load_pair(const float *p) { return {load(p), load(p + width)}; }
    static constexpr bool streams = can_stream; /* whether a pair can be stored past the caches */
    QAD_INLINE void store_pair(float *p, Pair pair, bool past) {
        put_words(p, bits_of(pair.first), past);
        put_words(p + width, bits_of(pair.second), past);
    }
    QAD_INLINE void keep_pair_if(float *p, M first, M second) {
        store(p, keep_if(first, load(p)));
        store(p + width, keep_if(second, load(p + width)));
    }
    QAD_INLINE WordPair random_pair(const uint16_t *p) { return random_in_order(p); }

    /* Words, the largest of which orders blocks as their keys do. */
    QAD_INLINE U order_of(const float *block, int count) {
        U key = key_of(load(block));
        for (int i = width; i < count; i += width) key = max_words(key, key_of(load(block + i)));
        return key;
    }
    /* The keys of blocks of which these are the largest such words. */
    QAD_INLINE U key_from(U largest) { return largest; }
};

/* What bf16 and fp16 share: magnitudes that order like integers of 16 bits. */
struct HalfOrder {
    typedef uint16_t Stored;

    QAD_INLINE U order_of(const uint16_t *block, int count) {
        U key = set_words(0);
        for (int i = 0; i < count; i += 2 * width)
            key = max_halves(key, bit_xor(rotate_halves_left_1(load_words(block + i)), set_words(0x00010001u)));
        /* To the high half, whatever remains in the low one: words are compared by it alone, or by it first. */
        return max_halves(key, shift_left(key, 16));
    }
};

template <typename Self> struct HalfElements : HalfOrder {
    typedef HalfOrder Order;

    QAD_INLINE U key_from(U largest) {
        const U sign = bit_xor(bit_and(shift_right(largest, 1), set_words(0x8000u)), set_words(0x8000u));
        uint16_t halves[width];
        narrow(halves, bit_or(shift_right(largest, 17), sign));
        return key_of(Self::load_vector(halves));
    }
};

template <> struct Elements<QAD_BF16> : HalfElements<Elements<QAD_BF16>> {
    QAD_INLINE F load_vector(const uint16_t *p) { return load_bfloat(p); }
    QAD_INLINE Pair load_pair(const uint16_t *p) {
        const U both = load_words(p);
        return {float_of(shift_left(both, 16)), float_of(bit_and(both, set_words(0xffff0000u)))};
    }
    static constexpr bool streams = can_stream;
    QAD_INLINE void store_pair(uint16_t *p, Pair pair, bool past) {
        put_words(p, join_halves(shift_right(round_bfloat(pair.first), 16), round_bfloat(pair.second)), past);
    }
    QAD_INLINE void keep_pair_if(uint16_t *p, M first, M second) {
        const U both = load_words(p);
        store_words(p, join_halves(bits_of(keep_if(first, float_of(both))), bits_of(keep_if(second, float_of(both)))));
    }
    QAD_INLINE WordPair random_pair(const uint16_t *p) {
        const U both = load_words(p);
        return {bit_and(both, set_words(0xffffu)), shift_right(both, 16)};
    }

#ifdef QAD_HAS_LOOK_UP
    /* A vector's values as memory holds them, which half of that a value is, and where in memory each half belongs of
     * words that hold a pair, one vector in their low and the other in their high halves. */
    QAD_INLINE U stored(F values) { return round_bfloat(values); }
    static int half_of(int value) { return 2 * value + 1; }
    static int place_of(int half) { return half; }
#endif
};

template <> struct Elements<QAD_F16> : HalfElements<Elements<QAD_F16>> {
    QAD_INLINE F load_vector(const uint16_t *p) { return load_half(p); }
    QAD_INLINE Pair load_pair(const uint16_t *p) { return {load_half(p), load_half(p + width)}; }
    static constexpr bool streams = false; /* half a vector at a time, it cannot */
    QAD_INLINE void store_pair(uint16_t *p, Pair pair, bool) {
        store_half(p, pair.first);
        store_half(p + width, pair.second);
    }
    QAD_INLINE void keep_pair_if(uint16_t *p, M first, M second) {
        store_pair(p, {keep_if(first, load_half(p)), keep_if(second, load_half(p + width))}, false);
    }
    QAD_INLINE WordPair random_pair(const uint16_t *p) { return random_in_order(p); }

#ifdef QAD_HAS_LOOK_UP
    QAD_INLINE U stored(F values) { return round_half(values); }
    static int half_of(int value) { return value; }
    static int place_of(int half) { return half / 2 + half % 2 * width; }
#endif
};

QAD_INLINE int size_of(int dtype) { return dtype == QAD_F32 ? 4 : 2; }

/* Elements as fp32 and in order: where they are if they are that, else in `buffer`. */
QAD_CALLED const float *load_elements(const void *from, int dtype, int64_t first, int count, float *buffer) {
    if (dtype == QAD_F32) return (const float *)from + first;
    const uint16_t *source = (const uint16_t *)from + first;
    if (dtype == QAD_BF16)
        for (int i = 0; i < count; i += width) store(buffer + i, load_bfloat(source + i));
    else
        for (int i = 0; i < count; i += width) store(buffer + i, load_half(source + i));
    return buffer;
}

/* Store fp32 as bf16 or fp16: values that are not NaN, or the quiet one. */
QAD_CALLED void store_elements(void *to, int dtype, int64_t first, int count, const float *buffer) {
    uint16_t *target = (uint16_t *)to + first;
    if (dtype == QAD_BF16)
        for (int i = 0; i < count; i += width) store_bfloat(target + i, load(buffer + i));
    else
        for (int i = 0; i < count; i += width) store_half(target + i, load(buffer + i));
}

/* Copy whole vectors past the caches, to an address that is a multiple of a vector's size. */
QAD_CALLED void stream_out(void *to, const void *from, int bytes) {
    for (int i = 0; i < bytes; i += 4 * width) stream_words((char *)to + i, load_words((const char *)from + i));
}

} // namespace
#endif
