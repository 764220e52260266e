// The rules that there are. A new rule is a header here and a name in the list below. It has
//
//   name                 as in fused_optim/rules.py
//   moments(g, m, v, c)  makes m and v, the second state, the new ones
//   update(g, m, v, c)   the update that these make, before weight decay and learning rate;
//                        g may be used where c.nesterov is set alone
#pragma once

#include "adabelief.h"
#include "adamaxw.h"
#include "adamw.h"

namespace fused_optim {

using Rules = Types<AdaBelief, AdamaxW, AdamW>;

// All of a step, of a number or a vector of them.
template <class Rule, class T, class S>
FUSED_OPTIM_HD void step(T& p, T g, T& m, T& v, const Coefficients<S>& c) {
  Rule::moments(g, m, v, c);
  p = apply_update(p, Rule::update(g, m, v, c), c);
}

}  // namespace fused_optim
