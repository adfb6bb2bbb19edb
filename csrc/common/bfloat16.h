// Bitwise conversion between bfloat16 and float, for host and CUDA code.
#pragma once

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace cat_fast {

struct BFloat16 {
  uint16_t bits;
};

CAT_FAST_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

CAT_FAST_HOST_DEVICE inline uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

CAT_FAST_HOST_DEVICE inline float to_float(float value) { return value; }
CAT_FAST_HOST_DEVICE inline float to_float(BFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
CAT_FAST_HOST_DEVICE inline T from_float(float value);

template <>
CAT_FAST_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}

template <>  // round to nearest even; NaN stays NaN
CAT_FAST_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

}  // namespace cat_fast
