// Math functions without calls and branches, which compilers vectorise in plain loops.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/bfloat16.h"
#include "common/float16.h"
#include "common/instruction_set.h"

namespace cat_fast {

// Clamps x to [-limit, limit], NaN too. Floats of one sign are ordered like their bits, and an integer minimum
// is one instruction. With a float comparison the compiler computed both branches for every element, and the
// unused one met subnormal numbers and took ten times as long.
CAT_FAST_INLINE float clamp_magnitude(float x, float limit) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t magnitude = std::min(bits & 0x7fffffff, std::bit_cast<int32_t>(limit));
  return std::bit_cast<float>((bits & ~0x7fffffff) | magnitude);
}

// e^r for |r| <= ln(2) / 2 by its Taylor polynomial, for a float or a vector of floats.
template <typename V>
CAT_FAST_INLINE V exponential_series(const V& r) {
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// e^x within 2 ulp for |x| <= 87, clamped beyond: e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2) / 2.
// Adding 1.5 * 2^23 rounds to an integer.
CAT_FAST_INLINE float exponential(float x) {
  x = clamp_magnitude(x, 87.0f);
  constexpr float kRound = 12582912.0f;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  return exponential_series(r) * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

CAT_FAST_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace cat_fast
