// fused_optim._cpu: addresses and sizes come in as integers; no torch header anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "addresses.h"
#include "cpu_task.h"

namespace py = pybind11;

namespace fused_optim {
namespace {

struct Isa {
  const char* name;
  bool supported;
  StepChunks (*find)(const char* rule, const Task& task);
  bool (*encode)(Operand, const char* format, const float*, const Place&, int64_t n, void* stored, void* extra);
  bool (*decode)(const char* format, const void* stored, const void* extra, int64_t n, float*);
};

// Best first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512::find, avx512::encode, avx512::decode},
      {"avx2", static_cast<bool>(__builtin_cpu_supports("avx2")), avx2::find, avx2::encode, avx2::decode},
#endif
      {"baseline", true, baseline::find, baseline::encode, baseline::decode},
  };
  return all;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

constexpr int64_t kAhead = 16;  // step numbers, each in a tensor of its own

// Coefficients for every counter, and the counters advanced. Neighbours mostly share group
// and step number, so a coefficient set is worked out when one of them changes.
template <class T>
std::vector<Coefficients<T>> advance(const Counter* counters, int64_t n, const Hyperparameters* hyper,
                                     double grad_scale, std::vector<int32_t>& index) {
  std::vector<Coefficients<T>> sets;
  index.resize(n);
  int64_t last_count = -1, last_hyper = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(reinterpret_cast<const void*>(counters[i + kAhead].step), 1);
    int64_t* step = reinterpret_cast<int64_t*>(counters[i].step);
    const int64_t count = next_count(*step);
    if (count != last_count || counters[i].hyper != last_hyper) {
      sets.push_back(coefficients<T>(hyper[counters[i].hyper], count, static_cast<T>(grad_scale)));
      last_count = count;
      last_hyper = counters[i].hyper;
    }
    index[i] = static_cast<int32_t>(sets.size()) - 1;
    *step = count;
  }
  return sets;
}

template <class T>
void run(StepChunks step_chunks, Task task, const Counter* counters, int64_t n_counters,
         const Hyperparameters* hyper, double grad_scale, int64_t n_chunks, int threads) {
  std::vector<int32_t> index;
  const std::vector<Coefficients<T>> sets = advance<T>(counters, n_counters, hyper, grad_scale, index);
  task.coefficients = sets.data();
  task.coefficient_of_counter = index.data();
  // A thread takes several chunks at a time, so that ten thousand tiny tensors do not mean
  // ten thousand requests for work; 32 portions a thread even out their speeds.
  const int64_t portion = 1 + n_chunks / (32 * static_cast<int64_t>(threads));
  const int64_t portions = (n_chunks + portion - 1) / portion;
  (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (portions > 1)
#endif
  for (int64_t i = 0; i < portions; ++i)
    step_chunks(task, i * portion, minimum((i + 1) * portion, n_chunks));
}

const Isa& isa_named(const std::string& name) {
  for (const Isa& isa : isas())
    if (isa.supported && name == isa.name) return isa;
  throw std::invalid_argument("no CPU code for instruction set '" + name + "'");
}

void encode(const std::string& isa, int operand, const std::string& format, int64_t values, int64_t n, uint32_t step,
            uint64_t key, int64_t stored, int64_t extra) {
  if (!isa_named(isa).encode(static_cast<Operand>(operand), format.c_str(), reinterpret_cast<const float*>(values),
                             Place{step, key}, n, reinterpret_cast<void*>(stored), reinterpret_cast<void*>(extra)))
    throw std::invalid_argument("no CPU code that encodes format '" + format + "'");
}

void decode(const std::string& isa, const std::string& format, int64_t stored, int64_t extra, int64_t n,
            int64_t values) {
  if (!isa_named(isa).decode(format.c_str(), reinterpret_cast<const void*>(stored),
                             reinterpret_cast<const void*>(extra), n, reinterpret_cast<float*>(values)))
    throw std::invalid_argument("no CPU code that decodes format '" + format + "'");
}

void step(const std::string& isa, const std::string& rule, const std::string& param_format,
          const std::string& grad_format, const std::string& mu_format, const std::string& nu_format,
          int64_t rows, int64_t chunks, int64_t n_chunks, int64_t chunk_size, int64_t counters, int64_t n_counters,
          int64_t hyper, double grad_scale, int threads) {
  Task task{};
  task.rows = reinterpret_cast<const Row*>(rows);
  task.chunks = reinterpret_cast<const Chunk*>(chunks);
  task.chunk_size = chunk_size;
  task.param_format = param_format.c_str();
  task.grad_format = grad_format.c_str();
  task.mu_format = mu_format.c_str();
  task.nu_format = nu_format.c_str();
  const StepChunks step_chunks = isa_named(isa).find(rule.c_str(), task);
  if (step_chunks == nullptr)
    throw std::invalid_argument("no CPU code for rule '" + rule + "', parameter format '" + param_format +
                                "', gradient format '" + grad_format + "', moment formats '" + mu_format + "' and '" +
                                nu_format + "'");
  const auto* c = reinterpret_cast<const Counter*>(counters);
  const auto* h = reinterpret_cast<const Hyperparameters*>(hyper);
  py::gil_scoped_release release;
  if (mu_format == Fp64::name)
    run<double>(step_chunks, task, c, n_counters, h, grad_scale, n_chunks, threads);
  else
    run<float>(step_chunks, task, c, n_counters, h, grad_scale, n_chunks, threads);
}

}  // namespace
}  // namespace fused_optim

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU step of fused_optim.";
  m.def("isas", &fused_optim::supported_isas, "Instruction sets that this machine has, best first.");
  m.def("step", &fused_optim::step, "One step of every row of a table.");
  m.def("encode", &fused_optim::encode, "Values into a format that is not the working precision's own.");
  m.def("decode", &fused_optim::decode, "What encode stored, back to values.");
  using fused_optim::Addresses;
  py::class_<Addresses>(m, "Addresses", "Where an optimizer's tensors are: see fused_optim/addresses.py.")
      .def(py::init<py::list, py::list, int64_t>())
      .def("works", &Addresses::works)
      .def("ask", &Addresses::ask);
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#endif
}
