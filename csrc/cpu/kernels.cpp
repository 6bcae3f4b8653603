/* Compiled once per instruction set, with QAD_KERNELS naming the table it defines. Includes no C++ header: see simd.h.
 */
#include "divergence.h"
#include "fake_quant.h"
#include "kernels.h"

extern "C" const qad_kernels QAD_KERNELS;
extern "C" const qad_kernels QAD_KERNELS = {fake_quantize, backward, quantize, dequantize, uniform16, divergence_rows};
