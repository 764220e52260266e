// What one CPU launch is given, and the instruction sets that there are.
#pragma once

#include "codecs.h"
#include "cpu_standard.h"
#include "table.h"

namespace fused_optim {

using StepElements = void (*)(const Row&, int64_t begin, int64_t end, bool grad_is_own, const void* coefficients);

struct Task {
  const char *rule, *param_format, *grad_format, *mu_format, *nu_format;
  const Row* rows;
  const Chunk* chunks;
  int64_t chunk_size;
  StepElements step_elements;
  bool grad_is_own;  // or else in the working precision
  const char* coefficients;
  int64_t coefficients_bytes;  // of one counter
  const int32_t* coefficients_of_counter;

  // Inlined, as all that several instruction sets compile: the linker keeps one copy of what is not.
  FUSED_OPTIM_HD const void* coefficients_of(int64_t counter) const {
    return coefficients + coefficients_of_counter[counter] * coefficients_bytes;
  }
};

FUSED_OPTIM_HD bool same(const char* a, const char* b) { return strcmp(a, b) == 0; }
FUSED_OPTIM_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

#define FUSED_OPTIM_DECLARE(isa)                                                                          \
  namespace isa {                                                                                         \
  bool find(Task& task);                                                                                  \
  void step_chunks(const Task& task, int64_t first, int64_t last);                                        \
  bool encode(Operand operand, const char* format, const float* values, const Place& place, int64_t n,    \
              void* stored, void* aux);                                                                   \
  bool decode(const char* format, const void* stored, const void* aux, int64_t n, float* values);         \
  }
FUSED_OPTIM_DECLARE(baseline)
#if defined(__x86_64__)
FUSED_OPTIM_DECLARE(avx2)
FUSED_OPTIM_DECLARE(avx512)
#endif
#undef FUSED_OPTIM_DECLARE

}  // namespace fused_optim
