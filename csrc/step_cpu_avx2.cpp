#if defined(__x86_64__)
#define FUSED_OPTIM_ISA avx2
#define FUSED_OPTIM_VECTOR_BYTES 32
#include "step_cpu.h"
#endif
