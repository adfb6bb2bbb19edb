// Checks of the operator's tensors, for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "scalar_attention/shape.h"

namespace cat_fast::scalar_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3, "scalar_attention: expected q of shape (B, N, H), got ", q.dim(), " dimensions");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k.size(dim) == q.size(dim) && v.size(dim) == q.size(dim),
                    "scalar_attention: expected q, k and v of one shape");
  }
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "scalar_attention: expected q, k and v of one dtype");
  return {q.size(0), q.size(1), q.size(2)};
}

}  // namespace cat_fast::scalar_attention
