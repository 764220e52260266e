#include "cpu_standard.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what gcc 12's own intrinsics leave undefined
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FUSED_OPTIM_ISA avx512
#define FUSED_OPTIM_VECTOR_BYTES 64
#include "step_cpu.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
