// The memory's roofs on a CPU, with the threads and schedule of the CPU backend.
#include <cstdint>

namespace {

constexpr int64_t kChunk = 16384;

template <class Body>
void over_chunks(int64_t n, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t start = 0; start < n; start += kChunk) body(start, start + kChunk < n ? start + kChunk : n);
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

// A step's traffic and next to no arithmetic: a gradient is read; a parameter and the states, of
// other sizes, are read and written. Elements are seen as integers of their size.
#define SAME_STREAMS(NAME, PARAM, STATE)                                                             \
  void NAME(PARAM* p, const PARAM* g, STATE* m, STATE* v, int64_t n, int threads) {                  \
    over_chunks(n, threads, [=](int64_t start, int64_t end) {                                        \
      _Pragma("omp simd") for (int64_t i = start; i < end; ++i) {                                    \
        m[i] = STATE(m[i] + g[i]);                                                                   \
        v[i] = STATE(v[i] + g[i]);                                                                   \
        p[i] = PARAM(p[i] + g[i]);                                                                   \
      }                                                                                              \
    });                                                                                              \
  }

SAME_STREAMS(streams_4_4, uint32_t, uint32_t)
SAME_STREAMS(streams_2_4, uint16_t, uint32_t)
SAME_STREAMS(streams_2_2, uint16_t, uint16_t)
SAME_STREAMS(streams_4_2, uint32_t, uint16_t)
SAME_STREAMS(streams_4_1, uint32_t, uint8_t)
SAME_STREAMS(streams_2_1, uint16_t, uint8_t)

}
