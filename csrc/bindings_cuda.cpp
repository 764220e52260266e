// fused_optim._cuda: the functions of step_cuda.h; addresses, sizes and the stream come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "step_cuda.h"

PYBIND11_MODULE(_cuda, m) {
  using namespace fused_optim;
  const pybind11::call_guard<pybind11::gil_scoped_release> released;
  m.def("step", [](const NameStrings& names, const std::array<int64_t, 11>& task, int64_t stream) {
    step_cuda(names_of(names), bit_cast<CudaTask>(task), stream);
  }, released);
  m.def("square_sums", [](const std::string& grad, const std::array<int64_t, 6>& task, int64_t stream) {
    square_sums_cuda(grad.c_str(), bit_cast<NormTask>(task), stream);
  }, released);
  m.def("clip", [](const std::array<int64_t, 5>& task, int64_t stream) {
    clip_cuda(bit_cast<ClipTask>(task), stream);
  }, released);
  m.def("load", [](const NameStrings& names) { load_cuda(names_of(names)); });
  m.def("check", &check_cuda);
  m.attr("chunk_size") = kChunk;
  m.attr("coefficients_bytes") = kCoefficientsBytes;
  m.attr("archs") = cuda_archs();
  m.attr("compiler") = cuda_compiler();
}
