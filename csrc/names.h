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

// What `use` says of the type with that name; false where there is none.
template <class... T, class Use>
bool with_name(Types<T...>, const char* name, Use use) {
  return ((same(name, T::name) && use(T{})) || ...);
}

// Calls `use(rule, param, grad, mu, nu)` with what is named; false where it does not go together.
template <class Use>
bool with_names(const Names& names, Use use) {
  return with_name(Rules{}, names.rule, [&](auto rule) {
    return with_name(MuCodecs{}, names.mu, [&](auto mu) {
      using Mu = std::decay_t<decltype(mu)>;  // gcc 12 sees references in the innermost
      if (!same(names.nu, NuOf<Mu>::name)) return false;
      return with_name(ParamCodecs{}, names.param, [&](auto param) {
        using Param = std::decay_t<decltype(param)>;
        return with_name(GradCodecs{}, names.grad, [&](auto grad) {
          constexpr bool together = kTogether<Param, decltype(grad), Mu>;
          if constexpr (together) use(rule, param, grad, mu, NuOf<Mu>{});
          return together;
        });
      });
    });
  });
}

}  // namespace fused_optim
