// cpu_task.h and what it includes come before the target is set: no function of the
// standard library may be compiled for an instruction set that the machine may lack.
#include "cpu_task.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define FUSED_OPTIM_ISA avx2
#include "step_cpu.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
