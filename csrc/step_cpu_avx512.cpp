#if defined(__x86_64__)
#define FUSED_OPTIM_ISA avx512
#define FUSED_OPTIM_VECTOR_BYTES 64
#include "step_cpu.h"
#endif
