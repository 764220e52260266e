// fused_optim._cuda: addresses, sizes and the stream come in as integers; no torch header.
#include <pybind11/pybind11.h>

#include <string>

#include "arguments.h"
#include "step_cuda.h"

namespace py = pybind11;

namespace fused_optim {
namespace {

int step(const py::kwargs& given) {
  CudaStep s;
  Arguments(given)
      .take("rule", s.rule)
      .take("param", s.param)
      .take("grad", s.grad)
      .take("mu", s.mu)
      .take("nu", s.nu)
      .take("rows", s.rows)
      .take("chunks", s.chunks)
      .take("n_chunks", s.n_chunks)
      .take("counters", s.counters)
      .take("n_counters", s.n_counters)
      .take("hyper", s.hyper)
      .take("coefficients", s.coefficients)
      .take("grad_scale", s.grad_scale)
      .take("found_inf", s.found_inf)
      .take("stream", s.stream)
      .take("device", s.device)
      .end();
  py::gil_scoped_release release;
  return step_cuda(s);
}

}  // namespace
}  // namespace fused_optim

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA step of fused_optim.";
  m.def("step", &fused_optim::step,
        "Launches one step of every row of a table; takes the fields of CudaStep as keyword arguments. Returns the "
        "number of kernels.");
  m.def("chunk_size", &fused_optim::cuda_chunk_size,
        "Elements of a chunk in the table that a step is given.");
  m.def("coefficients_bytes", &fused_optim::cuda_coefficients_bytes,
        "Bytes of device memory that a step needs for each counter.", py::arg("param_format"));
  m.def("device_count", &fused_optim::cuda_device_count, "GPUs that there are; 0 without a driver.");
  m.attr("runtime_version") = fused_optim::cuda_runtime_version();
  m.attr("archs") = fused_optim::cuda_archs();
  m.attr("compiler") = fused_optim::cuda_compiler();
}
