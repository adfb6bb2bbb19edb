// GroupNorm + SiLU on CUDA: raw pointers and a stream, no torch types.
#pragma once

#include "group_norm_silu/shape.h"

namespace cat_fast::group_norm_silu {

enum class Dtype { kFloat, kBFloat16, kFloat16 };

// Number of elements per partial sum of the CUDA kernels.
constexpr int64_t kCudaChunkElements = 16384;

// Returns the floats of scratch memory that one call needs.
inline int64_t workspace_size(const Shape& shape) { return 2 * shape.partials() + 2 * shape.samples * shape.groups; }

// The parameters, (C,) fp32.
struct Parameters {
  const float *weight, *bias;
};

// In fp32. rstd: (N, groups). center: the mean of each group, (N, groups); with input_bias, (N, C): that of the
// channel's group, minus input_bias. deviation: null; with input_bias, (N, C): the mean of each channel minus that of
// its group.
struct Statistics {
  float *center, *rstd, *deviation;

  CAT_FAST_HOST_DEVICE bool per_channel() const { return deviation != nullptr; }
};

// The gradients of the parameters, (C,) fp32; dinput_bias is null without input_bias.
struct Gradients {
  float *dweight, *dbias, *dinput_bias;
};

// x, y: `dtype`, in the memory order of `shape`. input_bias, (C,) fp32, is added to x; it may be null.
void forward_cuda(Dtype dtype, const Shape& shape, const void* x, const Parameters& parameters,
                  const float* input_bias, float eps, bool activation, void* y, const Statistics& statistics,
                  float* workspace, void* stream);

// dy, dx like x.
void backward_cuda(Dtype dtype, const Shape& shape, const void* dy, const void* x, const Parameters& parameters,
                   const Statistics& statistics, bool activation, void* dx, const Gradients& gradients,
                   float* workspace, void* stream);

}  // namespace cat_fast::group_norm_silu
