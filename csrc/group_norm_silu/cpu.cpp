// GroupNorm + SiLU on the CPU in fp32, bf16 and fp16, contiguous and channels-last.
//
// Statistics take two passes over a chunk, which stays in cache. They are combined across chunks as counts, means
// and sums of squared distances, which avoids the cancellation of E[x^2] - E[x]^2. So x is read from memory twice
// and y is written once. Sums run in a fixed order, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/huge_pages.h"
#include "group_norm_silu/arguments.h"
#include "group_norm_silu/rows.h"

namespace cat_fast::group_norm_silu {
namespace {

constexpr int64_t kChunkElements = 32768;  // 128 KiB of fp32: still in the L2 cache for the second pass
constexpr int64_t kLanes = 64;             // independent sums over a contiguous channel, for SIMD

// One chunk of all channels (channels-last) or of one channel (contiguous) of a sample, or several consecutive
// contiguous channels if they are small.
struct Tile {
  int64_t sample, first_channel, channels;
  int64_t offset;     // of its first element in x
  int64_t positions;  // elements of each channel
  int64_t partial;    // index of its first channel's partial results
};

// Calls f(tile) for every tile. Element-wise passes run backwards, to start with the data that the preceding
// reduction left in the caches.
template <bool kElementwise = false, typename F>
void for_each_tile(const Shape& shape, const F& f) {
  const int64_t chunks = shape.chunks, positions = std::min(shape.chunk, shape.spatial);
  const int64_t together = chunks == 1 ? std::clamp(kChunkElements / positions, int64_t{1}, shape.channels) : 1;
  const int64_t channels = shape.channels_last ? shape.channels : together;
  const int64_t columns = (shape.channels + channels - 1) / channels;
  const int64_t grain = std::max<int64_t>(1, kChunkElements / (positions * channels));
  torch::stable::parallel_for(0, shape.samples * columns * chunks, grain, [&](int64_t begin, int64_t end) {
    const int64_t start = kElementwise ? end - 1 : begin;
    int64_t k = start % chunks, column = start / chunks % columns, n = start / chunks / columns;
    for (int64_t left = end - begin; left > 0; --left) {
      const int64_t c = column * channels, first = k * shape.chunk;
      const int64_t offset = (n * shape.channels + c) * shape.spatial + first * (shape.channels_last ? channels : 1);
      f(Tile{n, c, std::min(channels, shape.channels - c), offset, shape.positions(k),
             (n * chunks + k) * shape.channels + c});
      if (kElementwise) {  // count down or up without the divisions above
        if (k-- > 0) continue;
        k = chunks - 1;
        if (column-- > 0) continue;
        column = columns - 1;
        --n;
      } else {
        if (++k < chunks) continue;
        k = 0;
        if (++column < columns) continue;
        column = 0;
        ++n;
      }
    }
  });
}

// Returns the number of lanes to use for a channel of this size.
int64_t lanes_for(int64_t positions) { return positions < 8 * kLanes ? kLanes / 4 : kLanes; }

// Returns the sum of `count` partial sums; halving them first uses SIMD additions instead of one long chain.
float fold(float* lanes, int64_t count) {
  for (int64_t half = count / 2; half >= 8; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Sums over the positions of a tile, per channel. add(c, offset, rows, width, sums) adds `rows` rows of `width`
// elements to `width` sums, starting at channel c of the tile. A contiguous channel is viewed as such rows first.
template <typename Add>
void sum_channels(const Shape& shape, const Tile& tile, const Add& add, float* sums) {
  if (shape.channels_last) {
    std::fill_n(sums, tile.channels, 0.0f);
    add(0, tile.offset, tile.positions, tile.channels, sums);
    return;
  }
  const int64_t width = lanes_for(tile.positions), rows = tile.positions / width, rest = tile.positions % width;
  for (int64_t c = 0; c < tile.channels; ++c) {
    const int64_t offset = tile.offset + c * shape.spatial;
    float lanes[kLanes] = {};
    if (rows > 0) add(c, offset, rows, width, lanes);
    if (rest > 0) add(c, offset + rows * width, 1, rest, lanes);
    sums[c] = fold(lanes, width);
  }
}

// Calls f(sample, group) for every group.
template <typename F>
void for_each_group(const Shape& shape, const F& f) {
  constexpr int64_t kGrain = 4096;  // minimum number of partial results per thread
  const int64_t grain = std::max<int64_t>(1, kGrain / (shape.chunks * shape.channels_per_group()));
  torch::stable::parallel_for(0, shape.samples * shape.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) f(index / shape.groups, index % shape.groups);
  });
}

// Computes the mean and rstd of every group, (N, groups).
template <typename T, bool kChannelsLast>
void group_statistics(const Shape& shape, const T* x, float eps, float* mean, float* rstd) {
  std::vector<float> means(shape.partials()), squares(shape.partials());
  for_each_tile(shape, [&](const Tile& tile) {
    float* center = &means[tile.partial];
    sum_channels(
        shape, tile,
        [&](int64_t, int64_t offset, int64_t rows, int64_t width, float* sums) {
          CAT_FAST_DISPATCH(add_values)(x + offset, rows, width, sums);
        },
        center);
    for (int64_t c = 0; c < tile.channels; ++c) center[c] /= static_cast<float>(tile.positions);
    sum_channels(
        shape, tile,
        [&](int64_t c, int64_t offset, int64_t rows, int64_t width, float* sums) {
          CAT_FAST_DISPATCH(add_squares<T, kChannelsLast>)(x + offset, center + c, rows, width, sums);
        },
        &squares[tile.partial]);
  });
  const int64_t per_group = shape.channels_per_group();
  for_each_group(shape, [&](int64_t n, int64_t g) {
    const auto over_partials = [&](const auto& term) {
      double total = 0;
      for (int64_t k = 0; k < shape.chunks; ++k) {
        const int64_t first = (n * shape.chunks + k) * shape.channels + g * per_group;
        for (int64_t i = first; i < first + per_group; ++i) total += term(i, static_cast<double>(shape.positions(k)));
      }
      return total / static_cast<double>(shape.group_size());
    };
    const double group_mean = over_partials([&](int64_t i, double count) { return count * means[i]; });
    const double variance = over_partials([&](int64_t i, double count) {
      const double distance = means[i] - group_mean;
      return squares[i] + count * distance * distance;
    });
    mean[n * shape.groups + g] = static_cast<float>(group_mean);
    rstd[n * shape.groups + g] = static_cast<float>(1.0 / std::sqrt(variance + eps));
  });
}

// Expands (N, groups) to (N, C).
std::vector<float> per_channel(const Shape& shape, const float* per_group) {
  std::vector<float> result(shape.samples * shape.channels);
  const int64_t size = shape.channels_per_group();
  for (int64_t i = 0; i < shape.samples * shape.groups; ++i) std::fill_n(&result[i * size], size, per_group[i]);
  return result;
}

// Statistics and parameters of all channels; `at` returns those from a tile's first channel.
struct Channels {
  std::vector<float> mean, rstd;  // (N, C)
  const float *weight, *bias;     // (C,)

  ChannelData at(const Shape& shape, const Tile& tile) const {
    const int64_t i = tile.sample * shape.channels + tile.first_channel;
    return {&mean[i], &rstd[i], weight + tile.first_channel, bias + tile.first_channel};
  }
};

// Returns (rows, width) of a tile in an element-wise loop.
std::pair<int64_t, int64_t> rows_of(const Shape& shape, const Tile& tile) {
  return shape.channels_last ? std::pair(tile.positions, tile.channels) : std::pair(tile.channels, tile.positions);
}

// Returns a contiguous shape whose channels are the groups of `shape`, for results per group.
Shape by_groups(const Shape& shape) {
  const int64_t size = shape.group_size();
  return {shape.samples, shape.groups, size, shape.groups, false, kChunkElements, (size - 1) / kChunkElements + 1};
}

template <typename T, bool kChannelsLast, bool kActivation>
void forward(const Shape& shape, const T* x, const float* weight, const float* bias, float eps, T* y, float* mean,
             float* rstd) {
  group_statistics<T, kChannelsLast>(kChannelsLast ? shape : by_groups(shape), x, eps, mean, rstd);
  const Channels channels{per_channel(shape, mean), per_channel(shape, rstd), weight, bias};
  for_each_tile<true>(shape, [&](const Tile& tile) {
    const auto [rows, width] = rows_of(shape, tile);
    CAT_FAST_DISPATCH(normalize<T, kChannelsLast, kActivation>)(x + tile.offset, channels.at(shape, tile), rows, width,
                                                                y + tile.offset);
  });
}

template <typename T, bool kChannelsLast, bool kActivation>
void backward(const Shape& shape, const T* dy, const T* x, const float* weight, const float* bias,
              const float* mean, const float* rstd, T* dx, float* dweight, float* dbias) {
  const Channels channels{per_channel(shape, mean), per_channel(shape, rstd), weight, bias};

  // If true, dx holds dz between the two passes: writing it costs less than recomputing an exponential and a
  // division per element, but half precision would round it.
  constexpr bool kKeep = kChannelsLast && kActivation && std::is_same_v<T, float>;
  std::vector<float> partial_dz(shape.partials()), partial_dz_xhat(shape.partials());
  for_each_tile(shape, [&](const Tile& tile) {
    const ChannelData channel = channels.at(shape, tile);
    const auto [rows, width] = rows_of(shape, tile);
    float *dz = &partial_dz[tile.partial], *dz_xhat = &partial_dz_xhat[tile.partial];  // zeros
    if constexpr (kChannelsLast) {
      CAT_FAST_DISPATCH(add_row_gradients<T, kActivation, kKeep>)(x + tile.offset, dy + tile.offset, channel, rows,
                                                                  width, dz, dz_xhat, dx + tile.offset);
    } else {
      CAT_FAST_DISPATCH(sum_plane_gradients<T, kActivation>)(x + tile.offset, dy + tile.offset, channel, rows, width,
                                                             dz, dz_xhat);
    }
  });

  // Sums over chunks, (N, C) in double, for the following sums over groups and over samples.
  std::vector<double> dz(shape.samples * shape.channels), dz_xhat(shape.samples * shape.channels);
  for (int64_t n = 0; n < shape.samples; ++n) {
    for (int64_t k = 0; k < shape.chunks; ++k) {
      const int64_t first = (n * shape.chunks + k) * shape.channels;
      for (int64_t c = 0; c < shape.channels; ++c) {
        dz[n * shape.channels + c] += partial_dz[first + c];
        dz_xhat[n * shape.channels + c] += partial_dz_xhat[first + c];
      }
    }
  }
  for (int64_t c = 0; c < shape.channels; ++c) {
    double sum = 0, sum_xhat = 0;
    for (int64_t n = 0; n < shape.samples; ++n) {
      sum += dz[n * shape.channels + c];
      sum_xhat += dz_xhat[n * shape.channels + c];
    }
    dbias[c] = static_cast<float>(sum);
    dweight[c] = static_cast<float>(sum_xhat);
  }
  std::vector<float> mean_dz(shape.samples * shape.groups), mean_dz_xhat(shape.samples * shape.groups);
  for_each_group(shape, [&](int64_t n, int64_t g) {
    double sum = 0, sum_xhat = 0;
    for (int64_t c = g * shape.channels_per_group(); c < (g + 1) * shape.channels_per_group(); ++c) {
      sum += weight[c] * dz[n * shape.channels + c];
      sum_xhat += weight[c] * dz_xhat[n * shape.channels + c];
    }
    mean_dz[n * shape.groups + g] = static_cast<float>(sum / static_cast<double>(shape.group_size()));
    mean_dz_xhat[n * shape.groups + g] = static_cast<float>(sum_xhat / static_cast<double>(shape.group_size()));
  });

  const std::vector<float> channel_dz = per_channel(shape, mean_dz.data());
  const std::vector<float> channel_dz_xhat = per_channel(shape, mean_dz_xhat.data());
  for_each_tile<true>(shape, [&](const Tile& tile) {
    const auto [rows, width] = rows_of(shape, tile);
    const int64_t i = tile.sample * shape.channels + tile.first_channel;
    if constexpr (kKeep) {
      CAT_FAST_DISPATCH(input_gradient_in_place)(x + tile.offset, channels.at(shape, tile), &channel_dz[i],
                                                 &channel_dz_xhat[i], rows, width, dx + tile.offset);
    } else {
      CAT_FAST_DISPATCH(input_gradient<T, kChannelsLast, kActivation>)(
          x + tile.offset, dy + tile.offset, channels.at(shape, tile), &channel_dz[i], &channel_dz_xhat[i], rows, width,
          dx + tile.offset);
    }
  });
}

// Calls f.operator()<T, kChannelsLast, kActivation>() according to the arguments.
template <typename F>
void dispatch(ScalarType dtype, bool channels_last, bool activation, const F& f) {
  const auto with_flags = [&]<typename T>() {
    if (channels_last) {
      activation ? f.template operator()<T, true, true>() : f.template operator()<T, true, false>();
    } else {
      activation ? f.template operator()<T, false, true>() : f.template operator()<T, false, false>();
    }
  };
  if (dtype == ScalarType::Float) {
    with_flags.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    with_flags.template operator()<BFloat16>();
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "group_norm_silu on the CPU: expected float32, bfloat16 or float16");
    with_flags.template operator()<Float16>();
  }
}

Tensor empty_result(const Tensor& x) {
  Tensor result = torch::stable::empty_like(x);
  prefer_huge_pages(result.mutable_data_ptr(), x.numel() * x.element_size());
  return result;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(Tensor x, Tensor weight, Tensor bias, int64_t groups,
                                                       double eps, bool activation) {
  const Shape shape = shape_of(x, groups, kChunkElements);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  Tensor y = empty_result(x);
  Tensor mean = float_result(x, shape, {shape.samples, groups});
  Tensor rstd = float_result(x, shape, {shape.samples, groups});
  if (shape.empty()) return {y, mean, rstd};
  dispatch(x.scalar_type(), shape.channels_last, activation, [&]<typename T, bool kChannelsLast, bool kActivation>() {
    forward<T, kChannelsLast, kActivation>(
        shape, static_cast<const T*>(x.const_data_ptr()), weight_float.const_data_ptr<float>(),
        bias_float.const_data_ptr<float>(), static_cast<float>(eps), static_cast<T*>(y.mutable_data_ptr()),
        mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(Tensor grad_y, Tensor x, Tensor weight, Tensor bias,
                                                                Tensor mean, Tensor rstd, int64_t groups,
                                                                bool activation) {
  const Shape shape = shape_of(x, groups, kChunkElements);
  const Tensor weight_float = as_float(weight, shape), bias_float = as_float(bias, shape);
  const Tensor dy = in_order_of(x, grad_y);
  Tensor dx = empty_result(x);
  Tensor dweight = float_result(x, shape, {shape.channels}), dbias = float_result(x, shape, {shape.channels});
  if (!shape.empty()) {
    dispatch(x.scalar_type(), shape.channels_last, activation, [&]<typename T, bool kChannelsLast, bool kActivation>() {
      backward<T, kChannelsLast, kActivation>(
          shape, static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
          weight_float.const_data_ptr<float>(), bias_float.const_data_ptr<float>(), mean.const_data_ptr<float>(),
          rstd.const_data_ptr<float>(), static_cast<T*>(dx.mutable_data_ptr()), dweight.mutable_data_ptr<float>(),
          dbias.mutable_data_ptr<float>());
    });
  }
  return {dx, torch::stable::to(dweight, weight.scalar_type()), torch::stable::to(dbias, bias.scalar_type())};
}

}  // namespace
}  // namespace cat_fast::group_norm_silu

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&cat_fast::group_norm_silu::group_norm_silu_backward_cpu));
}
