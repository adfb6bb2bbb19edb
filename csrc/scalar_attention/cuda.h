// Attention with head dimension 1 on CUDA: raw pointers and a stream, no torch types.
#pragma once

#include "scalar_attention/shape.h"

namespace cat_fast::scalar_attention {

enum class Dtype { kFloat, kBFloat16, kFloat16 };

// Returns the floats of scratch memory that one call needs: at most 128 MiB, unless one sample needs more.
int64_t workspace_size(const Shape& shape, bool backward);

// All tensors: `dtype`, (B, N, H).
void forward_cuda(Dtype dtype, const Shape& shape, const void* q, const void* k, const void* v, void* y,
                  float* workspace, void* stream);
void backward_cuda(Dtype dtype, const Shape& shape, const void* dy, const void* q, const void* k, const void* v,
                   void* dq, void* dk, void* dv, float* workspace, void* stream);

}  // namespace cat_fast::scalar_attention
