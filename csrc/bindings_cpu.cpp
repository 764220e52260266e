// fused_optim._cpu: addresses and sizes come in as integers; no torch header anywhere.
#if defined(_OPENMP)
#include <omp.h>
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "addresses.h"
#include "cpu_task.h"

namespace {

using namespace fused_optim;

using NamedIsa = std::pair<const char*, const Isa*>;

// Those of this machine, best first.
const std::vector<NamedIsa>& isas() {
  static const std::vector<NamedIsa> found = [] {
    std::vector<NamedIsa> isas;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      isas.emplace_back("avx512", &avx512::isa);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.emplace_back("avx2", &avx2::isa);
#endif
    isas.emplace_back("baseline", &baseline::isa);
    return isas;
  }();
  return found;
}

const Isa& isa_named(const std::string& name) {
  for (const auto& [known, isa] : isas())
    if (name == known) return *isa;
  throw std::invalid_argument("no CPU code for instruction set '" + name + "'");
}

// What stays the same while a batch lives.
struct Prepared : Table {
  StepElements step_elements;
  bool grad_is_own, in_float64;
  int64_t chunk_size;
};

struct Task : Prepared {
  const Hyperparameters* hyper;
  double grad_scale, grad_factor;
  int threads;
};

// Small tensors lie in memory of their own each, where no prefetcher of the processor's finds them.
void prefetch(const Table& table, int32_t i) {
  const Row& row = table.rows[i];
  for (const int64_t operand : {table.grads[i], row.param, row.mu, row.nu})
    for (int64_t i = 0; i < 256; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(operand) + i, 1);
}

// Calls `body(k, last)` for portions of `n` chunks. A thread takes several at a time, so that ten thousand tiny tensors
// do not mean ten thousand requests for work. Each begins with a share of its own, the same in every step, which its
// core's cache may still hold, and then helps the others: a core may be busy with something else.
template <class Body>
void in_portions(int64_t n, int threads, Body body) {
  const int64_t portion = 1 + n / (32 * static_cast<int64_t>(threads));
  const int64_t portions = (n + portion - 1) / portion;
  const int shares = static_cast<int>(minimum(threads, portions));
  std::vector<std::atomic<int64_t>> taken(shares);
  const auto work = [&](int thread) {
    for (int k = 0; k < shares; ++k) {
      const int share = (thread + k) % shares;
      const int64_t first = portions * share / shares, count = portions * (share + 1) / shares - first;
      for (int64_t i; (i = taken[share].fetch_add(1, std::memory_order_relaxed)) < count;)
        body((first + i) * portion, minimum((first + i + 1) * portion, n));
    }
  };
#if defined(_OPENMP)
  if (shares > 1) {  // not a region of one: libgomp allocates for it, and ends the process where it cannot
#pragma omp parallel num_threads(shares)
    work(omp_get_thread_num());
    return;
  }
#endif
  work(0);
}

template <class T>
void run(const Task& task) {
  std::vector<Coefficients<T>> of_counters(task.n_counters);
  for (int64_t i = 0; i < task.n_counters; ++i) {
    const int64_t count = next_count(*reinterpret_cast<const int64_t*>(task.counters[i].step));
    of_counters[i] = coefficients<T>(task.hyper[task.counters[i].hyper], count, static_cast<T>(task.grad_scale),
                                     static_cast<T>(task.grad_factor));
  }
  in_portions(task.n_chunks, task.threads, [&](int64_t k, int64_t last) {
    for (; k < last; ++k) {
      if (k + 2 < last && task.chunks[k + 2].row != task.chunks[k + 1].row) prefetch(task, task.chunks[k + 2].row);
      const Chunk chunk = task.chunks[k];
      const Row& row = task.rows[chunk.row];
      const int64_t begin = (chunk.chunk < 0 ? ~chunk.chunk : chunk.chunk) * task.chunk_size;
      task.step_elements(row, task.grads[chunk.row], begin, minimum(begin + task.chunk_size, row.numel),
                         task.grad_is_own, &of_counters[row.counter]);
    }
  });
  // Last, so that what is thrown before leaves them true.
  for (int64_t i = 0; i < task.n_counters; ++i) {
    int64_t& count = *reinterpret_cast<int64_t*>(task.counters[i].step);
    count = next_count(count);
  }
}

// Not py::gil_scoped_release: at the interpreter's end taking the lock ends a daemon thread, by unwinding, and no
// destructor lets that through.
template <class Body>
void without_interpreter(Body body) {
  std::exception_ptr thrown;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (thrown) std::rethrow_exception(thrown);
}

// Not a class of pybind11's, which ends the process where memory for an instance runs out.
template <class T>
py::capsule kept(std::unique_ptr<T> made) {
  py::capsule capsule(made.get(), [](void* it) { delete static_cast<T*>(it); });
  made.release();
  return capsule;
}

py::capsule prepare(const std::string& isa, const NameStrings& strings, int64_t chunk_size,
                    const std::array<int64_t, 6>& table) {
  const Names names = names_of(strings);
  const StepElements step_elements = isa_named(isa).find(names);
  if (step_elements == nullptr) throw std::invalid_argument("no CPU code for " + text_of(names));
  return kept(std::make_unique<Prepared>(
      Prepared{bit_cast<Table>(table), step_elements, !same(names.grad, Fp32::name), same(names.mu, Fp64::name),
               chunk_size}));
}

void step_cpu(const py::capsule& prepared, int64_t hyper, double grad_scale, double grad_factor, int threads) {
  const Task task{*prepared.get_pointer<Prepared>(), reinterpret_cast<const Hyperparameters*>(hyper), grad_scale,
                  grad_factor, threads};
  without_interpreter([&] { task.in_float64 ? run<double>(task) : run<float>(task); });
}

void square_sums(const std::string& isa, const std::string& grad, const std::array<int64_t, 6>& fields, int threads) {
  const SquareSum square_sum = isa_named(isa).find_square_sum(grad.c_str());
  if (square_sum == nullptr) throw std::invalid_argument("no CPU code for gradients in " + grad);
  const auto task = bit_cast<NormTask>(fields);
  const double grad_scale = task.grad_scale == nullptr ? 1.0 : static_cast<double>(*task.grad_scale);
  const auto sum_chunks = [&](int64_t k, int64_t last) {
    for (; k < last; ++k) {
      const NormChunk chunk = task.chunks[k];
      const int64_t begin = (chunk.chunk < 0 ? ~chunk.chunk : chunk.chunk) * kNormChunk;
      const int64_t end = minimum(begin + kNormChunk, task.rows[chunk.row].numel);
      task.sums[chunk.place] = square_sum(task.grads[chunk.row], begin, end, grad_scale);
    }
  };
  without_interpreter([&] { in_portions(task.n_chunks, threads, sum_chunks); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const NamedIsa& isa : isas()) names.emplace_back(isa.first);
    return names;
  });
  m.def("prepare", &prepare);
  m.def("step", &step_cpu);
  m.def("square_sums", &square_sums);
  // None where it does not work.
  m.def("addresses", [](const py::list& param_lists, const py::dict& state, std::string kinds, std::set<int64_t> held,
                        int64_t grads) -> py::object {
    auto made = std::make_unique<Addresses>(param_lists, state, std::move(kinds), std::move(held), grads);
    return made->works() ? py::object(kept(std::move(made))) : py::none();
  });
  m.def("ask", [](const py::capsule& addresses, const py::list& param_lists, const py::dict& state) {
    return addresses.get_pointer<Addresses>()->ask(param_lists, state);
  });
  m.attr("openmp") = kOpenMP;
  m.attr("compiler") = __VERSION__;
}
