// Bitwise conversion between IEEE half precision and float, for host and CUDA code.
//
// Compilers convert _Float16 one element at a time (GCC 12, even with F16C) or by a function call; this code
// vectorises everywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/bfloat16.h"
#include "common/host_device.h"

namespace cat_fast {

struct Float16 {
  uint16_t bits;
};

CAT_FAST_HOST_DEVICE inline float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + kRebias + (magnitude >= 0x7c00 ? kRebias : 0);  // inf, NaN: twice
  const uint32_t subnormal = bits_of_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return float_of_bits((magnitude < 0x400 ? subnormal : normal) | sign);
#endif
}

template <>  // round to nearest even; infinite past 65520; NaN stays NaN
CAT_FAST_HOST_DEVICE inline Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return {bits};
#else
  constexpr uint32_t kRebias = (127 - 15) << 10;
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = std::min(((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - kRebias, 0x7c00u);
  // After adding 1/2, the last bit of the sum has the value 2^-24, the smallest half-precision number.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return {static_cast<uint16_t>((magnitude > 0x7f800000 ? 0x7e00 : finite) | (bits >> 16 & 0x8000))};
#endif
}

}  // namespace cat_fast
