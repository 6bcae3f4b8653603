/* Compiled once per instruction set, which QAD_SET names. Includes no C++ header: see simd.h. */
#include "fake_quant.h"
#include "kernels.h"

#define QAD_JOIN(a, b) a##b
#define QAD_NAME(a, b) QAD_JOIN(a, b)

extern "C" const qad_kernels QAD_NAME(qad_kernels_, QAD_SET);
extern "C" const qad_kernels QAD_NAME(qad_kernels_, QAD_SET) = {
    fake_quantize, backward, quantize, dequantize, uniform16, QAD_NAME(qad_divergence_rows_, QAD_SET)};
