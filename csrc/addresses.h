// Where an optimizer's tensors are, asked at each step: tensors through the DLPack exchange table that torch.Tensor
// has for libraries that know no torch header, dicts and lists through CPython's C API.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace fused_optim {

namespace py = pybind11;

// DLPack 1.3: the C structs of dlpack.h, as far as they are read here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* not_called_here[4];
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

// What fused_optim/addresses.py compares. It keeps numbers alone, so that nothing lives on that is replaced.
class Addresses {
 public:
  enum Answer { kChanged = 0, kSame = 1, kGradsMoved = 2, kGradsToggled = 3 };
  enum Kind : char { kNotStepped = 0, kGradNeeded = 1, kGradOptional = 2 };

  // `kinds`: a Kind for each parameter. `held`: the ids of the tensors in the states, of which each is asked once.
  // `grads`: where the gradients' addresses are kept, int64 for each parameter that is stepped.
  Addresses(const py::list& lists, const py::dict& state, std::string kinds, std::set<int64_t> held, int64_t grads)
      : kinds_(std::move(kinds)), held_(std::move(held)), grads_(reinterpret_cast<int64_t*>(grads)) {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
    api_ = py::capsule(tensor.attr("__dlpack_c_exchange_api__"));
    if (api_->major != 1 || api_->dltensor_from_py_object_no_sync == nullptr || ask(lists, state) == kChanged)
      api_ = nullptr;
    remembering_ = false;
  }

  bool works() const { return api_ != nullptr; }

  int ask(const py::list& param_lists, const py::dict& state) {
    next_ = shape_ = 0;
    const Answer answer = ask_params(param_lists);
    return answer != kChanged && same_state(state.ptr()) && next_ == numbers_.size() ? answer : kChanged;
  }

 private:
  Answer ask_params(const py::list& param_lists) {
    Answer answer = kSame;
    size_t i = 0, stepped = 0;
    for (py::handle list : param_lists) {
      if (!PyList_Check(list.ptr())) return kChanged;
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list.ptr()); ++j, ++i) {
        const auto p = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list.ptr(), j));
        if (i == kinds_.size() || !same_object(p.ptr())) return kChanged;
        const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(p.ptr(), grad_.ptr()));
        if (!grad) throw py::error_already_set();
        const bool missing = grad.is_none();
        if (kinds_[i] == kNotStepped ? !missing : missing && kinds_[i] != kGradOptional) return kChanged;
        if (kinds_[i] == kNotStepped) continue;
        if (!same_tensor(p) || !same(&address_, 1)) return kChanged;
        // A gradient that is missing is like its parameter, and of its address the lowest bits stay.
        if (!same_tensor(missing ? p : grad)) return kChanged;
        int64_t& known = grads_[stepped++];
        const int64_t address = missing ? known % 16 : address_;
        if (remembering_ || address == known) continue;
        if ((address ^ known) % 16 != 0 || (!missing && freed(grad, address))) return kChanged;
        if (answer != kGradsToggled) answer = missing || known < 16 ? kGradsToggled : kGradsMoved;
        known = address;
      }
    }
    return answer;
  }

  bool same_state(PyObject* state) {
    size_t i = 0;
    PyObject *key, *value, *name, *item;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
      if (!same_object(key) || !same_object(value)) return false;
      if (!PyDict_Check(value)) continue;
      const auto own = py::reinterpret_borrow<py::object>(value);  // a question may run Python code
      for (Py_ssize_t k = 0; PyDict_Next(own.ptr(), &k, &name, &item); ++i) {
        if (remembering_) asked_.push_back(held_.erase(reinterpret_cast<int64_t>(item)) != 0);
        if (i == asked_.size() || !same_object(name) || !same_object(item)) return false;
        if (asked_[i] && !(same_tensor(py::reinterpret_borrow<py::object>(item)) && same(&address_, 1))) return false;
      }
    }
    return true;
  }

  // A tensor or dict may have got the id of one that is gone: all that matters of it is asked. Python keeps names.
  bool same_object(PyObject* object) {
    const auto id = reinterpret_cast<int64_t>(object);
    return same(&id, 1);
  }

  // Whether a tensor is as remembered but for its address, which is left in address_.
  bool same_tensor(const py::object& tensor) {
    // Metadata, which lie around shapes, are fetched three tensors ahead: 10,000 take a third less. Nothing is read.
    for (int line = -64; shape_ + 3 < shapes_.size() && line <= 128; line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(shapes_[shape_ + 3] + line));
    ++shape_;
    DLTensor d;
    if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &d) != 0) {
      PyErr_Clear();
      return false;
    }
    address_ = reinterpret_cast<int64_t>(d.data) + static_cast<int64_t>(d.byte_offset);
    const int64_t kind[] = {d.ndim, d.dtype.code << 8 | d.dtype.bits, d.device_type, d.device_id};
    if (!same(kind, 4) || !same(d.shape, d.ndim) || !same(d.strides, d.ndim)) return false;
    if (remembering_) shapes_.push_back(reinterpret_cast<intptr_t>(d.shape));
    constexpr int kFloat = 2, kComplex = 5;
    // A lazy real tensor is a view of a complex one, with even strides: it has gaps, or one element.
    const bool may_be_lazy = d.dtype.code == kFloat && (d.ndim == 0 || d.strides[d.ndim - 1] != 1) &&
                             std::all_of(d.shape, d.shape + d.ndim, [](int64_t n) { return n == 1; });
    if (d.dtype.code != kComplex && !may_be_lazy) return true;
    const int64_t lazy[] = {tensor.attr("is_conj")().cast<bool>(), tensor.attr("is_neg")().cast<bool>()};
    return same(lazy, 2);
  }

  // Of freed memory the address is the tensor's offset in its storage, which is smaller than addresses are.
  static bool freed(const py::object& t, int64_t address) {
    return address < int64_t{1} << 40 && py::module_::import("fused_optim.layout").attr("freed")(t).cast<bool>();
  }

  // Whether these numbers are the next that are remembered, or remembers them.
  bool same(const int64_t* numbers, size_t n) {
    if (remembering_) numbers_.insert(numbers_.end(), numbers, numbers + n);
    if (n > numbers_.size() - next_) return false;
    const int64_t* const known = numbers_.data() + next_;
    next_ += n;
    for (size_t i = 0; i < n; ++i)  // std::equal calls memcmp, which for so few takes longer
      if (numbers[i] != known[i]) return false;
    return true;
  }

  const std::string kinds_;
  std::set<int64_t> held_;
  std::vector<bool> asked_;
  int64_t* grads_;
  py::str grad_{"grad"};
  const DLPackExchangeAPI* api_ = nullptr;
  bool remembering_ = true;
  std::vector<int64_t> numbers_;
  std::vector<intptr_t> shapes_;
  size_t next_ = 0, shape_ = 0;  // of the numbers and the shapes, the next ones
  int64_t address_ = 0;  // of the tensor that was asked last
};

}  // namespace fused_optim
