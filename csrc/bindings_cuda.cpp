// fused_optim._cuda: addresses, sizes and the stream come in as integers; no torch header.
#include "bindings.h"
#include "step_cuda.h"

namespace {

using namespace fused_optim;

int step_of_integers(const NameStrings& names, const std::array<int64_t, 10>& task, int64_t stream) {
  py::gil_scoped_release release;
  return step_cuda(names_of(names), bit_cast<CudaTask>(task), stream);
}

int square_sums(const std::string& grad, const std::array<int64_t, 5>& task, int64_t stream) {
  py::gil_scoped_release release;
  return square_sums_cuda(grad.c_str(), bit_cast<NormTask>(task), stream);
}

int clip(const std::array<int64_t, 5>& task, int64_t stream) {
  py::gil_scoped_release release;
  return clip_cuda(bit_cast<ClipTask>(task), stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA step of fused_optim.";
  m.def("step", &step_of_integers,
        "Launches one step of every row of a table and returns the number of kernels. Takes the names of rule and "
        "formats, the fields of CudaTask and the stream.");
  m.def("square_sums", &square_sums,
        "Launches the sums of squares of a batch's gradients and returns the number of kernels. Takes the gradients' "
        "format, the fields of NormTask and the stream.");
  m.def("clip", &clip, "Launches what makes a norm of all sums. Takes the fields of ClipTask and the stream.");
  m.def("load", [](const NameStrings& names) { load_cuda(names_of(names)); },
        "Loads the kernels of a step. Takes the names of rule and formats.");
  m.def("check", &check_cuda, "Loads a kernel, and raises what the driver says where it does not take it.");
  m.attr("chunk_size") = kChunk;
  m.attr("coefficients_bytes") = kCoefficientsBytes;
  m.attr("archs") = cuda_archs();
  m.attr("compiler") = cuda_compiler();
}
