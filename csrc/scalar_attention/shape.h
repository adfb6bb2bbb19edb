// The shape of the inputs of attention with head dimension 1, for every device.
#pragma once

#include <cstdint>

namespace cat_fast::scalar_attention {

// (B, N, H), contiguous.
struct Shape {
  int64_t batch, count, heads;

  bool empty() const { return batch * count * heads == 0; }
};

}  // namespace cat_fast::scalar_attention
