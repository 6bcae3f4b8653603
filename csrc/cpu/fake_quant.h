/* Fake quantization, quantization and dequantization of a range of blocks, a batch of elements at a time.
 *
 * A batch runs in stages over memory that is in the first-level cache by then: keys of the blocks (their largest
 * element), scales of all blocks at once, random bits, codes. Rounding adds and subtracts 1.5 x 2^23, which rounds half
 * to even on every instruction set, after clamping, which commutes with it because the ends of the range are integers;
 * it also turns -0 into the one zero that a code has.
 */
#ifndef QAD_FAKE_QUANT_H
#define QAD_FAKE_QUANT_H

#include "../numerics.h"
#include "kernels.h"
#include "random.h"
#include "simd.h"

namespace {

constexpr int chunk = 32; /* elements per step of the inner loops: every block is some of them */
constexpr int vectors = chunk / width;
constexpr int most_blocks = QAD_BATCH / 32;
constexpr uint32_t quiet_nan = 0x7fc00000u;

QAD_INLINE int size_of(int dtype) { return dtype == QAD_F32 ? 4 : 2; }

/* Memory that the next batch will want, asked for a chunk at a time while this one is computed: stages that only compute
 * would else leave the memory idle. Asking for what lies beyond the end is harmless. Lines to be written are asked for
 * only where they come from memory: out of a cache, that gets in the way (of a copy's rate, fp32 forward: 0.97 without
 * and 0.93 with it at 1536 x 576; 0.96 without and 1.06 with it at 4096 x 4096). */
struct Ahead {
    const char *in, *out;
    int in_bytes, out_bytes; /* of a chunk */

    void ask() {
        for (int byte = 0; byte < in_bytes; byte += 64) __builtin_prefetch(in + byte, 0, 3);
        for (int byte = 0; byte < out_bytes; byte += 64) __builtin_prefetch(out + byte, 1, 2);
        in += in_bytes;
        out += out_bytes;
    }
};

QAD_INLINE Ahead ahead(const qad_fake_quantize_job *job, int64_t first) {
    const int in = size_of(job->weights_dtype), out = size_of(job->out_dtype);
    return {(const char *)job->weights + in * first, (const char *)job->out + out * first, in * chunk,
            job->streams ? out * chunk : 0};
}

QAD_CALLED const float *load_elements(const void *from, int dtype, int64_t first, int count, float *buffer) {
    if (dtype == QAD_F32) return (const float *)from + first;
    const uint16_t *source = (const uint16_t *)from + first;
    if (dtype == QAD_BF16)
        for (int i = 0; i < count; i += width) store(buffer + i, load_bfloat(source + i));
    else
        for (int i = 0; i < count; i += width) store(buffer + i, load_half(source + i));
    return buffer;
}

/* Values that are not NaN. */
QAD_CALLED void store_elements(void *to, int dtype, int64_t first, int count, const float *buffer) {
    uint16_t *target = (uint16_t *)to + first;
    if (dtype == QAD_BF16)
        for (int i = 0; i < count; i += width) store_bfloat(target + i, load(buffer + i));
    else
        for (int i = 0; i < count; i += width) store_half(target + i, load(buffer + i));
}

/* See qad_element_key. */
QAD_INLINE U key_of(F value) { return bit_xor(rotate_left_1(bits_of(value)), set_words(1)); }

QAD_INLINE U block_key(const float *values, int block) {
    U key = key_of(load(values));
    for (int i = width; i < block; i += width) key = max_words(key, key_of(load(values + i)));
    return key;
}

template <int block> QAD_INLINE void find_keys_of(const float *values, int blocks, uint32_t *keys) {
    int b = 0;
    for (; b + 4 <= blocks; b += 4, values += 4 * block)
        reduce_max_4(keys + b, block_key(values, block), block_key(values + block, block),
                     block_key(values + 2 * block, block), block_key(values + 3 * block, block));
    for (; b < blocks; ++b, values += block) keys[b] = reduce_max(block_key(values, block));
}

QAD_CALLED void find_keys(const float *values, int blocks, int block, uint32_t *keys) {
    if (block == 32)
        find_keys_of<32>(values, blocks, keys);
    else if (block == 64)
        find_keys_of<64>(values, blocks, keys);
    else
        find_keys_of<128>(values, blocks, keys);
}

QAD_CALLED bool all_finite(const float *values, int count) {
    U key[vectors];
    for (int v = 0; v < vectors; ++v) key[v] = set_words(0);
    for (int i = 0; i < count; i += chunk)
        for (int v = 0; v < vectors; ++v) key[v] = max_words(key[v], rotate_left_1(bits_of(load(values + i + v * width))));
    for (int v = 1; v < vectors; ++v) key[0] = max_words(key[0], key[v]);
    return reduce_max(key[0]) < QAD_KEY_NOT_FINITE;
}

/* The scales of a batch, and which of its blocks are damaged. Arrays are padded to whole vectors. */
struct Scales {
    float scale[most_blocks + width], inverse[most_blocks + width];
    bool damaged[most_blocks];
    int damaged_count;
};

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
    return choose(less_equal(value, value), magnitude, float_of(set_words(quiet_nan)));
}

QAD_CALLED void find_scales(const float *values, const float *given, int blocks, const qad_grid &grid, Scales &out) {
    uint32_t keys[most_blocks + width];
    float padded[most_blocks + width];
    bool look = false;
    if (given) {
        memcpy(padded, given, (size_t)blocks * 4);
        for (int b = blocks; b % width; ++b) padded[b] = 1.0f;
        look = !all_finite(values, blocks * grid.block);
        if (look) find_keys(values, blocks, grid.block, keys);
    } else {
        find_keys(values, blocks, grid.block, keys);
        for (int b = blocks; b % width; ++b) keys[b] = 0;
    }
    const F end = set((float)(grid.signed_scale ? grid.code_min : grid.code_max)), zero = set(0.0f);
    U any_bad = set_words(0);
    for (int b = 0; b < blocks; b += width) {
        F scale;
        if (given) {
            scale = round_scales(load(padded + b), grid);
        } else {
            const U key = load_words(keys + b);
            const U sign = shift_left(bit_xor(key, set_words(1)), 31);
            U bits = shift_right(key, 1);
            if (grid.signed_scale) bits = bit_or(bits, sign);
            const F extreme = float_of(bits);
            scale = round_scales(div(extreme, end), grid);
            /* An infinity minus itself is a NaN. */
            scale = choose(less_equal(sub(extreme, extreme), zero), scale, float_of(set_words(quiet_nan)));
        }
        any_bad = bit_or(any_bad, bits_of(choose(less_equal(scale, scale), zero, set(1.0f))));
        store(out.scale + b, scale);
        store(out.inverse + b, div(set(1.0f), scale));
    }
    out.damaged_count = 0;
    if (!look && reduce_max(any_bad) == 0) return;
    for (int b = 0; b < blocks; ++b) {
        out.damaged[b] = !(out.scale[b] <= 3.0e38f) || (look && keys[b] >= QAD_KEY_NOT_FINITE);
        out.damaged_count += out.damaged[b];
    }
}

/* The noise of a batch: 16 random bits for each element, and whether a block is rounded hard. */
struct Draws {
    uint16_t element[QAD_BATCH];
    float block[most_blocks];
};

QAD_INLINE F round_code(F clamped) {
    const F magic = set(12582912.0f);
    return sub(add(clamped, magic), magic);
}

/* The (fractional, unless hard) code of a scaled weight. A sum with noise is never -0: the noise is never zero, and what
 * cancels gives +0. */
template <int mode, bool mixed>
QAD_INLINE F code_of(F scaled, const uint16_t *random, M hard, F low, F high) {
    F moved = scaled;
    if (mode == QAD_NOISE_UNIFORM) moved = add(scaled, uniform_from(widen(random), -0.5f));
    if (mode == QAD_NOISE_STOCHASTIC) moved = add(scaled, uniform_from(widen(random), 0.0f));
    if (mixed && mode != QAD_NOISE_PARTIAL) moved = choose(hard, scaled, moved);
    moved = min_of(high, max_of(low, moved));
    if (mode == QAD_NOISE_NONE) return round_code(moved);
    F soft = moved;
    if (mode == QAD_NOISE_STOCHASTIC) soft = floor_of(moved);
    if (mode == QAD_NOISE_PARTIAL) soft = add(moved, set(0.0f));
    return mixed ? choose(hard, round_code(moved), soft) : soft;
}

template <int mode, bool mixed>
void forward_batch(const float *values, float *out, int blocks, const qad_grid &grid, const Scales &scales,
                   const Draws &draws, float hard_share, Ahead next) {
    const F low = set((float)grid.code_min), high = set((float)grid.code_max), share = set(hard_share);
    const uint16_t *random = draws.element;
    for (int b = 0; b < blocks; ++b) {
        const F scale = set(scales.scale[b]), inverse = set(scales.inverse[b]);
        M hard = less(share, share);
        if (mixed) hard = less(set(draws.block[b]), share);
        for (int i = 0; i < grid.block; i += chunk) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const F scaled = mul(load(values + v * width), inverse);
                store(out + v * width, mul(code_of<mode, mixed>(scaled, random + v * width, hard, low, high), scale));
            }
            next.ask();
            values += chunk;
            out += chunk;
            random += chunk;
        }
    }
}

void mask_batch(const float *values, float *grad, int blocks, const qad_grid &grid, const Scales &scales, Ahead next) {
    const F first = set((float)grid.code_min - 0.5f), last = set((float)grid.code_max + 0.5f);
    for (int b = 0; b < blocks; ++b) {
        const F inverse = set(scales.inverse[b]);
        for (int i = 0; i < grid.block; i += chunk) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const F scaled = mul(load(values + v * width), inverse);
                const M inside = both(less_equal(first, scaled), less_equal(scaled, last));
                store(grad + v * width, keep_if(inside, load(grad + v * width)));
            }
            next.ask();
            values += chunk;
            grad += chunk;
        }
    }
}

template <int mode, bool mixed>
void learn_batch(const float *values, float *grad, float *grad_scales, int blocks, const qad_grid &grid,
                 const Scales &scales, const Draws &draws, float hard_share, Ahead next) {
    const F low = set((float)grid.code_min), high = set((float)grid.code_max), share = set(hard_share);
    const F first = set((float)grid.code_min - 0.5f), last = set((float)grid.code_max + 0.5f);
    const uint16_t *random = draws.element;
    for (int b = 0; b < blocks; ++b) {
        const F inverse = set(scales.inverse[b]);
        M hard = less(share, share);
        if (mixed) hard = less(set(draws.block[b]), share);
        F products[128 / width];
        int count = grid.block / width;
        for (int i = 0; i < count; ++i) {
            const F scaled = mul(load(values), inverse), slope = load(grad);
            const M inside = both(less_equal(first, scaled), less_equal(scaled, last));
            const F code = code_of<mode, mixed>(scaled, random, hard, low, high);
            products[i] = mul(sub(code, keep_if(inside, scaled)), slope);
            store(grad, keep_if(inside, slope));
            values += width;
            grad += width;
            random += width;
        }
        for (int i = 0; i < grid.block; i += chunk) next.ask();
        for (; count > 1; count /= 2)
            for (int i = 0; i < count / 2; ++i) products[i] = add(products[i], products[i + count / 2]);
        grad_scales[b] = fold(products[0]);
    }
}

/* How the noise of a job works out. */
struct Mode {
    int mode;
    bool mixed;
    explicit Mode(const qad_noise &noise) : mode(noise.mode), mixed(false) {
        if (noise.hard_share >= 1.0f) mode = QAD_NOISE_NONE;
        if (mode != QAD_NOISE_NONE) mixed = noise.hard_share > 0.0f;
    }
    bool draws_elements() const { return mode == QAD_NOISE_UNIFORM || mode == QAD_NOISE_STOCHASTIC; }
};

QAD_CALLED void fill_blocks(Draws &draws, int64_t first, int blocks, const Random &random) {
    uint16_t bits[most_blocks + random_step];
    fill_random(bits, first, blocks, random);
    for (int b = 0; b < blocks; ++b) draws.block[b] = ((float)bits[b] + 0.5f) * 0x1p-16f;
}

/* Overwrite the damaged blocks of a batch that begins at element `first`. */
void fill_damaged(void *to, int dtype, int64_t first, int blocks, int block, const Scales &scales, bool with_nan) {
    const uint32_t word = with_nan ? quiet_nan : 0u;
    const uint16_t half = (uint16_t)(!with_nan ? 0u : dtype == QAD_BF16 ? 0x7fc0u : 0x7e00u);
    for (int b = 0; b < blocks; ++b) {
        if (!scales.damaged[b]) continue;
        for (int64_t i = first + b * block; i < first + (b + 1) * block; ++i) {
            if (dtype == QAD_F32)
                memcpy((float *)to + i, &word, 4);
            else
                memcpy((uint16_t *)to + i, &half, 2);
        }
    }
}

int64_t fake_quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const qad_noise &noise = job->noise;
    const Mode mode(noise);
    const Random elements(noise.seed_low, noise.seed_high, noise.tensor, noise.step, QAD_STREAM_ELEMENT);
    const Random hardness(noise.seed_low, noise.seed_high, noise.tensor, noise.step, QAD_STREAM_BLOCK);
    const int per_batch = QAD_BATCH / grid.block;
    alignas(64) float in_buffer[QAD_BATCH], out_buffer[QAD_BATCH];
    Scales scales;
    Draws draws;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        float *out = job->out_dtype == QAD_F32 ? (float *)job->out + first : out_buffer;
        if (mode.draws_elements()) fill_random(draws.element, first, count, elements);
        find_scales(values, job->scales ? job->scales + b : nullptr, blocks, grid, scales);
        if (mode.mixed) fill_blocks(draws, b, blocks, hardness);
        const Ahead next = ahead(job, first + QAD_BATCH);
        if (mode.mode == QAD_NOISE_NONE)
            forward_batch<QAD_NOISE_NONE, false>(values, out, blocks, grid, scales, draws, 0, next);
        else if (mode.mode == QAD_NOISE_UNIFORM)
            (mode.mixed ? forward_batch<QAD_NOISE_UNIFORM, true> : forward_batch<QAD_NOISE_UNIFORM, false>)(
                values, out, blocks, grid, scales, draws, noise.hard_share, next);
        else if (mode.mode == QAD_NOISE_STOCHASTIC)
            (mode.mixed ? forward_batch<QAD_NOISE_STOCHASTIC, true> : forward_batch<QAD_NOISE_STOCHASTIC, false>)(
                values, out, blocks, grid, scales, draws, noise.hard_share, next);
        else
            (mode.mixed ? forward_batch<QAD_NOISE_PARTIAL, true> : forward_batch<QAD_NOISE_PARTIAL, false>)(
                values, out, blocks, grid, scales, draws, noise.hard_share, next);
        if (job->out_dtype != QAD_F32) store_elements(job->out, job->out_dtype, first, count, out);
        if (scales.damaged_count) fill_damaged(job->out, job->out_dtype, first, blocks, grid.block, scales, true);
        damaged += scales.damaged_count;
        if (job->used_scales) memcpy(job->used_scales + b, scales.scale, (size_t)blocks * 4);
    }
    return damaged;
}

int64_t backward(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const qad_noise &noise = job->noise;
    const Mode mode(noise);
    const Random elements(noise.seed_low, noise.seed_high, noise.tensor, noise.step, QAD_STREAM_ELEMENT);
    const Random hardness(noise.seed_low, noise.seed_high, noise.tensor, noise.step, QAD_STREAM_BLOCK);
    const int per_batch = QAD_BATCH / grid.block;
    alignas(64) float in_buffer[QAD_BATCH], grad_buffer[QAD_BATCH];
    Scales scales;
    Draws draws;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        float *grad = (float *)load_elements(job->out, job->out_dtype, first, count, grad_buffer);
        find_scales(values, job->scales ? job->scales + b : nullptr, blocks, grid, scales);
        const Ahead next = ahead(job, first + QAD_BATCH);
        if (!job->grad_scales) {
            mask_batch(values, grad, blocks, grid, scales, next);
        } else {
            float *slopes = job->grad_scales + b;
            if (mode.draws_elements()) fill_random(draws.element, first, count, elements);
            if (mode.mixed) fill_blocks(draws, b, blocks, hardness);
            if (mode.mode == QAD_NOISE_NONE)
                learn_batch<QAD_NOISE_NONE, false>(values, grad, slopes, blocks, grid, scales, draws, 0, next);
            else if (mode.mode == QAD_NOISE_UNIFORM)
                (mode.mixed ? learn_batch<QAD_NOISE_UNIFORM, true> : learn_batch<QAD_NOISE_UNIFORM, false>)(
                    values, grad, slopes, blocks, grid, scales, draws, noise.hard_share, next);
            else if (mode.mode == QAD_NOISE_STOCHASTIC)
                (mode.mixed ? learn_batch<QAD_NOISE_STOCHASTIC, true> : learn_batch<QAD_NOISE_STOCHASTIC, false>)(
                    values, grad, slopes, blocks, grid, scales, draws, noise.hard_share, next);
            else
                (mode.mixed ? learn_batch<QAD_NOISE_PARTIAL, true> : learn_batch<QAD_NOISE_PARTIAL, false>)(
                    values, grad, slopes, blocks, grid, scales, draws, noise.hard_share, next);
            if (scales.damaged_count)
                for (int i = 0; i < blocks; ++i)
                    if (scales.damaged[i]) slopes[i] = 0.0f;
        }
        if (job->out_dtype != QAD_F32) store_elements(job->out, job->out_dtype, first, count, grad);
        if (scales.damaged_count) fill_damaged(job->out, job->out_dtype, first, blocks, grid.block, scales, false);
        damaged += scales.damaged_count;
    }
    return damaged;
}

int64_t quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const int per_batch = QAD_BATCH / grid.block;
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    alignas(64) float in_buffer[QAD_BATCH];
    uint16_t halves[most_blocks + width];
    Scales scales;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        int8_t *codes = job->codes + first;
        find_scales(values, job->scales ? job->scales + b : nullptr, blocks, grid, scales);
        for (int i = 0; i < blocks; i += width) store_half(halves + i, load(scales.scale + i));
        for (int i = 0; i < blocks; ++i) {
            const F inverse = set(scales.inverse[i]);
            if (scales.damaged_count && scales.damaged[i]) {
                halves[i] = 0x7e00;
                memset(codes + i * grid.block, 0, (size_t)grid.block);
                continue;
            }
            for (int j = i * grid.block; j < (i + 1) * grid.block; j += width) {
                const F scaled = mul(load(values + j), inverse);
                store_codes(codes + j, code_of<QAD_NOISE_NONE, false>(scaled, nullptr, less(low, low), low, high));
            }
        }
        memcpy(job->half_scales + b, halves, (size_t)blocks * 2);
        damaged += scales.damaged_count;
    }
    return damaged;
}

int64_t dequantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const int block = job->grid.block, per_batch = QAD_BATCH / block;
    alignas(64) float out_buffer[QAD_BATCH];
    float scales[most_blocks + width];
    uint16_t halves[most_blocks + width] = {0};
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * block;
        const int64_t first = b * block;
        float *out = job->out_dtype == QAD_F32 ? (float *)job->out + first : out_buffer;
        memcpy(halves, job->stored_scales + b, (size_t)blocks * 2);
        for (int i = 0; i < blocks; i += width) {
            const F scale = load_half(halves + i);
            store(scales + i, choose(less_equal(scale, scale), scale, float_of(set_words(quiet_nan))));
        }
        const int8_t *codes = job->codes + first;
        for (int i = 0; i < blocks; ++i) {
            const F scale = set(scales[i]);
            for (int j = i * block; j < (i + 1) * block; j += width) store(out + j, mul(load_codes(codes + j), scale));
        }
        if (job->out_dtype != QAD_F32) store_elements(job->out, job->out_dtype, first, count, out);
    }
    return 0;
}

void uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
               uint32_t stream) {
    const Random random(seed_low, seed_high, tensor, step, stream);
    uint16_t bits[QAD_BATCH];
    for (int64_t first = 0; first < count; first += QAD_BATCH) {
        const int left = (int)(count - first < (int64_t)QAD_BATCH ? count - first : (int64_t)QAD_BATCH);
        fill_random(bits, first, left, random);
        for (int i = 0; i < left; ++i) out[first + i] = ((float)bits[i] + 0.5f) * 0x1p-16f;
    }
}

} // namespace
#endif
