// The schemas of all torch operators of cat_fast. Implementations register themselves, one folder per operator.

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/instruction_set.h"

STABLE_TORCH_LIBRARY(cat_fast, m) {
  // -> y, and the mean and rstd of each group (N, groups) in fp32, for backward
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation)"
      " -> (Tensor, Tensor, Tensor)");
  // -> the gradients of x, weight and bias
  m.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
      " int groups, bool activation) -> (Tensor, Tensor, Tensor)");
  // The same of x + input_bias, on CUDA only -> y, center, rstd and deviation, as in group_norm_silu/cuda.h
  m.def(
      "group_norm_silu_biased(Tensor x, Tensor weight, Tensor bias, Tensor input_bias, int groups, float eps,"
      " bool activation) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> the gradients of x, weight, bias and input_bias
  m.def(
      "group_norm_silu_biased_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor input_bias,"
      " Tensor center, Tensor rstd, Tensor deviation, int groups, bool activation)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("scalar_attention(Tensor q, Tensor k, Tensor v) -> Tensor");
  // -> the gradients of q, k and v
  m.def("scalar_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)");
  // -> y, and the mean and rstd of each token (T,) in fp32, for backward
  m.def("adaln(Tensor x, Tensor shift, Tensor scale, Tensor cu_seqlens, float eps) -> (Tensor, Tensor, Tensor)");
  // -> the gradients of x, shift and scale
  m.def(
      "adaln_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor cu_seqlens, Tensor mean, Tensor rstd)"
      " -> (Tensor, Tensor, Tensor)");
  // -> x_new, y, and the mean and rstd of each token of x_new
  m.def(
      "gate_residual_adaln(Tensor x, Tensor h, Tensor gate, Tensor shift, Tensor scale, Tensor cu_seqlens, float eps)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // -> the gradients of x, h, gate, shift and scale
  m.def(
      "gate_residual_adaln_backward(Tensor grad_x_new, Tensor grad_y, Tensor x_new, Tensor h, Tensor gate,"
      " Tensor scale, Tensor cu_seqlens, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> out (T, H, D), and lse (H, T) in fp32, the logarithm of each softmax denominator, for backward
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_k) -> (Tensor, Tensor)");
  // -> the gradients of q, k and v
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " Tensor cu_seqlens, SymInt max_seqlen, Tensor cu_seqlens_k, SymInt max_seqlen_k) -> (Tensor, Tensor, Tensor)");
  m.def("pack(Tensor[] latents, int patch_size) -> Tensor");
  // grids are h0, w0, h1, w1 and so on, in patches
  m.def("unpack(Tensor tokens, SymInt[] grids, int patch_size) -> Tensor[]");
  // -> the instruction set of the CPU kernels: "default", "avx2" or "avx512"
  m.def("instruction_set() -> str");
}

namespace {

std::string instruction_set_in_use() { return cat_fast::name_of(cat_fast::kInstructionSet); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_in_use));
}
