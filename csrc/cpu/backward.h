/* The gradient of fake quantization by the weights, in place: what passes. Of another dtype than the weights it is staged
 * as fp32.
 */
#ifndef QAD_BACKWARD_H
#define QAD_BACKWARD_H

#include "rounding.h"
#include "walk.h"

namespace {

/* Whether a gradient passes: the weight is at most half a step beyond the last code. */
struct Inside {
    F first, last;
    explicit Inside(const qad_grid &grid)
        : first(set((float)grid.code_min - 0.5f)), last(set((float)grid.code_max + 0.5f)) {}
    M operator()(F scaled) const { return both(less_equal(first, scaled), less_equal(scaled, last)); }
};

template <int dtype>
void mask_batch(const Batch &batch, void *to, const qad_grid &grid, const char *weights_ahead, const char *out_ahead,
                bool far) {
    typedef Elements<dtype> E;
    const Inside inside(grid);
    const typename E::Stored *values = (const typename E::Stored *)batch.weights;
    typename E::Stored *grad = (typename E::Stored *)to;
    const int more = chunks_per_block_log2(grid), chunks = batch.count / chunk;
    for (int c = 0; c < chunks; ++c) {
        const F inverse = set(batch.scales.inverse[c >> more]);
        ask_for_weights<typename E::Stored>(weights_ahead, c * chunk, far);
        if (out_ahead) ask<typename E::Stored>(out_ahead, c * chunk, to_write);
#pragma GCC unroll 4
        for (int i = c * chunk; i < (c + 1) * chunk; i += pair) {
            const Pair scaled = E::load_pair(values + i).times(inverse);
            E::keep_pair_if(grad + i, inside(scaled.first), inside(scaled.second));
        }
    }
}

template <int dtype> int64_t mask(const qad_fake_quantize_job &job, int64_t begin, int64_t end) {
    Walk<dtype> walk(job);
    alignas(64) float staged[QAD_BATCH];
    return walk(begin, end, [&](const Batch &batch) {
        void *grad = dtype == QAD_F32
                         ? (void *)load_elements(job.out, job.out_dtype, batch.element, batch.count, staged)
                         : (void *)((typename Elements<dtype>::Stored *)job.out + batch.element);
        mask_batch<dtype>(batch, grad, job.grid, walk.weights_ahead(batch), walk.out_ahead(batch),
                          job.many_lines);
        if (batch.scales.damaged_count) fill_damaged<dtype>(grad, batch, job.grid.block, false);
        if (dtype != job.out_dtype) store_elements(job.out, job.out_dtype, batch.element, batch.count, (float *)grad);
    });
}

} // namespace
#endif
