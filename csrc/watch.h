// Tells quickly that no tensor of an optimizer was replaced or moved since the table of
// addresses was made. Asking ten thousand tensors from Python takes longer than stepping them.
#pragma once

#include <dlfcn.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fused_optim {

namespace py = pybind11;

// torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), reached through the
// library that is loaded already. A Python method of a tensor takes 90 ns, a function of this
// interface 5: the guards make the difference. Four functions that it lacks are C++'s, whose
// mangled names spell what they take; a watch tries them before it relies on them.
class TorchInterface {
 public:
  struct Impl;
  using Handle = const Impl* const*;  // a C++ tensor is one pointer

  TorchInterface() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    available_ = find(torch, "aoti_torch_get_data_ptr", data_ptr) && find(torch, "aoti_torch_get_dim", dim) &&
                 find(torch, "aoti_torch_get_sizes", sizes) && find(torch, "aoti_torch_get_strides", strides) &&
                 find(torch, "aoti_torch_get_dtype", dtype) && find(torch, "aoti_torch_get_layout", layout) &&
                 find(torch, "aoti_torch_get_device_type", device_type) &&
                 find(torch, "aoti_torch_get_device_index", device_index) &&
                 find(torch, "_ZNK3c1010TensorImpl4gradEv", grad) &&
                 find(torch, "_ZN2at6native6is_negERKNS_6TensorE", is_neg) &&
                 find(torch, "_ZN5torch8autograd4impl15version_counterERKN2at6TensorE", version_counter) &&
                 find(torch, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", bump_version);
  }

  bool available() const { return available_; }

  int32_t (*data_ptr)(Handle, void** result) = nullptr;
  int32_t (*dim)(Handle, int64_t* result) = nullptr;
  int32_t (*sizes)(Handle, int64_t** result) = nullptr;
  int32_t (*strides)(Handle, int64_t** result) = nullptr;
  int32_t (*dtype)(Handle, int32_t* result) = nullptr;
  int32_t (*layout)(Handle, int32_t* result) = nullptr;
  int32_t (*device_type)(Handle, int32_t* result) = nullptr;
  int32_t (*device_index)(Handle, int32_t* result) = nullptr;
  Handle (*grad)(const Impl*) = nullptr;
  bool (*is_neg)(Handle) = nullptr;
  void* const* (*version_counter)(Handle) = nullptr;  // to null: an inference tensor has none
  void (*bump_version)(Handle) = nullptr;

 private:
  template <class Function>
  static bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
  }

  bool available_ = false;
};

// Any will do that are odd and unlike one another: those of splitmix64.
struct OddNumbers {
  uint64_t numbers[32];
  constexpr OddNumbers() : numbers() {
    uint64_t state = 0;
    for (uint64_t& number : numbers) {
      uint64_t z = state += 0x9e3779b97f4a7c15u;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      number = (z ^ (z >> 31)) | 1u;
    }
  }
};

class Watch {
 public:
  // `param_lists`: the groups' lists of parameters. `state`: the optimizer's state, a dict of
  // dicts. `grad_cells`: for each gradient that there is, where a table keeps its address, or 0.
  // `scratch`: a tensor of nobody's, with an address, without a gradient. The caller keeps lists,
  // dicts, what is in them and the tables alive for as long as the watch: it only borrows them,
  // since Python's garbage collector could not see through it.
  Watch(py::list param_lists, py::dict state, const std::vector<size_t>& grad_cells, py::object scratch)
      : type_(py::type::of(scratch)), works_(torch_.available() && torch_as_expected(scratch)) {
    size_t live = 0;
    for (py::handle list : param_lists) {
      lists_.push_back({list.ptr(), PyList_GET_SIZE(list.ptr())});
      for (py::handle p : py::reinterpret_borrow<py::list>(list)) {
        Parameter was{};
        was.param = remember(p);
        const py::object grad = p.attr("grad");
        if (!grad.is_none()) {
          was.grad = remember(grad);
          was.grad.object = nullptr;  // another one next time, or none
          was.grad_cell = reinterpret_cast<int64_t*>(grad_cells.at(live++));
        }
        if (works_) {
          was.grad_handle = torch_.grad(was.param.impl);
          was.version_counter = *torch_.version_counter(handle(p.ptr()));
          works_ = *was.grad_handle == (grad.is_none() ? no_grad_ : was.grad.impl);
        }
        params_.push_back(was);
      }
    }
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      inner_.push_back({value, nullptr, values_.size(), values_.size()});
      if (!PyDict_Check(value)) continue;
      inner_.back().keys = reinterpret_cast<PyDictObject*>(value)->ma_keys;
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item);)
        values_.push_back(is_tensor(item) ? remember(item) : Tensor{item});
      inner_.back().end = values_.size();
    }
  }

  enum Answer { kPerhapsNot, kUnchanged, kGradsMoved };

  bool works() const { return works_; }
  bool digests() const { return impl_bytes_ != 0; }

  // Whether all is where it was, but for gradients: these may be new tensors of the same dtype,
  // layout, device and alignment, and if they are elsewhere their cells are given the addresses.
  // Where this watch cannot tell, "perhaps not"; some cells may have been given theirs then.
  // `ask_python`: p.grad may be another thing in Python than in C++.
  Answer ask(py::list param_lists, py::dict state, bool ask_python, int threads) {
    if (!works_ || !lists_unchanged(param_lists.ptr()) || !dicts_unchanged(state.ptr())) return kPerhapsNot;
    if (ask_python && !python_agrees()) return kPerhapsNot;
    const size_t n = params_.size();
    const int found = each(n + inner_.size(), threads,
                           [this, n](size_t i) { return i < n ? param_found(i) : state_found(i - n); });
    return found & kOther ? kPerhapsNot : found & kMoved ? kGradsMoved : kUnchanged;
  }

  // How often these tensors were written to: the same list both times.
  void remember_versions(py::list tensors, int threads) {
    versions_.resize(tensors.size());
    each_version(tensors.ptr(), threads, [this](size_t i, uint32_t now) {
      versions_[i] = now;
      return kSame;
    });
  }

  bool versions_unchanged(py::list tensors, int threads) const {
    return versions_.size() == tensors.size() && each_version(tensors.ptr(), threads, [this](size_t i, uint32_t now) {
             return now == versions_[i] ? kSame : kOther;
           }) == kSame;
  }

  // Tells autograd that the parameters which have gradients were written to.
  void bump_versions(int threads) const {
    each(params_.size(), threads, [this](size_t i) {
      if (i + kAhead < params_.size()) {
        const Parameter& next = params_[i + kAhead];
        __builtin_prefetch(next.param.object);
        __builtin_prefetch(next.param.impl);
        __builtin_prefetch(next.version_counter, 1);
      }
      const Handle p = handle(params_[i].param.object);
      if (params_[i].grad.impl != nullptr && *torch_.version_counter(p) != nullptr) torch_.bump_version(p);
      return kSame;
    });
  }

 private:
  using Impl = TorchInterface::Impl;
  using Handle = TorchInterface::Handle;

  // How far ahead memory is asked for, in parameters or their states. Of 1 to 16 the best with
  // one thread: 2.1 ms for 10,000 parameters, where 6 took 2.4 and 16 took 2.6.
  static constexpr size_t kAhead = 2;
  // What of a tensor is looked at by torch 2.13, and of a dict with three keys by CPython 3.11.
  static constexpr int kImplBytes = 184, kStorageBytes = 64, kKeysBytes = 88;
  static constexpr size_t kPortion = 256, kCounterBytes = 24;

  enum Found { kSame = 0, kMoved = 1, kOther = 2 };

  struct Tensor {
    PyObject* object = nullptr;
    void* address = nullptr;
    const Impl* impl = nullptr;
    const void* storage = nullptr;  // where `impl` has its storage, if `digested`
    uint64_t impl_digest = 0, storage_digest = 0;
    bool digested = false;
    int64_t dim = -1;               // no tensor
    int32_t dtype = 0;
    uint32_t layout = 0;  // where its sizes and strides begin in `layouts_`
  };
  struct Parameter {
    Tensor param, grad;
    Handle grad_handle;  // prefetched, never read, as is the next
    const void* version_counter;
    int64_t* grad_cell;
  };
  struct List {
    PyObject* list;
    Py_ssize_t size;
  };
  struct Inner {
    PyObject* dict;
    const void* keys;   // prefetched, never read
    size_t begin, end;  // of its values in `values_`
  };

  // All that `find` finds for 0..n-1, or-ed. Each tensor has its object, its C++ half and its
  // storage in memory of their own: of ten thousand none is in a cache when its turn comes. So
  // there are prefetches, and threads, whose misses overlap. They read Python's objects while
  // the caller holds Python's lock; where there is no such lock they would not be safe.
  template <class Find>
  static int each(size_t n, int threads, Find find) {
    int found = kSame;
    (void)threads;
#if defined(_OPENMP) && !defined(Py_GIL_DISABLED)
#pragma omp parallel for num_threads(threads) schedule(dynamic, kPortion) reduction(| : found) if (n > kPortion)
#endif
    for (size_t i = 0; i < n; ++i)
      if (!(found & kOther)) found |= find(i);
    return found;
  }

  template <class Find>
  int each_version(PyObject* tensors, int threads, Find find) const {
    const auto n = static_cast<size_t>(PyList_GET_SIZE(tensors));
    return each(n, threads, [&](size_t i) {
      if (i + 4 * kAhead < n) prefetch(PyList_GET_ITEM(tensors, i + 4 * kAhead), sizeof(PyObject) + sizeof(void*));
      if (i + 2 * kAhead < n) prefetch(*handle(PyList_GET_ITEM(tensors, i + 2 * kAhead)), kImplBytes);
      return find(i, version(handle(PyList_GET_ITEM(tensors, i))));
    });
  }

  bool is_tensor(py::handle object) const { return PyObject_IsInstance(object.ptr(), type_.ptr()) == 1; }

  // A Python tensor has its C++ tensor somewhere in its object. Where is found by comparing its
  // words with the pointer that `_cdata` names.
  Handle handle(PyObject* tensor) const {
    return reinterpret_cast<Handle>(reinterpret_cast<const char*>(tensor) + offset_);
  }

  static const Impl* cdata(py::handle tensor) {
    return reinterpret_cast<const Impl*>(tensor.attr("_cdata").cast<size_t>());
  }

  bool torch_as_expected(py::handle scratch) {
    const Impl* const impl = cdata(scratch);
    const Py_ssize_t last = Py_TYPE(scratch.ptr())->tp_basicsize - static_cast<Py_ssize_t>(sizeof(impl));
    offset_ = sizeof(PyObject);
    while (offset_ < last && *handle(scratch.ptr()) != impl) offset_ += sizeof(impl);
    if (*handle(scratch.ptr()) != impl || *torch_.version_counter(handle(scratch.ptr())) == nullptr) return false;
    no_grad_ = *torch_.grad(impl);
    const auto version = scratch.attr("_version").cast<int64_t>();
    torch_.bump_version(handle(scratch.ptr()));
    find_digests(scratch, impl);
    return scratch.attr("_version").cast<int64_t>() == version + 1 && find_version(handle(scratch.ptr()));
  }

  // The number in a counter of versions is the one that a write makes one larger.
  bool find_version(Handle scratch) {
    const auto* const counter = static_cast<const char*>(*torch_.version_counter(scratch));
    uint64_t before[kCounterBytes / 8];
    memcpy(before, counter, kCounterBytes);
    torch_.bump_version(scratch);
    for (size_t offset = 0; offset < kCounterBytes; offset += 8) {
      if (word(counter, offset) == before[offset / 8]) continue;
      version_offset_ = offset;
      return version(scratch) == static_cast<uint32_t>(before[offset / 8]) + 1;
    }
    return false;
  }

  // An inference tensor has none.
  uint32_t version(Handle tensor) const {
    const void* const counter = *torch_.version_counter(tensor);
    return counter == nullptr ? 0 : static_cast<uint32_t>(word(counter, version_offset_));
  }

  // A watch that reads another address than Python gives does not work and says so.
  Tensor remember(py::handle t) {
    Tensor was{t.ptr(), nullptr, cdata(t)};
    was.storage = reinterpret_cast<const void*>(t.attr("untyped_storage")().attr("_cdata").cast<size_t>());
    int64_t *sizes, *strides;
    works_ = works_ && *handle(t.ptr()) == was.impl && torch_.dim(&was.impl, &was.dim) == 0 &&
             torch_.data_ptr(&was.impl, &was.address) == 0 &&
             reinterpret_cast<size_t>(was.address) == t.attr("data_ptr")().cast<size_t>() &&
             torch_.dtype(&was.impl, &was.dtype) == 0 && torch_.sizes(&was.impl, &sizes) == 0 &&
             torch_.strides(&was.impl, &strides) == 0;
    if (works_) {
      was.layout = static_cast<uint32_t>(layouts_.size());
      layouts_.insert(layouts_.end(), sizes, sizes + was.dim);
      layouts_.insert(layouts_.end(), strides, strides + was.dim);
      digest(was, was.impl);
    }
    return was;
  }

  // Whether it has the dtype and layout that it had, and its address.
  bool ask_torch(const Tensor& was, Handle tensor, void** address) const {
    int64_t dim, *sizes, *strides;
    int32_t dtype;
    const int64_t* const layout = layouts_.data() + was.layout;
    return torch_.dim(tensor, &dim) == 0 && dim == was.dim && torch_.dtype(tensor, &dtype) == 0 &&
           dtype == was.dtype && !torch_.is_neg(tensor) && torch_.sizes(tensor, &sizes) == 0 &&
           std::equal(layout, layout + dim, sizes) && torch_.strides(tensor, &strides) == 0 &&
           std::equal(layout + dim, layout + 2 * dim, strides) && torch_.data_ptr(tensor, address) == 0;
  }

  bool same(Tensor& was, PyObject* object) const {
    void* address;
    if (object != was.object) return false;
    if (was.dim < 0 || unchanged(was, *handle(object))) return true;
    if (!ask_torch(was, handle(object), &address) || address != was.address) return false;
    digest(was, *handle(object));
    return true;
  }

  // Seven questions to torch take 35 ns a tensor, the bytes that the answers lie in 10. So where a
  // tensor is as it was to the bit, so is all that matters of it; where not (a count of references
  // is among them), torch is asked.
  bool unchanged(const Tensor& was, const Impl* impl) const {
    return was.digested && impl == was.impl && digest(impl, impl_bytes_) == was.impl_digest &&
           digest(was.storage, kStorageBytes) == was.storage_digest;
  }

  // Only of a tensor whose sizes and strides lie in its own bytes, not beside them.
  void digest(Tensor& now, const Impl* impl) const {
    now.digested = false;
    int64_t *sizes, *strides;
    if (impl_bytes_ == 0 || allocated(impl) < impl_bytes_ || torch_.sizes(&impl, &sizes) != 0 ||
        torch_.strides(&impl, &strides) != 0 || !within(impl, sizes, now.dim) || !within(impl, strides, now.dim))
      return;
    now.impl = impl;
    now.storage = reinterpret_cast<const void*>(word(impl, storage_offset_));
    if (allocated(now.storage) < kStorageBytes) return;
    now.impl_digest = digest(impl, impl_bytes_);
    now.storage_digest = digest(now.storage, kStorageBytes);
    now.digested = true;
  }

  // Another one for any change of a single word; for changes of several, almost surely.
  static uint64_t digest(const void* at, size_t bytes) {
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes / 8; ++i) sum += word(at, 8 * i) * odd_.numbers[i];
    return sum;
  }

  static uint64_t word(const void* at, size_t offset) {
    uint64_t found;
    memcpy(&found, static_cast<const char*>(at) + offset, sizeof(found));
    return found;
  }

  bool within(const Impl* impl, const int64_t* first, int64_t n) const {
    const auto* const begin = reinterpret_cast<const char*>(impl);
    const auto* const at = reinterpret_cast<const char*>(first);
    return n == 0 || (at >= begin && at + 8 * n <= begin + impl_bytes_);
  }

  // The bytes of an object, with what its allocator added; 0 where that cannot be asked.
  static size_t allocated(const void* object) {
#if defined(__GLIBC__)
    return malloc_usable_size(const_cast<void*>(object));
#else
    (void)object;
    return 0;
#endif
  }

  // Where in the bytes a word is, or `bytes`.
  static size_t find_word(const void* at, size_t bytes, const void* sought) {
    size_t offset = 0;
    while (offset < bytes && word(at, offset) != reinterpret_cast<uint64_t>(sought)) offset += 8;
    return offset;
  }

  // Digests are for a torch whose tensor names its storage, and whose storage its address.
  void find_digests(py::handle scratch, const Impl* impl) {
    const auto* const storage =
        reinterpret_cast<const void*>(scratch.attr("untyped_storage")().attr("_cdata").cast<size_t>());
    const auto* const data = reinterpret_cast<const void*>(scratch.attr("data_ptr")().cast<size_t>());
    const size_t bytes = allocated(impl) / 8 * 8;
    storage_offset_ = find_word(impl, bytes, storage);
    if (bytes <= sizeof(odd_.numbers) && storage_offset_ < bytes && data != nullptr &&
        allocated(storage) >= kStorageBytes && find_word(storage, kStorageBytes, data) < kStorageBytes)
      impl_bytes_ = bytes;
  }

  // Inlined by force: gcc drops calls of functions that do nothing but prefetch.
  __attribute__((always_inline)) static void prefetch(const void* first, int bytes) {
    const char* const at = static_cast<const char*>(first);
    for (int i = 0; i < bytes - 1; i += 64) __builtin_prefetch(at + i);
    __builtin_prefetch(at + bytes - 1);
  }

  __attribute__((always_inline)) void prefetch(const Tensor& t) const {
    prefetch(handle(t.object), 1);
    prefetch(t.impl, kImplBytes);
    prefetch(t.storage, kStorageBytes);
  }

  bool lists_unchanged(PyObject* param_lists) const {
    if (PyList_GET_SIZE(param_lists) != static_cast<Py_ssize_t>(lists_.size())) return false;
    size_t i = 0;
    for (size_t group = 0; group < lists_.size(); ++group) {
      PyObject* list = PyList_GET_ITEM(param_lists, group);
      if (list != lists_[group].list || PyList_GET_SIZE(list) != lists_[group].size) return false;
      for (Py_ssize_t j = 0; j < lists_[group].size; ++j, ++i)
        if (PyList_GET_ITEM(list, j) != params_[i].param.object) return false;
    }
    return true;
  }

  bool dicts_unchanged(PyObject* state) const {
    if (PyDict_Size(state) != static_cast<Py_ssize_t>(inner_.size())) return false;
    size_t i = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++i)
      if (value != inner_[i].dict) return false;
    return true;
  }

  bool python_agrees() const {
    for (const Parameter& p : params_) {
      const py::object grad = py::handle(p.param.object).attr("grad");
      if (!grad.is_none() && !is_tensor(grad)) return false;
      if (*torch_.grad(*handle(p.param.object)) != (grad.is_none() ? no_grad_ : *handle(grad.ptr()))) return false;
    }
    return true;
  }

  Found param_found(size_t i) {
    if (i + 2 * kAhead < params_.size()) {
      const Parameter& later = params_[i + 2 * kAhead];
      prefetch(later.param);
      prefetch(later.grad_handle, 1);
      prefetch(later.grad.storage, kStorageBytes);
    }
    // Gradients are often new ones, elsewhere than the last.
    if (i + kAhead < params_.size())
      prefetch(*torch_.grad(*handle(params_[i + kAhead].param.object)), kImplBytes);
    Parameter& was = params_[i];
    const Handle param = handle(was.param.object);
    if (!same(was.param, was.param.object)) return kOther;
    const Handle grad = torch_.grad(*param);
    if (*grad == no_grad_ || was.grad.impl == nullptr)
      return *grad == no_grad_ && was.grad.impl == nullptr ? kSame : kOther;
    if (unchanged(was.grad, *grad)) return kSame;
    void* address;
    // A sparse tensor has no strides and no address to ask for.
    if (!is_strided(grad) || !ask_torch(was.grad, grad, &address)) return kOther;
    if (*grad == was.grad.impl && address == was.grad.address) {
      digest(was.grad, *grad);
      return kSame;
    }
    if (!same_device(grad, param) || !same_alignment(address, was.grad.address)) return kOther;
    was.grad.impl = *grad;
    was.grad.digested = false;
    if (address == was.grad.address) return kSame;
    was.grad.address = address;
    if (was.grad_cell != nullptr) *was.grad_cell = reinterpret_cast<int64_t>(address);
    return kMoved;
  }

  static bool is_strided(Handle tensor) {
    int32_t layout;
    return torch_.layout(tensor, &layout) == 0 && layout == 0;
  }

  static bool same_device(Handle a, Handle b) {
    int32_t types[2], indices[2];
    return torch_.device_type(a, types) == 0 && torch_.device_type(b, types + 1) == 0 && types[0] == types[1] &&
           torch_.device_index(a, indices) == 0 && torch_.device_index(b, indices + 1) == 0 &&
           indices[0] == indices[1];
  }

  // As far as a table's chunks depend on it.
  static bool same_alignment(const void* a, const void* b) {
    constexpr uintptr_t kVector = 16;
    return (a == nullptr) == (b == nullptr) &&
           reinterpret_cast<uintptr_t>(a) % kVector == reinterpret_cast<uintptr_t>(b) % kVector;
  }

  Found state_found(size_t i) {
    if (i + kAhead < inner_.size()) {
      const Inner& next = inner_[i + kAhead];
      prefetch(next.dict, sizeof(PyDictObject));
      prefetch(next.keys, kKeysBytes);
      for (size_t j = next.begin; j < next.end; ++j) prefetch(values_[j]);
    }
    const Inner& was = inner_[i];
    size_t j = was.begin;
    if (PyDict_Check(was.dict)) {
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(was.dict, &k, &name, &item); ++j)
        if (j >= was.end || !same(values_[j], item)) return kOther;
    }
    return j == was.end ? kSame : kOther;
  }

  static constexpr OddNumbers odd_{};
  static inline const TorchInterface torch_;
  py::object type_;  // torch.Tensor
  Py_ssize_t offset_ = 0;
  size_t storage_offset_ = 0, impl_bytes_ = 0;  // no digests
  size_t version_offset_ = 0;
  const Impl* no_grad_ = nullptr;
  bool works_;
  std::vector<List> lists_;
  std::vector<Parameter> params_;
  std::vector<Inner> inner_;
  std::vector<Tensor> values_;
  std::vector<int64_t> layouts_;
  std::vector<uint32_t> versions_;
};

}  // namespace fused_optim
