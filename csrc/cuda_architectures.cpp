#include <torch/csrc/stable/library.h>

#include <string>

// Which GPUs the kernels of this library run on is decided when it is built; setup.py defines the list.
STABLE_TORCH_LIBRARY_FRAGMENT(cat_fast, m) {
  // -> the architectures of the CUDA kernels, in the form of TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX"
  m.def("cuda_architectures() -> str");
}

namespace {

std::string cuda_architectures() { return CAT_FAST_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
