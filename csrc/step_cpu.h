// The CPU step. This file is compiled once for each instruction set, in a namespace of its own, by a short .cpp that
// sets FUSED_OPTIM_ISA and FUSED_OPTIM_VECTOR_BYTES. What our own headers define outside of that namespace is always
// inlined, or the linker would keep one instruction set's copy for all.
//
// Vectors of neighbours are decoded and updated in registers. What is not stored as it is waits until all of its tile
// is known, and is encoded then: low-precision moments while the processor divides for the parameter.
#pragma once

// The headers of others come before an instruction set is chosen: none of their functions may be compiled for one
// that the machine may lack.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#if FUSED_OPTIM_VECTOR_BYTES > 16
#include <immintrin.h>
#endif
#if FUSED_OPTIM_VECTOR_BYTES == 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what gcc 12's own intrinsics leave undefined
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#elif FUSED_OPTIM_VECTOR_BYTES == 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#endif

#include "cpu_task.h"
#include "vectors.h"

#define FUSED_OPTIM_INLINE __attribute__((always_inline))  // of lambdas: gcc would call those that are used twice

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

// A tile is what is decoded and updated before it is encoded; it begins at a multiple of kTile and has whole blocks of
// the 8-bit formats. (Where nothing is encoded, a chunk is one tile.) AdaBelief all in bfloat16 takes 0.26 ns an
// element with tiles of 256 or 512, in a cache, 0.28 with 128. What lies kAhead elements further, without tiles kFar,
// is fetched: the processor's own prefetching leaves 2^24 elements 16% slower (256 and 1,024 are no better).
constexpr int64_t kTile = 256, kAhead = 768, kFar = 512;

inline void prefetch_bytes(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(first) + i, 1);
}

// Philox gives eight neighbours their bits at once, two in each word. Returns where those of element `begin` are.
__attribute__((noinline)) inline const uint16_t* random_tile(const Place& place, int64_t begin, uint16_t* random) {
  constexpr int64_t most = kTile / 8 + 1;
  const int64_t groups = most - (begin % 8 == 0);
  uint32_t words[4][most];
#pragma omp simd
  for (int64_t i = 0; i < groups; ++i) {
    const PhiloxWords four = philox(static_cast<uint64_t>(begin / 8 + i), place);
    words[0][i] = four.word[0];  // no loop over the four: with it gcc takes up to 10% longer for a step
    words[1][i] = four.word[1];
    words[2][i] = four.word[2];
    words[3][i] = four.word[3];
  }
  for (int64_t i = 0; i < groups; ++i) {
    for (int k = 0; k < 4; ++k) {
      random[8 * i + 2 * k] = static_cast<uint16_t>(words[k][i]);
      random[8 * i + 2 * k + 1] = static_cast<uint16_t>(words[k][i] >> 16);
    }
  }
  return random + begin % 8;
}

// `body(i, count)` for each vector of elements `i` to `end`.
template <int64_t size, class Body>
FUSED_OPTIM_HD void for_vectors(int64_t i, int64_t end, Body body) {
  for (; i + size <= end; i += size) body(i, All{});
  if (i < end) body(i, end - i);
}

// Whether updated values are buffered until the whole tile is updated. What they share is known then, and whether all
// are finite. And fewer instructions wait for each division: bfloat16 parameters with float32 moments take 0.21 ns an
// element, 0.29 where each vector is encoded at once.
template <class Codec>
constexpr bool kBuffered = !std::is_same<typename Codec::Stored, typename Codec::Working>::value;

template <class Codec>
constexpr int64_t kBlockLength = kBlocked<Codec> ? kBlockElements : kTile;

// A tile of one operand of a row.
template <class Codec>
struct Tile {
  using Stored = typename Codec::Stored;
  using Aux = typename Codec::Aux;
  using Vector = VectorOf<typename Codec::Working>;

  Stored* stored;
  Aux* aux;
  float* values;                // updated, and not encoded yet
  Words dithers, dithers_step;  // of the next vector, and from it to the one after
  Words largest{};              // magnitude since the tile's beginning, or the block's, by lane
  uint32_t exponent;            // of the block
  bool finite_codes, finite_values = true;

  FUSED_OPTIM_HD Tile(int64_t stored_address, int64_t aux_address, int64_t begin, float* values)
      : stored(reinterpret_cast<Stored*>(stored_address) + begin),
        aux(reinterpret_cast<Aux*>(aux_address) + begin / Codec::block),
        values(values) {}

  FUSED_OPTIM_HD void prefetch() const {
    if constexpr (kBuffered<Codec>) prefetch_bytes(stored + kAhead, kTile * sizeof(Stored));
    if constexpr (kAuxEach<Codec>) prefetch_bytes(aux + kAhead, kTile * sizeof(Aux));
  }

  FUSED_OPTIM_HD void look_at_codes(int64_t n) {
    if constexpr (kBlocked<Codec>) {
      uint8_t largest_code = 0;
      for (int64_t i = 0; i < n; ++i) {
        const auto code = static_cast<uint8_t>(stored[i] & Codec::code_bits);
        largest_code = code > largest_code ? code : largest_code;
      }
      finite_codes = largest_code < Codec::infinity;
    }
  }

  FUSED_OPTIM_HD void begin_block(int64_t block) { if constexpr (kBlocked<Codec>) exponent = aux[block]; }

  template <class Count>
  FUSED_OPTIM_HD Vector read(int64_t i, Count n) const {
    const auto from = read_vector<Codec::is_upper_half>(stored + i, n);
    if constexpr (kBlocked<Codec>)
      return finite_codes ? Codec::template load<true>(from, exponent) : Codec::load(from, exponent);
    else if constexpr (kAuxEach<Codec>)
      return Codec::load(from, read_vector(aux + i, n));
    else
      return Codec::load(from, NoAux{});
  }

  template <class Count>
  FUSED_OPTIM_HD void write(Vector x, int64_t i, Count n) {
    if constexpr (!kBuffered<Codec>) {
      write_vector(stored + i, x, n);
    } else {
      const Floats there = first_of(x, n);
      take_magnitudes(Codec::finite_magnitude(there));
      write_vector(values + i, there);
    }
  }

  // All of a block, elements `i` to `end`, is written.
  FUSED_OPTIM_HD void end_block(int64_t block, int64_t i, int64_t end) {
    if constexpr (kBlocked<Codec>) {
      if (largest_of(largest) >= kFiniteLimit) {
        finite_values = false;
        largest = Words{};
        for (; i < end; i += kWords) take_magnitudes(Codec::magnitude(read_vector(values + i)));
      }
      aux[block] = Codec::exponent_of(largest_of(largest));
      largest = Words{};
    }
  }

  // Whether `store<true>` will do, after all of the tile was written.
  FUSED_OPTIM_HD bool has_finite_values() const {
    return Codec::low_precision && (kBlocked<Codec> ? finite_values : largest_of(largest) < kFiniteLimit);
  }

  FUSED_OPTIM_HD void begin_dithers(int64_t begin, const Place& place, Operand operand) {
    if constexpr (Codec::random == kDither) {
      dithers = dither(iota() + static_cast<uint32_t>(begin), place, operand);
      dithers_step = in_register(dither(Words{} + static_cast<uint32_t>(kWords), Place{}, operand));
    }
  }

  // In order, since dithers are made on the way. `random`: the tile's, of formats that take Philox's bits.
  template <bool finite, class Count>
  FUSED_OPTIM_HD void encode(int64_t i, Count n, const uint16_t* random = nullptr) {
    if constexpr (kBuffered<Codec>) {
      const Floats x = read_vector(values + i);
      Words bits{};
      if constexpr (Codec::random == kPhilox) bits = read_vector(random + i);
      if constexpr (Codec::random == kDither) {
        bits = dithers;
        dithers += dithers_step;
      }
      std::conditional_t<kBlocked<Codec>, uint32_t, VectorOf<Aux>> part{};
      if constexpr (kBlocked<Codec>) part = exponent;
      write_vector<Codec::is_upper_half>(stored + i, Codec::template store<finite>(x, bits, part), n);
      if constexpr (kAuxEach<Codec>) write_vector(aux + i, part, n);
    }
  }

 private:
  FUSED_OPTIM_HD void take_magnitudes(Words m) { largest = larger(m, largest); }
};

// Encodes the `n` values of a tile that begins at element `begin` of its parameter; block exponents are in place. Not
// inlined, so that it is compiled once for each format, and not for each rule too.
template <class Codec>
__attribute__((noinline)) void encode_tile(Tile<Codec> tile, bool finite, int64_t begin, int64_t n, Place place,
                                           Operand operand) {
  alignas(Words) uint16_t random_bits[Codec::random == kPhilox ? kTile + 8 : 1];
  const uint16_t* random = random_bits;
  if constexpr (Codec::random == kPhilox) random = random_tile(place, begin, random_bits);
  tile.begin_dithers(begin, place, operand);
  for (int64_t block = 0, first = 0; first < n; ++block, first += kBlockLength<Codec>) {
    tile.begin_block(block);
    const int64_t end = minimum(first + kBlockLength<Codec>, n);
    const auto encode_all = [&](auto finite) FUSED_OPTIM_INLINE {
      for_vectors<kWords>(first, end, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
        tile.template encode<finite.value>(i, count, random);
      });
    };
    finite ? encode_all(std::true_type{}) : encode_all(std::false_type{});
  }
}

// Elements `begin` to `end` of a row. The coefficients are a copy, since no write to a tensor can
// change that: else they are read again for each vector.
template <class Rule, class Param, class Mu, class Nu>
void step_elements(const Row& row, int64_t grad, int64_t begin, int64_t end, bool grad_is_own,
                   const void* coefficients) {
  using T = typename Param::Working;
  using Vector = VectorOf<T>;
  using OwnGrad = typename Param::PlainCodec;
  static_assert(!kBlocked<Param>, "only moments share exponents");
  static_assert(kBuffered<Mu> == kBuffered<Nu> && kBlocked<Mu> == kBlocked<Nu>, "moments take the same way");
  constexpr bool buffered = kBuffered<Param> || kBuffered<Mu>;
  const Coefficients<T> c = *static_cast<const Coefficients<T>*>(coefficients);
  const auto* const own_grad = reinterpret_cast<const typename OwnGrad::Stored*>(grad);
  const auto* const working_grad = reinterpret_cast<const T*>(grad);
  const Place place{c.count, static_cast<uint64_t>(row.key)};
  alignas(Words) float param_values[kTile], mu_values[kTile], nu_values[kTile];
  for (int64_t n; begin < end; begin += n) {
    n = buffered ? minimum(kTile, end - begin) : end - begin;
    Tile<Param> param(row.param, row.param_aux, begin, param_values);
    Tile<Mu> mu(row.mu, row.mu_aux, begin, mu_values);
    Tile<Nu> nu(row.nu, row.nu_aux, begin, nu_values);
    param.prefetch();
    mu.prefetch();
    nu.prefetch();
    if (kBuffered<OwnGrad> && grad_is_own) prefetch_bytes(own_grad + begin + kAhead, kTile * sizeof(*own_grad));
    // All vectors of a step branch alike.
    const auto read_grad = [&](int64_t i, auto count) FUSED_OPTIM_INLINE -> Vector {
      if constexpr (kBuffered<OwnGrad>) {
        if (grad_is_own)
          return OwnGrad::load(read_vector<OwnGrad::is_upper_half>(own_grad + begin + i, count), NoAux{}) /
                 c.grad_divisor * c.grad_factor;
      }
      prefetch_bytes(working_grad + begin + i + kFar, sizeof(Vector));
      return read_vector(working_grad + begin + i, count) / c.grad_divisor * c.grad_factor;
    };
    if constexpr (!kBuffered<Mu>) {
      for_vectors<kSize<T>>(0, n, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
        if constexpr (!kBuffered<Param>) prefetch_bytes(param.stored + i + kFar, sizeof(Vector));
        prefetch_bytes(mu.stored + i + kFar, sizeof(Vector));
        prefetch_bytes(nu.stored + i + kFar, sizeof(Vector));
        Vector p = param.read(i, count), m = mu.read(i, count), v = nu.read(i, count);
        step<Rule>(p, read_grad(i, count), m, v, c);
        mu.write(m, i, count);
        nu.write(v, i, count);
        param.write(p, i, count);
      });
    } else {
      mu.look_at_codes(n);
      nu.look_at_codes(n);
      for (int64_t block = 0, first = 0; first < n; ++block, first += kBlockLength<Mu>) {
        const int64_t block_end = minimum(first + kBlockLength<Mu>, n);
        mu.begin_block(block);
        nu.begin_block(block);
        for_vectors<kWords>(first, block_end, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
          Vector m = mu.read(i, count), v = nu.read(i, count);
          Rule::moments(read_grad(i, count), m, v, c);
          mu.write(m, i, count);
          nu.write(v, i, count);
        });
        mu.end_block(block, first, block_end);
        nu.end_block(block, first, block_end);
      }
      const bool finite = mu.has_finite_values() && nu.has_finite_values();
      mu.begin_dithers(row.offset + begin, place, kMu);
      nu.begin_dithers(row.offset + begin, place, kNu);
      for (int64_t block = 0, first = 0; first < n; ++block, first += kBlockLength<Mu>) {
        const int64_t block_end = minimum(first + kBlockLength<Mu>, n);
        mu.begin_block(block);
        nu.begin_block(block);
        for_vectors<kWords>(first, block_end, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
          const Vector p = param.read(i, count), m = read_vector(mu.values + i), v = read_vector(nu.values + i);
          // Read again only where it is asked for: otherwise a tile takes some 10% longer.
          const Vector g = c.nesterov ? read_grad(i, count) : Vector{};
          const Vector u = Rule::update(g, m, v, c);
          if (finite) {
            mu.template encode<true>(i, count);
            nu.template encode<true>(i, count);
          }
          param.write(apply_update(p, u, c), i, count);
        });
      }
      if (!finite) {
        encode_tile(mu, false, row.offset + begin, n, place, kMu);
        encode_tile(nu, false, row.offset + begin, n, place, kNu);
      }
    }
    if constexpr (kBuffered<Param>) encode_tile(param, param.has_finite_values(), row.offset + begin, n, place, kParam);
  }
}

StepElements find(const Names& names) {
  return with_names<StepElements>(names, [](auto rule, auto param, auto, auto mu, auto nu) -> StepElements {
    return step_elements<decltype(rule), decltype(param), decltype(mu), decltype(nu)>;
  });
}

template <class Grad>
double square_sum(int64_t grad, int64_t begin, int64_t end, double grad_scale) {
  using T = typename Grad::Working;
  const auto* const stored = reinterpret_cast<const typename Grad::Stored*>(grad);
  const Divisor<T> scale = divisor(static_cast<T>(grad_scale));
  alignas(Words) T values[kNormLanes];
  alignas(Words) double lanes[kNormLanes] = {};
  for (; begin < end; begin += kNormLanes) {
    const int64_t n = minimum(kNormLanes, end - begin);
    for_vectors<kSize<T>>(0, n, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
      const auto from = read_vector<Grad::is_upper_half>(stored + begin + i, count);
      write_vector(values + i, Grad::load(from, NoAux{}) / scale);
    });
    for (int64_t i = 0; i < n; ++i) lanes[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  for (int64_t n = kNormLanes / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  return lanes[0];
}

SquareSum find_square_sum(const char* grad) {
  return with_name<SquareSum>(GradCodecs{}, grad, [](auto codec) { return square_sum<decltype(codec)>; });
}

const Isa isa = {find, find_square_sum};

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim

#if defined(__clang__) && FUSED_OPTIM_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
