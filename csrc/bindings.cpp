// cat_fast._bindings: native code that does not need torch (the packer's core, the CPU feature report).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>

#include "token_budget_packer/best_fit.h"

namespace py = pybind11;
using cat_fast::BestFitPacker;

namespace {

py::array_t<int64_t> to_array(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

// A length given as an integer of Python or numpy. Conversion would truncate 7.9 and read true as 1.
int64_t to_length(const py::handle item) {
  const bool boolean = PyBool_Check(item.ptr()) ||
                       (!PyLong_Check(item.ptr()) && py::hasattr(item, "dtype") &&
                        std::string(py::str(item.attr("dtype"))).ends_with("bool"));
  const auto index = py::reinterpret_steal<py::object>(boolean ? nullptr : PyNumber_Index(item.ptr()));
  if (!index) {
    PyErr_Clear();
    throw std::invalid_argument("expected an integer number of tokens, got " + std::string(py::repr(item)));
  }
  int overflow = 0;
  const int64_t length = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  // Lengths beyond 64 bits do not fit any batch.
  if (overflow != 0) return overflow > 0 ? std::numeric_limits<int64_t>::max() : 0;
  return length;
}

std::vector<int64_t> to_lengths(const py::object& lengths) {
  if (py::isinstance<py::array>(lengths)) {
    const auto array = lengths.cast<py::array>();
    if (array.ndim() != 1) throw std::invalid_argument("lengths: expected a one-dimensional array");
    if (array.dtype().kind() == 'i') {
      const py::array_t<int64_t, py::array::c_style | py::array::forcecast> values(array);
      return {values.data(), values.data() + values.size()};
    }
  }
  std::vector<int64_t> result;
  for (const py::handle item : lengths) result.push_back(to_length(item));
  return result;
}

void extend(BestFitPacker& packer, const py::object& lengths) {
  const std::vector<int64_t> values = to_lengths(lengths);
  packer.extend(values.data(), static_cast<int64_t>(values.size()));
}

void restore(BestFitPacker& packer, const py::dict& saved) {
  BestFitPacker::Pending pending;
  for (const py::handle entry : saved["pending"]) {
    const auto [id, length] = entry.cast<std::pair<py::object, py::object>>();
    pending.emplace_back(to_length(id), to_length(length));
  }
  packer.restore(to_length(saved["next_id"]), pending);
}

std::pair<py::array_t<int64_t>, py::array_t<int64_t>> plan(const BestFitPacker& packer, const py::object& lengths) {
  const std::vector<int64_t> values = to_lengths(lengths);
  std::vector<int64_t> ids, offsets;
  {
    py::gil_scoped_release release;
    packer.plan(values.data(), static_cast<int64_t>(values.size()), ids, offsets);
  }
  return {to_array(ids), to_array(offsets)};
}

py::dict state(const BestFitPacker& packer) {
  py::dict result;
  result["next_id"] = packer.next_id();
  result["pending"] = packer.pending();
  return result;
}

// Returns the instruction sets that a CPU backend may choose from at run time.
py::dict cpu_features() {
  py::dict result;
#if defined(__x86_64__)
  __builtin_cpu_init();
  result["avx2"] = static_cast<bool>(__builtin_cpu_supports("avx2"));
  result["fma"] = static_cast<bool>(__builtin_cpu_supports("fma"));
  result["avx512f"] = static_cast<bool>(__builtin_cpu_supports("avx512f"));
  result["avx512bw"] = static_cast<bool>(__builtin_cpu_supports("avx512bw"));
  result["avx512vl"] = static_cast<bool>(__builtin_cpu_supports("avx512vl"));
  result["avx512_bf16"] = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
  result["amx_tile"] = static_cast<bool>(__builtin_cpu_supports("amx-tile"));
  result["amx_bf16"] = static_cast<bool>(__builtin_cpu_supports("amx-bf16"));
#endif
  return result;
}

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Native code that does not need torch: the packer's core and the CPU feature report.";

  py::class_<BestFitPacker>(m, "BestFitPacker",
                            "Packer of sequences into batches of at most max_tokens tokens and max_sequences "
                            "sequences. Each step makes one batch for each of `ranks` ranks, by best fit among "
                            "the first `window` pending sequences, with similar sums of squared lengths.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("max_tokens"), py::arg("max_sequences"),
           py::arg("window"), py::arg("ranks") = 1)
      .def("extend", &extend, py::arg("lengths"),
           "Append sequences; the id of each is the number of sequences added before it. If a length is not an "
           "integer from 1 to max_tokens, append none and raise ValueError.")
      .def("next", &BestFitPacker::next, py::arg("flush") = false,
           "Return the ids of one batch per rank. Return None if no sequence is pending, or if fewer than "
           "`window` are and `flush` is False.")
      .def("pending", &BestFitPacker::pending, "Return (id, length) of every pending sequence, oldest first.")
      .def("state", &state, "Return the packer's state as plain ints and lists, for restore().")
      .def("restore", &restore, py::arg("state"),
           "Resume from a saved state(). If it is not valid for this packer, change nothing and raise ValueError.")
      .def("plan", &plan, py::arg("lengths"),
           "Return (ids, offsets) of the batches of an entire int64 array, `ranks` batches per step: batch b is "
           "ids[offsets[b]:offsets[b + 1]]. Does not change the packer.")
      .def("__len__", &BestFitPacker::pending_count);

  m.def("cpu_features", &cpu_features,
        "Return the instruction sets of this CPU; empty on architectures other than x86-64.");
}
