/* Codes and scales of a range of blocks, and back. */
#ifndef QAD_CODES_H
#define QAD_CODES_H

#include "rounding.h"
#include "scales.h"

namespace {

int64_t quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const qad_grid grid = job->grid;
    const int per_batch = batch_of<QAD_F32>() / grid.block;
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    alignas(64) float in_buffer[QAD_BATCH];
    uint16_t halves[most_blocks + width];
    const ScaleRule rule(grid);
    Scales scales;
    int64_t damaged = 0;
    for (int64_t b = begin; b < end; b += per_batch) {
        const int blocks = (int)(end - b < per_batch ? end - b : per_batch), count = blocks * grid.block;
        const int64_t first = b * grid.block;
        const float *values = load_elements(job->weights, job->weights_dtype, first, count, in_buffer);
        int8_t *codes = job->codes + first;
        find_scales_of<QAD_F32>(values, job->scales ? job->scales + b : nullptr, nullptr, blocks, grid.block, rule,
                                nullptr, scales);
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
                store_codes(codes + j, clamp(code_of<QAD_NOISE_NONE>(scaled), low, high));
            }
        }
        memcpy(job->half_scales + b, halves, (size_t)blocks * 2);
        damaged += scales.damaged_count;
    }
    return damaged;
}

int64_t dequantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    const int block = job->grid.block, per_batch = batch_of<QAD_F32>() / block;
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

} // namespace
#endif
