// cat_fast._bindings: native code that does not need torch (the packer's core, the CPU feature report).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "token_budget_packer/best_fit.h"

namespace py = pybind11;
using cat_fast::BestFitPacker;

namespace {

py::array_t<int64_t> to_array(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

using Lengths = py::array_t<int64_t, py::array::c_style>;

const Lengths& one_dimensional(const Lengths& lengths) {
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths: expected a one-dimensional array");
  return lengths;
}

void extend(BestFitPacker& packer, const Lengths& lengths) {
  packer.extend(one_dimensional(lengths).data(), lengths.size());
}

std::pair<py::array_t<int64_t>, py::array_t<int64_t>> plan(const BestFitPacker& packer, const Lengths& lengths) {
  one_dimensional(lengths);
  std::vector<int64_t> ids, offsets;
  {
    py::gil_scoped_release release;
    packer.plan(lengths.data(), lengths.size(), ids, offsets);
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
           "Append sequences; the id of each is the number of sequences added before it. If a length is outside "
           "1 .. max_tokens, append none and raise ValueError.")
      .def("next", &BestFitPacker::next, py::arg("flush") = false,
           "Return the ids of one batch per rank. Return None if no sequence is pending, or if fewer than "
           "`window` are and `flush` is False.")
      .def("pending", &BestFitPacker::pending, "Return (id, length) of every pending sequence, oldest first.")
      .def("state", &state, "Return the packer's state as plain ints and lists, for restore().")
      .def(
          "restore",
          [](BestFitPacker& packer, const py::dict& saved) {
            packer.restore(saved["next_id"].cast<int64_t>(),
                           saved["pending"].cast<BestFitPacker::Pending>());
          },
          py::arg("state"), "Resume from a saved state(). Raise ValueError if it is not valid for this packer.")
      .def("plan", &plan, py::arg("lengths"),
           "Return (ids, offsets) of the batches of an entire int64 array, `ranks` batches per step: batch b is "
           "ids[offsets[b]:offsets[b + 1]]. Does not change the packer.")
      .def("__len__", &BestFitPacker::pending_count);

  m.def("cpu_features", &cpu_features,
        "Return the instruction sets of this CPU; empty on architectures other than x86-64.");
}
