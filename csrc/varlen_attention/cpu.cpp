// Attention over packed sequences on the CPU in fp32, bf16 and fp16, with all arithmetic in fp32.
//
// Scores exist only in tiles of 64 keys x 32 queries. The products are register-blocked loops over packed tiles
// (tiles.h); packing also converts to fp32, so all dtypes share them. Each work item is computed by one thread in a
// fixed order, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "varlen_attention/backward.h"
#include "varlen_attention/forward.h"

namespace cat_fast::varlen_attention {
namespace {

template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    f.template operator()<BFloat16>();
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half,
                    "varlen_attention on the CPU: expected float32, bfloat16 or float16");
    f.template operator()<Float16>();
  }
}

Tensor results_like(const Tensor& tensor, const Problem& problem) {
  Tensor results = torch::stable::new_empty(tensor, {tensor.size(0), problem.heads, problem.dim});
  if (problem.gaps) torch::stable::zero_(results);
  return results;
}

std::tuple<Tensor, Tensor> varlen_attention_cpu(Tensor q_given, Tensor k_given, Tensor v_given, Tensor cu_seqlens,
                                                int64_t /*max_seqlen*/, Tensor cu_seqlens_k, int64_t /*max_seqlen_k*/) {
  const Problem problem = problem_of(q_given, k_given, v_given, cu_seqlens, cu_seqlens_k);
  const Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  Tensor out = results_like(q, problem);
  Tensor lse = torch::stable::new_empty(q, {problem.heads, problem.tokens}, ScalarType::Float);
  if (problem.gaps) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  dispatch(q.scalar_type(), [&]<typename T>() {
    const ForwardTensors<T> tensors{view_of<T>(q), view_of<T>(k), view_of<T>(v), mutable_view_of<T>(out),
                                    lse.mutable_data_ptr<float>()};
    share(problem, items_of(problem, kItemQueries), [&] { return Forward<T>(problem, tensors); });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward_cpu(Tensor grad_out_given, Tensor q_given, Tensor k_given,
                                                                 Tensor v_given, Tensor out_given, Tensor lse_given,
                                                                 Tensor cu_seqlens, int64_t /*max_seqlen*/,
                                                                 Tensor cu_seqlens_k, int64_t /*max_seqlen_k*/) {
  const Problem problem = problem_of(q_given, k_given, v_given, cu_seqlens, cu_seqlens_k);
  for (const Tensor& given : {grad_out_given, out_given}) {
    STD_TORCH_CHECK(given.dim() == 3 && given.size(0) == problem.tokens && given.size(1) == problem.heads &&
                        given.size(2) == problem.dim && given.scalar_type() == q_given.scalar_type(),
                    "varlen_attention_backward: expected grad_out and out with the shape and dtype of q");
  }
  STD_TORCH_CHECK(lse_given.dim() == 2 && lse_given.size(0) == problem.heads && lse_given.size(1) == problem.tokens,
                  "varlen_attention_backward: expected lse of shape (H, T)");
  const Tensor q = unit_stride(q_given), k = unit_stride(k_given), v = unit_stride(v_given);
  const Tensor grad_out = unit_stride(grad_out_given), out = unit_stride(out_given);
  const Tensor lse = torch::stable::contiguous(lse_given);
  Tensor dq = results_like(q, problem), dk = results_like(k, problem), dv = results_like(v, problem);
  dispatch(q.scalar_type(), [&]<typename T>() {
    const BackwardTensors<T> tensors{view_of<T>(grad_out), view_of<T>(q),   view_of<T>(k),
                                     view_of<T>(v),        view_of<T>(out), lse.const_data_ptr<float>(),
                                     mutable_view_of<T>(dq), mutable_view_of<T>(dk), mutable_view_of<T>(dv)};
    share(problem, items_of(problem, std::max<int64_t>(problem.longest, 1)),
          [&] { return Backward<T>(problem, tensors); });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace cat_fast::varlen_attention

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&cat_fast::varlen_attention::varlen_attention_cpu));
  m.impl("varlen_attention_backward", TORCH_BOX(&cat_fast::varlen_attention::varlen_attention_backward_cpu));
}
