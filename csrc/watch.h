// Tells quickly that no tensor of an optimizer was replaced or moved since the table of
// addresses was made. Asking ten thousand tensors from Python takes longer than stepping them.
#pragma once

#include <dlfcn.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "coefficients.h"

// FUSED_OPTIM_HD inlines by force: gcc drops calls of functions that do nothing but prefetch, and a
// function for one instruction set takes in no other by itself.
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
    find(torch, "_ZN5torch8autograd4impl19set_version_counterERKN2at6TensorERKN3c1015VariableVersionE",
         set_version_counter);
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
  void (*set_version_counter)(Handle, void* const*) = nullptr;  // null where torch has none to offer

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
  uint64_t numbers[40];
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
  // `steps`: step numbers in the state of which is asked whether somebody wrote to them.
  // `owners`: of each parameter that has a gradient, the tensor that it is given the counter of
  // versions of, as a view has that of its base; or empty.
  // `scratch`: a tensor of nobody's, with an address, without a gradient. The caller keeps lists,
  // dicts, what is in them and the tables alive for as long as the watch: it only borrows them,
  // since Python's garbage collector could not see through it.
  Watch(py::list param_lists, py::dict state, const std::vector<size_t>& grad_cells, py::list steps,
        py::dict owners, py::object scratch)
      : type_(py::type::of(scratch)), works_(torch_.available() && torch_as_expected(scratch)) {
    shares_versions_ = works_ && !owners.empty() && share_versions(owners);
    size_t live = 0;
    for (py::handle list : param_lists) {
      lists_.push_back({list.ptr(), PyList_GET_SIZE(list.ptr())});
      for (py::handle p : py::reinterpret_borrow<py::list>(list)) {
        Parameter was{};
        remember(p);
        const py::object grad = p.attr("grad");
        if (grad.is_none()) {
          remember_nothing(nullptr);
        } else {
          remember(grad);
          tensors_.back().object = nullptr;
          was.grad_cell = reinterpret_cast<int64_t*>(grad_cells.at(live++));
        }
        if (works_) {
          was.grad_handle = torch_.grad(tensors_.end()[-2].impl);
          was.version_counter = facts_.end()[-2].version_counter;
          works_ = *was.grad_handle == (grad.is_none() ? no_grad_ : tensors_.back().impl);
        }
        params_.push_back(was);
      }
    }
    state_version_ = dict_version(state.ptr());
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
      inner_.push_back({value, nullptr, 0, tensors_.size(), tensors_.size()});
      if (!PyDict_Check(value)) continue;
      inner_.back().keys = reinterpret_cast<PyDictObject*>(value)->ma_keys;
      inner_.back().version = dict_version(value);
      PyObject *name, *item;
      for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &item);)
        is_tensor(item) ? remember(item) : remember_nothing(item);
      inner_.back().end = tensors_.size();
    }
    if (!works_) return;
    if (impl_bytes_ < least_bytes_) impl_bytes_ = 0;
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (tensors_[i].impl != nullptr) digest(tensors_[i], tensors_[i].impl, facts_[i].dim);
    std::unordered_map<const void*, uint32_t> seen;
    for (py::handle step : steps) {
      const void* const counter = *torch_.version_counter(handle(step.ptr()));
      const auto number = static_cast<uint32_t>(counters_.size());
      counter_of_step_.push_back(seen.emplace(counter, number).first->second);
      if (counter_of_step_.back() == number) counters_.push_back({step.ptr(), counter, 0});
    }
  }

  enum Answer { kPerhapsNot, kUnchanged, kGradsMoved };

  bool works() const { return works_; }
  bool shares_versions() const { return shares_versions_; }
  size_t asked() const { return asked_; }  // of how many tensors torch was, their digests being others

  // Whether all is where it was, and nobody wrote to the step numbers, but for gradients: these may
  // be new tensors of the same dtype, layout, device and alignment, and if they are elsewhere their
  // cells are given the addresses.
  // Where this watch cannot tell, "perhaps not"; some cells may have been given theirs then.
  // `ask_python`: p.grad may be another thing in Python than in C++.
  Answer ask(py::list param_lists, py::dict state, bool ask_python, int threads) {
    if (!works_ || !sizes_unchanged(param_lists.ptr()) || !dicts_unchanged(state.ptr())) return kPerhapsNot;
    if (first_replaced(param_lists.ptr(), 0, params_.size()) != params_.size()) return kPerhapsNot;
    if (!counters_unchanged()) return kPerhapsNot;
    if (ask_python && !python_agrees()) return kPerhapsNot;
    const size_t n = params_.size();
    const int found = in_portions(n + inner_.size(), threads, [this](size_t first, size_t last) {
#if defined(__x86_64__)
      if (avx512_) return portion_found_avx512(first, last);
#endif
      return portion_found<Scalar>(first, last);
    });
    return found & kOther ? kPerhapsNot : found & kMoved ? kGradsMoved : kUnchanged;
  }

  // Of no more than `count` parameters and as many states, the next ones in each call: the first whose
  // tensors are not all as they were, states counted after parameters; or these.
  static constexpr int64_t kNone = -1, kAskAll = -2;
  int64_t ask_next(py::list param_lists, py::dict state, size_t count) {
    if (!works_ || !sizes_unchanged(param_lists.ptr()) || !dicts_unchanged(state.ptr()) || !counters_unchanged())
      return kAskAll;
    const size_t most = std::max(params_.size(), inner_.size());
    const size_t first = next_ < most ? next_ : 0, last = std::min(first + count, most);
    next_ = last;
    const size_t replaced = first_replaced(param_lists.ptr(), first, last);
    if (replaced != last) return static_cast<int64_t>(replaced);
#if defined(__x86_64__)
    if (avx512_) return first_change_avx512(first, last);
#endif
    return first_change<Scalar>(first, last);
  }

  // How often the step numbers were written to. All that were made together are views of one
  // tensor, which share its counter: so there are few to read, for `ask` sees that each step
  // number still has the counter that it had.
  void remember_versions() {
    for (Counter& c : counters_) c.version = version(handle(c.step));
    versions_remembered_ = true;
  }

  // Of the same list of step numbers, whatever `ask` says.
  bool versions_unchanged(py::list steps) const {
    if (!versions_remembered_ || steps.size() != counter_of_step_.size()) return false;
    for (size_t i = 0; i < counter_of_step_.size(); ++i)
      if (!counter_unchanged(counters_[counter_of_step_[i]], PyList_GET_ITEM(steps.ptr(), i))) return false;
    return true;
  }

  // Tells autograd that the parameters which have gradients were written to.
  void bump_versions(int threads) const {
    in_portions(params_.size(), threads, [this](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) {
        if (i + kAhead < params_.size()) {
          __builtin_prefetch(param(i + kAhead).object);
          __builtin_prefetch(param(i + kAhead).impl);
          __builtin_prefetch(params_[i + kAhead].version_counter, 1);
        }
        const Handle p = handle(param(i).object);
        if (grad(i).impl != nullptr && *torch_.version_counter(p) != nullptr) torch_.bump_version(p);
      }
      return kSame;
    });
  }

 private:
  using Impl = TorchInterface::Impl;
  using Handle = TorchInterface::Handle;

  // How far ahead memory is asked for, in parameters or their states. With one thread and 10,000
  // parameters in a flat buffer 2 take 0.40 ms, 4 take 0.39, 8 take 0.37; with 1,000 it is 32, 32
  // and 35 us.
  static constexpr size_t kAhead = 4;
  // What of a tensor is looked at by torch 2.13, and of a dict with three keys by CPython 3.11.
  static constexpr int kImplBytes = 184, kStorageBytes = 64, kKeysBytes = 88;
  static constexpr size_t kPortion = 256, kCounterBytes = 24;
  static constexpr size_t kStorageNumbers = 32;  // of the odd ones the first that are a storage's

  enum Found { kSame = 0, kMoved = 1, kOther = 2 };

  // What is read of each tensor at each step: half a cache line.
  struct Tensor {
    PyObject* object = nullptr;  // of a gradient none: another one next time, or none
    const Impl* impl = nullptr;
    const void* storage = nullptr;  // where `impl` has its storage; null if there is no digest
    uint64_t digest = 0;            // of both
  };
  // What is read of it besides where its digest is another one.
  struct Facts {
    void* address = nullptr;
    const void* version_counter = nullptr;
    int64_t dim = -1;  // no tensor
    int32_t dtype = 0;
    uint32_t layout = 0;  // where its sizes and strides begin in `layouts_`
  };
  struct Parameter {
    Handle grad_handle;  // prefetched, never read, as is the next
    const void* version_counter;
    int64_t* grad_cell;
  };
  struct Counter {
    PyObject* step;  // one of those that have it
    const void* counter;
    uint32_t version;
  };
  struct List {
    PyObject* list;
    Py_ssize_t size;
  };
  struct Inner {
    PyObject* dict;
    const void* keys;   // prefetched, never read
    uint64_t version;
    size_t begin, end;  // of its values in `tensors_`
  };

  // Another one for any change of a single word; for changes of several, almost surely.
  struct Scalar {
    static uint64_t digest(const void* at, size_t bytes, const uint64_t* odd) {
      uint64_t sum = 0;
      for (size_t i = 0; i < bytes / 8; ++i) sum += word(at, 8 * i) * odd[i];
      return sum;
    }
  };
#if defined(__x86_64__)
  // The same number. Five digests take 12 ns, and 30 one word at a time (`ask` of 1,000 parameters
  // in a flat buffer: 32 us for 50).
  struct Avx512 {
    __attribute__((target("avx512f,avx512dq"))) static uint64_t digest(const void* at, size_t bytes,
                                                                       const uint64_t* odd) {
      __m512i sum = _mm512_setzero_si512();
      for (size_t i = 0; i < bytes / 8; i += 8) {
        const auto mask = static_cast<__mmask8>((1u << std::min<size_t>(bytes / 8 - i, 8)) - 1);
        const __m512i words = _mm512_maskz_loadu_epi64(mask, static_cast<const uint64_t*>(at) + i);
        sum = _mm512_add_epi64(sum, _mm512_mullo_epi64(words, _mm512_maskz_loadu_epi64(mask, odd + i)));
      }
      // Not by _mm512_reduce_add_epi64, for which gcc 12 warns of its own header.
      uint64_t lanes[8], total = 0;
      memcpy(lanes, &sum, sizeof(lanes));
      for (const uint64_t lane : lanes) total += lane;
      return total;
    }
  };
#endif

  // Tensors of a flat buffer share its storage: neighbours in the same role have the digest of it
  // worked out once, not each for itself.
  template <class Isa>
  struct StorageDigests {
    static constexpr size_t kRoles = 8;
    const void* storages[kRoles] = {};
    uint64_t digests[kRoles];
    size_t asked = 0;  // see `asked`: counted by portion, since threads would wait for one another

    FUSED_OPTIM_HD uint64_t of(const void* storage, size_t role) {
      if (storages[role % kRoles] != storage) {
        storages[role % kRoles] = storage;
        digests[role % kRoles] = Isa::digest(storage, kStorageBytes, odd_.numbers + kStorageNumbers);
      }
      return digests[role % kRoles];
    }
  };

  // All that `find` finds for 0..n-1, or-ed. Each tensor has its object, its C++ half and its
  // storage in memory of their own: of ten thousand none is in a cache when its turn comes. So
  // there are prefetches, and threads, whose misses overlap. They read Python's objects while
  // the caller holds Python's lock; where there is no such lock they would not be safe.
  template <class Find>
  static int in_portions(size_t n, int threads, Find find) {
    int found = kSame;
    (void)threads;
#if defined(_OPENMP) && !defined(Py_GIL_DISABLED)
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : found) if (n >= 2 * kPortion)
#endif
    for (size_t first = 0; first < n; first += kPortion)
      if (!(found & kOther)) found |= find(first, std::min(first + kPortion, n));
    return found;
  }

  bool counter_unchanged(const Counter& was, PyObject* step) const {
    return *torch_.version_counter(handle(step)) == was.counter && version(handle(step)) == was.version;
  }

  bool counters_unchanged() const {
    return counters_.empty() ||
           (versions_remembered_ && std::all_of(counters_.begin(), counters_.end(), [this](const Counter& was) {
              return counter_unchanged(was, was.step);
            }));
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

  // All of them or none. What autograd has saved holds the old counter, or asks the tensor for the
  // number in its present one: so the old one goes up, and the new one is past it.
  bool share_versions(const py::dict& owners) const {
    const auto none = [this](py::handle t) { return *torch_.version_counter(handle(t.ptr())) == nullptr; };
    if (torch_.set_version_counter == nullptr ||
        std::any_of(owners.begin(), owners.end(), [&](auto item) { return none(item.first) || none(item.second); }))
      return false;
    for (const auto& [tensor, owner] : owners) {
      const Handle t = handle(tensor.ptr()), base = handle(owner.ptr());
      if (*torch_.version_counter(t) == *torch_.version_counter(base)) continue;
      torch_.bump_version(t);
      while (version(base) <= version(t)) torch_.bump_version(base);
      torch_.set_version_counter(t, torch_.version_counter(base));
      if (*torch_.version_counter(t) != *torch_.version_counter(base)) return false;
    }
    return true;
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
  void remember(py::handle t) {
    Tensor was{t.ptr(), cdata(t)};
    Facts facts;
    int64_t *sizes, *strides;
    works_ = works_ && *handle(t.ptr()) == was.impl && torch_.dim(&was.impl, &facts.dim) == 0 &&
             torch_.data_ptr(&was.impl, &facts.address) == 0 &&
             reinterpret_cast<size_t>(facts.address) == t.attr("data_ptr")().cast<size_t>() &&
             torch_.dtype(&was.impl, &facts.dtype) == 0 && torch_.sizes(&was.impl, &sizes) == 0 &&
             torch_.strides(&was.impl, &strides) == 0;
    if (works_) {
      facts.layout = static_cast<uint32_t>(layouts_.size());
      layouts_.insert(layouts_.end(), sizes, sizes + facts.dim);
      layouts_.insert(layouts_.end(), strides, strides + facts.dim);
      facts.version_counter = *torch_.version_counter(&was.impl);
      impl_bytes_ = std::min(impl_bytes_, allocated(was.impl) / 8 * 8);
    }
    tensors_.push_back(was);
    facts_.push_back(facts);
  }

  void remember_nothing(PyObject* object) {
    tensors_.push_back({object});
    facts_.emplace_back();
  }

  // A parameter and its gradient are neighbours; after them all come the values of the states.
  Tensor& param(size_t i) { return tensors_[2 * i]; }
  Tensor& grad(size_t i) { return tensors_[2 * i + 1]; }
  const Tensor& param(size_t i) const { return tensors_[2 * i]; }
  const Tensor& grad(size_t i) const { return tensors_[2 * i + 1]; }

  // Whether it has the dtype and layout that it had, and its address.
  bool ask_torch(const Facts& was, Handle tensor, void** address, size_t& asked) const {
    int64_t dim, *sizes, *strides;
    int32_t dtype;
    const int64_t* const layout = layouts_.data() + was.layout;
    ++asked;
    return torch_.dim(tensor, &dim) == 0 && dim == was.dim && torch_.dtype(tensor, &dtype) == 0 &&
           dtype == was.dtype && !torch_.is_neg(tensor) && torch_.sizes(tensor, &sizes) == 0 &&
           std::equal(layout, layout + dim, sizes) && torch_.strides(tensor, &strides) == 0 &&
           std::equal(layout + dim, layout + 2 * dim, strides) && torch_.data_ptr(tensor, address) == 0;
  }

  template <class Isa>
  FUSED_OPTIM_HD bool same(size_t i, size_t role, StorageDigests<Isa>& storages) {
    const Handle tensor = handle(tensors_[i].object);
    void* address;
    if (unchanged(tensors_[i], *tensor, role, storages)) return true;
    if (!ask_torch(facts_[i], tensor, &address, storages.asked) || address != facts_[i].address ||
        *torch_.version_counter(tensor) != facts_[i].version_counter)
      return false;
    digest(tensors_[i], *tensor, facts_[i].dim);
    return true;
  }

  // Seven questions to torch take 35 ns a tensor, the bytes that the facts lie in 10. So where a
  // tensor is as it was to the bit, so is all that matters of it; where not (a count of references
  // is among them), torch is asked.
  template <class Isa>
  FUSED_OPTIM_HD bool unchanged(const Tensor& was, const Impl* impl, size_t role,
                                StorageDigests<Isa>& storages) const {
    return was.storage != nullptr && impl == was.impl && word(impl, storage_offset_) == address_of(was.storage) &&
           Isa::digest(impl, impl_bytes_, odd_.numbers) + storages.of(was.storage, role) == was.digest;
  }

  // Only of a tensor whose sizes and strides lie in its own bytes, not beside them.
  void digest(Tensor& now, const Impl* impl, int64_t dim) const {
    now.storage = nullptr;
    int64_t *sizes, *strides;
    if (impl_bytes_ == 0 || allocated(impl) < impl_bytes_ || torch_.sizes(&impl, &sizes) != 0 ||
        torch_.strides(&impl, &strides) != 0 || !within(impl, sizes, dim) || !within(impl, strides, dim))
      return;
    const auto* const storage = reinterpret_cast<const void*>(word(impl, storage_offset_));
    if (allocated(storage) < kStorageBytes) return;
    now.impl = impl;
    now.storage = storage;
    now.digest = Scalar::digest(impl, impl_bytes_, odd_.numbers) +
                 Scalar::digest(storage, kStorageBytes, odd_.numbers + kStorageNumbers);
  }

  static uint64_t address_of(const void* object) { return reinterpret_cast<uint64_t>(object); }

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
    while (offset < bytes && word(at, offset) != address_of(sought)) offset += 8;
    return offset;
  }

  // Digests are for a torch whose tensor names its storage and its counter of versions, and whose
  // storage its address. An allocator may give a tensor more than it needs, by chance; the smallest
  // of many allocations is what a tensor takes.
  void find_digests(py::handle scratch, const Impl* impl) {
    const auto* const storage =
        reinterpret_cast<const void*>(scratch.attr("untyped_storage")().attr("_cdata").cast<size_t>());
    const auto* const data = reinterpret_cast<const void*>(scratch.attr("data_ptr")().cast<size_t>());
    const size_t bytes = allocated(impl) / 8 * 8;
    storage_offset_ = find_word(impl, bytes, storage);
    least_bytes_ = 8 + std::max(storage_offset_, find_word(impl, bytes, *torch_.version_counter(&impl)));
    if (bytes <= 8 * kStorageNumbers && least_bytes_ <= bytes && data != nullptr &&
        allocated(storage) >= kStorageBytes && find_word(storage, kStorageBytes, data) < kStorageBytes)
      impl_bytes_ = bytes;
  }

  FUSED_OPTIM_HD static void prefetch(const void* first, int bytes) {
    const char* const at = static_cast<const char*>(first);
    for (int i = 0; i < bytes - 1; i += 64) __builtin_prefetch(at + i);
    __builtin_prefetch(at + bytes - 1);
  }

  FUSED_OPTIM_HD void prefetch(const Tensor& t) const {
    prefetch(handle(t.object), 1);
    prefetch(t.impl, kImplBytes);
    prefetch(t.storage, kStorageBytes);
  }

  bool sizes_unchanged(PyObject* param_lists) const {
    if (PyList_GET_SIZE(param_lists) != static_cast<Py_ssize_t>(lists_.size())) return false;
    for (size_t group = 0; group < lists_.size(); ++group) {
      PyObject* list = PyList_GET_ITEM(param_lists, group);
      if (list != lists_[group].list || PyList_GET_SIZE(list) != lists_[group].size) return false;
    }
    return true;
  }

  // Of the parameters from `first` to `last`, the first that is another object; `last` if none is.
  size_t first_replaced(PyObject* param_lists, size_t first, size_t last) const {
    size_t begin = 0;
    for (size_t group = 0; group < lists_.size(); ++group) {
      PyObject* list = PyList_GET_ITEM(param_lists, group);
      const size_t end = begin + static_cast<size_t>(lists_[group].size);
      for (size_t i = std::max(first, begin); i < std::min(last, end); ++i)
        if (PyList_GET_ITEM(list, i - begin) != param(i).object) return i;
      begin = end;
    }
    return last;
  }

  // CPython before 3.14 counts the changes of all dicts, and keeps in each the count of its last
  // (PEP 509): a word that is another after every change, and here is tried which. A walk through a
  // dict of three takes 8 ns more, and reads two more cache lines.
  static size_t find_dict_version() {
    constexpr size_t kTries = 6;
    py::dict dict;
    uint64_t words[kTries][sizeof(PyDictObject) / 8];
    for (size_t i = 0; i < kTries; ++i) {
      if (i == kTries - 1) dict.clear();
      dict["key"] = i % 2 == 0;
      memcpy(words[i], dict.ptr(), sizeof(words[i]));
    }
    for (size_t at = sizeof(PyObject); at < sizeof(words[0]); at += 8) {
      bool version = true;
      for (size_t i = 0; i < kTries; ++i)
        for (size_t j = 0; j < i; ++j) version = version && words[i][at / 8] != words[j][at / 8];
      if (version) return at;
    }
    return 0;
  }

  // 0: it has none. An object's attributes may be written to past it.
  uint64_t dict_version(PyObject* dict) const {
    const bool of_an_object = reinterpret_cast<PyDictObject*>(dict)->ma_values != nullptr;
    return dict_version_offset_ == 0 || of_an_object ? 0 : word(dict, dict_version_offset_);
  }

  bool dict_unchanged(PyObject* dict, uint64_t version) const {
    return version != 0 && word(dict, dict_version_offset_) == version;
  }

  bool dicts_unchanged(PyObject* state) {
    if (dict_unchanged(state, state_version_)) return true;
    if (PyDict_Size(state) != static_cast<Py_ssize_t>(inner_.size())) return false;
    size_t i = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++i)
      if (value != inner_[i].dict) return false;
    state_version_ = dict_version(state);
    return true;
  }

  bool python_agrees() const {
    for (size_t i = 0; i < params_.size(); ++i) {
      PyObject* const p = param(i).object;
      const py::object grad = py::handle(p).attr("grad");
      if (!grad.is_none() && !is_tensor(grad)) return false;
      if (*torch_.grad(*handle(p)) != (grad.is_none() ? no_grad_ : *handle(grad.ptr()))) return false;
    }
    return true;
  }

  template <class Isa>
  FUSED_OPTIM_HD Found param_found(size_t i, StorageDigests<Isa>& storages) {
    if (i + 2 * kAhead < params_.size()) {
      prefetch(param(i + 2 * kAhead));
      prefetch(params_[i + 2 * kAhead].grad_handle, 1);
      prefetch(grad(i + 2 * kAhead).storage, kStorageBytes);
    }
    // Gradients are often new ones, elsewhere than the last.
    if (i + kAhead < params_.size()) prefetch(*torch_.grad(*handle(param(i + kAhead).object)), kImplBytes);
    if (!same(2 * i, 0, storages)) return kOther;
    const Handle tensor = handle(param(i).object), now = torch_.grad(*tensor);
    Tensor& was = grad(i);
    if (*now == no_grad_ || was.impl == nullptr) return *now == no_grad_ && was.impl == nullptr ? kSame : kOther;
    if (unchanged(was, *now, 1, storages)) return kSame;
    Facts& facts = facts_[2 * i + 1];
    void* address;
    // A sparse tensor has no strides and no address to ask for.
    if (!is_strided(now) || !ask_torch(facts, now, &address, storages.asked)) return kOther;
    if (*now == was.impl && address == facts.address) {
      digest(was, *now, facts.dim);
      return kSame;
    }
    if (!same_device(now, tensor) || !same_alignment(address, facts.address)) return kOther;
    was.impl = *now;
    was.storage = nullptr;
    if (address == facts.address) return kSame;
    facts.address = address;
    if (params_[i].grad_cell != nullptr) *params_[i].grad_cell = reinterpret_cast<int64_t>(address);
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

  template <class Isa>
  FUSED_OPTIM_HD Found state_found(size_t i, StorageDigests<Isa>& storages) {
    if (i + kAhead < inner_.size()) {
      const Inner& next = inner_[i + kAhead];
      prefetch(next.dict, sizeof(PyDictObject));
      if (next.version == 0) prefetch(next.keys, kKeysBytes);
      for (size_t j = next.begin; j < next.end; ++j) prefetch(tensors_[j]);
    }
    Inner& was = inner_[i];
    if (!PyDict_Check(was.dict)) return kSame;
    if (!dict_unchanged(was.dict, was.version)) {
      PyObject *name, *item;
      size_t j = was.begin;
      for (Py_ssize_t k = 0; PyDict_Next(was.dict, &k, &name, &item); ++j)
        if (j >= was.end || item != tensors_[j].object) return kOther;
      if (j != was.end) return kOther;
      was.version = dict_version(was.dict);
    }
    for (size_t j = was.begin; j < was.end; ++j)
      if (tensors_[j].impl != nullptr && !same(j, j - was.begin, storages)) return kOther;
    return kSame;
  }

  template <class Isa>
  FUSED_OPTIM_HD int portion_found(size_t first, size_t last) {
    StorageDigests<Isa> storages;
    const size_t n = params_.size();
    int found = kSame;
    for (size_t i = first; i < last && !(found & kOther); ++i)
      found |= i < n ? param_found(i, storages) : state_found(i - n, storages);
    asked_.fetch_add(storages.asked, std::memory_order_relaxed);
    return found;
  }

  // See `ask_next`.
  template <class Isa>
  FUSED_OPTIM_HD int64_t first_change(size_t first, size_t last) {
    StorageDigests<Isa> storages;
    const size_t n = params_.size();
    int64_t changed = kNone;
    for (size_t i = first; i < std::min(last, n) && changed == kNone; ++i)
      if (param_found(i, storages) != kSame) changed = static_cast<int64_t>(i);
    for (size_t i = first; i < std::min(last, inner_.size()) && changed == kNone; ++i)
      if (state_found(i, storages) != kSame) changed = static_cast<int64_t>(n + i);
    asked_.fetch_add(storages.asked, std::memory_order_relaxed);
    return changed;
  }

#if defined(__x86_64__)
  __attribute__((target("avx512f,avx512dq"))) int portion_found_avx512(size_t first, size_t last) {
    return portion_found<Avx512>(first, last);
  }
  __attribute__((target("avx512f,avx512dq"))) int64_t first_change_avx512(size_t first, size_t last) {
    return first_change<Avx512>(first, last);
  }
#endif

  static constexpr OddNumbers odd_{};
#if defined(__x86_64__)
  static inline const bool avx512_ = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#endif
  static inline const TorchInterface torch_;
  py::object type_;  // torch.Tensor
  Py_ssize_t offset_ = 0;
  size_t storage_offset_ = 0, least_bytes_ = 0, impl_bytes_ = 0;  // no digests
  size_t version_offset_ = 0;
  const Impl* no_grad_ = nullptr;
  const size_t dict_version_offset_ = find_dict_version();  // 0: dicts have none
  uint64_t state_version_ = 0;
  bool works_, shares_versions_ = false;
  size_t next_ = 0;  // see `ask_next`
  std::atomic<size_t> asked_{0};
  std::vector<List> lists_;
  std::vector<Parameter> params_;
  std::vector<Inner> inner_;
  std::vector<Tensor> tensors_;
  std::vector<Facts> facts_;  // of each in `tensors_`
  std::vector<int64_t> layouts_;
  std::vector<Counter> counters_;
  std::vector<uint32_t> counter_of_step_;
  bool versions_remembered_ = false;
};

}  // namespace fused_optim
