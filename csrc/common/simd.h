// Sixteen floats that are worked on at once: one AVX-512 register, two of AVX2, four of SSE or NEON.
#pragma once

#include <cstdint>

#include "common/cpu_math.h"

namespace cat_fast {

constexpr int64_t kLanes = 16;
using Vector = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

CAT_FAST_INLINE Vector broadcast(float value) { return Vector{} + value; }

// Addresses are multiples of 64 bytes.
CAT_FAST_INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
CAT_FAST_INLINE void store(const Vector& value, float* to) { *reinterpret_cast<Vector*>(to) = value; }

// b where it is NaN, a where only a is.
CAT_FAST_INLINE Vector maximum(const Vector& a, const Vector& b) { return a > b ? a : b; }

// e^x as in cpu_math.h, for x <= 0 or a little above; NaN stays NaN.
CAT_FAST_INLINE Vector exponential(const Vector& exponent) {
  using Integers = int32_t __attribute__((vector_size(sizeof(Vector))));
  const Vector x = maximum(broadcast(-87.0f), exponent);
  constexpr float kRound = 12582912.0f;
  const Vector n = (x * 1.44269504f + kRound) - kRound;
  const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return exponential_series(r) * reinterpret_cast<Vector>(power);
}

}  // namespace cat_fast
