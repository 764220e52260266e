// What the extensions are given, as pybind11 has it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "names.h"
#include "table.h"

namespace py = pybind11;

namespace fused_optim {

using NameStrings = std::array<std::string, 5>;  // of Names, in their order

inline Names names_of(const NameStrings& s) {
  return {s[0].c_str(), s[1].c_str(), s[2].c_str(), s[3].c_str(), s[4].c_str()};
}

}  // namespace fused_optim
