/* The arithmetic of the kernels one number at a time, as CUDA runs it: scale rounding and counter-based random bits; the
 * CPU has it in vectors, and shares the constants.
 * Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
#ifndef QAD_NUMERICS_H
#define QAD_NUMERICS_H

#ifdef __CUDACC__
#define QAD_SHARED static __host__ __device__ __forceinline__
#else
#define QAD_SHARED static inline
#endif

#ifdef __CUDACC_RTC__
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned short uint16_t;
typedef signed char int8_t;
#else
#include <stdint.h>
#endif

#define QAD_PHILOX_ROUNDS 7
#define QAD_PHILOX_MULTIPLIER_0 0xD2511F53u
#define QAD_PHILOX_MULTIPLIER_1 0xCD9E8D57u
#define QAD_PHILOX_WEYL_0 0x9E3779B9u
#define QAD_PHILOX_WEYL_1 0xBB67AE85u
#define QAD_STREAM_ELEMENT 0u
#define QAD_STREAM_BLOCK 1u

/* One call of Philox4x32-7: 128 random bits, eight elements of 16 bits, lowest first. */
QAD_SHARED void qad_philox(uint32_t call, uint32_t tensor, uint32_t step, uint32_t stream, uint32_t key_0,
                           uint32_t key_1, uint32_t words[4]) {
    uint32_t c0 = call, c1 = tensor, c2 = step, c3 = stream;
    for (int round = 0; round < QAD_PHILOX_ROUNDS; ++round) {
        const uint64_t product_0 = (uint64_t)c0 * QAD_PHILOX_MULTIPLIER_0;
        const uint64_t product_1 = (uint64_t)c2 * QAD_PHILOX_MULTIPLIER_1;
        c0 = (uint32_t)(product_1 >> 32) ^ c1 ^ key_0;
        c1 = (uint32_t)product_1;
        c2 = (uint32_t)(product_0 >> 32) ^ c3 ^ key_1;
        c3 = (uint32_t)product_0;
        key_0 += QAD_PHILOX_WEYL_0;
        key_1 += QAD_PHILOX_WEYL_1;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

/* The bits of a scale as the grid can store it: `scale_bits` significand bits, half to even, magnitude clamped, zero
 * becomes +floor, NaN the quiet NaN. Floats that are positive compare like their bits. */
QAD_SHARED uint32_t qad_round_scale(uint32_t bits, int scale_bits, int signed_scale, uint32_t floor_bits,
                                    uint32_t ceiling_bits) {
    const int drop = 24 - scale_bits;
    uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = signed_scale && magnitude ? bits & 0x80000000u : 0u;
    if (magnitude > 0x7f800000u) return 0x7fc00000u;
    magnitude = ((magnitude + (1u << (drop - 1)) - 1u + ((magnitude >> drop) & 1u)) >> drop) << drop;
    magnitude = magnitude < floor_bits ? floor_bits : magnitude > ceiling_bits ? ceiling_bits : magnitude;
    return magnitude | sign;
}

/* A block's key: the largest of its elements' keys belongs to the element of largest magnitude, of two that differ
 * only in their sign to the positive one. Not finite if >= QAD_KEY_NOT_FINITE. */
#define QAD_KEY_NOT_FINITE 0xff000000u
QAD_SHARED uint32_t qad_element_key(uint32_t bits) { return ((bits << 1) | (bits >> 31)) ^ 1u; }
QAD_SHARED uint32_t qad_key_bits(uint32_t key) { return (key >> 1) | ((key & 1u) ? 0u : 0x80000000u); }

#endif
