// Launches the CUDA kernels of GroupNorm + SiLU. Independent of torch; also compiles against the thread emulation.

#include "group_norm_silu/cuda.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "group_norm_silu/kernels.cuh"

namespace cat_fast::group_norm_silu {
namespace {

// Grid and thread layout of the kernels that process tiles.
struct Tiling {
  dim3 grid;
  int columns;  // threads side by side over channels (channels-last)
};

template <int V>
Tiling tiling(const Shape& shape) {
  if (!shape.channels_last) return {dim3(shape.chunks, shape.channels, shape.samples), 1};
  const int64_t packs = shape.channels / V;
  const int64_t columns = std::min<int64_t>(packs, kThreads);
  return {dim3(shape.chunks, (packs + columns - 1) / columns, shape.samples), static_cast<int>(columns)};
}

template <typename T, int V, bool kChannelsLast, bool kActivation>
void forward(const Shape& shape, const T* x, const Parameters& parameters, const float* input_bias, float eps, T* y,
             const Statistics& statistics, float* workspace, cudaStream_t stream) {
  const auto [grid, columns] = tiling<V>(shape);
  float *means = workspace, *squares = workspace + shape.partials();
  launch(partial_moments<T, V, kChannelsLast>, grid, kThreads, stream, shape, columns, x, means, squares);
  launch(combine_moments, dim3(shape.groups, shape.samples), kThreads, stream, shape, means, squares, input_bias,
         eps, statistics);
  launch(normalize<T, V, kChannelsLast, kActivation>, grid, kThreads, stream, shape, columns, x, parameters,
         statistics, y);
}

template <typename T, int V, bool kChannelsLast, bool kActivation>
void backward(const Shape& shape, const T* dy, const T* x, const Parameters& parameters, const Statistics& statistics,
              T* dx, const Gradients& gradients, float* workspace, cudaStream_t stream) {
  const auto [grid, columns] = tiling<V>(shape);
  float *sums_dz = workspace, *sums_dz_distance = sums_dz + shape.partials();
  float *mean_dz = sums_dz_distance + shape.partials(), *mean_dz_xhat = mean_dz + shape.samples * shape.groups;
  launch(partial_gradients<T, V, kChannelsLast, kActivation>, grid, kThreads, stream, shape, columns, dy, x,
         parameters, statistics, sums_dz, sums_dz_distance);
  launch(combine_group_gradients, dim3(shape.groups, shape.samples), kThreads, stream, shape, sums_dz, sums_dz_distance,
         parameters.weight, statistics.rstd, mean_dz, mean_dz_xhat);
  launch(combine_channel_gradients, dim3(shape.channels), kThreads, stream, shape, sums_dz, sums_dz_distance,
         parameters.weight, statistics, mean_dz, mean_dz_xhat, gradients);
  launch(input_gradient<T, V, kChannelsLast, kActivation>, grid, kThreads, stream, shape, columns, dy, x, parameters,
         statistics, mean_dz, mean_dz_xhat, dx);
}

// Calls f.operator()<T, V, kChannelsLast, kActivation>(). V is 16 bytes of elements if every pack is within one
// tile and at an aligned address, 1 otherwise.
template <typename F>
void dispatch(Dtype dtype, const Shape& shape, bool activation, std::initializer_list<const void*> tensors,
              const F& f) {
  const auto with_flags = [&]<typename T, int V>() {
    if (shape.channels_last) {
      activation ? f.template operator()<T, V, true, true>() : f.template operator()<T, V, true, false>();
    } else {
      activation ? f.template operator()<T, V, false, true>() : f.template operator()<T, V, false, false>();
    }
  };
  const auto with_width = [&]<typename T>() {
    constexpr int kWide = 16 / sizeof(T);
    const int64_t run = shape.channels_last ? shape.channels : shape.spatial;
    const bool aligned = std::all_of(tensors.begin(), tensors.end(), [](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    });
    if (aligned && run % kWide == 0) {
      with_flags.template operator()<T, kWide>();
    } else {
      with_flags.template operator()<T, 1>();
    }
  };
  switch (dtype) {
    case Dtype::kFloat: return with_width.template operator()<float>();
    case Dtype::kBFloat16: return with_width.template operator()<BFloat16>();
    case Dtype::kFloat16: return with_width.template operator()<Float16>();
  }
}

}  // namespace

void forward_cuda(Dtype dtype, const Shape& shape, const void* x, const Parameters& parameters,
                  const float* input_bias, float eps, bool activation, void* y, const Statistics& statistics,
                  float* workspace, void* stream) {
  dispatch(dtype, shape, activation, {x, y}, [&]<typename T, int V, bool kChannelsLast, bool kActivation>() {
    forward<T, V, kChannelsLast, kActivation>(shape, static_cast<const T*>(x), parameters, input_bias, eps,
                                              static_cast<T*>(y), statistics, workspace,
                                              static_cast<cudaStream_t>(stream));
  });
}

void backward_cuda(Dtype dtype, const Shape& shape, const void* dy, const void* x, const Parameters& parameters,
                   const Statistics& statistics, bool activation, void* dx, const Gradients& gradients,
                   float* workspace, void* stream) {
  dispatch(dtype, shape, activation, {dy, x, dx}, [&]<typename T, int V, bool kChannelsLast, bool kActivation>() {
    backward<T, V, kChannelsLast, kActivation>(shape, static_cast<const T*>(dy), static_cast<const T*>(x), parameters,
                                               statistics, static_cast<T*>(dx), gradients, workspace,
                                               static_cast<cudaStream_t>(stream));
  });
}

}  // namespace cat_fast::group_norm_silu
