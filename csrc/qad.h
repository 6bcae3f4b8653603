/* qad's kernels: the whole C API, on raw pointers.
 *
 * A weight [N, K] whose rows are whole blocks is one flat run of blocks in memory, so every function takes a number of
 * blocks and no shape. Nothing needs to be aligned beyond its element. Inputs and outputs may not overlap, except where
 * a function says that it works in place.
 *
 * The truth is qad/tensor.py, qad/fake_quant.py and qad/philox.py: every function here but one gives
 * their bits, on every instruction set and with any number of threads. qad_divergence is accurate to a millionth instead,
 * on each instruction set in its own way, with the same bits for any number of threads.
 *
 * Non-finite numbers: a block that holds an infinity or a NaN, or whose given scale is NaN, is damaged. Its weights,
 * and the scale that is found for it or stored beside its codes, come out as the quiet NaN 0x7fc00000 (0x7fc0 in bf16,
 * 0x7e00 in fp16), its codes as 0, its gradients as 0. A given scale that is infinite becomes the grid's ceiling.
 * Functions that read weights return how many blocks were damaged. A gradient that is NaN stays one; which one is not
 * defined.
 */
#ifndef QAD_H
#define QAD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* Raised when a signature or a struct changes, so that a stale library cannot be called. */
#define QAD_API_VERSION 2

enum qad_dtype { QAD_F32 = 0, QAD_BF16 = 1, QAD_F16 = 2 };
enum qad_noise_mode { QAD_NOISE_NONE = 0, QAD_NOISE_UNIFORM = 1, QAD_NOISE_STOCHASTIC = 2, QAD_NOISE_PARTIAL = 3 };
enum qad_isa {
    QAD_ISA_PORTABLE = 0,
    QAD_ISA_AVX2 = 1,
    QAD_ISA_AVX512 = 2,
    QAD_ISA_NEON = 3,
    QAD_ISA_AVX512BF16 = 4
};
enum qad_layout { QAD_LAYOUT_GGUF = 0, QAD_LAYOUT_GPTQ = 1, QAD_LAYOUT_ONNX = 2 };
enum qad_divergence { QAD_KL_FORWARD = 0, QAD_KL_REVERSE = 1, QAD_KL_JSD = 2 };

/* A number format with one scale per block; the fields are those of qad.grid.Grid. block: 32, 64 or 128. */
typedef struct {
    int32_t bits;
    int32_t block;
    int32_t code_min; /* less than 0 */
    int32_t code_max; /* more than 0 */
    int32_t signed_scale;
    int32_t scale_bits; /* 2 to 11 */
    float scale_floor; /* 2^-64 or more: no product of a code and a scale is subnormal */
    float scale_ceiling;
} qad_grid;

/* Which noise one tensor gets in one optimizer step; the fields are those of qad.noise.Noise. */
typedef struct {
    int32_t mode;     /* enum qad_noise_mode */
    float hard_share; /* probability that a block is rounded hard in spite of the mode */
    uint32_t seed_low, seed_high;
    uint32_t tensor;
    uint32_t step;
} qad_noise;

int qad_api_version(void);

/* The instruction set in use (enum qad_isa): the best that both this library and this machine have, unless qad_set_isa
 * chose another; -1 if they have none in common, and then nothing else may be called. */
int qad_get_isa(void);

/* Whether this library holds kernels for an instruction set and this machine can run them. */
int qad_has_isa(int isa);

/* Force an instruction set, for tests. Returns 0, or -1 if qad_has_isa says no. Not while another call runs. */
int qad_set_isa(int isa);

/* Put weights on their grid, or add its noise: forward of straight-through fake quantization.
 *
 * scales: one float per block, rounded to the grid here; null: each block's absmax scale.
 * used_scales: null, or receives the rounded scale of each block. May be `scales` itself.
 * out: may be `weights` itself, where both are of one dtype.
 */
int64_t qad_fake_quantize(const void *weights, int weights_dtype, const float *scales, float *used_scales, void *out,
                          int out_dtype, int64_t blocks, const qad_grid *grid, const qad_noise *noise, int threads);

/* Turn the gradient of the forward weights, in place, into that of the masters: zero outside the range of the grid.
 *
 * scales: as given to forward; null: absmax. grad_scales: null, or receives each block's gradient by its scale, a sum
 * that is folded in halves (element i + element i + n/2, until one is left).
 */
int64_t qad_fake_quantize_backward(void *grad, int grad_dtype, const void *weights, int weights_dtype,
                                   const float *scales, float *grad_scales, int64_t blocks, const qad_grid *grid,
                                   const qad_noise *noise, int threads);

/* Codes and fp16 scales of weights. scales: as in qad_fake_quantize. */
int64_t qad_quantize(const void *weights, int weights_dtype, const float *scales, int8_t *codes, uint16_t *out_scales,
                     int64_t blocks, const qad_grid *grid, int threads);

/* The weights that a device decodes: code x scale. An infinite scale, which qad_quantize stores nowhere, gives infinities,
 * and where the code is 0 some NaN. */
void qad_dequantize(const int8_t *codes, const uint16_t *scales, void *out, int out_dtype, int64_t blocks,
                    const qad_grid *grid, int threads);

/* Lay codes [rows, columns] out as a file stores them. Returns 0, or -1 where the layout cannot hold such a tensor.
 *
 * stride: codes from one row to the next, for some columns of a wider tensor; `columns` if that is all of it. `out` is
 * aligned to 4 bytes for QAD_LAYOUT_GPTQ. scales: [rows, columns / block], null for layouts that store none.
 *
 * QAD_LAYOUT_GGUF: [rows, blocks of fp16 scale and codes]; Q4_0: byte j holds element j low and j + 16 high, plus 8;
 *     Q8_0: signed bytes. Blocks of 32 only.
 * QAD_LAYOUT_GPTQ: qweight, 32-bit words [columns * bits / 32, rows], lowest bits first, plus 2^(bits-1). Scales not
 *     stored: they are a tensor of their own.
 * QAD_LAYOUT_ONNX: B of MatMulNBits, [rows, columns / block, block * bits / 8], element 2j low and 2j + 1 high, plus
 *     2^(bits-1). Scales not stored.
 */
int qad_pack(const int8_t *codes, int64_t stride, const uint16_t *scales, void *out, int64_t rows, int64_t columns,
             const qad_grid *grid, int layout);

/* count random values (r + 0.5) / 65536 as qad.philox.uniform16 gives them. */
void qad_uniform16(float *out, int64_t count, uint32_t seed_low, uint32_t seed_high, uint32_t tensor, uint32_t step,
                   uint32_t stream);

/* One pass of the distillation head over a chunk of tokens: see csrc/cpu/divergence.h.
 *
 * student, teacher: logits [tokens, vocabulary], rows student_stride and teacher_stride floats apart. The student's are
 *     overwritten with the gradient of (temperature^2 x divergence + next_token_weight x nll) by themselves; null
 *     gradient wanted: keep_logits = 1 leaves them as they are.
 * labels: null, or the next token of each, negative for none.
 * divergence, nll: receive one double per token: the divergence at that temperature (not multiplied by its square) and
 *     the next-token cross-entropy (0 without a label).
 */
void qad_divergence(float *student, int64_t student_stride, const float *teacher, int64_t teacher_stride,
                    const int64_t *labels, double *divergence, double *nll, int64_t tokens, int64_t vocabulary,
                    int kind, float beta, float temperature, float next_token_weight, int keep_logits, int threads);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
