/* The C API on a CPU: which instruction set, which thread does which blocks. Compiled for the plainest machine. */
#include <pthread.h>
#include <string.h>
#if defined(QAD_HAVE_X86)
#include <cpuid.h>
#endif

#include "../qad.h"
#include "kernels.h"
#include "pack.h"

/* A library may hold the kernels of some instruction sets only: those it lacks are null. */
#define QAD_TABLE(set) extern const qad_kernels qad_kernels_##set __attribute__((weak))
extern "C" {
QAD_TABLE(portable);
QAD_TABLE(avx2);
QAD_TABLE(avx512);
QAD_TABLE(avx512bf16);
QAD_TABLE(neon);
}

namespace {

#if defined(QAD_HAVE_X86)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Asked of the processor, because compilers learnt its name later; and once, because under a hypervisor the answer can
 * take longer than a small weight. */
bool ask_for_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
const bool has_bf16 = ask_for_bf16();
#endif

const qad_kernels *kernels_for(int isa) {
    switch (isa) {
    case QAD_ISA_PORTABLE:
        return &qad_kernels_portable;
#if defined(QAD_HAVE_X86)
    case QAD_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &qad_kernels_avx2 : nullptr;
    case QAD_ISA_AVX512:
        return has_avx512() ? &qad_kernels_avx512 : nullptr;
    case QAD_ISA_AVX512BF16:
        return has_avx512() && has_bf16 ? &qad_kernels_avx512bf16 : nullptr;
#elif defined(QAD_HAVE_NEON)
    case QAD_ISA_NEON:
        return &qad_kernels_neon;
#endif
    default:
        return nullptr;
    }
}

int best_isa() {
    const int from_best[] = {QAD_ISA_NEON, QAD_ISA_AVX512BF16, QAD_ISA_AVX512, QAD_ISA_AVX2, QAD_ISA_PORTABLE};
    for (int isa : from_best)
        if (kernels_for(isa)) return isa;
    return -1;
}

int chosen_isa = -1;

const qad_kernels &kernels() { return *kernels_for(qad_get_isa()); }

enum { MOST_THREADS = 64 };
/* Below this a thread costs more than it saves. */
const int64_t ELEMENTS_PER_THREAD = 1 << 18;

template <typename Job> struct Share {
    const Job *job;
    int64_t (*work)(const Job *, int64_t, int64_t);
    int64_t begin, end, result;
    static void *run(void *self) {
        Share *share = (Share *)self;
        share->result = share->work(share->job, share->begin, share->end);
        return nullptr;
    }
};

/* Split [0, count) into runs of whole `unit`s, one per thread, none shorter than `smallest`, and add up what they
 * return. A thread that cannot be started is replaced by the caller. */
template <typename Job>
int64_t split(const Job *job, int64_t (*work)(const Job *, int64_t, int64_t), int64_t count, int64_t unit,
              int64_t smallest, int threads) {
    if (threads > count / smallest) threads = (int)(count / smallest);
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1) return work(job, 0, count);
    Share<Job> shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    bool started[MOST_THREADS] = {false};
    const int64_t units = (count + unit - 1) / unit;
    for (int t = 0; t < threads; ++t) {
        const int64_t begin = units * t / threads * unit, end = units * (t + 1) / threads * unit;
        shares[t] = {job, work, begin, end < count ? end : count, 0};
        if (t) started[t] = pthread_create(&ids[t], nullptr, Share<Job>::run, &shares[t]) == 0;
    }
    for (int t = 0; t < threads; ++t)
        if (!started[t]) Share<Job>::run(&shares[t]);
    int64_t total = 0;
    for (int t = 0; t < threads; ++t) {
        if (started[t]) pthread_join(ids[t], nullptr);
        total += shares[t].result;
    }
    return total;
}

/* Weights of which not even a large cache holds much: 8M elements. (Tests want it for small ones.) */
#ifndef QAD_STREAMING_ELEMENTS
#define QAD_STREAMING_ELEMENTS (1 << 23)
#endif

bool is_amd() {
#if defined(QAD_AS_ON_AMD) /* by a test */
    return QAD_AS_ON_AMD;
#elif defined(QAD_HAVE_X86)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

/* Whether the processor is faster if weights are asked for a batch earlier and for the second-level cache, if batches are whole
 * without noise too, and if random bits are given to twice as many chunks at a time. A Zen 4 is, out of memory, in ps an
 * element: the first made fp32 to bf16 without noise 206 from 272 (4096 x 4096), the second bf16 without noise 136 from 154,
 * the third fp32 with noise, which was given it then, 309 from 347 (49152 x 576). */
bool asks_for_many_lines(const qad_fake_quantize_job &job) { return job.streams && is_amd(); }

/* Whether weights that are loaded soon lie where the last 12 bits of an address are those of what was just stored. A Zen 4
 * lets such a load wait for the store: 4096 x 4096 in bf16 with uniform noise took 335 ps an element where out began 64 bytes
 * after the weights, but for multiples of 4096 (as malloc has it for such sizes), 284 where 128, and 255 where 256 or more
 * (without noise, out of a cache, 146, 134, 126). From the last chunk to the first, loads go the other way. */
bool meets_its_stores(const qad_fake_quantize_job &job) {
    const bool same_size = (job.weights_dtype == QAD_F32) == (job.out_dtype == QAD_F32);
    const uintptr_t after = ((uintptr_t)job.out - (uintptr_t)job.weights) % 4096;
    return is_amd() && same_size && 0 < after && after < 256;
}

int64_t split_blocks(qad_fake_quantize_job &job, int64_t (*work)(const qad_fake_quantize_job *, int64_t, int64_t),
                     int64_t blocks, int threads) {
    job.streams = blocks * job.grid.block >= QAD_STREAMING_ELEMENTS;
    job.many_lines = asks_for_many_lines(job);
    return split(&job, work, blocks, QAD_BATCH / job.grid.block, ELEMENTS_PER_THREAD / job.grid.block, threads);
}

int64_t divergence_rows(const qad_divergence_job *job, int64_t begin, int64_t end) {
    kernels().divergence(job, begin, end);
    return 0;
}

} // namespace

extern "C" {

int qad_api_version(void) { return QAD_API_VERSION; }

int qad_get_isa(void) {
    if (chosen_isa < 0) chosen_isa = best_isa();
    return chosen_isa;
}

int qad_has_isa(int isa) { return kernels_for(isa) != nullptr; }

int qad_set_isa(int isa) {
    if (!kernels_for(isa)) return -1;
    chosen_isa = isa;
    return 0;
}

int64_t qad_fake_quantize(const void *weights, int weights_dtype, const float *scales, float *used_scales, void *out,
                          int out_dtype, int64_t blocks, const qad_grid *grid, const qad_noise *noise, int threads) {
    qad_fake_quantize_job job = {};
    job.weights = weights;
    job.weights_dtype = weights_dtype;
    job.scales = scales;
    job.used_scales = used_scales;
    job.out = out;
    job.out_dtype = out_dtype;
    job.grid = *grid;
    job.noise = *noise;
    job.backwards = meets_its_stores(job);
    /* For fp16 without noise, a Zen 4 takes 4 to 11 % less time then; a Xeon took 7 % more (576 x 576: 174 ps an element). */
    job.rounds_tables = is_amd();
    return split_blocks(job, kernels().fake_quantize, blocks, threads);
}

int64_t qad_fake_quantize_backward(void *grad, int grad_dtype, const void *weights, int weights_dtype,
                                   const float *scales, float *grad_scales, int64_t blocks, const qad_grid *grid,
                                   const qad_noise *noise, int threads) {
    qad_fake_quantize_job job = {};
    job.weights = weights;
    job.weights_dtype = weights_dtype;
    job.scales = scales;
    job.grad_scales = grad_scales;
    job.out = grad;
    job.out_dtype = grad_dtype;
    job.grid = *grid;
    job.noise = *noise;
    return split_blocks(job, kernels().backward, blocks, threads);
}

int64_t qad_quantize(const void *weights, int weights_dtype, const float *scales, int8_t *codes, uint16_t *out_scales,
                     int64_t blocks, const qad_grid *grid, int threads) {
    qad_fake_quantize_job job = {};
    job.weights = weights;
    job.weights_dtype = weights_dtype;
    job.scales = scales;
    job.codes = codes;
    job.half_scales = out_scales;
    job.grid = *grid;
    return split_blocks(job, kernels().quantize, blocks, threads);
}

void qad_dequantize(const int8_t *codes, const uint16_t *scales, void *out, int out_dtype, int64_t blocks,
                    const qad_grid *grid, int threads) {
    qad_fake_quantize_job job = {};
    job.codes = (int8_t *)codes;
    job.stored_scales = scales;
    job.out = out;
    job.out_dtype = out_dtype;
    job.grid = *grid;
    split_blocks(job, kernels().dequantize, blocks, threads);
}

void qad_uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
                   uint32_t stream) {
    kernels().uniform16(out, count, seed_low, seed_high, tensor, step, stream);
}

int qad_pack(const int8_t *codes, int64_t stride, const uint16_t *scales, void *out, int64_t rows, int64_t columns,
             const qad_grid *grid, int layout) {
    const int bits = grid->bits, block = grid->block;
    if ((bits != 4 && bits != 8) || columns % block) return -1;
    uint8_t *bytes = (uint8_t *)out;
    switch (layout) {
    case QAD_LAYOUT_GGUF:
        if (block != 32) return -1;
        for (int64_t row = 0; row < rows; ++row, codes += stride, scales += columns / block)
            bytes = pack_gguf_row(codes, scales, columns / block, bits, bytes);
        return 0;
    case QAD_LAYOUT_ONNX:
        for (int64_t row = 0; row < rows; ++row, codes += stride) bytes = pack_fields_row(codes, columns, bits, bytes);
        return 0;
    case QAD_LAYOUT_GPTQ:
        (bits == 4 ? pack_gptq<4> : pack_gptq<8>)(codes, stride, (uint32_t *)out, rows, columns);
        return 0;
    default:
        return -1;
    }
}

void qad_divergence(float *student, int64_t student_stride, const float *teacher, int64_t teacher_stride,
                    const int64_t *labels, double *divergence, double *nll, int64_t tokens, int64_t vocabulary,
                    int kind, float beta, float temperature, float next_token_weight, int keep_logits, int threads) {
    const qad_divergence_job job = {student, student_stride, teacher,    teacher_stride, labels,      divergence,       nll,
                                    vocabulary, kind,        beta,       temperature,    next_token_weight, keep_logits};
    split(&job, divergence_rows, tokens, 1, 1, threads);
}

} // extern "C"
