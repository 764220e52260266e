// What one CPU launch is given, and the instruction sets that there are.
#pragma once

#include "codecs.h"
#include "cpu_standard.h"
#include "table.h"

namespace fused_optim {

struct Task {
  const Row* rows;
  const Chunk* chunks;
  int64_t chunk_size;
  const char* param_format;
  const char* grad_format;
  const char* mu_format;
  const char* nu_format;
  const int32_t* coefficient_of_counter;
  const void* coefficients;

  // Inlined, as all that several instruction sets compile: the linker keeps one copy of what is not.
  template <class T>
  FUSED_OPTIM_HD const Coefficients<T>& coefficients_of(int64_t counter) const {
    return static_cast<const Coefficients<T>*>(coefficients)[coefficient_of_counter[counter]];
  }
};

using StepChunks = void (*)(const Task&, int64_t first, int64_t last);

FUSED_OPTIM_HD bool same(const char* a, const char* b) { return strcmp(a, b) == 0; }
FUSED_OPTIM_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

#define FUSED_OPTIM_DECLARE(isa)                                                                          \
  namespace isa {                                                                                         \
  StepChunks find(const char* rule, const Task& task);                                                    \
  bool encode(Operand operand, const char* format, const float* values, const Place& place, int64_t n,    \
              void* stored, void* extra);                                                                 \
  bool decode(const char* format, const void* stored, const void* extra, int64_t n, float* values);       \
  }
FUSED_OPTIM_DECLARE(baseline)
#if defined(__x86_64__)
FUSED_OPTIM_DECLARE(avx2)
FUSED_OPTIM_DECLARE(avx512)
#endif
#undef FUSED_OPTIM_DECLARE

}  // namespace fused_optim
