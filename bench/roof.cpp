// The memory roof: a loop with the streams of one float32 step (reads four, writes three)
// and next to no arithmetic, with the threads and schedule of the CPU backend.
#include <cstdint>

extern "C" void same_traffic(float* p, const float* g, float* m, float* v, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += 16384) {
    const int64_t end = start + 16384 < n ? start + 16384 : n;
#pragma omp simd
    for (int64_t i = start; i < end; ++i) {
      m[i] = m[i] + g[i];
      v[i] = v[i] + g[i];
      p[i] = p[i] + g[i];
    }
  }
}
