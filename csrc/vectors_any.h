// What vectors.h needs of registers of 16 bytes, on any processor.
#pragma once

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

template <class Stored>
using Short __attribute__((vector_size(kWords * sizeof(Stored)))) = Stored;

template <class Stored>
FUSED_OPTIM_HD Words read_vector(const Stored* from) {
  return __builtin_convertvector(load<Short<Stored>>(from), Words);
}
template <class Stored>
FUSED_OPTIM_HD void write_short(void* to, Words values) {
  const auto narrow = __builtin_convertvector(values, Short<Stored>);
  memcpy(to, &narrow, sizeof(narrow));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) { write_short<uint16_t>(to, values); }
FUSED_OPTIM_HD void write_bytes(void* to, Words values) { write_short<uint8_t>(to, values); }
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) { return read_vector(from) << 16; }
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) { write_halves(to, values >> 16); }
FUSED_OPTIM_HD uint32_t largest_of(Words values) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kWords; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
