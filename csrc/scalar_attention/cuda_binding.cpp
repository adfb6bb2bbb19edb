// Binds the CUDA kernels of attention with head dimension 1 to torch through its stable ABI.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "scalar_attention/arguments.h"
#include "scalar_attention/cuda.h"

namespace cat_fast::scalar_attention {
namespace {

Shape cuda_shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  constexpr int64_t kGridLimit = 65535;  // of the grid dimensions that hold samples and groups of heads
  const Shape shape = shape_of(q, k, v);
  STD_TORCH_CHECK(shape.batch <= kGridLimit && shape.heads <= 8 * kGridLimit,
                  "scalar_attention on CUDA: expected at most 65535 samples and 524280 heads, got ", shape.batch,
                  " and ", shape.heads);
  return shape;
}

Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(q.scalar_type() == ScalarType::Half,
                      "scalar_attention on CUDA: expected float32, bfloat16 or float16");
      return Dtype::kFloat16;
  }
}

void* current_stream(const Tensor& q) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  return stream;
}

Tensor workspace_for(const Tensor& q, const Shape& shape, bool backward) {
  const int64_t size = workspace_size(shape, backward);
  return torch::stable::new_empty(q, {&size, 1}, ScalarType::Float);
}

Tensor scalar_attention_cuda(Tensor q_given, Tensor k_given, Tensor v_given) {
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const Shape shape = cuda_shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given);
  Tensor y = torch::stable::empty_like(q);
  if (shape.empty()) return y;
  const Tensor workspace = workspace_for(q, shape, false);
  forward_cuda(dtype_of(q), shape, q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), y.mutable_data_ptr(),
               workspace.mutable_data_ptr<float>(), current_stream(q));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scalar_attention_backward_cuda(Tensor grad_y, Tensor q_given, Tensor k_given,
                                                                  Tensor v_given) {
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const Shape shape = cuda_shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given), dy = torch::stable::contiguous(grad_y);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  if (shape.empty()) return {dq, dk, dv};
  const Tensor workspace = workspace_for(q, shape, true);
  backward_cuda(dtype_of(q), shape, dy.const_data_ptr(), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
                dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
                workspace.mutable_data_ptr<float>(), current_stream(q));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dq, dk, dv};
}

}  // namespace
}  // namespace cat_fast::scalar_attention

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CUDA, m) {
  m.impl("scalar_attention", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_cuda));
  m.impl("scalar_attention_backward", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_backward_cuda));
}
