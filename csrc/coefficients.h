// What a rule multiplies and divides by: fused_optim.reference.coefficients in C++, in the same order.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_OPTIM_HD __host__ __device__ __forceinline__
#else
#define FUSED_OPTIM_HD inline __attribute__((always_inline))
#endif

namespace fused_optim {

constexpr int64_t kMaxCount = 2147483647;

// One parameter group's numbers; the column order of the table that Python fills.
struct Hyperparameters {
  double lr, weight_decay, beta1, beta2, eps, eps_root, initial_lr, maximize, nesterov;
};

// What is divided by. Dividing by 1 changes no bit, so it is left out: the first moment's correction, which is 1 from
// step 165 on for beta1 = 0.9, takes 15% of a step in a CPU's cache, and 10 of some 80 instructions on a GPU.
template <class T>
struct Divisor {
  T value;
  T reciprocal;     // NaN where quotients need a division: see vectors.h and cuda_kernels.h
  uint32_t is_one;  // once for all, and as an integer: a processor is done with it sooner
};

template <class T>
FUSED_OPTIM_HD Divisor<T> divisor(T value) {
  // Of a negative one the multiplications would lose the sign of a zero.
  const bool usual = value >= T(0x1p-14) && value <= T(0x1p24);
  return {value, usual ? T(1) / value : T(NAN), value == T(1)};
}

template <class X, class T>
FUSED_OPTIM_HD X operator/(X x, const Divisor<T>& divisor) {
  if (divisor.is_one) return x;
  return x / divisor.value;
}

template <class T>
struct Coefficients {
  T beta1, one_minus_beta1, beta2, one_minus_beta2, eps, eps_root;
  Divisor<T> bias_correction1, bias_correction1_next, bias_correction2;
  T neg_lr, decay;
  Divisor<T> grad_divisor;  // the gradient scale, 1 for none
  T grad_factor;            // what the quotient is multiplied by: the clip coefficient, 1 for none; negative to ascend
  uint32_t decay_kind;      // see fused_optim.reference.Coefficients
  uint32_t nesterov;        // 1 or 0
  uint32_t count;           // the step number
};

FUSED_OPTIM_HD double integer_power(double base, int64_t exponent) {
  double result = 1.0;
  // 31 bits, as everywhere: a negative number, which only a broken state holds, ends too.
  for (int64_t left = exponent & kMaxCount; left != 0; left >>= 1) {
    if (left & 1) result = result * base;
    base = base * base;
  }
  return result;
}

template <class T>
FUSED_OPTIM_HD T bias_correction(double beta, int64_t count) {
  const double rounded = static_cast<double>(static_cast<T>(beta));
  return static_cast<T>(1) - static_cast<T>(integer_power(rounded, count));
}

FUSED_OPTIM_HD int64_t next_count(int64_t count) { return count < kMaxCount ? count + 1 : kMaxCount; }

// The coefficients of step number `count`, 1 at the first step. `grad_scale` and `grad_factor` are 1 for none.
template <class T>
FUSED_OPTIM_HD Coefficients<T> coefficients(const Hyperparameters& h, int64_t count, T grad_scale, T grad_factor) {
  const bool decoupled = h.initial_lr != 0.0;
  Coefficients<T> c;
  c.beta1 = static_cast<T>(h.beta1);
  c.one_minus_beta1 = static_cast<T>(1.0 - h.beta1);
  c.beta2 = static_cast<T>(h.beta2);
  c.one_minus_beta2 = static_cast<T>(1.0 - h.beta2);
  c.eps = static_cast<T>(h.eps);
  c.eps_root = static_cast<T>(h.eps_root);
  c.bias_correction1 = divisor(bias_correction<T>(h.beta1, count));
  c.bias_correction1_next = divisor(bias_correction<T>(h.beta1, next_count(count)));
  c.bias_correction2 = divisor(bias_correction<T>(h.beta2, count));
  c.neg_lr = static_cast<T>(-h.lr);
  c.decay = static_cast<T>(decoupled ? h.weight_decay * (h.lr / h.initial_lr) : h.weight_decay);
  c.decay_kind = h.weight_decay == 0.0 ? 0 : decoupled ? 2 : 1;
  c.grad_divisor = divisor(grad_scale);
  c.grad_factor = h.maximize != 0.0 ? -grad_factor : grad_factor;
  c.nesterov = h.nesterov != 0.0;
  c.count = static_cast<uint32_t>(count);
  return c;
}

}  // namespace fused_optim
