// The CUDA kernels of GroupNorm + SiLU.
//
// A block processes a tile: one chunk of positions, of one channel in contiguous memory or of `columns` * V
// adjacent channels in channels-last memory. A thread reads V elements at once (16 bytes if alignment permits).
// Partial results are stored at [n][chunk][channel] and added in a fixed order, without atomics, so results are
// deterministic. Names and formulas are those of rows.h.
//
// With input_bias, means and distances are those of x + input_bias. x is loaded as it is: the partial means are
// shifted before they are combined, and distance = x - center, where center = mean - input_bias.
#pragma once

#include "common/bfloat16.h"
#include "common/float16.h"
#include "common/launch.cuh"
#include "group_norm_silu/cuda.h"
#include "group_norm_silu/shape.h"

namespace cat_fast::group_norm_silu {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // minimum per multiprocessor: half of its capacity

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* pointer) {
  return *reinterpret_cast<const Pack<T, V>*>(pointer);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* pointer, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(pointer) = pack;
}

// Returns the sum of `value` over the block, in every thread.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warps[kThreads / 32];
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  __syncthreads();  // all threads have read the previous call's values
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (float warp : warps) total += warp;
  return total;
}

// The elements that a thread processes: `count` packs of V elements at first, first + stride, ...
struct Walk {
  int64_t first;
  int stride, count;
  int channel;      // the first of the thread's V channels (channels-last), or the tile's only channel
  int row, column;  // of the thread in the block, which has rows of `columns` threads (channels-last)

  // Returns the index of the partial result of `channel`.
  __device__ __forceinline__ int64_t partial(const Shape& shape) const {
    return (blockIdx.z * shape.chunks + blockIdx.x) * shape.channels + channel;
  }
};

// grid: (chunks, channels or column tiles, samples)
template <int V, bool kChannelsLast>
__device__ __forceinline__ Walk walk(const Shape& shape, int columns) {
  const int64_t k = blockIdx.x, n = blockIdx.z;
  const int positions = static_cast<int>(shape.positions(k));
  Walk w;
  if (kChannelsLast) {
    w.row = threadIdx.x / columns;
    w.column = threadIdx.x % columns;
    w.channel = (blockIdx.y * columns + w.column) * V;
    const int rows = kThreads / columns;
    const bool active = w.row < rows && w.channel < shape.channels;
    w.first = (n * shape.spatial + k * shape.chunk + w.row) * shape.channels + w.channel;
    w.stride = rows * static_cast<int>(shape.channels);
    w.count = active ? (positions - w.row + rows - 1) / rows : 0;
    if (w.count < 0) w.count = 0;
  } else {
    w.row = w.column = 0;
    w.channel = blockIdx.y;
    w.first = (n * shape.channels + w.channel) * shape.spatial + k * shape.chunk + threadIdx.x * V;
    w.stride = kThreads * V;
    const int remaining = positions - static_cast<int>(threadIdx.x) * V;
    w.count = remaining > 0 ? (remaining + kThreads * V - 1) / (kThreads * V) : 0;
  }
  return w;
}

// Adds up sums[V] over the tile. In contiguous memory, over all threads and elements: every sums[j] becomes the
// total. In channels-last memory, over the rows of threads, per channel.
template <int V, bool kChannelsLast>
__device__ __forceinline__ void tile_sum(float (&sums)[V], const Walk& w, int columns) {
  if (!kChannelsLast) {
    float total = 0;
    for (int j = 0; j < V; ++j) total += sums[j];
    total = block_sum(total);
    for (int j = 0; j < V; ++j) sums[j] = total;
    return;
  }
  __shared__ float shared[kThreads * V];
  __syncthreads();
  for (int j = 0; j < V; ++j) shared[threadIdx.x * V + j] = sums[j];
  __syncthreads();
  for (int j = 0; j < V; ++j) sums[j] = 0;
  for (int row = 0; row < kThreads / columns; ++row) {
    for (int j = 0; j < V; ++j) sums[j] += shared[(row * columns + w.column) * V + j];
  }
}

// Returns the number of partial results of the tile that this thread writes.
template <int V, bool kChannelsLast>
__device__ __forceinline__ int results(const Shape& shape, const Walk& w) {
  if (!kChannelsLast) return threadIdx.x == 0 ? 1 : 0;
  return w.row == 0 && w.channel < shape.channels ? V : 0;
}

// Computes the mean and the sum of squared distances from it, of every channel of the tile.
template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    partial_moments(Shape shape, int columns, const T* x, float* means, float* squares) {
  const Walk w = walk<V, kChannelsLast>(shape, columns);
  float mean[V] = {};
  int64_t offset = w.first;
  for (int i = w.count; i > 0; --i, offset += w.stride) {
    const auto values = load<V>(x + offset);
    for (int j = 0; j < V; ++j) mean[j] += to_float(values.values[j]);
  }
  tile_sum<V, kChannelsLast>(mean, w, columns);
  for (int j = 0; j < V; ++j) mean[j] /= static_cast<float>(shape.positions(blockIdx.x));
  float square[V] = {};
  offset = w.first;
  for (int i = w.count; i > 0; --i, offset += w.stride) {
    const auto values = load<V>(x + offset);
    for (int j = 0; j < V; ++j) {
      const float distance = to_float(values.values[j]) - mean[j];
      square[j] += distance * distance;
    }
  }
  tile_sum<V, kChannelsLast>(square, w, columns);
  for (int j = 0; j < results<V, kChannelsLast>(shape, w); ++j) {
    means[w.partial(shape) + j] = mean[j];
    squares[w.partial(shape) + j] = square[j];
  }
}

// Calls term(partial index, channel, positions) for this thread's share of a group's partial results.
template <typename Term>
__device__ __forceinline__ void over_group(const Shape& shape, int64_t n, int64_t g, const Term& term) {
  const unsigned per_group = static_cast<unsigned>(shape.channels) / static_cast<unsigned>(shape.groups);
  const unsigned count = static_cast<unsigned>(shape.chunks) * per_group;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const int64_t k = i / per_group, c = g * per_group + i % per_group;
    term((n * shape.chunks + k) * shape.channels + c, c, static_cast<float>(shape.positions(k)));
  }
}

// Returns element c of input_bias, 0 if there is none.
__device__ __forceinline__ float input_bias_at(const float* input_bias, int64_t c) {
  return input_bias == nullptr ? 0.0f : input_bias[c];
}

// grid: (groups, samples)
__global__ void __launch_bounds__(kThreads)
    combine_moments(Shape shape, const float* means, const float* squares, const float* input_bias, float eps,
                    Statistics statistics) {
  const int64_t g = blockIdx.x, n = blockIdx.y;
  const float size = static_cast<float>(shape.group_size());
  float sum = 0;
  over_group(shape, n, g, [&](int64_t i, int64_t c, float count) {
    sum += (means[i] + input_bias_at(input_bias, c)) * (count / size);
  });
  const float group_mean = block_sum(sum);
  float square = 0;
  over_group(shape, n, g, [&](int64_t i, int64_t c, float count) {
    const float distance = means[i] + input_bias_at(input_bias, c) - group_mean;
    square += squares[i] + count * distance * distance;
  });
  const float variance = block_sum(square) / size;
  if (threadIdx.x == 0) statistics.rstd[n * shape.groups + g] = 1.0f / sqrtf(variance + eps);
  if (!statistics.per_channel()) {
    if (threadIdx.x == 0) statistics.center[n * shape.groups + g] = group_mean;
    return;
  }
  for (int64_t c = g * shape.channels_per_group(); c < (g + 1) * shape.channels_per_group(); ++c) {
    const float center = group_mean - input_bias_at(input_bias, c), positions = static_cast<float>(shape.spatial);
    float distance = 0;
    for (int64_t k = threadIdx.x; k < shape.chunks; k += kThreads) {
      const float mean = means[(n * shape.chunks + k) * shape.channels + c];
      distance += (mean - center) * (static_cast<float>(shape.positions(k)) / positions);
    }
    distance = block_sum(distance);
    if (threadIdx.x == 0) {
      statistics.center[n * shape.channels + c] = center;
      statistics.deviation[n * shape.channels + c] = distance;
    }
  }
}

// A thread's channel parameters in registers: with distance = x - center, z = scale * distance + bias.
template <int V>
struct Channels {
  float center[V], scale[V], bias[V];
};

// Returns a thread's j-th channel. Threads past the end are idle, and read the parameters of the first channels.
template <bool kChannelsLast>
__device__ __forceinline__ int channel_of(const Shape& shape, const Walk& w, int j) {
  const int first = w.channel < static_cast<int>(shape.channels) ? w.channel : 0;
  return kChannelsLast ? first + j : first;
}

// Returns the index in (N, groups) of the group of a thread's j-th channel.
template <bool kChannelsLast>
__device__ __forceinline__ unsigned group_of(const Shape& shape, const Walk& w, int j) {
  const int groups = static_cast<int>(shape.groups), per_group = static_cast<int>(shape.channels) / groups;
  return blockIdx.z * groups + channel_of<kChannelsLast>(shape, w, j) / per_group;
}

template <int V, bool kChannelsLast>
__device__ __forceinline__ Channels<V> channels_of(const Shape& shape, const Walk& w, const Parameters& parameters,
                                                   const Statistics& statistics) {
  const unsigned first = blockIdx.z * static_cast<unsigned>(shape.channels);
  Channels<V> result;
  for (int j = 0; j < V; ++j) {
    const int c = channel_of<kChannelsLast>(shape, w, j);
    const unsigned g = group_of<kChannelsLast>(shape, w, j);
    result.center[j] = statistics.center[statistics.per_channel() ? first + c : g];
    result.scale[j] = statistics.rstd[g] * parameters.weight[c];
    result.bias[j] = parameters.bias[c];
  }
  return result;
}

// Fast division avoids a subroutine call, which would spill registers.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

template <bool kActivation>
__device__ __forceinline__ float activation_gradient(float z) {
  if (!kActivation) return 1.0f;
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

template <typename T, int V, bool kChannelsLast, bool kActivation>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normalize(Shape shape, int columns, const T* x, Parameters parameters, Statistics statistics, T* y) {
  const Walk w = walk<V, kChannelsLast>(shape, columns);
  const auto channel = channels_of<V, kChannelsLast>(shape, w, parameters, statistics);
  int64_t offset = w.first;
  for (int i = w.count; i > 0; --i, offset += w.stride) {
    auto values = load<V>(x + offset);
    for (int j = 0; j < V; ++j) {
      const float z = (to_float(values.values[j]) - channel.center[j]) * channel.scale[j] + channel.bias[j];
      values.values[j] = from_float<T>(kActivation ? z * sigmoid(z) : z);
    }
    store<V>(y + offset, values);
  }
}

// Computes the sums of dz and of dz * distance; the latter times rstd is the sum of dz * xhat.
template <typename T, int V, bool kChannelsLast, bool kActivation>
__global__ void __launch_bounds__(kThreads, kBlocks)
    partial_gradients(Shape shape, int columns, const T* dy, const T* x, Parameters parameters, Statistics statistics,
                      float* sums_dz, float* sums_dz_distance) {
  const Walk w = walk<V, kChannelsLast>(shape, columns);
  const auto channel = channels_of<V, kChannelsLast>(shape, w, parameters, statistics);
  float sum_dz[V] = {}, sum_dz_distance[V] = {};
  int64_t offset = w.first;
  for (int i = w.count; i > 0; --i, offset += w.stride) {
    const auto values = load<V>(x + offset);
    const auto gradients = load<V>(dy + offset);
    for (int j = 0; j < V; ++j) {
      const float distance = to_float(values.values[j]) - channel.center[j];
      const float z = distance * channel.scale[j] + channel.bias[j];
      const float dz = to_float(gradients.values[j]) * activation_gradient<kActivation>(z);
      sum_dz[j] += dz;
      sum_dz_distance[j] += dz * distance;
    }
  }
  tile_sum<V, kChannelsLast>(sum_dz, w, columns);
  tile_sum<V, kChannelsLast>(sum_dz_distance, w, columns);
  for (int j = 0; j < results<V, kChannelsLast>(shape, w); ++j) {
    sums_dz[w.partial(shape) + j] = sum_dz[j];
    sums_dz_distance[w.partial(shape) + j] = sum_dz_distance[j];
  }
}

// Computes the means over each group that the input's gradient needs. grid: (groups, samples)
__global__ void __launch_bounds__(kThreads)
    combine_group_gradients(Shape shape, const float* sums_dz, const float* sums_dz_distance, const float* weight,
                            const float* rstd, float* mean_dz, float* mean_dz_xhat) {
  const int64_t g = blockIdx.x, n = blockIdx.y;
  float dz = 0, dz_distance = 0;
  over_group(shape, n, g, [&](int64_t i, int64_t c, float) {
    dz += weight[c] * sums_dz[i];
    dz_distance += weight[c] * sums_dz_distance[i];
  });
  dz = block_sum(dz);
  const float dz_xhat = block_sum(dz_distance) * rstd[n * shape.groups + g];
  if (threadIdx.x == 0) {
    mean_dz[n * shape.groups + g] = dz / static_cast<float>(shape.group_size());
    mean_dz_xhat[n * shape.groups + g] = dz_xhat / static_cast<float>(shape.group_size());
  }
}

// Computes the gradients of the parameters: sums over samples and chunks. That of input_bias is the sum of dx (see
// input_gradient), in which the sum of distance is known from the deviation of the channel's mean. grid: (channels)
__global__ void __launch_bounds__(kThreads)
    combine_channel_gradients(Shape shape, const float* sums_dz, const float* sums_dz_distance, const float* weight,
                              Statistics statistics, const float* mean_dz, const float* mean_dz_xhat,
                              Gradients gradients) {
  const int64_t c = blockIdx.x, g = c / shape.channels_per_group();
  float dz = 0, dz_xhat = 0, dx = 0;
  const unsigned chunks = static_cast<unsigned>(shape.chunks), count = static_cast<unsigned>(shape.samples) * chunks;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const int64_t n = i / chunks, group = n * shape.groups + g;
    const float sum = sums_dz[i * shape.channels + c], rstd = statistics.rstd[group];
    dz += sum;
    dz_xhat += sums_dz_distance[i * shape.channels + c] * rstd;
    if (gradients.dinput_bias != nullptr) {
      const float deviation = statistics.deviation[n * shape.channels + c];
      const float constant = mean_dz[group] + rstd * deviation * mean_dz_xhat[group];
      dx += rstd * (weight[c] * sum - static_cast<float>(shape.positions(i % chunks)) * constant);
    }
  }
  dz = block_sum(dz);
  dz_xhat = block_sum(dz_xhat);
  dx = block_sum(dx);
  if (threadIdx.x == 0) {
    gradients.dbias[c] = dz;
    gradients.dweight[c] = dz_xhat;
    if (gradients.dinput_bias != nullptr) gradients.dinput_bias[c] = dx;
  }
}

template <typename T, int V, bool kChannelsLast, bool kActivation>
__global__ void __launch_bounds__(kThreads, kBlocks)
    input_gradient(Shape shape, int columns, const T* dy, const T* x, Parameters parameters, Statistics statistics,
                   const float* mean_dz, const float* mean_dz_xhat, T* dx) {
  const Walk w = walk<V, kChannelsLast>(shape, columns);
  const auto channel = channels_of<V, kChannelsLast>(shape, w, parameters, statistics);
  // z and dx = scale * dz - rstd * (mean_dz + xhat * mean_dz_xhat) as linear functions of x, to save registers
  float shift[V], constant[V], slope[V];
  for (int j = 0; j < V; ++j) {
    const unsigned g = group_of<kChannelsLast>(shape, w, j);
    const float rstd = statistics.rstd[g];
    shift[j] = channel.bias[j] - channel.scale[j] * channel.center[j];
    slope[j] = -rstd * rstd * mean_dz_xhat[g];
    constant[j] = -rstd * mean_dz[g] - slope[j] * channel.center[j];
  }
  int64_t offset = w.first;
  for (int i = w.count; i > 0; --i, offset += w.stride) {
    auto values = load<V>(x + offset);
    const auto gradients = load<V>(dy + offset);
    for (int j = 0; j < V; ++j) {
      const float value = to_float(values.values[j]);
      const float dz =
          to_float(gradients.values[j]) * activation_gradient<kActivation>(channel.scale[j] * value + shift[j]);
      values.values[j] = from_float<T>(channel.scale[j] * dz + (slope[j] * value + constant[j]));
    }
    store<V>(dx + offset, values);
  }
}

}  // namespace cat_fast::group_norm_silu
