/* What one instruction set offers to cpu/api.cpp: each function works on the blocks [begin, end). */
#ifndef QAD_KERNELS_H
#define QAD_KERNELS_H

#include "../qad.h"

/* At most as many elements are worked on at a time: with their noise and a second buffer they stay in a first-level
 * cache. Work is split between threads at multiples of this, so that no call of the random generator is shared. */
enum { QAD_BATCH = 2048 };

/* Elements that the inner loops work on at a time: every block is some of them. */
constexpr int chunk = 32;

struct qad_fake_quantize_job {
    const void *weights;
    int weights_dtype;
    const float *scales;
    float *used_scales;
    void *out; /* forward: the weights; backward: the gradient */
    int out_dtype;
    float *grad_scales;
    int8_t *codes;
    uint16_t *half_scales;
    const uint16_t *stored_scales;
    qad_grid grid;
    qad_noise noise;
    bool streams; /* more than the caches hold: worth asking for memory ahead of its use */
    bool many_lines; /* and to ask for more of it at a time: see asks_for_many_lines */
    bool backwards;  /* what a batch writes: see meets_its_stores */
    bool rounds_tables; /* of products in fp16, before they are looked up */
};

struct qad_divergence_job {
    float *student;
    int64_t student_stride;
    const float *teacher;
    int64_t teacher_stride;
    const int64_t *labels;
    double *divergence, *nll;
    int64_t vocabulary;
    int kind;
    float beta, temperature, next_token_weight;
    int keep_logits;
};

struct qad_kernels {
    int64_t (*fake_quantize)(const qad_fake_quantize_job *job, int64_t begin, int64_t end);
    int64_t (*backward)(const qad_fake_quantize_job *job, int64_t begin, int64_t end);
    int64_t (*quantize)(const qad_fake_quantize_job *job, int64_t begin, int64_t end);
    int64_t (*dequantize)(const qad_fake_quantize_job *job, int64_t begin, int64_t end);
    void (*uniform16)(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
                      uint32_t stream);
    void (*divergence)(const qad_divergence_job *job, int64_t begin, int64_t end);
};

/* See more_kernels.cpp. */
#define QAD_PARTS(set)                                                                                                 \
    void qad_divergence_rows_##set(const qad_divergence_job *job, int64_t begin, int64_t end);                         \
    int64_t qad_fake_quantize_halves_##set(const qad_fake_quantize_job *job, int64_t begin, int64_t end);              \
    int64_t qad_mask_halves_##set(const qad_fake_quantize_job *job, int64_t begin, int64_t end)
extern "C" {
QAD_PARTS(portable);
QAD_PARTS(avx2);
QAD_PARTS(avx512);
QAD_PARTS(avx512bf16);
QAD_PARTS(neon);
}

#endif
