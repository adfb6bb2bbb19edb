// Binds the CUDA kernels of GroupNorm + SiLU to torch through its stable ABI.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

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

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cuda(Tensor x, Tensor weight, Tensor bias, int64_t groups,
                                                        double eps, bool activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = cuda_shape_of(x, groups);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = float_result(x, shape, {shape.samples, groups});
  Tensor rstd = float_result(x, shape, {shape.samples, groups});
  if (shape.empty()) return {y, mean, rstd};
  const Tensor workspace = workspace_for(x, shape);
  forward_cuda(dtype_of(x), shape, x.const_data_ptr(), weight_float.const_data_ptr<float>(),
               bias_float.const_data_ptr<float>(), static_cast<float>(eps), activation, y.mutable_data_ptr(),
               mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
               current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(Tensor grad_y, Tensor x, Tensor weight, Tensor bias,
                                                                 Tensor mean, Tensor rstd, int64_t groups,
                                                                 bool activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape shape = cuda_shape_of(x, groups);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  const Tensor dy = in_order_of(x, grad_y);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = float_result(x, shape, {shape.channels}), dbias = float_result(x, shape, {shape.channels});
  if (!shape.empty()) {
    const Tensor workspace = workspace_for(x, shape);
    backward_cuda(dtype_of(x), shape, dy.const_data_ptr(), x.const_data_ptr(), weight_float.const_data_ptr<float>(),
                  bias_float.const_data_ptr<float>(), mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                  activation, dx.mutable_data_ptr(), dweight.mutable_data_ptr<float>(),
                  dbias.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {dx, torch::stable::to(dweight, weight.scalar_type()), torch::stable::to(dbias, bias.scalar_type())};
}

}  // namespace
}  // namespace cat_fast::group_norm_silu

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_backward_cuda));
}
