// The schema of every torch operator of cat_fast. Implementations register themselves, one folder an operator.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cat_fast, m) {
  // -> y, and the mean and rstd of each group (N, groups) in fp32, which backward takes
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation)"
      " -> (Tensor, Tensor, Tensor)");
  // -> the gradients of x, weight and bias
  m.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
      " int groups, bool activation) -> (Tensor, Tensor, Tensor)");
  m.def("scalar_attention(Tensor q, Tensor k, Tensor v) -> Tensor");
  // -> the gradients of q, k and v
  m.def("scalar_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)");
}
