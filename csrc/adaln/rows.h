// The inner loops of adaLN on the CPU over one token's features, which stay in the L1 cache between loops.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cpu_math.h"
#include "common/float16.h"

namespace cat_fast::adaln {

constexpr int64_t kLanes = 32;  // independent sums over a row, for SIMD

// A sequence's modulation in fp32, `width` elements each; gate may be null.
struct Modulation {
  const float *scale_plus_1, *shift, *gate;
};

// Returns the sum of kLanes partial sums; halving them first uses SIMD additions instead of one long chain.
CAT_FAST_INLINE float fold(float* lanes) {
  for (int64_t half = kLanes / 2; half >= 8; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Returns the mean over a row of (x - center)^power, where power is 1 or 2.
template <int kPower, typename T>
CAT_FAST_INLINE float mean_moment(const T* __restrict x, float center, int64_t width) {
  float lanes[kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) {
    const float distance = to_float(x[i + lane]) - center;
    lanes[lane] += kPower == 2 ? distance * distance : distance;
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i, lane);
  }
  for (int64_t lane = 0; lane < width - i; ++lane) add(i, lane);
  return fold(lanes) / static_cast<float>(width);
}

// y = (x - mean) rstd (1 + scale) + shift, with the mean and rstd of this row
template <typename T>
CAT_FAST_INLINE void modulated_norm(const T* __restrict x, Modulation modulation, int64_t width, float eps,
                                    T* __restrict y, float* mean, float* rstd) {
  const float* __restrict scale_plus_1 = modulation.scale_plus_1;
  const float* __restrict shift = modulation.shift;
  const float m = mean_moment<1>(x, 0.0f, width);
  const float r = 1.0f / std::sqrt(mean_moment<2>(x, m, width) + eps);
  for (int64_t i = 0; i < width; ++i) y[i] = from_float<T>((to_float(x[i]) - m) * r * scale_plus_1[i] + shift[i]);
  *mean = m;
  *rstd = r;
}

// x_new = x + gate h
template <typename T>
CAT_FAST_INLINE void add_gated(const T* __restrict x, const T* __restrict h, const float* __restrict gate,
                               int64_t width, T* __restrict x_new) {
  for (int64_t i = 0; i < width; ++i) x_new[i] = from_float<T>(to_float(x[i]) + gate[i] * to_float(h[i]));
}

struct Means {
  float dxhat, dxhat_xhat;
};

// Adds the terms of `count` elements, one per lane.
template <typename T>
CAT_FAST_INLINE void add_gradient_lanes(const T* __restrict dy, const T* __restrict x,
                                        const float* __restrict scale_plus_1, float mean, float rstd, int64_t count,
                                        float* __restrict dshift, float* __restrict dscale, float* __restrict lanes,
                                        float* __restrict lanes_xhat) {
  for (int64_t i = 0; i < count; ++i) {
    const float dy_i = to_float(dy[i]), xhat = (to_float(x[i]) - mean) * rstd;
    dshift[i] += dy_i;
    dscale[i] += dy_i * xhat;
    lanes[i] += dy_i * scale_plus_1[i];
    lanes_xhat[i] += dy_i * scale_plus_1[i] * xhat;
  }
}

// With xhat = (x - mean) rstd and dxhat = dy (1 + scale): dshift += dy, dscale += dy xhat. Returns the means
// over the row of dxhat and of dxhat xhat.
template <typename T>
CAT_FAST_INLINE Means add_modulation_gradients(const T* __restrict dy, const T* __restrict x,
                                               const float* __restrict scale_plus_1, float mean, float rstd,
                                               int64_t width, float* __restrict dshift, float* __restrict dscale) {
  float lanes[kLanes] = {}, lanes_xhat[kLanes] = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    add_gradient_lanes(dy + i, x + i, scale_plus_1 + i, mean, rstd, kLanes, dshift + i, dscale + i, lanes, lanes_xhat);
  }
  add_gradient_lanes(dy + whole, x + whole, scale_plus_1 + whole, mean, rstd, width - whole, dshift + whole,
                     dscale + whole, lanes, lanes_xhat);
  return {fold(lanes) / static_cast<float>(width), fold(lanes_xhat) / static_cast<float>(width)};
}

// dx = rstd (dxhat - mean of dxhat - xhat * mean of dxhat xhat)
CAT_FAST_INLINE float norm_gradient(float dy, float x, float scale_plus_1, float mean, float rstd, Means means) {
  const float xhat = (x - mean) * rstd;
  return rstd * (dy * scale_plus_1 - means.dxhat - xhat * means.dxhat_xhat);
}

template <typename T>
CAT_FAST_INLINE void input_gradient(const T* __restrict dy, const T* __restrict x, const float* __restrict scale_plus_1,
                                    float mean, float rstd, Means means, int64_t width, T* __restrict dx) {
  for (int64_t i = 0; i < width; ++i) {
    dx[i] = from_float<T>(norm_gradient(to_float(dy[i]), to_float(x[i]), scale_plus_1[i], mean, rstd, means));
  }
}

// The same for x_new = x + gate h, where dx_new is the gradient of x_new from its other uses:
// dh = gate dx, dgate += h dx
template <typename T>
CAT_FAST_INLINE void gated_input_gradients(const T* __restrict dx_new, const T* __restrict dy,
                                           const T* __restrict x_new, const T* __restrict h, Modulation modulation,
                                           float mean, float rstd, Means means, int64_t width, T* __restrict dx,
                                           T* __restrict dh, float* __restrict dgate) {
  const float* __restrict scale_plus_1 = modulation.scale_plus_1;
  const float* __restrict gate = modulation.gate;
  for (int64_t i = 0; i < width; ++i) {
    const float from_norm = norm_gradient(to_float(dy[i]), to_float(x_new[i]), scale_plus_1[i], mean, rstd, means);
    const float gradient = from_norm + to_float(dx_new[i]);
    dx[i] = from_float<T>(gradient);
    dh[i] = from_float<T>(gate[i] * gradient);
    dgate[i] += to_float(h[i]) * gradient;
  }
}

}  // namespace cat_fast::adaln
