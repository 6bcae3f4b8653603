/* Eight elements at a time: how a thread loads, converts and stores the number types of the kernels.
 *
 * No header of the CUDA toolkit is included, so that NVRTC needs none; the few conversions that C++ does not have are
 * one instruction each. A test compiles the same sources for the CPU (QAD_EMULATED) and brings its own.
 */
#ifndef QAD_ELEMENTS_CUH
#define QAD_ELEMENTS_CUH

#include "../numerics.h"

#ifndef QAD_KERNEL
#define QAD_KERNEL(name, threads, Arguments, body)                                                                     \
    extern "C" __global__ void __launch_bounds__(threads) name(const Arguments arguments) { body(arguments); }
#endif

#define QAD_DEVICE static __device__ __forceinline__

constexpr uint32_t WHOLE_WARP = 0xffffffffu;
constexpr int WARP = 32;
constexpr int OCTET = 8; /* elements of one thread, and of one call of the random number generator */

#ifndef QAD_EMULATED
/* Two floats as two 16-bit numbers in one word, rounded half to even; `low` goes to the lower address. */
QAD_DEVICE uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

QAD_DEVICE uint32_t f16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

QAD_DEVICE float f16_value(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

/* Each type: its elements in memory, what a pair (a single float) packs to, and how damage is written. */
struct F32 {
    typedef uint32_t Storage;
    static constexpr int PER_WORD = 1;
    static constexpr uint32_t QUIET_NAN = 0x7fc00000u;
};
struct BF16 {
    typedef uint16_t Storage;
    static constexpr int PER_WORD = 2;
    static constexpr uint32_t QUIET_NAN = 0x7fc07fc0u;
    QAD_DEVICE uint32_t pair(float low, float high) { return bf16_pair(low, high); }
    QAD_DEVICE float value(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
};
struct F16 {
    typedef uint16_t Storage;
    static constexpr int PER_WORD = 2;
    static constexpr uint32_t QUIET_NAN = 0x7e007e00u;
    QAD_DEVICE uint32_t pair(float low, float high) { return f16_pair(low, high); }
    QAD_DEVICE float value(uint16_t bits) { return f16_value(bits); }
};

/* The thread's eight elements; `aligned`: the array begins at a multiple of 16 bytes. */
template <class Type> QAD_DEVICE void load_octet(float values[OCTET], const void *array, int64_t octet, bool aligned) {
    constexpr int WORDS = OCTET / Type::PER_WORD;
    uint32_t words[WORDS];
    if (aligned) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 vector = static_cast<const uint4 *>(array)[octet * (WORDS / 4) + i / 4];
            words[i] = vector.x;
            words[i + 1] = vector.y;
            words[i + 2] = vector.z;
            words[i + 3] = vector.w;
        }
    } else {
        const typename Type::Storage *elements = static_cast<const typename Type::Storage *>(array) + octet * OCTET;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            words[i] = elements[i * Type::PER_WORD];
            if constexpr (Type::PER_WORD == 2) words[i] |= (uint32_t)elements[i * 2 + 1] << 16;
        }
    }
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        if constexpr (Type::PER_WORD == 1) {
            values[i] = __uint_as_float(words[i]);
        } else {
            values[i] = Type::value((uint16_t)(words[i / 2] >> (i % 2 * 16)));
        }
    }
}

/* Store the thread's eight values, or quiet NaNs. The whole warp takes part; who is not `valid` stores nothing.
 *
 * Eight floats are two vectors. Were each thread to store its own two, each store instruction would fill every other
 * half of a 32-byte sector and the second level of cache would be written twice; so neighbours swap a vector, and each
 * instruction fills whole sectors. */
template <class Type>
QAD_DEVICE void store_octet(void *array, int64_t octet, const float values[OCTET], bool damaged, bool valid,
                            bool aligned) {
    constexpr int WORDS = OCTET / Type::PER_WORD;
    uint32_t words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        if constexpr (Type::PER_WORD == 1) {
            words[i] = __float_as_uint(values[i]);
        } else {
            words[i] = Type::pair(values[2 * i], values[2 * i + 1]);
        }
        if (damaged) words[i] = Type::QUIET_NAN;
    }
    if (!aligned) {
        typename Type::Storage *elements = static_cast<typename Type::Storage *>(array) + octet * OCTET;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            if (valid) elements[i] = (typename Type::Storage)(words[i / Type::PER_WORD] >> (i % Type::PER_WORD * 16));
        }
    } else if constexpr (Type::PER_WORD == 2) {
        if (valid) static_cast<uint4 *>(array)[octet] = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        const bool odd = octet & 1;
        uint32_t first[4], second[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t got = __shfl_xor_sync(WHOLE_WARP, odd ? words[i] : words[i + 4], 1);
            first[i] = odd ? got : words[i];
            second[i] = odd ? words[i + 4] : got;
        }
        if (valid) {
            uint4 *pair = static_cast<uint4 *>(array) + octet * 2 - odd;
            pair[0] = make_uint4(first[0], first[1], first[2], first[3]);
            pair[2] = make_uint4(second[0], second[1], second[2], second[3]);
        }
    }
}

#endif
