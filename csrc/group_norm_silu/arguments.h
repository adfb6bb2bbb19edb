// Checks and conversions of the operator's tensors, for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "group_norm_silu/shape.h"

namespace cat_fast::group_norm_silu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.stride(1) != 1) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return x.size(0) == 1 || x.stride(0) == expected;
}

// Returns the shape of x, with chunks of at least `chunk_elements` elements (of all channels together in
// channels-last memory).
inline Shape shape_of(const Tensor& x, int64_t groups, int64_t chunk_elements) {
  STD_TORCH_CHECK(x.dim() >= 2, "group_norm_silu: expected x of shape (N, C, *spatial), got ", x.dim(), " dimensions");
  Shape shape{x.size(0), x.size(1), 1, groups, false, 1, 1};
  for (int64_t dim = 2; dim < x.dim(); ++dim) shape.spatial *= x.size(dim);
  STD_TORCH_CHECK(groups > 0 && shape.channels % groups == 0, "group_norm_silu: ", shape.channels,
                  " channels do not divide into ", groups, " groups");
  if (!shape.empty() && !x.is_contiguous()) {
    STD_TORCH_CHECK(is_channels_last(x), "group_norm_silu: expected contiguous or channels-last x");
    shape.channels_last = true;
  }
  shape.chunk = shape.channels_last ? std::max<int64_t>(1, chunk_elements / shape.channels) : chunk_elements;
  shape.chunks = (shape.spatial + shape.chunk - 1) / shape.chunk;
  return shape;
}

// Converts weight or bias to contiguous fp32.
inline Tensor as_float(const Tensor& parameter, const Shape& shape) {
  STD_TORCH_CHECK(parameter.numel() == shape.channels, "group_norm_silu: expected weight and bias with ",
                  shape.channels, " elements, one per channel, got ", parameter.numel());
  if (parameter.scalar_type() == ScalarType::Float && parameter.is_contiguous()) return parameter;
  return torch::stable::contiguous(torch::stable::to(parameter, ScalarType::Float));
}

// Returns grad_y in the memory order of x; autograd may pass it in another.
inline Tensor in_order_of(const Tensor& x, const Tensor& grad_y) {
  bool same = true;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    same = same && (x.size(dim) == 1 || x.stride(dim) == grad_y.stride(dim));
  }
  if (same) return grad_y;
  Tensor reordered = torch::stable::empty_like(x);
  return torch::stable::copy_(reordered, grad_y);
}

// Allocates an fp32 result, zeroed if shape is empty, since the kernels do not run then.
inline Tensor float_result(const Tensor& like, const Shape& shape, std::initializer_list<int64_t> sizes) {
  return shape.empty() ? torch::stable::new_zeros(like, {sizes.begin(), sizes.size()}, ScalarType::Float)
                       : torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

}  // namespace cat_fast::group_norm_silu
