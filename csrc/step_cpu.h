// The CPU step. This file is compiled once for each instruction set, in a namespace of
// its own, by a short .cpp that sets FUSED_OPTIM_ISA, FUSED_OPTIM_PACK_BYTES and the compiler's
// target. What is called from here is compiled for it too, so all of our own headers come after it;
// what they define outside of that namespace is always inlined, or the linker would keep one
// instruction set's copy for all.
//
// Packs of neighbours are decoded and updated in registers; a tensor's last, short pack takes the
// same way. What is not stored as it is waits in a buffer until all of its tile is known, and is
// encoded then: narrow moments while the processor divides for the parameter.
#pragma once

#include "codecs.h"
#include "cpu_task.h"
#include "packs.h"
#include "rules/all.h"

// Of lambdas: gcc would call those that are used twice.
#define FUSED_OPTIM_INLINE __attribute__((always_inline))

namespace fused_optim {
namespace FUSED_OPTIM_ISA {

// A tile is what is decoded and updated before it is encoded; it begins at a multiple of kTile and has
// whole blocks of the 8-bit formats. (Where nothing is encoded, a chunk is one tile.) While one is
// stepped, what lies kAhead elements further is fetched. AdaBelief all in bfloat16 takes 0.26 ns an
// element with tiles of 256 or 512, in a cache, 0.28 with 128.
constexpr int64_t kTile = 256, kAhead = 768, kBlocks = kTile / kBlockElements;

inline void prefetch_bytes(const void* first, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(first) + i, 1);
}

// Philox gives eight neighbours their bits at once, two of them in each word.
inline void random_tile(const Place& place, int64_t begin, uint16_t* random) {
  uint32_t words[4][kTile / 8];
#pragma omp simd
  for (int64_t i = 0; i < kTile / 8; ++i) {
    const PhiloxWords four = philox(static_cast<uint64_t>(begin / 8 + i), place);
    words[0][i] = four.word[0];
    words[1][i] = four.word[1];
    words[2][i] = four.word[2];
    words[3][i] = four.word[3];
  }
  for (int64_t i = 0; i < kTile / 8; ++i) {
    for (int k = 0; k < 4; ++k) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
      const uint32_t halves = words[k][i] << 16 | words[k][i] >> 16;
#else
      const uint32_t halves = words[k][i];
#endif
      memcpy(random + 8 * i + 2 * k, &halves, sizeof(halves));
    }
  }
}

template <class Stored>
FUSED_OPTIM_HD bool any_code_at_least(const Stored* codes, int64_t n, uint8_t mask, uint8_t limit) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto code = static_cast<uint8_t>(codes[i] & mask);
    largest = code > largest ? code : largest;
  }
  return largest >= limit;
}

// Whether updated values are buffered until the whole tile is updated. What they share is known
// then, and whether all are usual; and since a processor holds only so many instructions that wait for a
// division, the fewer a pack has the more divisions it holds: bfloat16 parameters with float32
// moments take 0.21 ns an element, 0.29 where each pack is encoded at once.
template <class Codec>
constexpr bool kBuffered = !std::is_same<typename Codec::Stored, typename Codec::Working>::value;

// What an operand of a tile keeps in memory meanwhile. It is not within Array, whose fields would
// then be in memory too.
template <class Codec>
struct Buffers {
  alignas(Words) float values[kBuffered<Codec> ? kTile : 1];
  alignas(Words) uint16_t random[Codec::random == kPhilox ? kTile : 1];
};

// One operand of a row: the tile that is being stepped, and those after it.
template <class Codec, Operand operand>
struct Array {
  using Stored = typename Codec::Stored;
  using Extra = typename Codec::Extra;
  using Pack = typename PackOf<typename Codec::Working>::Pack;
  static_assert(!kBlocked<Codec> || Codec::block == kBlockElements, "blocks of one size are walked");

  Stored* stored;
  Extra* extra;
  Buffers<Codec>& buffers;
  Words dithers, dithers_step;  // of the next pack, and from it to the one after
  Words largest;                // magnitude since the tile's beginning, or the block's, by lane
  uint32_t base;                // of the block
  bool usual_codes;             // in the tile
  bool usual_values;            // that were written to it

  FUSED_OPTIM_HD Array(int64_t stored_address, int64_t extra_address, int64_t begin, const Place& place,
                       Buffers<Codec>& buffers)
      : stored(reinterpret_cast<Stored*>(stored_address) + begin),
        extra(reinterpret_cast<Extra*>(extra_address) + begin / Codec::block),
        buffers(buffers) {
    if constexpr (Codec::random == kDither) {
      dithers = dither<operand>(iota() + static_cast<uint32_t>(begin), place);
      dithers_step = in_register(dither<operand>(Words{} + static_cast<uint32_t>(kWords), Place{}));
    }
  }

  // `begin`: the index of the tile's first element, of which there are `n`.
  FUSED_OPTIM_HD void begin_tile(int64_t begin, int64_t n, const Place& place) {
    if constexpr (kBuffered<Codec>) {
      prefetch_bytes(stored + kAhead, kTile * sizeof(Stored));
      largest = Words{};
      usual_values = true;
    }
    if constexpr (kExtraEach<Codec>) prefetch_bytes(extra + kAhead, kTile * sizeof(Extra));
    if constexpr (Codec::random == kPhilox) random_tile(place, begin, buffers.random);
    if (n == kTile)
      look_at_codes(0, kTile);  // a number that is known is a loop without a rest
    else
      look_at_codes(0, n);
  }

  // Whether those of elements `i` to `end` are usual.
  FUSED_OPTIM_HD void look_at_codes(int64_t i, int64_t end) {
    if constexpr (kBlocked<Codec>)
      usual_codes = !any_code_at_least(stored + i, end - i, Codec::code_bits, Codec::infinity);
  }

  FUSED_OPTIM_HD void begin_block(int64_t block) {
    if constexpr (kBlocked<Codec>) base = extra[block];
  }

  template <class Count>
  FUSED_OPTIM_HD Pack read(int64_t i, Count n) const {
    const auto from = read_pack<Codec::is_upper_half>(stored + i, n);
    if constexpr (kBlocked<Codec>)
      return usual_codes ? Codec::load_usual(from, base) : Codec::load(from, base);
    else if constexpr (kExtraEach<Codec>)
      return Codec::load(from, read_pack(extra + i, n));
    else
      return Codec::load(from, NoExtra{});
  }

  template <class Count>
  FUSED_OPTIM_HD void write(Pack x, int64_t i, Count n) {
    if constexpr (!kBuffered<Codec>) {
      write_pack(stored + i, x, n);
    } else {
      const Floats there = first_of(x, n);
      take_magnitudes(magnitude_bits(there));
      write_pack(buffers.values + i, there);
    }
  }

  // What was written.
  template <class Count>
  FUSED_OPTIM_HD Pack written(int64_t i, Count n) const {
    if constexpr (kBuffered<Codec>)
      return read_pack(buffers.values + i);
    else
      return read_pack(stored + i, n);
  }

  // All of a block, elements `i` to `end`, is written.
  FUSED_OPTIM_HD void end_block(int64_t block, int64_t i, int64_t end) {
    if constexpr (kBlocked<Codec>) {
      if (any_at_least(largest, kUnusual)) {
        usual_values = false;
        largest = Words{};
        for (; i < end; i += kWords) take_magnitudes(Codec::magnitude(read_pack(buffers.values + i)));
      }
      extra[block] = Codec::extra_of(largest_of(largest));
      largest = Words{};
    }
  }

  // Whether `store_usual` will do, after all of the tile was written.
  FUSED_OPTIM_HD bool has_usual_values() const {
    if constexpr (!kBuffered<Codec>) return true;
    return Codec::has_usual && (kBlocked<Codec> ? usual_values : !any_at_least(largest, kUnusual));
  }

  // In order, since dithers are made on the way.
  template <bool usual, class Count>
  FUSED_OPTIM_HD void encode(int64_t i, Count n) {
    if constexpr (kBuffered<Codec>) {
      const Floats x = read_pack(buffers.values + i);
      Words bits{};
      if constexpr (Codec::random == kPhilox) bits = read_pack(buffers.random + i);
      if constexpr (Codec::random == kDither) bits = next_dithers();
      std::conditional_t<kBlocked<Codec>, uint32_t, typename PackOf<Extra>::Pack> part{};
      if constexpr (kBlocked<Codec>) part = base;
      if constexpr (usual && Codec::has_usual)
        write_pack<Codec::is_upper_half>(stored + i, Codec::store_usual(x, bits, part), n);
      else
        write_pack<Codec::is_upper_half>(stored + i, Codec::store(x, bits, part), n);
      if constexpr (kExtraEach<Codec>) write_pack(extra + i, part, n);
    }
  }

  // To the next one.
  FUSED_OPTIM_HD void end_tile(int64_t n) {
    stored += n;
    extra += n / Codec::block;
  }

 private:
  FUSED_OPTIM_HD void take_magnitudes(Words m) { largest = larger(m, largest); }

  FUSED_OPTIM_HD Words next_dithers() {
    const Words bits = dithers;
    dithers += dithers_step;
    return bits;
  }
};

// The gradient: any plain format that is decoded to T goes with any parameter's. All packs of a
// step branch alike.
template <class T>
struct Gradient {
  using Pack = typename PackOf<T>::Pack;

  int format;  // its place in FUSED_OPTIM_PLAIN_CODECS
  const void* first;

  // -1 where there is no such format.
  static int format_of(const char* name) {
    int format = 0;
#define FUSED_OPTIM_CASE(Codec)                                                                         \
  if (std::is_same<typename Codec::Working, T>::value && same(name, Codec::name)) return format;        \
  ++format;
    FUSED_OPTIM_PLAIN_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
    return -1;
  }

  FUSED_OPTIM_HD void begin_tile(int64_t i) const {
    visit([&](auto codec) {
      using Codec = decltype(codec);
      if (kBuffered<Codec>) prefetch_bytes(at<Codec>(i) + kAhead, kTile * sizeof(typename Codec::Stored));
      return Pack{};
    });
  }

  template <class Count>
  FUSED_OPTIM_HD Pack read(int64_t i, Count n) const {
    return visit([&](auto codec) __attribute__((always_inline)) -> Pack {
      using Codec = decltype(codec);
      return Codec::load(read_pack<Codec::is_upper_half>(at<Codec>(i), n), NoExtra{});
    });
  }

 private:
  template <class Codec>
  FUSED_OPTIM_HD const typename Codec::Stored* at(int64_t i) const {
    return static_cast<const typename Codec::Stored*>(first) + i;
  }

  template <class Visitor>
  FUSED_OPTIM_HD Pack visit(Visitor visitor) const {
    int k = 0;
#define FUSED_OPTIM_CASE(Codec)                                        \
  if constexpr (std::is_same<typename Codec::Working, T>::value)       \
    if (format == k) return visitor(Codec{});                          \
  ++k;
    FUSED_OPTIM_PLAIN_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
    __builtin_unreachable();
  }
};

// Small tensors lie in memory of their own each, where no prefetcher of the processor's finds them.
inline void prefetch_row(const Row& row) {
  for (const int64_t operand : {row.grad, row.param, row.mu, row.nu})
    prefetch_bytes(reinterpret_cast<const void*>(operand), 256);
}

// `body(i, count)` for each pack of elements `i` to `end`.
template <int64_t size, class Body>
FUSED_OPTIM_HD void for_packs(int64_t i, int64_t end, Body body) {
  for (; i + size <= end; i += size) body(i, All{});
  if (i < end) body(i, end - i);
}

// The `n` elements that were written, of a format without blocks.
template <class Array>
FUSED_OPTIM_HD void encode_all(Array& array, int64_t n) {
  if (array.has_usual_values())
    for_packs<kWords>(0, n, [&](int64_t i, auto count) FUSED_OPTIM_INLINE { array.template encode<true>(i, count); });
  else
    for_packs<kWords>(0, n, [&](int64_t i, auto count) FUSED_OPTIM_INLINE { array.template encode<false>(i, count); });
}

// Elements `begin` to `end` of a row. The coefficients are a copy, since no write to a tensor can
// change that: else they are read again for each pack.
template <class Rule, class Param, class Mu, class Nu>
inline void step_elements(const Row& row, const Gradient<typename Param::Working> grad, int64_t begin, int64_t end,
                          const Coefficients<typename Param::Working> c) {
  using T = typename Param::Working;
  using Pack = typename PackOf<T>::Pack;
  static_assert(!kBlocked<Param>, "only moments share bases");
  constexpr int64_t size = PackOf<T>::size;
  constexpr bool buffered = kBuffered<Param> || kBuffered<Mu> || kBuffered<Nu>;
  const Place place{c.count, static_cast<uint64_t>(row.key)};
  Buffers<Param> param_buffers;
  Buffers<Mu> mu_buffers;
  Buffers<Nu> nu_buffers;
  Array<Param, kParam> param(row.param, row.param_extra, begin, place, param_buffers);
  Array<Mu, kMu> mu(row.mu, row.mu_extra, begin, place, mu_buffers);
  Array<Nu, kNu> nu(row.nu, row.nu_extra, begin, place, nu_buffers);
  for (int64_t n; begin < end; begin += n) {
    n = buffered ? minimum(kTile, end - begin) : end - begin;
    param.begin_tile(begin, n, place);
    grad.begin_tile(begin);
    mu.begin_tile(begin, n, place);
    nu.begin_tile(begin, n, place);
    const auto read_grad = [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
      return grad.read(begin + i, count) / c.grad_divisor;
    };
    if constexpr (!kBuffered<Mu> && !kBuffered<Nu>) {
      for_packs<size>(0, n, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
        const Pack p = param.read(i, count), g = read_grad(i, count);
        Pack m = mu.read(i, count), v = nu.read(i, count);
        Rule::moments(g, m, v, c);
        mu.write(m, i, count);
        nu.write(v, i, count);
        param.write(apply_update(p, Rule::update(g, m, v, c), c), i, count);
      });
    } else {
      const int64_t block_length = kBlocked<Mu> || kBlocked<Nu> ? kBlockElements : n;
      for (int64_t block = 0, first = 0; first < n; ++block, first += block_length) {
        const int64_t block_end = minimum(first + block_length, n);
        mu.begin_block(block);
        nu.begin_block(block);
        for_packs<size>(first, block_end, [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
          Pack m = mu.read(i, count), v = nu.read(i, count);
          Rule::moments(read_grad(i, count), m, v, c);
          mu.write(m, i, count);
          nu.write(v, i, count);
        });
        mu.end_block(block, first, block_end);
        nu.end_block(block, first, block_end);
      }
      const auto update_and_encode = [&](auto usual) FUSED_OPTIM_INLINE {
        for (int64_t block = 0, first = 0; first < n; ++block, first += block_length) {
          mu.begin_block(block);
          nu.begin_block(block);
          for_packs<size>(first, minimum(first + block_length, n), [&](int64_t i, auto count) FUSED_OPTIM_INLINE {
            const Pack p = param.read(i, count), m = mu.written(i, count), v = nu.written(i, count);
            const Pack u = Rule::update(read_grad(i, count), m, v, c);
            mu.template encode<usual.value>(i, count);
            nu.template encode<usual.value>(i, count);
            param.write(apply_update(p, u, c), i, count);
          });
        }
      };
      if (mu.has_usual_values() && nu.has_usual_values())
        update_and_encode(std::true_type{});
      else
        update_and_encode(std::false_type{});
    }
    encode_all(param, n);
    mu.end_tile(n);
    nu.end_tile(n);
    param.end_tile(n);
  }
}

template <class Rule, class Param, class Mu, class Nu>
void step_chunks(const Task& task, int64_t first, int64_t last) {
  using T = typename Param::Working;
  const int grad_format = Gradient<T>::format_of(task.grad_format);
  for (int64_t k = first; k < last; ++k) {
    if (k + 2 < last && task.chunks[k + 2].row != task.chunks[k + 1].row)
      prefetch_row(task.rows[task.chunks[k + 2].row]);
    const Chunk chunk = task.chunks[k];
    const Row& row = task.rows[chunk.row];
    const int64_t number = chunk.chunk < 0 ? ~chunk.chunk : chunk.chunk;
    const int64_t begin = number * task.chunk_size, end = minimum(begin + task.chunk_size, row.numel);
    const Gradient<T> grad{grad_format, reinterpret_cast<const void*>(row.grad)};
    step_elements<Rule, Param, Mu, Nu>(row, grad, begin, end, task.coefficients_of<T>(row.counter));
  }
}

// One operand alone, for the tests of codecs.
template <class Codec, Operand operand>
void encode_operand(const float* values, const Place& place, int64_t n, void* stored, void* extra) {
  Buffers<Codec> buffers;
  Array<Codec, operand> array(reinterpret_cast<int64_t>(stored), reinterpret_cast<int64_t>(extra), 0, place, buffers);
  // A tile of blocks is one block here.
  constexpr int64_t length = kBlocked<Codec> ? kBlockElements : kTile;
  for (int64_t begin = 0; begin < n; begin += length) {
    const int64_t end = minimum(length, n - begin);
    array.begin_tile(begin, end, place);
    for_packs<kWords>(0, end, [&](int64_t i, auto count) {
      array.write(read_pack(values + begin + i, count), i, count);
    });
    array.end_block(0, 0, end);
    array.begin_block(0);
    encode_all(array, end);
    array.end_tile(end);
  }
}

template <class Codec>
void decode_operand(const void* stored, const void* extra, int64_t n, float* values) {
  Buffers<Codec> buffers;
  Array<Codec, kMu> array(reinterpret_cast<int64_t>(stored), reinterpret_cast<int64_t>(extra), 0, {}, buffers);
  for (int64_t begin = 0; begin < n; begin += kBlockElements) {
    const int64_t end = minimum(kBlockElements, n - begin);
    array.look_at_codes(0, end);
    array.begin_block(0);
    for_packs<kWords>(0, end, [&](int64_t i, auto count) {
      write_pack(values + begin + i, array.read(i, count), count);
    });
    array.end_tile(end);
  }
}

// Calls `visitor` with the codec of that name; false where there is none that is encoded.
template <class Visitor>
bool with_codec(const char* format, Visitor visitor) {
#define FUSED_OPTIM_CASE(Codec)              \
  if constexpr (kBuffered<Codec>) {          \
    if (same(format, Codec::name)) {         \
      visitor(Codec{});                      \
      return true;                           \
    }                                        \
  }
  FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
  FUSED_OPTIM_MOMENT_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return false;
}

bool encode(Operand operand, const char* format, const float* values, const Place& place, int64_t n, void* stored,
            void* extra) {
  return with_codec(format, [&](auto codec) {
    using Codec = decltype(codec);
    const auto encode = operand == kParam ? encode_operand<Codec, kParam>
                        : operand == kMu  ? encode_operand<Codec, kMu>
                                          : encode_operand<Codec, kNu>;
    encode(values, place, n, stored, extra);
  });
}

bool decode(const char* format, const void* stored, const void* extra, int64_t n, float* values) {
  return with_codec(format, [&](auto codec) { decode_operand<decltype(codec)>(stored, extra, n, values); });
}

template <class Rule, class Param>
StepChunks find_of(const Task& task) {
  using T = typename Param::Working;
  if (!same(task.param_format, Param::name) || Gradient<T>::format_of(task.grad_format) < 0)
    return nullptr;
#define FUSED_OPTIM_CASE(Mu, Nu)                                                  \
  if constexpr (std::is_same<typename Mu::Working, T>::value) {                   \
    if (same(task.mu_format, Mu::name) && same(task.nu_format, Nu::name))         \
      return step_chunks<Rule, Param, Mu, Nu>;                                    \
  }
  FUSED_OPTIM_MOMENTS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

template <class Rule>
StepChunks find_of(const Task& task) {
  StepChunks found = nullptr;
#define FUSED_OPTIM_CASE(Param) \
  if (found == nullptr) found = find_of<Rule, Param>(task);
  FUSED_OPTIM_PARAM_CODECS(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return found;
}

// The function that steps a range of chunks; null for an unknown rule or format.
StepChunks find(const char* rule, const Task& task) {
#define FUSED_OPTIM_CASE(Rule) \
  if (same(rule, Rule::name)) return find_of<Rule>(task);
  FUSED_OPTIM_RULES(FUSED_OPTIM_CASE)
#undef FUSED_OPTIM_CASE
  return nullptr;
}

}  // namespace FUSED_OPTIM_ISA
}  // namespace fused_optim
