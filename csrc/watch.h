// Tells quickly that no tensor of an optimizer was replaced or moved since the table of
// addresses was made. Asking ten thousand tensors from Python takes longer than stepping
// them; asking from here takes a third of that.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fused_optim {

namespace py = pybind11;

class Watch {
 public:
  // `param_lists`: the groups' lists of parameters. `state`: the optimizer's state, a dict of
  // dicts. `tensor`: torch.Tensor. The caller keeps all of these and what is in them alive for
  // as long as the watch: it only borrows them, since Python's garbage collector could not
  // see through it.
  Watch(py::list param_lists, py::dict state, py::object tensor)
      : data_ptr_(reinterpret_cast<PyMethodDescrObject*>(tensor.attr("data_ptr").ptr())->d_method->ml_meth),
        grad_(reinterpret_cast<PyGetSetDescrObject*>(tensor.attr("grad").ptr())->d_getset) {
    for (py::handle list : param_lists) {
      lists_.push_back(list.ptr());
      sizes_.push_back(PyList_GET_SIZE(list.ptr()));
      for (py::handle p : py::reinterpret_borrow<py::list>(list)) {
        Parameter entry{p.ptr(), address(p.ptr()), py::object(), 0};
        layouts_.push_back(layout_of(p.ptr()));
        py::object grad = p.attr("grad");
        if (!grad.is_none()) {
          entry.grad = py::weakref(grad);
          entry.grad_address = address(grad.ptr());
          layouts_.push_back(layout_of(grad.ptr()));
        }
        params_.push_back(std::move(entry));
      }
    }
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      inner_.push_back(value);
      if (!PyDict_Check(value)) continue;
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item);) {
        values_.push_back(item);
        if (PyObject_IsInstance(item, tensor.ptr()) == 1) layouts_.push_back(layout_of(item));
      }
    }
  }

  bool unchanged(py::list param_lists, py::dict state) {
    return params_unchanged(param_lists.ptr()) && states_unchanged(state.ptr()) && layouts_unchanged();
  }

 private:
  struct Parameter {
    PyObject* param;
    int64_t address;
    py::object grad;  // a weak reference: a dropped gradient's memory must not be kept
    int64_t grad_address;
  };
  struct Layout {
    PyObject* tensor;
    int64_t address;
    py::object numel, stride, dtype;
  };

  // A tensor that is the same object at the same address has another layout, and a state that
  // is the same object another address, only where somebody assigned to `.data` or worked on
  // the tensor itself in place. That takes long to ask: up to this many are asked at each step,
  // which is all of them but in very long lists, where the turn comes within a few steps.
  static constexpr size_t kWindow = 1024;

  bool params_unchanged(PyObject* param_lists) {
    if (PyList_GET_SIZE(param_lists) != static_cast<Py_ssize_t>(lists_.size())) return false;
    size_t i = 0;
    for (size_t group = 0; group < lists_.size(); ++group) {
      PyObject* list = PyList_GET_ITEM(param_lists, group);
      if (list != lists_[group] || PyList_GET_SIZE(list) != sizes_[group]) return false;
      for (Py_ssize_t j = 0; j < sizes_[group]; ++j, ++i) {
        if (PyList_GET_ITEM(list, j) != params_[i].param || !param_unchanged(params_[i])) return false;
      }
    }
    return true;
  }

  bool param_unchanged(const Parameter& entry) {
    if (address(entry.param) != entry.address) return false;
    const py::object grad = py::reinterpret_steal<py::object>(grad_->get(entry.param, grad_->closure));
    if (!grad) throw py::error_already_set();
    if (grad.is_none() || !entry.grad) return grad.is_none() && !entry.grad;
    return refers_to(entry.grad.ptr(), grad.ptr()) && address(grad.ptr()) == entry.grad_address;
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

  bool states_unchanged(PyObject* state) {
    if (PyDict_Size(state) != static_cast<Py_ssize_t>(inner_.size())) return false;
    size_t i = 0, j = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++i) {
      if (value != inner_[i]) return false;
      if (!PyDict_Check(value)) continue;
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item); ++j)
        if (j >= values_.size() || item != values_[j]) return false;
    }
    return j == values_.size();
  }

  // Called last: every tensor in `layouts_` is then known to be alive.
  bool layouts_unchanged() {
    const size_t n = layouts_.size() < kWindow ? layouts_.size() : kWindow;
    for (size_t k = 0; k < n; ++k, ++next_) {
      const Layout& was = layouts_[next_ % layouts_.size()];
      const Layout is = layout_of(was.tensor);
      if (is.address != was.address || !is.numel.equal(was.numel) || !is.stride.equal(was.stride) ||
          !is.dtype.is(was.dtype))
        return false;
    }
    return true;
  }

  Layout layout_of(PyObject* tensor) {
    const py::handle t(tensor);
    const auto ask = [&](const py::str& name) {
      PyObject* result = PyObject_CallMethodNoArgs(tensor, name.ptr());
      if (result == nullptr) throw py::error_already_set();
      return py::reinterpret_steal<py::object>(result);
    };
    return {tensor, address(tensor), ask(numel_), ask(stride_), t.attr(dtype_)};
  }

  int64_t address(PyObject* tensor) {
    PyObject* result = data_ptr_(tensor, nullptr);
    if (result == nullptr) throw py::error_already_set();
    const int64_t value = PyLong_AsLongLong(result);
    Py_DECREF(result);
    return value;
  }

  PyCFunction data_ptr_;
  PyGetSetDef* grad_;
  const py::str numel_{"numel"}, stride_{"stride"}, dtype_{"dtype"};
  std::vector<PyObject*> lists_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<Parameter> params_;
  std::vector<PyObject*> inner_;
  std::vector<PyObject*> values_;
  std::vector<Layout> layouts_;
  size_t next_ = 0;
};

}  // namespace fused_optim
