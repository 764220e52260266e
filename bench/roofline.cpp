// The memory's roofline on a CPU: a step's traffic and next to no arithmetic. Of a block at a time the
// gradient is read; the parameter and two states, perhaps of another size, are read and written. (One loop
// over elements of two sizes would be slower than memory: the compiler shuffles.)
#include <cstdint>

namespace {

constexpr int64_t kChunk = 16384, kBlock = 256;

uint8_t xor_of(const uint8_t* bytes, int64_t n) {
  uint8_t sum = 0;
#pragma omp simd reduction(^ : sum)
  for (int64_t i = 0; i < n; ++i) sum ^= bytes[i];
  return sum;
}

void add(uint8_t* bytes, int64_t n, uint8_t what) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(bytes[i] + what);
}

}  // namespace

extern "C" void streams(uint8_t* p, const uint8_t* g, uint8_t* m, uint8_t* v, int64_t n, int threads,
                        int param_bytes, int state_bytes) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t end = start + kChunk < n ? start + kChunk : n;
    for (int64_t first = start; first < end; first += kBlock) {
      const int64_t count = first + kBlock < end ? kBlock : end - first;
      const uint8_t sum = xor_of(g + first * param_bytes, count * param_bytes);
      add(m + first * state_bytes, count * state_bytes, sum);
      add(v + first * state_bytes, count * state_bytes, sum);
      add(p + first * param_bytes, count * param_bytes, sum);
    }
  }
}
