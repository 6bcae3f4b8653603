/* Compiled once per instruction set, which QAD_SET names. Includes no C++ header: see simd.h. */
#include "codes.h"
#include "forward.h"
#include "kernels.h"
#include "learned_scales.h"

#define QAD_JOIN(a, b) a##b
#define QAD_NAME(a, b) QAD_JOIN(a, b)

namespace {

bool all_halves(const qad_fake_quantize_job &job) {
    return job.weights_dtype == job.out_dtype && job.out_dtype != QAD_F32;
}

int64_t fake_quantize(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (all_halves(*job)) return QAD_NAME(qad_fake_quantize_halves_, QAD_SET)(job, begin, end);
    switch (job->out_dtype) {
    case QAD_BF16:
        return forward<QAD_F32, QAD_BF16>(*job, begin, end);
    case QAD_F16:
        return forward<QAD_F32, QAD_F16>(*job, begin, end);
    default:
        return forward<QAD_F32, QAD_F32>(*job, begin, end);
    }
}

int64_t backward(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    if (job->grad_scales) return learn(*job, begin, end);
    return all_halves(*job) ? QAD_NAME(qad_mask_halves_, QAD_SET)(job, begin, end) : mask<QAD_F32>(*job, begin, end);
}

/* The 16 bits of elements, as numbers between 0 and 1. */
void uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
               uint32_t stream) {
    const Random random(seed_low, seed_high, tensor, step, stream);
    constexpr int group = group_of<float>();
    alignas(64) uint16_t bits[group * chunk];
    uint64_t products[group];
    for (int i = 0; i < group; ++i) products[i] = product_of_call((uint64_t)i * calls_per_chunk);
    for (int64_t first = 0; first < count; first += group * chunk) {
        fill_random<false>(bits, (uint64_t)first / 8, products, group, random);
        for (int i = 0; i < group * chunk && first + i < count; ++i)
            out[first + i] = ((float)bits[i] + 0.5f) * 0x1p-16f;
    }
}

} // namespace

extern "C" const qad_kernels QAD_NAME(qad_kernels_, QAD_SET);
extern "C" const qad_kernels QAD_NAME(qad_kernels_, QAD_SET) = {
    fake_quantize, backward, quantize, dequantize, uniform16, QAD_NAME(qad_divergence_rows_, QAD_SET)};
