// The inner loops of GroupNorm + SiLU on the CPU, over rows of consecutive elements.
//
// With xhat = (x - mean) * rstd and z = weight * xhat + bias, the output is y = silu(z), and the gradient of z is
// dz = dy * silu'(z). In channels-last memory (kPerElement), channel data is indexed like the elements of a row.
// Otherwise sums are over one channel, and element-wise loops have one channel per row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_math.h"

namespace cat_fast::group_norm_silu {

struct ChannelData {
  const float *mean, *rstd, *weight, *bias;
};

// sums[i] += x[row][i]
template <typename T>
CAT_FAST_INLINE void add_values(const T* __restrict x, int64_t rows, int64_t width, float* __restrict sums) {
  for (int64_t row = 0; row < rows; ++row, x += width) {
    for (int64_t i = 0; i < width; ++i) sums[i] += to_float(x[i]);
  }
}

// sums[i] += (x[row][i] - center)^2
template <typename T, bool kPerElement>
CAT_FAST_INLINE void add_squares(const T* __restrict x, const float* __restrict center, int64_t rows, int64_t width,
                                 float* __restrict sums) {
  for (int64_t row = 0; row < rows; ++row, x += width) {
    for (int64_t i = 0; i < width; ++i) {
      const float distance = to_float(x[i]) - center[kPerElement ? i : 0];
      sums[i] += distance * distance;
    }
  }
}

// y = silu(z), or z without activation
template <typename T, bool kPerElement, bool kActivation>
CAT_FAST_INLINE void normalize(const T* __restrict x, ChannelData channel, int64_t rows, int64_t width,
                               T* __restrict y) {
  const float* __restrict mean = channel.mean;
  const float* __restrict rstd = channel.rstd;
  const float* __restrict weight = channel.weight;
  const float* __restrict bias = channel.bias;
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = kPerElement ? i : row;
      const float z = (to_float(x[i]) - mean[c]) * rstd[c] * weight[c] + bias[c];
      y[i] = from_float<T>(kActivation ? z * sigmoid(z) : z);
    }
  }
}

// silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z); 1 without activation
template <bool kActivation>
CAT_FAST_INLINE float activation_gradient(float z) {
  if constexpr (!kActivation) return 1.0f;
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

// One element's gradient of z, and its contribution to the gradient of weight.
struct Gradients {
  float dz, dz_xhat;
};

template <bool kActivation>
CAT_FAST_INLINE Gradients gradients_of(float x, float dy, float mean, float rstd, float weight, float bias) {
  const float xhat = (x - mean) * rstd;
  const float dz = dy * activation_gradient<kActivation>(weight * xhat + bias);
  return {dz, dz * xhat};
}

// For each channel i of channels-last rows: sums_dz[i] += dz, sums_dz_xhat[i] += dz * xhat. With kKeep, also
// writes every dz to `kept`.
template <typename T, bool kActivation, bool kKeep>
CAT_FAST_INLINE void add_row_gradients(const T* __restrict x, const T* __restrict dy, ChannelData channel, int64_t rows,
                                       int64_t width, float* __restrict sums_dz, float* __restrict sums_dz_xhat,
                                       T* __restrict kept) {
  const float* __restrict mean = channel.mean;
  const float* __restrict rstd = channel.rstd;
  const float* __restrict weight = channel.weight;
  const float* __restrict bias = channel.bias;
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width) {
    for (int64_t i = 0; i < width; ++i) {
      const Gradients g =
          gradients_of<kActivation>(to_float(x[i]), to_float(dy[i]), mean[i], rstd[i], weight[i], bias[i]);
      sums_dz[i] += g.dz;
      sums_dz_xhat[i] += g.dz_xhat;
      if constexpr (kKeep) kept[row * width + i] = from_float<T>(g.dz);
    }
  }
}

// The same for contiguous channels of `width` elements each: sums_dz[row] = the sum of dz, and so on.
template <typename T, bool kActivation>
CAT_FAST_INLINE void sum_plane_gradients(const T* __restrict x, const T* __restrict dy, ChannelData channel,
                                         int64_t rows, int64_t width, float* __restrict sums_dz,
                                         float* __restrict sums_dz_xhat) {
  constexpr int64_t kLanes = 16;   // independent sums, for SIMD
  constexpr int64_t kBlock = 256;  // converted in separate loops first, so that half precision is vectorised
  float x_block[kBlock], dy_block[kBlock];
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width) {
    const float mean = channel.mean[row], rstd = channel.rstd[row];
    const float weight = channel.weight[row], bias = channel.bias[row];
    float dz[kLanes] = {}, dz_xhat[kLanes] = {};
    for (int64_t start = 0; start < width; start += kBlock) {
      const int64_t count = std::min(kBlock, width - start), whole = count / kLanes * kLanes;
      for (int64_t i = 0; i < count; ++i) x_block[i] = to_float(x[start + i]);
      for (int64_t i = 0; i < count; ++i) dy_block[i] = to_float(dy[start + i]);
      for (int64_t i = 0; i < whole; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const Gradients g =
              gradients_of<kActivation>(x_block[i + lane], dy_block[i + lane], mean, rstd, weight, bias);
          dz[lane] += g.dz;
          dz_xhat[lane] += g.dz_xhat;
        }
      }
      for (int64_t i = whole; i < count; ++i) {
        const Gradients g = gradients_of<kActivation>(x_block[i], dy_block[i], mean, rstd, weight, bias);
        dz[i - whole] += g.dz;
        dz_xhat[i - whole] += g.dz_xhat;
      }
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) {
        dz[lane] += dz[lane + half];
        dz_xhat[lane] += dz_xhat[lane + half];
      }
    }
    sums_dz[row] = dz[0];
    sums_dz_xhat[row] = dz_xhat[0];
  }
}

// dx = rstd * (weight * dz - mean_g(weight * dz) - xhat * mean_g(weight * dz * xhat)), given the two means over
// the group
template <typename T, bool kPerElement, bool kActivation>
CAT_FAST_INLINE void input_gradient(const T* __restrict x, const T* __restrict dy, ChannelData channel,
                                    const float* __restrict mean_dz, const float* __restrict mean_dz_xhat, int64_t rows,
                                    int64_t width, T* __restrict dx) {
  const float* __restrict mean = channel.mean;
  const float* __restrict rstd = channel.rstd;
  const float* __restrict weight = channel.weight;
  const float* __restrict bias = channel.bias;
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = kPerElement ? i : row;
      const float xhat = (to_float(x[i]) - mean[c]) * rstd[c];
      const float dz = to_float(dy[i]) * activation_gradient<kActivation>(weight[c] * xhat + bias[c]);
      dx[i] = from_float<T>(rstd[c] * (weight[c] * dz - mean_dz[c] - xhat * mean_dz_xhat[c]));
    }
  }
}

// The same for channels-last rows whose dx holds dz.
template <typename T>
CAT_FAST_INLINE void input_gradient_in_place(const T* __restrict x, ChannelData channel,
                                             const float* __restrict mean_dz, const float* __restrict mean_dz_xhat,
                                             int64_t rows, int64_t width, T* __restrict dx) {
  const float* __restrict mean = channel.mean;
  const float* __restrict rstd = channel.rstd;
  const float* __restrict weight = channel.weight;
  for (int64_t row = 0; row < rows; ++row, x += width, dx += width) {
    for (int64_t i = 0; i < width; ++i) {
      const float xhat = (to_float(x[i]) - mean[i]) * rstd[i];
      dx[i] = from_float<T>(rstd[i] * (weight[i] * to_float(dx[i]) - mean_dz[i] - xhat * mean_dz_xhat[i]));
    }
  }
}

}  // namespace cat_fast::group_norm_silu
