// What vectors.h needs of AVX2. gcc 12 splits __builtin_convertvector of these registers in pieces.
#pragma once

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

FUSED_OPTIM_HD Words read_vector(const uint16_t* p) { return (Words)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const int16_t* p) { return (Words)_mm256_cvtepi16_epi32(load<__m128i>(p)); }
FUSED_OPTIM_HD Words read_vector(const uint8_t* p) { return (Words)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
FUSED_OPTIM_HD Words read_vector(const int8_t* p) { return (Words)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
FUSED_OPTIM_HD Words read_upper_halves(const uint16_t* from) { return read_vector(from) << 16; }
// Chosen bytes of each half of the register, and then the two side by side.
FUSED_OPTIM_HD void write_chosen_halves(void* to, Words values, __m128i chosen) {
  const __m256i halves = _mm256_shuffle_epi8((__m256i)values, _mm256_broadcastsi128_si256(chosen));
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
}
FUSED_OPTIM_HD void write_halves(void* to, Words values) {
  write_chosen_halves(to, values, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD void write_upper_halves(uint16_t* to, Words values) {
  write_chosen_halves(to, values, _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1));
}
FUSED_OPTIM_HD void write_bytes(void* to, Words values) {
  const __m128i chosen = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)values, _mm256_broadcastsi128_si256(chosen));
  _mm_storeu_si64(to, _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
}
FUSED_OPTIM_HD uint32_t largest_of(Words values) {
  const __m256i all = (__m256i)values;
  __m128i largest = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0x4e));
  largest = _mm_max_epu32(largest, _mm_shuffle_epi32(largest, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(largest));
}

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
