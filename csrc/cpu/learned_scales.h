/* The gradients of fake quantization by weights and by scales. */
#ifndef QAD_LEARNED_SCALES_H
#define QAD_LEARNED_SCALES_H

#include "backward.h"
#include "rounding.h"
#include "walk.h"

namespace {

template <int mode> void learn_chunks(const Step &step, const qad_grid &grid, float *grad_scales) {
    const F low = set((float)grid.code_min), high = set((float)grid.code_max);
    const Inside inside(grid);
    const uint16_t *random = step.random;
    const int per_block = grid.block / chunk;
    for (int k = 0; k < step.chunks; k += per_block) {
        const int first = step.list[k].first, b = step.list[k].block;
        const F inverse = set(step.batch.scales.inverse[b]);
        const float *values = (const float *)step.batch.weights + first;
        float *grad = (float *)step.to + first;
        F products[128 / width];
        int count = per_block * (chunk / width);
        const auto learn = [&](F scaled, F moved) {
            const F slope = load(grad), code = clamp(code_of<mode>(moved), low, high);
            const M passes = inside(scaled);
            store(grad, keep_if(passes, slope));
            grad += width;
            return mul(sub(code, keep_if(passes, scaled)), slope);
        };
        for (int i = 0; i < count; i += 2) {
            const Pair scaled = Elements<QAD_F32>::load_pair(values).times(inverse);
            const Pair moved = move<Elements<QAD_F32>, mode>(scaled, random);
            products[i] = learn(scaled.first, moved.first);
            products[i + 1] = learn(scaled.second, moved.second);
            values += pair;
            if (draws_elements(mode)) random += pair;
        }
        for (int i = 0; i < grid.block; i += chunk) {
            ask_for_weights<float>(step.weights_ahead, k * chunk + i, step.far);
            if (step.out_ahead) ask<float>(step.out_ahead, k * chunk + i, to_write);
        }
        for (; count > 1; count /= 2)
            for (int i = 0; i < count / 2; ++i) products[i] = add(products[i], products[i + count / 2]);
        grad_scales[b] = fold(products[0]);
    }
}

void (*learn_for(int mode))(const Step &, const qad_grid &, float *) {
    switch (mode) {
    case QAD_NOISE_UNIFORM:
        return learn_chunks<QAD_NOISE_UNIFORM>;
    case QAD_NOISE_STOCHASTIC:
        return learn_chunks<QAD_NOISE_STOCHASTIC>;
    case QAD_NOISE_PARTIAL:
        return learn_chunks<QAD_NOISE_PARTIAL>;
    default:
        return learn_chunks<QAD_NOISE_NONE>;
    }
}

/* Backward with gradients by the scales: sums want fp32, and its elements in order. */
int64_t learn(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<QAD_F32> walk(job);
    const auto hard = learn_for(QAD_NOISE_NONE), soft = learn_for(walk.mode.mode);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        float *grad = (float *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged);
        float *slopes = job.grad_scales + batch.block;
        walk.treat<float>(
            batch, grad, false, false,
            [&](const Step &step) { hard(step, job.grid, slopes); },
            [&](const Step &step) { soft(step, job.grid, slopes); });
        if (batch.scales.damaged_count) {
            fill_damaged<QAD_F32>(grad, batch, job.grid.block, false);
            for (int i = 0; i < batch.blocks; ++i)
                if (batch.scales.damaged[i]) slopes[i] = 0.0f;
        }
        if (job.out_dtype != QAD_F32) store_elements(job.out, job.out_dtype, batch.element, batch.count, grad);
    });
}

} // namespace
#endif
