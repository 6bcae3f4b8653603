/* Half of what kernels.cpp offers: what is of one dtype of 16 bits, and the KL head. It is compiled beside it and at the
 * same time, once per instruction set: two halves are sooner done than a whole. */
#include "backward.h"
#include "divergence.h"
#include "forward.h"
#include "kernels.h"

#define QAD_JOIN(a, b) a##b
#define QAD_NAME(a, b) QAD_JOIN(a, b)

extern "C" int64_t QAD_NAME(qad_fake_quantize_halves_, QAD_SET)(const qad_fake_quantize_job *job, int64_t begin,
                                                                int64_t end) {
    return job->out_dtype == QAD_BF16 ? forward<QAD_BF16, QAD_BF16>(*job, begin, end)
                                      : forward<QAD_F16, QAD_F16>(*job, begin, end);
}

extern "C" int64_t QAD_NAME(qad_mask_halves_, QAD_SET)(const qad_fake_quantize_job *job, int64_t begin, int64_t end) {
    return job->out_dtype == QAD_BF16 ? mask<QAD_BF16>(*job, begin, end) : mask<QAD_F16>(*job, begin, end);
}

extern "C" void QAD_NAME(qad_divergence_rows_, QAD_SET)(const qad_divergence_job *job, int64_t begin, int64_t end) {
    divergence_rows(job, begin, end);
}
