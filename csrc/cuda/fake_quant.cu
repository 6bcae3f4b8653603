/* Fake quantization, its backward, quantize and dequantize on CUDA: the bits of qad/fake_quant.py and qad/tensor.py.
 *
 * A thread owns eight consecutive elements: one call of the random number generator, one or two 16-byte loads. A block
 * is 4, 8 or 16 neighbouring threads, so that finding its scale is a reduction within a warp and nothing passes through
 * shared memory; a warp takes 256 elements at a time and strides over the tensor. The arithmetic is far cheaper than the
 * memory traffic, so everything is recomputed from the weights instead of stored.
 *
 * Every product and sum is rounded on its own (the intrinsics with _rn), unless the product is exact: else a fused
 * multiply-add would differ from the reference in the last bit. What is given up: the last warp works on nothing where
 * the blocks do not fill it, because all 32 threads must take part in a shuffle.
 */
#include "elements.cuh"

constexpr int THREADS = 256;
enum Mode { NONE, UNIFORM, STOCHASTIC, PARTIAL };

/* What a kernel works on; which members it uses depends on the kernel. qad/native_cuda.py fills the same struct. */
struct BlockArguments {
    const void *weights;
    const float *scales;           /* null: absmax */
    float *scales_out;             /* null, or: forward: the rounded scales, may be `scales`; backward: their gradient */
    void *values;                  /* forward, dequantize: the output; backward: the gradient, in place */
    int8_t *codes;                 /* quantize: written; dequantize: read */
    uint16_t *stored_scales;       /* the same, fp16 */
    unsigned long long *damaged;   /* null, or a counter of damaged blocks to add to */
    int64_t blocks;
    float code_min, code_max;
    uint32_t scale_bits, signed_scale, floor_bits, ceiling_bits;
    uint32_t lanes_log2;           /* log2 of the threads that share a block: block / 8 */
    uint32_t mode;                 /* backward of scales: enum Mode; the others are compiled for one */
    float hard_share;
    uint32_t seed_low, seed_high, tensor, step;
    uint32_t aligned;              /* every array begins at a multiple of 16 bytes */
};
static_assert(sizeof(BlockArguments) == 8 * 8 + 14 * 4, "qad/native_cuda.py lays the same struct out");

/* Where a thread is: its octet, whether that exists, and its block. */
struct Place {
    int64_t octet, block;
    bool valid;
};

QAD_DEVICE Place place_of(int64_t tile, const BlockArguments &arguments) {
    Place place;
    place.octet = tile * WARP + threadIdx.x % WARP;
    place.block = place.octet >> arguments.lanes_log2;
    place.valid = place.block < arguments.blocks;
    return place;
}

QAD_DEVICE bool is_first_of_block(const BlockArguments &arguments) {
    return (threadIdx.x & ((1u << arguments.lanes_log2) - 1u)) == 0;
}

QAD_DEVICE int64_t first_tile() { return ((int64_t)blockIdx.x * THREADS + threadIdx.x) / WARP; }
QAD_DEVICE int64_t tile_stride() { return (int64_t)gridDim.x * (THREADS / WARP); }
QAD_DEVICE int64_t tile_count(const BlockArguments &arguments) {
    return ((arguments.blocks << arguments.lanes_log2) + WARP - 1) / WARP;
}

/* A block's rounded scale, the same in all threads of the block. The absmax scale of a damaged block is the quiet NaN,
 * a given one is left as it is. */
struct Scale {
    float value;
    bool damaged;
};

QAD_DEVICE Scale block_scale(const float values[OCTET], const Place &place, const BlockArguments &arguments) {
    const uint32_t lanes = 1u << arguments.lanes_log2;
    uint32_t scale;
    bool damaged;
    if (arguments.scales) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
            largest = largest > magnitude ? largest : magnitude;
        }
        scale = place.valid ? __float_as_uint(arguments.scales[place.block]) : 0;
        const uint32_t of_warp = __ballot_sync(WHOLE_WARP, largest >= 0x7f800000u);
        damaged = of_warp >> (threadIdx.x % WARP & ~(lanes - 1u)) & ((1u << lanes) - 1u);
    } else {
        uint32_t key = 0;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            const uint32_t other = qad_element_key(__float_as_uint(values[i]));
            key = key > other ? key : other;
        }
        for (uint32_t distance = lanes / 2; distance; distance /= 2) {
            const uint32_t other = __shfl_xor_sync(WHOLE_WARP, key, distance);
            key = key > other ? key : other;
        }
        damaged = key >= QAD_KEY_NOT_FINITE;
        const uint32_t extreme = arguments.signed_scale ? qad_key_bits(key) : key >> 1;
        const float end = arguments.signed_scale ? arguments.code_min : arguments.code_max;
        scale = __float_as_uint(__fdiv_rn(__uint_as_float(extreme), end));
    }
    scale = qad_round_scale(scale, arguments.scale_bits, arguments.signed_scale, arguments.floor_bits,
                            arguments.ceiling_bits);
    if (damaged && !arguments.scales) scale = 0x7fc00000u;
    return {__uint_as_float(scale), damaged || scale == 0x7fc00000u};
}

QAD_DEVICE void count_damaged(bool damaged, const Place &place, const BlockArguments &arguments) {
    if (damaged && place.valid && arguments.damaged && is_first_of_block(arguments)) atomicAdd(arguments.damaged, 1ull);
}

/* 1 + r / 65536 of the `index`-th 16 random bits: a float made of bits costs less than a conversion. */
QAD_DEVICE float one_to_two(const uint32_t words[4], int index) {
    const uint32_t word = words[index / 2];
    return __uint_as_float(0x3f800000u | (index % 2 ? word >> 16 : word & 0xffffu) << 7);
}
constexpr float TO_UNIT = 0.99999237060546875f;   /* 1 - 2^-17: leaves (r + 1/2) / 65536, exactly */
constexpr float TO_CENTRED = 1.49999237060546875f; /* 1 1/2 - 2^-17: leaves that minus 1/2, exactly */

/* Which blocks are rounded hard, bit b for block b of eight: the blocks' random bits come eight to a call. */
QAD_DEVICE uint32_t hard_blocks(uint32_t call, const BlockArguments &arguments) {
    uint32_t words[4], hard = 0;
    qad_philox(call, arguments.tensor, arguments.step, QAD_STREAM_BLOCK, arguments.seed_low, arguments.seed_high,
               words);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        hard |= (uint32_t)(__fsub_rn(one_to_two(words, i), TO_UNIT) < arguments.hard_share) << i;
    }
    return hard;
}

/* Draws for the blocks of a warp's tiles, 32 tiles ahead: thread i draws for the i-th tile to come, instead of all for
 * the same one. */
struct HardBlocks {
    uint32_t ahead = 0;
    int turn = 0;

    __device__ __forceinline__ bool next(int64_t tile, const Place &place, const BlockArguments &arguments) {
        if (!(arguments.hard_share > 0.0f)) return false;
        if (turn == 0) {
            const int64_t mine = tile + threadIdx.x % WARP * tile_stride();
            ahead = hard_blocks((uint32_t)(mine >> (arguments.lanes_log2 - 2)), arguments);
        }
        const uint32_t hard = __shfl_sync(WHOLE_WARP, ahead, turn);
        turn = (turn + 1) % WARP;
        return hard >> (place.block & 7) & 1;
    }
};

/* The eight codes, fractional where the noise asks for it, of scaled values. */
template <int MODE>
QAD_DEVICE void noisy_codes(float codes[OCTET], const float scaled[OCTET], bool hard, const Place &place,
                            const BlockArguments &arguments) {
    uint32_t words[4];
    if constexpr (MODE == UNIFORM || MODE == STOCHASTIC) {
        qad_philox((uint32_t)place.octet, arguments.tensor, arguments.step, QAD_STREAM_ELEMENT, arguments.seed_low,
                   arguments.seed_high, words);
    }
    /* No branches: threads of a warp hold blocks of both kinds. 1.5 x 2^23 has no fraction bits, so that adding it rounds
     * half to even; taking it away again leaves no negative zero, and neither does zero in its place. */
    const float whole = hard || MODE == NONE || MODE == STOCHASTIC ? 12582912.0f : 0.0f;
    const uint32_t noisy = hard ? 0u : 0xffffffffu;
    const float down = hard ? 0.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        float code = scaled[i];
        if constexpr (MODE == UNIFORM || MODE == STOCHASTIC) {
            const float noise = __fsub_rn(one_to_two(words, i), MODE == UNIFORM ? TO_CENTRED : TO_UNIT);
            code = __fadd_rn(code, __uint_as_float(__float_as_uint(noise) & noisy));
        }
        /* The ends are integers, so clipping before rounding gives the same. */
        code = fminf(fmaxf(code, arguments.code_min), arguments.code_max);
        float rounded = __fsub_rn(__fadd_rn(code, whole), whole);
        if constexpr (MODE == STOCHASTIC) rounded = __fsub_rn(rounded, rounded > code ? down : 0.0f); /* floor */
        codes[i] = rounded;
    }
}

/* What forward, backward and quantize begin with: the weights, and their block's scale. */
template <class Master>
QAD_DEVICE Scale load_weights(float values[OCTET], const Place &place, const BlockArguments &arguments) {
#pragma unroll
    for (int i = 0; i < OCTET; ++i) values[i] = 0.0f;
    if (place.valid) load_octet<Master>(values, arguments.weights, place.octet, arguments.aligned);
    return block_scale(values, place, arguments);
}

/* The same, the weights over the scale. */
template <class Master>
QAD_DEVICE Scale load_scaled(float scaled[OCTET], const Place &place, const BlockArguments &arguments) {
    const Scale scale = load_weights<Master>(scaled, place, arguments);
    const float reciprocal = __frcp_rn(scale.value);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) scaled[i] = __fmul_rn(scaled[i], reciprocal);
    return scale;
}

/* Move the weights of a block that is not hard by noise of a step, and clip them. The product of a scale cut to 8
 * significand bits and of noise is exact, so that the one rounding is that of the sum. */
QAD_DEVICE void add_uniform_noise(float values[OCTET], float scale, const Place &place,
                                  const BlockArguments &arguments) {
    uint32_t words[4];
    qad_philox((uint32_t)place.octet, arguments.tensor, arguments.step, QAD_STREAM_ELEMENT, arguments.seed_low,
               arguments.seed_high, words);
    const float noise_step = __uint_as_float(__float_as_uint(scale) & 0xffff0000u);
    const float one = __fmul_rn(arguments.code_min, scale), other = __fmul_rn(arguments.code_max, scale);
    const float low = fminf(one, other), high = fmaxf(one, other);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        const float noise = __fsub_rn(one_to_two(words, i), TO_CENTRED);
        values[i] = fminf(fmaxf(__fmaf_rn(noise, noise_step, values[i]), low), high);
    }
}

/* The weights that forward uses, of weights as they are. Where a warp holds hard blocks and others it goes both ways, of which
 * the hard one is short: it draws nothing. */
template <int MODE>
QAD_DEVICE void on_grid(float values[OCTET], float scale, bool hard, const Place &place,
                        const BlockArguments &arguments) {
    if (MODE == UNIFORM && !hard) {
        add_uniform_noise(values, scale, place, arguments);
        return;
    }
    const float reciprocal = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) values[i] = __fmul_rn(values[i], reciprocal);
    constexpr int ROUNDING = MODE == UNIFORM ? NONE : MODE;
    noisy_codes<ROUNDING>(values, values, hard, place, arguments);
#pragma unroll
    for (int i = 0; i < OCTET; ++i) values[i] = __fmul_rn(values[i], scale);
}

template <class Master, class Out, int MODE> QAD_DEVICE void fake_quantize(const BlockArguments &arguments) {
    HardBlocks hard_blocks;
    const int64_t tiles = tile_count(arguments);
    for (int64_t tile = first_tile(); tile < tiles; tile += tile_stride()) {
        const Place place = place_of(tile, arguments);
        float values[OCTET];
        const Scale scale = load_weights<Master>(values, place, arguments);
        const bool hard = MODE == NONE || hard_blocks.next(tile, place, arguments);
        on_grid<MODE>(values, scale.value, hard, place, arguments);
        store_octet<Out>(arguments.values, place.octet, values, scale.damaged, place.valid, arguments.aligned);
        if (arguments.scales_out && place.valid && is_first_of_block(arguments)) {
            arguments.scales_out[place.block] = scale.value;
        }
        count_damaged(scale.damaged, place, arguments);
    }
}

/* Zero the gradient of masters outside the range. Nothing is read or written where all are inside. */
template <class Grad>
QAD_DEVICE void zero_outside(const bool outside[OCTET], const Place &place, const BlockArguments &arguments) {
    typename Grad::Storage *grad = static_cast<typename Grad::Storage *>(arguments.values) + place.octet * OCTET;
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        if (place.valid && outside[i]) grad[i] = 0;
    }
}

QAD_DEVICE void find_outside(bool outside[OCTET], const float scaled[OCTET], bool damaged,
                             const BlockArguments &arguments) {
    const float low = arguments.code_min - 0.5f, high = arguments.code_max + 0.5f;
#pragma unroll
    for (int i = 0; i < OCTET; ++i) outside[i] = damaged || !(scaled[i] >= low && scaled[i] <= high);
}

template <class Master, class Grad> QAD_DEVICE void backward(const BlockArguments &arguments) {
    const int64_t tiles = tile_count(arguments);
    for (int64_t tile = first_tile(); tile < tiles; tile += tile_stride()) {
        const Place place = place_of(tile, arguments);
        float scaled[OCTET];
        bool outside[OCTET];
        const bool damaged = load_scaled<Master>(scaled, place, arguments).damaged;
        find_outside(outside, scaled, damaged, arguments);
        zero_outside<Grad>(outside, place, arguments);
        count_damaged(damaged, place, arguments);
    }
}

/* The same, and the gradient by each block's scale, summed as `fold_sum` does: element i and element i + n/2. */
template <class Master, class Grad> QAD_DEVICE void backward_scales(const BlockArguments &arguments) {
    HardBlocks hard_blocks;
    const int64_t tiles = tile_count(arguments);
    for (int64_t tile = first_tile(); tile < tiles; tile += tile_stride()) {
        const Place place = place_of(tile, arguments);
        float scaled[OCTET], by_scale[OCTET], grad[OCTET];
        bool outside[OCTET];
        const bool damaged = load_scaled<Master>(scaled, place, arguments).damaged;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) grad[i] = 0.0f;
        if (place.valid) load_octet<Grad>(grad, arguments.values, place.octet, arguments.aligned);
        if (arguments.mode == NONE) {
            noisy_codes<NONE>(by_scale, scaled, true, place, arguments);
        } else {
            const bool hard = hard_blocks.next(tile, place, arguments);
            if (arguments.mode == UNIFORM) noisy_codes<UNIFORM>(by_scale, scaled, hard, place, arguments);
            if (arguments.mode == STOCHASTIC) noisy_codes<STOCHASTIC>(by_scale, scaled, hard, place, arguments);
            if (arguments.mode == PARTIAL) noisy_codes<PARTIAL>(by_scale, scaled, hard, place, arguments);
        }
        find_outside(outside, scaled, damaged, arguments);
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            by_scale[i] = __fmul_rn(__fsub_rn(by_scale[i], outside[i] ? 0.0f : scaled[i]), grad[i]);
        }
        for (uint32_t distance = 1u << arguments.lanes_log2 >> 1; distance; distance /= 2) {
#pragma unroll
            for (int i = 0; i < OCTET; ++i) {
                by_scale[i] = __fadd_rn(by_scale[i], __shfl_xor_sync(WHOLE_WARP, by_scale[i], distance));
            }
        }
#pragma unroll
        for (int half = OCTET / 2; half; half /= 2) {
#pragma unroll
            for (int i = 0; i < half; ++i) by_scale[i] = __fadd_rn(by_scale[i], by_scale[i + half]);
        }
        if (place.valid && is_first_of_block(arguments)) {
            arguments.scales_out[place.block] = damaged ? 0.0f : by_scale[0];
        }
        zero_outside<Grad>(outside, place, arguments);
        count_damaged(damaged, place, arguments);
    }
}

template <class Master> QAD_DEVICE void quantize(const BlockArguments &arguments) {
    const int64_t tiles = tile_count(arguments);
    for (int64_t tile = first_tile(); tile < tiles; tile += tile_stride()) {
        const Place place = place_of(tile, arguments);
        float codes[OCTET];
        const Scale scale = load_scaled<Master>(codes, place, arguments);
        noisy_codes<NONE>(codes, codes, true, place, arguments);
        uint32_t words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            const uint32_t code = scale.damaged ? 0u : (uint32_t)(int32_t)codes[i] & 0xffu;
            words[i / 4] |= code << (i % 4 * 8);
        }
        if (place.valid && arguments.aligned) {
            reinterpret_cast<uint2 *>(arguments.codes)[place.octet] = make_uint2(words[0], words[1]);
        } else if (place.valid) {
#pragma unroll
            for (int i = 0; i < OCTET; ++i) {
                arguments.codes[place.octet * OCTET + i] = (int8_t)(words[i / 4] >> (i % 4 * 8));
            }
        }
        if (place.valid && is_first_of_block(arguments)) {
            arguments.stored_scales[place.block] =
                scale.damaged ? (uint16_t)0x7e00u : (uint16_t)f16_pair(scale.value, 0.0f);
        }
        count_damaged(scale.damaged, place, arguments);
    }
}

template <class Out> QAD_DEVICE void dequantize(const BlockArguments &arguments) {
    const int64_t tiles = tile_count(arguments);
    for (int64_t tile = first_tile(); tile < tiles; tile += tile_stride()) {
        const Place place = place_of(tile, arguments);
        uint32_t words[2] = {0, 0};
        float scale = 0.0f, values[OCTET];
        if (place.valid) {
            scale = f16_value(arguments.stored_scales[place.block]);
            if (arguments.aligned) {
                const uint2 vector = reinterpret_cast<const uint2 *>(arguments.codes)[place.octet];
                words[0] = vector.x;
                words[1] = vector.y;
            } else {
#pragma unroll
                for (int i = 0; i < OCTET; ++i) {
                    words[i / 4] |= (uint32_t)(unsigned char)arguments.codes[place.octet * OCTET + i] << (i % 4 * 8);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            values[i] = __fmul_rn((float)(int8_t)(words[i / 4] >> (i % 4 * 8)), scale);
        }
        const bool damaged = scale != scale;
        store_octet<Out>(arguments.values, place.octet, values, damaged, place.valid, arguments.aligned);
    }
}

/* qad_fake_quantize_<master>_<out>_<mode>, qad_fake_quantize_backward_<master>_<grad>,
 * qad_fake_quantize_backward_scales_<master>_<grad>, qad_quantize_<master>, qad_dequantize_<out> */
#define BLOCK_KERNEL(name, ...) QAD_KERNEL(name, THREADS, BlockArguments, (__VA_ARGS__))
#define FOR_PAIR(master, Master, other, Other)                                                                         \
    BLOCK_KERNEL(qad_fake_quantize_##master##_##other##_none, fake_quantize<Master, Other, NONE>)                      \
    BLOCK_KERNEL(qad_fake_quantize_##master##_##other##_uniform, fake_quantize<Master, Other, UNIFORM>)                \
    BLOCK_KERNEL(qad_fake_quantize_##master##_##other##_stochastic, fake_quantize<Master, Other, STOCHASTIC>)          \
    BLOCK_KERNEL(qad_fake_quantize_##master##_##other##_partial, fake_quantize<Master, Other, PARTIAL>)                \
    BLOCK_KERNEL(qad_fake_quantize_backward_##master##_##other, backward<Master, Other>)                               \
    BLOCK_KERNEL(qad_fake_quantize_backward_scales_##master##_##other, backward_scales<Master, Other>)
#define FOR_TYPE(type, Type)                                                                                           \
    FOR_PAIR(type, Type, f32, F32)                                                                                     \
    FOR_PAIR(type, Type, bf16, BF16)                                                                                   \
    FOR_PAIR(type, Type, f16, F16)                                                                                     \
    BLOCK_KERNEL(qad_quantize_##type, quantize<Type>)                                                                  \
    BLOCK_KERNEL(qad_dequantize_##type, dequantize<Type>)

FOR_TYPE(f32, F32)
FOR_TYPE(bf16, BF16)
FOR_TYPE(f16, F16)
