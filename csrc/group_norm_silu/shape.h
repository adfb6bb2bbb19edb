// What GroupNorm + SiLU works on, for every device: sizes, memory order, and the chunks that partial sums
// are taken over.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cat_fast::group_norm_silu {

// x[n][c][p] for p < spatial; channels-last memory is [n][p][c].
//
// Reductions run over chunks of `chunk` positions and leave one partial result at [n][k][c] for chunk k of
// channel c. Chunks depend on the shape alone, never on the number of threads, so results are reproducible.
struct Shape {
  int64_t samples, channels, spatial, groups;
  bool channels_last;
  int64_t chunk, chunks;  // positions in one, and how many there are

  CAT_FAST_HOST_DEVICE int64_t channels_per_group() const { return channels / groups; }
  CAT_FAST_HOST_DEVICE int64_t group_size() const { return channels_per_group() * spatial; }
  CAT_FAST_HOST_DEVICE int64_t positions(int64_t k) const { return k + 1 < chunks ? chunk : spatial - k * chunk; }
  CAT_FAST_HOST_DEVICE int64_t partials() const { return samples * chunks * channels; }
  CAT_FAST_HOST_DEVICE bool empty() const { return samples * channels * spatial == 0; }
};

}  // namespace cat_fast::group_norm_silu
