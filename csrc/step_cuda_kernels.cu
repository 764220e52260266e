// The step kernels, some 35 of each rule. setup.py compiles this file once for each FUSED_OPTIM_PART of 4, side
// by side; a part has the kernels of every fourth pair of moment formats.
#include "cuda_kernels.h"

namespace fused_optim {
namespace {

template <class Codec, class... All>
constexpr int place_in(Types<All...>) {
  int place = 0;
  (void)((std::is_same<Codec, All>::value || (++place, false)) || ...);
  return place;
}

}  // namespace

template <int part>
Kernel find_step(const Names& names) {
  Kernel found = nullptr;
  with_names(names, [&](auto rule, auto param, auto grad, auto mu, auto nu) {
    if constexpr (place_in<decltype(mu)>(MuCodecs{}) % 4 == part)
      found = step_kernel<decltype(rule), decltype(param), decltype(grad), decltype(mu), decltype(nu)>;
  });
  return found;
}

#if defined(FUSED_OPTIM_PART)
template Kernel find_step<FUSED_OPTIM_PART>(const Names&);
#endif

}  // namespace fused_optim
