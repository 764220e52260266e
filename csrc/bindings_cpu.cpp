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
#include "arguments.h"
#include "cpu_task.h"

namespace py = pybind11;

namespace fused_optim {
namespace {

struct Isa {
  const char* name;
  bool supported;
  bool (*find)(Task& task);
  void (*step_chunks)(const Task& task, int64_t first, int64_t last);
  bool (*encode)(Operand, const char* format, const float*, const Place&, int64_t n, void* stored, void* aux);
  bool (*decode)(const char* format, const void* stored, const void* aux, int64_t n, float*);
};

// Best first.
const std::vector<Isa>& isas() {
#define FUSED_OPTIM_ISA_OF(isa, supported) \
  { #isa, supported, isa::find, isa::step_chunks, isa::encode, isa::decode }
  static const std::vector<Isa> all = {
#if defined(__x86_64__)
      FUSED_OPTIM_ISA_OF(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
      FUSED_OPTIM_ISA_OF(avx2, static_cast<bool>(__builtin_cpu_supports("avx2"))),
#endif
      FUSED_OPTIM_ISA_OF(baseline, true),
  };
#undef FUSED_OPTIM_ISA_OF
  return all;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

// A step as Python describes it; addresses are of tables that fused_optim/table.py makes.
struct CpuStep {
  std::string isa, rule, param, grad, mu, nu;
  int64_t rows, chunks, n_chunks, chunk_size, counters, n_counters, hyper;
  double grad_scale;
  int threads;

  explicit CpuStep(const py::kwargs& given) {
    Arguments(given)
        .take("isa", isa)
        .take("rule", rule)
        .take("param", param)
        .take("grad", grad)
        .take("mu", mu)
        .take("nu", nu)
        .take("rows", rows)
        .take("chunks", chunks)
        .take("n_chunks", n_chunks)
        .take("chunk_size", chunk_size)
        .take("counters", counters)
        .take("n_counters", n_counters)
        .take("hyper", hyper)
        .take("grad_scale", grad_scale)
        .take("threads", threads)
        .end();
  }
};

constexpr int64_t kAhead = 16;  // step numbers, each in a tensor of its own

// Coefficients for every counter. Neighbours mostly share group and step number, so a coefficient set is
// worked out when one of them changes.
template <class T>
std::vector<Coefficients<T>> coefficient_sets(const CpuStep& step, std::vector<int32_t>& set_of_counter) {
  const auto* counters = reinterpret_cast<const Counter*>(step.counters);
  const auto* hyper = reinterpret_cast<const Hyperparameters*>(step.hyper);
  std::vector<Coefficients<T>> sets;
  set_of_counter.resize(step.n_counters);
  int64_t last_count = -1, last_hyper = -1;
  for (int64_t i = 0; i < step.n_counters; ++i) {
    if (i + kAhead < step.n_counters) __builtin_prefetch(reinterpret_cast<const void*>(counters[i + kAhead].step), 1);
    const int64_t count = next_count(*reinterpret_cast<const int64_t*>(counters[i].step));
    if (count != last_count || counters[i].hyper != last_hyper) {
      sets.push_back(coefficients<T>(hyper[counters[i].hyper], count, static_cast<T>(step.grad_scale)));
      last_count = count;
      last_hyper = counters[i].hyper;
    }
    set_of_counter[i] = static_cast<int32_t>(sets.size()) - 1;
  }
  return sets;
}

template <class T>
void run(const CpuStep& step, Task task, void (*step_chunks)(const Task&, int64_t, int64_t)) {
  std::vector<int32_t> set_of_counter;
  const std::vector<Coefficients<T>> sets = coefficient_sets<T>(step, set_of_counter);
  task.coefficients = reinterpret_cast<const char*>(sets.data());
  task.coefficients_bytes = sizeof(Coefficients<T>);
  task.coefficients_of_counter = set_of_counter.data();
  // A thread takes several chunks at a time, so that ten thousand tiny tensors do not mean
  // ten thousand requests for work; 32 portions a thread even out their speeds.
  const int64_t portion = 1 + step.n_chunks / (32 * static_cast<int64_t>(step.threads));
  const int64_t portions = (step.n_chunks + portion - 1) / portion;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(step.threads) schedule(dynamic) if (step.threads > 1 && portions > 1)
#endif
  for (int64_t i = 0; i < portions; ++i)
    step_chunks(task, i * portion, minimum((i + 1) * portion, step.n_chunks));
  // Last, so that what is thrown before leaves them true.
  const auto* counters = reinterpret_cast<const Counter*>(step.counters);
  for (int64_t i = 0; i < step.n_counters; ++i) {
    int64_t& count = *reinterpret_cast<int64_t*>(counters[i].step);
    count = next_count(count);
  }
}

const Isa& isa_named(const std::string& name) {
  for (const Isa& isa : isas())
    if (isa.supported && name == isa.name) return isa;
  throw std::invalid_argument("no CPU code for instruction set '" + name + "'");
}

void encode(const std::string& isa, int operand, const std::string& format, int64_t values, int64_t n, uint32_t step,
            uint64_t key, int64_t stored, int64_t aux) {
  if (!isa_named(isa).encode(static_cast<Operand>(operand), format.c_str(), reinterpret_cast<const float*>(values),
                             Place{step, key}, n, reinterpret_cast<void*>(stored), reinterpret_cast<void*>(aux)))
    throw std::invalid_argument("no CPU code that encodes format '" + format + "'");
}

void decode(const std::string& isa, const std::string& format, int64_t stored, int64_t aux, int64_t n,
            int64_t values) {
  if (!isa_named(isa).decode(format.c_str(), reinterpret_cast<const void*>(stored),
                             reinterpret_cast<const void*>(aux), n, reinterpret_cast<float*>(values)))
    throw std::invalid_argument("no CPU code that decodes format '" + format + "'");
}

void step(const py::kwargs& given) {
  const CpuStep step(given);
  Task task{};
  task.rule = step.rule.c_str();
  task.param_format = step.param.c_str();
  task.grad_format = step.grad.c_str();
  task.mu_format = step.mu.c_str();
  task.nu_format = step.nu.c_str();
  task.rows = reinterpret_cast<const Row*>(step.rows);
  task.chunks = reinterpret_cast<const Chunk*>(step.chunks);
  task.chunk_size = step.chunk_size;
  const Isa& isa = isa_named(step.isa);
  if (!isa.find(task))
    throw std::invalid_argument("no CPU code for rule '" + step.rule + "', parameter format '" + step.param +
                                "', gradient format '" + step.grad + "', moment formats '" + step.mu + "' and '" +
                                step.nu + "'");
  py::gil_scoped_release release;
  if (step.mu == Fp64::name)
    run<double>(step, task, isa.step_chunks);
  else
    run<float>(step, task, isa.step_chunks);
}

}  // namespace
}  // namespace fused_optim

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU step of fused_optim.";
  m.def("isas", &fused_optim::supported_isas, "Instruction sets that this machine has, best first.");
  m.def("step", &fused_optim::step, "One step of every row of a table; takes the fields of CpuStep as keyword arguments.");
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
