// What attention with heads of one dimension works on, for every device.
#pragma once

#include <cstdint>

namespace cat_fast::scalar_attention {

// (B, N, H), contiguous.
struct Shape {
  int64_t batch, count, heads;

  bool empty() const { return batch * count * heads == 0; }
};

}  // namespace cat_fast::scalar_attention
