#define FUSED_OPTIM_ISA baseline
#define FUSED_OPTIM_VECTOR_BYTES 16
#include "step_cpu.h"
