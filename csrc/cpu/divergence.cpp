/* Compiled once per instruction set, beside kernels.cpp and at the same time: two halves are sooner done than a whole. */
#include "divergence.h"
#include "kernels.h"

#define QAD_JOIN(a, b) a##b
#define QAD_NAME(a, b) QAD_JOIN(a, b)

extern "C" void QAD_NAME(qad_divergence_rows_, QAD_SET)(const qad_divergence_job *job, int64_t begin, int64_t end) {
    divergence_rows(job, begin, end);
}
