// Where an optimizer's tensors are, asked at each step. Tensors are asked through the DLPack exchange
// table that torch.Tensor has (made for libraries that know no torch header), dicts and lists through
// CPython's C API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fused_optim {

namespace py = pybind11;

// DLPack 1.3: the C structs of dlpack.h, as far as they are read here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

// fused_optim/addresses.py says what is compared; this is the same in C++. It keeps numbers alone: the
// objects are in lists that Python keeps, where its garbage collector sees them, and gives to each call.
class Addresses {
 public:
  enum Answer { kChanged = 0, kSame = 1, kGradsMoved = 2 };

  // `grads`: where the gradients' addresses are kept, int64 each.
  Addresses(py::list params, py::list values, int64_t grads)
      : grads_(reinterpret_cast<int64_t*>(grads)), tensor_(py::module_::import("torch").attr("Tensor")) {
    if (!py::hasattr(tensor_, "__dlpack_c_exchange_api__")) return;
    const py::capsule capsule = tensor_.attr("__dlpack_c_exchange_api__");
    api_ = static_cast<const DLPackExchangeAPI*>(capsule.get_pointer());
    if (api_->version.major != 1 || api_->dltensor_from_py_object_no_sync == nullptr) return;
    remembering_ = true;
    works_ = ask_tensors(params.ptr(), values.ptr()) != kChanged;
    remembering_ = false;
  }

  bool works() const { return works_; }

  int ask(py::list params, py::list keys, py::list states, py::list names, py::list values, py::list param_lists,
          py::dict state) {
    if (!same_lists(param_lists, params.ptr()) || !same_dicts(state.ptr(), keys, states, names, values))
      return kChanged;
    next_ = 0;
    return ask_tensors(params.ptr(), values.ptr());
  }

 private:
  static bool same_lists(const py::list& lists, PyObject* params) {
    Py_ssize_t n = 0;
    for (py::handle list : lists) {
      if (!PyList_Check(list.ptr()) || n + PyList_GET_SIZE(list.ptr()) > PyList_GET_SIZE(params)) return false;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i)
        if (PyList_GET_ITEM(list.ptr(), i) != PyList_GET_ITEM(params, n++)) return false;
    }
    return n == PyList_GET_SIZE(params);
  }

  static bool is(const py::list& list, size_t i, PyObject* object) {
    return i < list.size() && PyList_GET_ITEM(list.ptr(), i) == object;
  }

  static bool same_dicts(PyObject* state, const py::list& keys, const py::list& states, const py::list& names,
                         const py::list& values) {
    size_t n = 0, item = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++n) {
      if (!is(keys, n, key) || !is(states, n, value)) return false;
      if (!PyDict_Check(value)) continue;
      PyObject *name, *held;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &held); ++item)
        if (!is(names, item, name) || !is(values, item, held)) return false;
    }
    return n == keys.size() && item == values.size();
  }

  Answer ask_tensors(PyObject* params, PyObject* values) {
    Answer answer = kSame;
    size_t live = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* const p = PyList_GET_ITEM(params, i);
      const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(p, grad_.ptr()));
      if (!grad) throw py::error_already_set();
      if (!same(grad.is_none())) return kChanged;
      if (grad.is_none()) continue;
      int64_t address = 0, elements = 0;
      if (!same_tensor(p, address, elements) || !same(address)) return kChanged;
      if (!same_tensor(grad.ptr(), address, elements)) return kChanged;
      int64_t& known = grads_[live++];
      if (remembering_ || address == known) continue;
      if ((address ^ known) % 16 != 0 || (elements != 0 && freed(grad, address))) return kChanged;
      known = address;
      answer = kGradsMoved;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(values); ++i) {
      PyObject* const value = PyList_GET_ITEM(values, i);
      if (!PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(tensor_.ptr()))) continue;
      int64_t address = 0, elements = 0;
      if (!same_tensor(value, address, elements) || !same(address)) return kChanged;
    }
    return answer;
  }

  bool same_tensor(PyObject* t, int64_t& address, int64_t& elements) {
    DLTensor d;
    if (api_->dltensor_from_py_object_no_sync(t, &d) != 0) {
      PyErr_Clear();
      return false;
    }
    address = reinterpret_cast<int64_t>(d.data) + static_cast<int64_t>(d.byte_offset);
    elements = 1;
    bool all = same(d.ndim) && same(d.dtype.code << 8 | d.dtype.bits) && same(d.device_type) && same(d.device_id);
    for (int k = 0; all && k < d.ndim; ++k) {
      all = same(d.shape[k]) && same(d.strides[k]);
      elements *= d.shape[k];
    }
    constexpr int kComplex = 5;
    // A lazy real tensor is a view of a complex one, and so has gaps unless it has no dimensions.
    if (all && (d.ndim == 0 || d.dtype.code == kComplex)) {
      const py::handle tensor(t);
      all = same(tensor.attr("is_conj")().cast<bool>()) && same(tensor.attr("is_neg")().cast<bool>());
    }
    return all;
  }

  // Of freed memory the address is the tensor's offset in its storage, which is below this.
  static bool freed(const py::object& t, int64_t address) {
    constexpr int64_t kLowestAddress = int64_t{1} << 40;
    return address < kLowestAddress && t.attr("untyped_storage")().attr("data_ptr")().cast<int64_t>() == 0;
  }

  // Whether a number is the remembered one, or remembers it.
  bool same(int64_t number) {
    if (remembering_) {
      numbers_.push_back(number);
      return true;
    }
    return next_ < numbers_.size() && numbers_[next_++] == number;
  }

  int64_t* grads_;
  py::object tensor_;
  py::str grad_{"grad"};
  const DLPackExchangeAPI* api_ = nullptr;
  bool works_ = false, remembering_ = false;
  std::vector<int64_t> numbers_;
  size_t next_ = 0;
};

}  // namespace fused_optim
