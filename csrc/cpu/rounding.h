/* From weights to codes. Rounding adds and subtracts 1.5 x 2^23, which rounds half to even on every instruction set; it
 * also turns -0 into the one zero that a code has.
 */
#ifndef QAD_ROUNDING_H
#define QAD_ROUNDING_H

#include "../qad.h"
#include "elements.h"
#include "simd.h"

namespace {

constexpr float rounding_magic = 0x1.8p23f;

constexpr bool draws_elements(int mode) { return mode == QAD_NOISE_UNIFORM || mode == QAD_NOISE_STOCHASTIC; }

/* A pair of scaled weights, moved by the noise of their elements if the mode has any. */
template <typename E, int mode> QAD_INLINE Pair move(Pair scaled, const uint16_t *random) {
    if constexpr (!draws_elements(mode)) return scaled;
    constexpr bool with_sign = mode == QAD_NOISE_UNIFORM;
    U words[2];
    E::noise_at(random, words);
    return {add_noise(scaled.first, words[0], with_sign), add_noise(scaled.second, words[1], with_sign)};
}

/* A pair of weights, moved by uniform noise of a step: see Scales. */
template <typename E> QAD_INLINE Pair move_by(Pair values, const uint16_t *random, F noise_step) {
    U words[2];
    E::noise_at(random, words);
    return {fused_add(convert(words[0]), noise_step, values.first), fused_add(convert(words[1]), noise_step, values.second)};
}

/* The (fractional, unless hard) code of a scaled and moved weight, not yet clamped to the ends of the range: that
 * commutes with rounding, because the ends are integers, and with a product, which only turns round what is in order. */
template <int mode> QAD_INLINE F code_of(F moved) {
    if (mode == QAD_NOISE_UNIFORM) return moved;
    if (mode == QAD_NOISE_STOCHASTIC) return floor_of(moved);
    if (mode == QAD_NOISE_PARTIAL) return add(moved, set(0.0f));
    return sub(add(moved, set(rounding_magic)), set(rounding_magic));
}

QAD_INLINE F clamp(F code, F low, F high) { return min_of(high, max_of(low, code)); }

} // namespace
#endif
