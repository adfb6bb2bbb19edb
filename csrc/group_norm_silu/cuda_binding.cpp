// Binds the CUDA kernels of GroupNorm + SiLU to torch through its stable ABI.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "group_norm_silu/arguments.h"
#include "group_norm_silu/cuda.h"

namespace cat_fast::group_norm_silu {
namespace {

Shape cuda_shape_of(const Tensor& x, int64_t groups) {
  constexpr int64_t kGridLimit = 65535;  // of the grid dimensions that hold samples and channels
  const Shape shape = shape_of(x, groups, kCudaChunkElements);
  STD_TORCH_CHECK(shape.samples <= kGridLimit && shape.channels <= kGridLimit,
                  "group_norm_silu on CUDA: expected at most 65535 samples and 65535 channels, got ", shape.samples,
                  " and ", shape.channels);
  return shape;
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "group_norm_silu on CUDA: expected float32, bfloat16 or float16");
  }
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor workspace_for(const Tensor& x, const Shape& shape) {
  const int64_t size = workspace_size(shape);
  return torch::stable::new_empty(x, {&size, 1}, ScalarType::Float);
}

float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr<float>() : nullptr;
}

// Returns y, center, rstd and, with input_bias, the deviation; see Statistics.
std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> forward(const Tensor& x, const Tensor& weight,
                                                                  const Tensor& bias,
                                                                  const std::optional<Tensor>& input_bias,
                                                                  int64_t groups, double eps, bool activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = cuda_shape_of(x, groups);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  std::optional<Tensor> input_bias_float, deviation;
  if (input_bias) {
    input_bias_float = as_float(*input_bias, shape);
    deviation = float_result(x, shape, {shape.samples, shape.channels});
  }
  Tensor y = torch::stable::empty_like(x);
  Tensor center = float_result(x, shape, {shape.samples, input_bias ? shape.channels : groups});
  Tensor rstd = float_result(x, shape, {shape.samples, groups});
  if (shape.empty()) return {y, center, rstd, deviation};
  const Tensor workspace = workspace_for(x, shape);
  forward_cuda(dtype_of(x), shape, x.const_data_ptr(),
               {weight_float.const_data_ptr<float>(), bias_float.const_data_ptr<float>()},
               data_or_null(input_bias_float), static_cast<float>(eps), activation, y.mutable_data_ptr(),
               {data_or_null(center), data_or_null(rstd), data_or_null(deviation)}, data_or_null(workspace),
               current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, center, rstd, deviation};
}

// Returns the gradients of x, weight, bias and, if there is one, input_bias.
std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>> backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& input_bias, const Tensor& center, const Tensor& rstd,
    const std::optional<Tensor>& deviation, int64_t groups, bool activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = cuda_shape_of(x, groups);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  const Tensor dy = in_order_of(x, grad_y);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = float_result(x, shape, {shape.channels}), dbias = float_result(x, shape, {shape.channels});
  std::optional<Tensor> dinput_bias;
  if (input_bias) dinput_bias = float_result(x, shape, {shape.channels});
  if (!shape.empty()) {
    const Tensor workspace = workspace_for(x, shape);
    backward_cuda(dtype_of(x), shape, dy.const_data_ptr(), x.const_data_ptr(),
                  {weight_float.const_data_ptr<float>(), bias_float.const_data_ptr<float>()},
                  {data_or_null(center), data_or_null(rstd), data_or_null(deviation)}, activation,
                  dx.mutable_data_ptr(), {data_or_null(dweight), data_or_null(dbias), data_or_null(dinput_bias)},
                  data_or_null(workspace), current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (input_bias) dinput_bias = torch::stable::to(*dinput_bias, input_bias->scalar_type());
  return {dx, torch::stable::to(dweight, weight.scalar_type()), torch::stable::to(dbias, bias.scalar_type()),
          dinput_bias};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cuda(Tensor x, Tensor weight, Tensor bias, int64_t groups,
                                                        double eps, bool activation) {
  const auto [y, mean, rstd, deviation] = forward(x, weight, bias, std::nullopt, groups, eps, activation);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(Tensor grad_y, Tensor x, Tensor weight, Tensor bias,
                                                                 Tensor mean, Tensor rstd, int64_t groups,
                                                                 bool activation) {
  const auto [dx, dweight, dbias, dinput_bias] =
      backward(grad_y, x, weight, bias, std::nullopt, mean, rstd, std::nullopt, groups, activation);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_biased_cuda(Tensor x, Tensor weight, Tensor bias,
                                                                       Tensor input_bias, int64_t groups, double eps,
                                                                       bool activation) {
  const auto [y, center, rstd, deviation] = forward(x, weight, bias, input_bias, groups, eps, activation);
  return {y, center, rstd, *deviation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_biased_backward_cuda(
    Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor input_bias, Tensor center, Tensor rstd,
    Tensor deviation, int64_t groups, bool activation) {
  const auto [dx, dweight, dbias, dinput_bias] =
      backward(grad_y, x, weight, bias, input_bias, center, rstd, deviation, groups, activation);
  return {dx, dweight, dbias, *dinput_bias};
}

}  // namespace
}  // namespace cat_fast::group_norm_silu

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_backward_cuda));
  m.impl("group_norm_silu_biased", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_biased_cuda));
  m.impl("group_norm_silu_biased_backward",
         TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_biased_backward_cuda));
}
