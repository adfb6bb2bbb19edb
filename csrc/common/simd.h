// SIMD vectors of floats.
#pragma once

#include <cstdint>

#include "common/cpu_math.h"

namespace cat_fast {

// kWidth floats. Compilers split vectors wider than the machine's into narrower ones, but inefficiently: comparisons
// one by one, and arrays through memory. So kWidth is a template argument, set by CAT_FAST_DISPATCH.
template <int kWidth>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kWidth * sizeof(float)), may_alias));
  typedef int32_t Integers __attribute__((vector_size(kWidth * sizeof(float))));
};

template <int kWidth>
using Vector = typename VectorOf<kWidth>::Type;

// Addresses must be multiples of the vector's size.
template <int kWidth>
CAT_FAST_INLINE Vector<kWidth> load(const float* from) {
  return *reinterpret_cast<const Vector<kWidth>*>(from);
}

template <typename V>
CAT_FAST_INLINE void store(const V& value, float* to) {
  *reinterpret_cast<V*>(to) = value;
}

// Returns b if either is NaN.
template <typename V>
CAT_FAST_INLINE V maximum(const V& a, const V& b) {
  return a > b ? a : b;
}

// e^x as in cpu_math.h, for x <= 0 or a little above; NaN stays NaN.
template <int kWidth>
CAT_FAST_INLINE Vector<kWidth> exponential(const Vector<kWidth>& exponent) {
  using Integers = typename VectorOf<kWidth>::Integers;
  const Vector<kWidth> x = maximum(Vector<kWidth>{} - 87.0f, exponent);
  constexpr float kRound = 12582912.0f;
  const Vector<kWidth> n = (x * 1.44269504f + kRound) - kRound;
  const Vector<kWidth> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return exponential_series(r) * reinterpret_cast<Vector<kWidth>>(power);
}

}  // namespace cat_fast
