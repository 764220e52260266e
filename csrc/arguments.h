// A struct's fields from Python keyword arguments, each by its name.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace fused_optim {

class Arguments {
 public:
  explicit Arguments(const pybind11::kwargs& given) : given_(given) {}

  template <class T>
  Arguments& take(const char* name, T& field) {
    PyObject* const value = PyDict_GetItemString(given_.ptr(), name);
    if (value == nullptr) throw std::invalid_argument(std::string("the argument ") + name + " is missing");
    field = pybind11::handle(value).cast<T>();
    ++taken_;
    return *this;
  }

  void end() const {
    if (taken_ != given_.size()) throw std::invalid_argument("an argument is not known");
  }

 private:
  const pybind11::kwargs& given_;
  size_t taken_ = 0;
};

}  // namespace fused_optim
