#define FUSED_OPTIM_ISA baseline
#include "step_cpu.h"
