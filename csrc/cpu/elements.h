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
constexpr int pair = 2 * width;

/* The smallest and the largest that an element of a block may become, as the words that its dtype compares: floats, or
 * two times the same half. The first is negative, the second positive. */
struct Ends {
    U low, high;
};

/* A value moved by noise, a word over 2^32: its 16 random bits, which may be a number with a sign, and half of their lowest
 * one. So noise is exact, and the sum is rounded once; noise is never zero, and a sum with it never -0. */
QAD_INLINE F add_noise(F value, U word, bool with_sign) {
    if (with_sign) return fused_add(convert(word), set(0x1p-32f), value);
    return fused_add(convert_unsigned(word), set(1.0f / unsigned_one), value);
}

/* What comes one vector after the other, and so do its random bits once they are unpacked. */
struct MovesInOrder {
    static constexpr bool to_unpack = true;
    /* The words of a pair's noise; see add_noise. */
    QAD_INLINE void noise_at(const uint16_t *random, U *words) {
        unpack(load_words(random), set_words(0x80008000u), words);
    }
};

/* See qad_element_key. */
QAD_INLINE U key_of(F value) { return bit_xor(rotate_left_1(bits_of(value)), set_words(1)); }

/* Store a vector, if need be past the caches; see stream_words. */
QAD_INLINE void put_words(void *p, U a, bool past) {
    if (__builtin_expect(past, 0))
        stream_words(p, a);
    else
        store_words(p, a);
}

template <int dtype> struct Elements;

template <> struct Elements<QAD_F32> : MovesInOrder {
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

    QAD_INLINE U keys_at(const float *p) { return key_of(load(p)); }
    /* Keys without what tells a sign: enough to see what is not finite. */
    QAD_INLINE U signless_keys_at(const float *p) { return add_words(load_words(p), load_words(p)); }
    QAD_INLINE U max_keys(U a, U b) { return max_words(a, b); }
    QAD_INLINE Key max_key(U a) { return reduce_max(a); }
    /* Vectors whose largest keys are found together: in parts, and how many of them. */
    static constexpr int per_part = 4, parts = width / 4;
    QAD_INLINE U partial_max_keys(const U *v) { return partial_max(v); }
    QAD_INLINE void store_max_keys(Key *p, const U *partial) { store_words(p, finish_max(partial)); }
    /* What keys say: magnitudes, and a sign bit where there is a plus. */
    QAD_INLINE F magnitudes_at(const Key *p) { return float_of(shift_right(load_words(p), 1)); }
    QAD_INLINE U pluses_at(const Key *p) { return shift_left(load_words(p), 31); }
};

/* What bf16 and fp16 share: magnitudes that order like integers of 16 bits. */
template <typename Self> struct HalfElements {
    typedef uint16_t Stored;
    typedef uint16_t Key;

    QAD_INLINE U keys_at(const uint16_t *p) {
        return bit_xor(rotate_halves_left_1(load_words(p)), set_words(0x00010001u));
    }
    QAD_INLINE U signless_keys_at(const uint16_t *p) { return add_halves(load_words(p), load_words(p)); }
    QAD_INLINE U max_keys(U a, U b) { return max_halves(a, b); }
    QAD_INLINE Key max_key(U a) { return (Key)(reduce_max(max_halves(a, shift_left(a, 16))) >> 16); }
    static constexpr int per_part = 8, parts = 1;
    QAD_INLINE U partial_max_keys(const U *v) { return partial_max_halves(v); }
    QAD_INLINE void store_max_keys(Key *p, const U *partial) { store_max_halves(p, partial[0]); }
    QAD_INLINE U pluses_at(const Key *p) { return shift_left(load_max_halves(p), 31); }
    /* As integers without a sign, halves with a minus are the larger ones, the more so the larger their magnitudes; as
     * integers with a sign, they are all smaller than those without. So each end is one comparison. */
    QAD_INLINE void store_pair(uint16_t *p, Pair pair, const Ends &ends, bool past) {
        put_words(p, min_signed_halves(min_halves(Self::pair_of(pair), ends.low), ends.high), past);
    }
};

/* What is stored as bf16. */
struct Bfloats {
    QAD_INLINE U end_from(F value) {
        const U bits = round_bfloat(value);
        return join_halves(shift_right(bits, 16), bits);
    }
};

template <> struct Elements<QAD_BF16> : HalfElements<Elements<QAD_BF16>>, Bfloats {
    static constexpr Key not_finite = 0xff00u;
    QAD_INLINE F magnitudes_at(const Key *p) { return float_of(shift_left(shift_right(load_max_halves(p), 1), 16)); }
    QAD_INLINE Pair load_pair(const uint16_t *p) {
        const U both = load_words(p);
        return {float_of(shift_left(both, 16)), float_of(bit_and(both, set_words(0xffff0000u)))};
    }
    QAD_INLINE U pair_of(Pair pair) {
        return join_halves(shift_right(round_bfloat(pair.first), 16), round_bfloat(pair.second));
    }
    QAD_INLINE void keep_pair_if(uint16_t *p, M first, M second) {
        const U both = load_words(p);
        store_words(p, join_halves(bits_of(keep_if(first, float_of(both))), bits_of(keep_if(second, float_of(both)))));
    }
    static constexpr bool to_unpack = false;
    QAD_INLINE void noise_at(const uint16_t *random, U *words) {
        const U both = load_words(random), half = set_words(0x8000u);
        words[0] = bit_or(shift_left(both, 16), half);
        words[1] = bit_or(bit_and(both, set_words(0xffff0000u)), half);
    }
};

template <> struct Elements<QAD_F16> : HalfElements<Elements<QAD_F16>>, MovesInOrder {
    static constexpr Key not_finite = 0xf800u;
    QAD_INLINE F magnitudes_at(const Key *p) {
        uint16_t halves[width];
        narrow(halves, shift_right(load_max_halves(p), 1));
        return load_half(halves);
    }
    QAD_INLINE Pair load_pair(const uint16_t *p) { return {load_half(p), load_half(p + width)}; }
    QAD_INLINE U end_from(F value) {
        uint16_t halves[width];
        store_half(halves, value);
        const U half = widen(halves);
        return join_halves(half, shift_left(half, 16));
    }
    QAD_INLINE U pair_of(Pair pair) { return halves_of(pair.first, pair.second); }
    QAD_INLINE void keep_pair_if(uint16_t *p, M first, M second) {
        store_words(p, halves_of(keep_if(first, load_half(p)), keep_if(second, load_half(p + width))));
    }
};

/* Outputs of fp32 weights, which come one vector after the other. */
struct BfloatInOrder : HalfElements<BfloatInOrder>, Bfloats {
    QAD_INLINE U pair_of(Pair pair) { return high_halves_of(round_bfloat(pair.first), round_bfloat(pair.second)); }
};

/* The same of what is not subnormal. */
struct NormalBfloatInOrder : HalfElements<NormalBfloatInOrder>, Bfloats {
    QAD_INLINE U pair_of(Pair pair) { return bfloats_of(pair.first, pair.second); }
};

#ifdef QAD_HAS_BFLOATS
/* bf16 that becomes bf16, in the order in which unpack takes it apart: to round two vectors by one instruction and to put
 * them in order by another takes less than to round and to join them where they are. */
struct UnpackedBfloat : HalfElements<UnpackedBfloat>, Bfloats, MovesInOrder {
    QAD_INLINE Pair load_pair(const uint16_t *p) {
        U words[2];
        unpack(load_words(p), set_words(0), words);
        return {float_of(words[0]), float_of(words[1])};
    }
    QAD_INLINE U pair_of(Pair pair) { return pack_again(bfloats_of(pair.first, pair.second)); }
};
#endif

/* How to store what was loaded as Elements<in>. Nothing is subnormal with noise: a scale is no less than 2^-64, so what moves a
 * weight is 2^-81 or more, and a weight that nearly takes it back is a multiple of 2^-105. Without any rounding a weight
 * may be anything. */
template <int in, int out, int mode> struct Outputs {
    typedef Elements<out> Type;
};
template <int mode> struct Outputs<QAD_F32, QAD_BF16, mode> {
    typedef NormalBfloatInOrder Type;
};
template <> struct Outputs<QAD_F32, QAD_BF16, QAD_NOISE_PARTIAL> {
    typedef BfloatInOrder Type;
};

/* How to load what is stored as that. */
template <int in, int out, int mode> struct Inputs {
    typedef Elements<in> Type;
};
#ifdef QAD_HAS_BFLOATS
template <> struct Outputs<QAD_BF16, QAD_BF16, QAD_NOISE_UNIFORM> {
    typedef UnpackedBfloat Type;
};
template <> struct Inputs<QAD_BF16, QAD_BF16, QAD_NOISE_UNIFORM> {
    typedef UnpackedBfloat Type;
};
#endif

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

} // namespace
#endif
