#include "cpu_standard.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define FUSED_OPTIM_ISA avx2
#define FUSED_OPTIM_VECTOR_BYTES 32
#include "step_cpu.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
