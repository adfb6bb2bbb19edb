// GroupNorm + SiLU on CUDA: raw pointers and a stream, no torch types.
#pragma once

#include "group_norm_silu/shape.h"

namespace cat_fast::group_norm_silu {

enum class Dtype { kFloat, kBFloat16, kFloat16 };

// Number of elements per partial sum of the CUDA kernels.
constexpr int64_t kCudaChunkElements = 16384;

// Returns the floats of scratch memory that one call needs.
inline int64_t workspace_size(const Shape& shape) { return 2 * shape.partials() + 2 * shape.samples * shape.groups; }

// x, y: `dtype`, in the memory order of `shape`; weight, bias: (C,) fp32; mean, rstd: (N, groups) fp32.
void forward_cuda(Dtype dtype, const Shape& shape, const void* x, const float* weight, const float* bias, float eps,
                  bool activation, void* y, float* mean, float* rstd, float* workspace, void* stream);

// dy, dx like x; dweight, dbias: (C,) fp32.
void backward_cuda(Dtype dtype, const Shape& shape, const void* dy, const void* x, const float* weight,
                   const float* bias, const float* mean, const float* rstd, bool activation, void* dx, float* dweight,
                   float* dbias, float* workspace, void* stream);

}  // namespace cat_fast::group_norm_silu
