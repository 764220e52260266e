// Rules and codecs by their names.
#pragma once

#include <array>
#include <cstring>
#include <string>

#include "codecs.h"
#include "rules.h"

namespace fused_optim {

// As in fused_optim/rules.py and fused_optim/storage.py.
struct Names {
  const char *rule, *param, *grad, *mu, *nu;
};

using NameStrings = std::array<std::string, 5>;  // in their order, as Python gives them
inline Names names_of(const NameStrings& s) {
  return {s[0].c_str(), s[1].c_str(), s[2].c_str(), s[3].c_str(), s[4].c_str()};
}

inline std::string text_of(const Names& names) {
  return std::string(names.rule) + " for parameters in " + names.param + ", gradients in " + names.grad +
         ", moments in " + names.mu + " and " + names.nu;
}

inline __attribute__((always_inline)) bool same(const char* a, const char* b) { return strcmp(a, b) == 0; }

// What `use` says of the type with that name; R{} where there is none.
template <class R, class... T, class Use>
R with_name(Types<T...>, const char* name, Use use) {
  R said{};
  (void)((same(name, T::name) && (said = use(T{}), true)) || ...);
  return said;
}

// What `use(rule, param, grad, mu, nu)` says of what is named; R{} where it does not go together.
template <class R, class Use>
R with_names(const Names& names, Use use) {
  return with_name<R>(Rules{}, names.rule, [&](auto rule) {
    return with_name<R>(MuCodecs{}, names.mu, [&](auto mu) {
      using Mu = std::decay_t<decltype(mu)>;  // gcc 12 sees references in the innermost
      if (!same(names.nu, NuOf<Mu>::name)) return R{};
      return with_name<R>(ParamCodecs{}, names.param, [&](auto param) {
        using Param = std::decay_t<decltype(param)>;
        return with_name<R>(GradCodecs{}, names.grad, [&](auto grad) {
          if constexpr (kTogether<Param, decltype(grad), Mu>)
            return use(rule, param, grad, mu, NuOf<Mu>{});
          else
            return R{};
        });
      });
    });
  });
}

}  // namespace fused_optim
