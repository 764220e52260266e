// fused_optim._cuda: addresses, sizes and the stream come in as integers; no torch header.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "step_cuda.h"

namespace py = pybind11;

namespace fused_optim {
namespace {

int step(std::string rule, std::string param_format, std::string grad_format, std::string mu_format,
         std::string nu_format, int64_t rows, int64_t chunks, int64_t n_chunks, int64_t counters,
         int64_t n_counters, int64_t hyper, int64_t coefficients, int64_t grad_scale, int64_t found_inf,
         int64_t stream, int device) {
  const CudaStep arguments{std::move(rule),
                           std::move(param_format),
                           std::move(grad_format),
                           std::move(mu_format),
                           std::move(nu_format),
                           rows,
                           chunks,
                           n_chunks,
                           counters,
                           n_counters,
                           hyper,
                           coefficients,
                           grad_scale,
                           found_inf,
                           stream,
                           device};
  py::gil_scoped_release release;
  return step_cuda(arguments);
}

}  // namespace
}  // namespace fused_optim

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA step of fused_optim.";
  m.def("step", &fused_optim::step,
        "Launches one step of every row of a table; returns the number of kernels.",
        py::arg("rule"), py::arg("param_format"), py::arg("grad_format"), py::arg("mu_format"),
        py::arg("nu_format"), py::arg("rows"), py::arg("chunks"), py::arg("n_chunks"), py::arg("counters"),
        py::arg("n_counters"), py::arg("hyper"), py::arg("coefficients"), py::arg("grad_scale"),
        py::arg("found_inf"), py::arg("stream"), py::arg("device"));
  m.def("chunk_size", &fused_optim::cuda_chunk_size,
        "Elements of a chunk in the table that a step is given.");
  m.def("coefficients_bytes", &fused_optim::cuda_coefficients_bytes,
        "Bytes of device memory that a step needs for each counter.", py::arg("param_format"));
  m.def("device_count", &fused_optim::cuda_device_count, "GPUs that there are; 0 without a driver.");
  m.attr("runtime_version") = fused_optim::cuda_runtime_version();
  m.attr("archs") = fused_optim::cuda_archs();
  m.attr("compiler") = fused_optim::cuda_compiler();
}
