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

/* The smallest and the largest that an element of a block may become, as the words that its dtype compares: floats, or
 * two times the same half. The first is negative, the second positive. */
struct Ends {
    U low, high;
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
    typedef uint32_t Key; /* what orders elements as their keys do: qad_element_key, of 16 bits for those of 16 bits */
    static constexpr Key not_finite = QAD_KEY_NOT_FINITE;

    QAD_INLINE Pair load_pair(const float *p) { return {load(p), load(p + width)}; }
    QAD_INLINE void store_vector(float *p, F value, const Ends &ends, bool past) {
        put_words(p, bits_of(min_of(float_of(ends.high), max_of(float_of(ends.low), value))), past);
    }
    QAD_INLINE void store_pair(float *p, Pair pair, const Ends &ends, bool past) {
        store_vector(p, pair.first, ends, past);
        store_vector(p + width, pair.second, ends, past);
    }
    QAD_INLINE U end_from(F value) { return bits_of(value); }
    QAD_INLINE void keep_pair_if(float *p, M first, M second) {
        store(p, keep_if(first, load(p)));
        store(p + width, keep_if(second, load(p + width)));
    }
    QAD_INLINE WordPair random_pair(const uint16_t *p) { return random_in_order(p); }

    QAD_INLINE U keys_at(const float *p) { return key_of(load(p)); }
    QAD_INLINE U max_keys(U a, U b) { return max_words(a, b); }
    QAD_INLINE Key max_key(U a) { return reduce_max(a); }
    static constexpr int per_reduction = 4; /* vectors whose largest keys are found together */
    QAD_INLINE void max_key_of_each(Key *p, const U *v) { reduce_max_4(p, v[0], v[1], v[2], v[3]); }
    QAD_INLINE U widen_keys(const Key *p) { return load_reduced(p); }
};

/* What bf16 and fp16 share: magnitudes that order like integers of 16 bits. */
template <typename Self> struct HalfElements {
    typedef uint16_t Stored;
    typedef uint16_t Key;

    QAD_INLINE U keys_at(const uint16_t *p) {
        return bit_xor(rotate_halves_left_1(load_words(p)), set_words(0x00010001u));
    }
    QAD_INLINE U max_keys(U a, U b) { return max_halves(a, b); }
    QAD_INLINE Key max_key(U a) { return (Key)(reduce_max(max_halves(a, shift_left(a, 16))) >> 16); }
    static constexpr int per_reduction = 8;
    QAD_INLINE void max_key_of_each(Key *p, const U *v) { reduce_max_halves_8(p, v); }
    /* As integers without a sign, halves with a minus are the larger ones, the more so the larger their magnitudes; as
     * integers with a sign, they are all smaller than those without. So each end is one comparison. */
    QAD_INLINE void store_pair(uint16_t *p, Pair pair, const Ends &ends, bool past) {
        put_words(p, min_signed_halves(min_halves(Self::pair_of(pair), ends.low), ends.high), past);
    }
    QAD_INLINE U end_from(F value) {
        uint16_t halves[width];
        Self::store_vector(halves, value);
        const U half = widen(halves);
        return bit_or(half, shift_left(half, 16));
    }
};

template <> struct Elements<QAD_BF16> : HalfElements<Elements<QAD_BF16>> {
    static constexpr Key not_finite = 0xff00u;
    QAD_INLINE U widen_keys(const Key *p) {
        const U key = load_reduced_halves(p);
        return bit_or(shift_left(bit_and(key, set_words(0xfffeu)), 16), bit_and(key, set_words(1)));
    }
    QAD_INLINE Pair load_pair(const uint16_t *p) {
        const U both = load_words(p);
        return {float_of(shift_left(both, 16)), float_of(bit_and(both, set_words(0xffff0000u)))};
    }
    QAD_INLINE void store_vector(uint16_t *p, F value) { store_bfloat(p, value); }
    QAD_INLINE U pair_of(Pair pair) {
        return join_halves(shift_right(round_bfloat(pair.first), 16), round_bfloat(pair.second));
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
    static constexpr Key not_finite = 0xf800u;
    QAD_INLINE U widen_keys(const Key *p) {
        const U key = load_reduced_halves(p), sign = shift_left(bit_xor(bit_and(key, set_words(1)), set_words(1)), 15);
        uint16_t halves[width];
        narrow(halves, bit_or(shift_right(key, 1), sign));
        return key_of(load_half(halves));
    }
    QAD_INLINE Pair load_pair(const uint16_t *p) { return {load_half(p), load_half(p + width)}; }
    QAD_INLINE void store_vector(uint16_t *p, F value) { store_half(p, value); }
    QAD_INLINE U pair_of(Pair pair) { return halves_of(pair.first, pair.second); }
    QAD_INLINE void keep_pair_if(uint16_t *p, M first, M second) {
        store_words(p, halves_of(keep_if(first, load_half(p)), keep_if(second, load_half(p + width))));
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
