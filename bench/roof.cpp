// The memory's roofs on a CPU, with the threads and schedule of the CPU backend.
#include <cstdint>

namespace {

constexpr int64_t kChunk = 16384;

template <class Body>
void over_chunks(int64_t n, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += kChunk) body(start, start + kChunk < n ? start + kChunk : n);
}

constexpr int64_t kBlock = 256;

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

extern "C" {

void copy(float* to, const float* from, int64_t n, int threads) {
  over_chunks(n, threads, [=](int64_t start, int64_t end) {
#pragma omp simd
    for (int64_t i = start; i < end; ++i) to[i] = from[i];
  });
}

void triad(float* a, const float* b, const float* c, int64_t n, int threads) {
  over_chunks(n, threads, [=](int64_t start, int64_t end) {
#pragma omp simd
    for (int64_t i = start; i < end; ++i) a[i] = b[i] + 3.0f * c[i];
  });
}

// A step's traffic and next to no arithmetic: of a block at a time a gradient is read; a parameter and
// two states, perhaps of another size, are read and written. In one loop over elements of two sizes
// the compiler's shuffles would take longer than memory.
void streams(uint8_t* p, const uint8_t* g, uint8_t* m, uint8_t* v, int64_t n, int threads, int param_bytes,
             int state_bytes) {
  over_chunks(n, threads, [=](int64_t start, int64_t end) {
    for (int64_t first = start; first < end; first += kBlock) {
      const int64_t count = first + kBlock < end ? kBlock : end - first;
      const uint8_t sum = xor_of(g + first * param_bytes, count * param_bytes);
      add(m + first * state_bytes, count * state_bytes, sum);
      add(v + first * state_bytes, count * state_bytes, sum);
      add(p + first * param_bytes, count * param_bytes, sum);
    }
  });
}

}
