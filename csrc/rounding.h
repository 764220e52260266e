// Random bits for rounding: the C++ statement of fused_optim/rounding.py.
#pragma once

#include <cstdint>

#include "coefficients.h"

namespace fused_optim {

enum Operand { kParam, kMu, kNu };

// What a rounding may depend on beside the value and the element's logical index.
struct Place {
  uint32_t count;  // the parameter's step number
  uint64_t key;    // fused_optim.rounding.random_key
};

// `index`: the element's logical index, whose low 32 bits are enough; one or a vector of them.
template <class W>
FUSED_OPTIM_HD W dither(W index, const Place& place, Operand operand) {
  const uint32_t factor = operand == kParam ? 0xA54FF53Bu : operand == kMu ? 0x6A09E667u : 0xBB67AE85u;
  return index * factor + place.count * 0x9E3779B9u;
}

struct PhiloxWords {
  uint32_t word[4];
};

// Philox 4x32-10 for eight neighbours: 16 bits for each, the low half of a word first.
FUSED_OPTIM_HD PhiloxWords philox(uint64_t group, const Place& place) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = place.count, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(place.key), k1 = static_cast<uint32_t>(place.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fused_optim
