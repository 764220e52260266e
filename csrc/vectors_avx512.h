// What vectors.h needs of AVX-512. gcc 12 splits __builtin_convertvector of these registers in pieces.
#pragma once

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

FUSED_OPTIM_HD Words read_vector(const uint16_t* p) { return (Words)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int16_t* p) { return (Words)_mm512_cvtepi16_epi32(load<__m256i>(p)); }
FUSED_OPTIM_HD Words read_vector(const uint8_t* p) { return (Words)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int8_t* p) { return (Words)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
// Zeros and halves in turns; and every second half.
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) {
  const __m512i order = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8,  //
                                         7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i halves = _mm512_castsi256_si512(load<__m256i>(from));
  return (Words)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, halves);
}
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) {
  const __m512i order = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_permutexvar_epi16(order, (__m512i)values);
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(halves));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)values));
}
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)values));
}
FUSED_OPTIM_HD uint32_t largest_of(Words values) { return _mm512_reduce_max_epu32((__m512i)values); }

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
