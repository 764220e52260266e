// Tells quickly that no tensor of an optimizer was replaced or moved since the table of
// addresses was made. Asking ten thousand tensors from Python takes longer than stepping them.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace fused_optim {

namespace py = pybind11;

// torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), reached through the
// library that is loaded already. A Python method of a tensor takes 90 ns, a function of this
// interface 5: the guards make the difference.
class TorchInterface {
 public:
  TorchInterface() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    available_ = find(torch, "aoti_torch_get_data_ptr", data_ptr) && find(torch, "aoti_torch_get_dim", dim) &&
                 find(torch, "aoti_torch_get_sizes", sizes) && find(torch, "aoti_torch_get_strides", strides) &&
                 find(torch, "aoti_torch_get_dtype", dtype);
  }

  bool available() const { return available_; }

  int32_t (*data_ptr)(void* tensor, void** result) = nullptr;
  int32_t (*dim)(void* tensor, int64_t* result) = nullptr;
  int32_t (*sizes)(void* tensor, int64_t** result) = nullptr;
  int32_t (*strides)(void* tensor, int64_t** result) = nullptr;
  int32_t (*dtype)(void* tensor, int32_t* result) = nullptr;

 private:
  template <class Function>
  static bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  bool available_ = false;
};

class Watch {
 public:
  // `param_lists`: the groups' lists of parameters. `state`: the optimizer's state, a dict of
  // dicts. `tensor`: torch.Tensor. The caller keeps all of these and what is in them alive for
  // as long as the watch: it only borrows them, since Python's garbage collector could not
  // see through it.
  Watch(py::list param_lists, py::dict state, py::object tensor)
      : grad_(getter(tensor.attr("grad"))), works_(torch_.available() && grad_ != nullptr) {
    for (py::handle list : param_lists) {
      lists_.push_back({list.ptr(), PyList_GET_SIZE(list.ptr())});
      for (py::handle p : py::reinterpret_borrow<py::list>(list)) {
        py::object grad = p.attr("grad");
        params_.push_back({remember(p), py::object(), {}});
        if (grad.is_none()) continue;
        params_.back().weak_grad = py::weakref(grad);
        params_.back().grad = remember(grad);
        if (grad_type_ == nullptr) grad_type_ = Py_TYPE(grad.ptr());
      }
    }
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      inner_.push_back(value);
      if (!PyDict_Check(value)) continue;
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item);) {
        const bool is_tensor = PyObject_IsInstance(item, tensor.ptr()) == 1;
        values_.push_back(is_tensor ? remember(item) : Tensor{item});
      }
    }
  }

  enum Answer { kPerhapsNot, kUnchanged, kGradsMoved };

  // Whether all is where it was, gradients aside that are new objects or at new addresses but of
  // the same dtype and layout: these are followed. Where this watch cannot tell, "perhaps not".
  Answer ask(py::list param_lists, py::dict state) {
    moved_ = false;
    if (!works_ || !params_unchanged(param_lists.ptr()) || !states_unchanged(state.ptr())) {
      works_ = works_ && !moved_;  // some gradients may have been followed, others not
      return kPerhapsNot;
    }
    return moved_ ? kGradsMoved : kUnchanged;
  }

 private:
  static constexpr size_t kAhead = 6;

  struct Tensor {
    PyObject* object = nullptr;
    void* address = nullptr;
    const char *impl = nullptr, *storage = nullptr;  // prefetched, never read
    int64_t dim = -1;                                // no tensor
    int32_t dtype = 0;
    uint32_t layout = 0;  // where its sizes and strides begin in `layouts_`
  };
  struct Parameter {
    Tensor param;
    py::object weak_grad;  // weak: a dropped gradient's memory must not be kept
    Tensor grad;
  };
  struct List {
    PyObject* list;
    Py_ssize_t size;
  };

  // A Python tensor has its C++ tensor, a single pointer, somewhere in its object. Where is found
  // by comparing its words with the pointer that `_cdata` names. A watch that does not find it, or
  // reads another address there than the method gives, does not work and says so.
  Tensor remember(py::handle t) {
    const auto cdata = t.attr("_cdata").cast<size_t>();
    const auto storage = t.attr("untyped_storage")().attr("_cdata").cast<size_t>();
    Tensor was{t.ptr(), nullptr, reinterpret_cast<const char*>(cdata), reinterpret_cast<const char*>(storage)};
    const Py_ssize_t size = Py_TYPE(t.ptr())->tp_basicsize;
    for (Py_ssize_t at = sizeof(PyObject); offset_ == 0 && at + static_cast<Py_ssize_t>(sizeof(cdata)) <= size;
         at += sizeof(cdata))
      if (memcmp(reinterpret_cast<char*>(t.ptr()) + at, &cdata, sizeof(cdata)) == 0) offset_ = at;
    works_ = works_ && offset_ != 0 && memcmp(body(t.ptr()), &cdata, sizeof(cdata)) == 0;
    int64_t *sizes, *strides;
    works_ = works_ && torch_.dim(body(t.ptr()), &was.dim) == 0 &&
             torch_.data_ptr(body(t.ptr()), &was.address) == 0 &&
             reinterpret_cast<size_t>(was.address) == t.attr("data_ptr")().cast<size_t>() &&
             torch_.dtype(body(t.ptr()), &was.dtype) == 0 && torch_.sizes(body(t.ptr()), &sizes) == 0 &&
             torch_.strides(body(t.ptr()), &strides) == 0;
    if (works_) {
      was.layout = static_cast<uint32_t>(layouts_.size());
      layouts_.insert(layouts_.end(), sizes, sizes + was.dim);
      layouts_.insert(layouts_.end(), strides, strides + was.dim);
    }
    return was;
  }

  static PyGetSetDef* getter(py::handle descriptor) {
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) return nullptr;
    return reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
  }

  bool same(const Tensor& was, PyObject* object) const {
    if (object != was.object) return false;
    if (was.dim < 0) return true;
    void* address;
    return torch_.data_ptr(body(object), &address) == 0 && address == was.address && same_layout(was, object);
  }

  bool same_layout(const Tensor& was, PyObject* object) const {
    int64_t dim, *sizes, *strides;
    int32_t dtype;
    const int64_t* const layout = layouts_.data() + was.layout;
    return torch_.dim(body(object), &dim) == 0 && dim == was.dim && torch_.dtype(body(object), &dtype) == 0 &&
           dtype == was.dtype &&
           torch_.sizes(body(object), &sizes) == 0 && memcmp(sizes, layout, dim * sizeof(int64_t)) == 0 &&
           torch_.strides(body(object), &strides) == 0 && memcmp(strides, layout + dim, dim * sizeof(int64_t)) == 0;
  }

  // Each tensor has its object, its C++ half and its storage in memory of their own: of ten
  // thousand none is in a cache when its turn comes.
  static void prefetch(const Tensor& t) {
    __builtin_prefetch(t.object);
    __builtin_prefetch(t.impl);
    __builtin_prefetch(t.impl + 64);
    __builtin_prefetch(t.impl + 128);
    __builtin_prefetch(t.storage);
    __builtin_prefetch(t.storage + 64);
  }

  void* body(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + offset_; }

  bool params_unchanged(PyObject* param_lists) {
    if (PyList_GET_SIZE(param_lists) != static_cast<Py_ssize_t>(lists_.size())) return false;
    size_t i = 0;
    for (size_t group = 0; group < lists_.size(); ++group) {
      PyObject* list = PyList_GET_ITEM(param_lists, group);
      if (list != lists_[group].list || PyList_GET_SIZE(list) != lists_[group].size) return false;
      for (Py_ssize_t j = 0; j < lists_[group].size; ++j, ++i) {
        if (i + kAhead < params_.size()) {
          prefetch(params_[i + kAhead].param);
          prefetch(params_[i + kAhead].grad);
        }
        if (!same(params_[i].param, PyList_GET_ITEM(list, j)) || !grad_unchanged(params_[i])) return false;
      }
    }
    return true;
  }

  bool grad_unchanged(Parameter& was) {
    const py::object grad = py::reinterpret_steal<py::object>(grad_->get(was.param.object, grad_->closure));
    if (!grad) throw py::error_already_set();
    if (grad.is_none() || !was.weak_grad) return grad.is_none() && !was.weak_grad;
    if (refers_to(was.weak_grad.ptr(), grad.ptr()) && same(was.grad, grad.ptr())) return true;
    void* address;
    // The type says that the C++ tensor is where it is in the gradient that was remembered.
    if (Py_TYPE(grad.ptr()) != grad_type_ || !same_layout(was.grad, grad.ptr()) ||
        torch_.data_ptr(body(grad.ptr()), &address) != 0)
      return false;
    moved_ = true;
    was.weak_grad = py::weakref(grad);
    was.grad.object = grad.ptr();
    was.grad.address = address;
    return true;
  }

  static bool refers_to(PyObject* weak, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* target = nullptr;
    PyWeakref_GetRef(weak, &target);
    Py_XDECREF(target);
    return target == object;
#else
    return PyWeakref_GET_OBJECT(weak) == object;
#endif
  }

  bool states_unchanged(PyObject* state) const {
    if (PyDict_Size(state) != static_cast<Py_ssize_t>(inner_.size())) return false;
    size_t i = 0, j = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++i) {
      if (value != inner_[i]) return false;
      if (!PyDict_Check(value)) continue;
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item); ++j) {
        if (j + 2 * kAhead < values_.size()) prefetch(values_[j + 2 * kAhead]);
        if (j >= values_.size() || !same(values_[j], item)) return false;
      }
    }
    return j == values_.size();
  }

  static inline const TorchInterface torch_;
  PyGetSetDef* grad_;
  bool works_;
  bool moved_ = false;
  PyTypeObject* grad_type_ = nullptr;
  Py_ssize_t offset_ = 0;
  std::vector<List> lists_;
  std::vector<Parameter> params_;
  std::vector<PyObject*> inner_;
  std::vector<Tensor> values_;
  std::vector<int64_t> layouts_;
};

}  // namespace fused_optim
