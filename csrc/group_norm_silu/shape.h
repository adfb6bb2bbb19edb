// The shape of GroupNorm + SiLU's input, for every device: sizes, memory order, and the chunks of partial sums.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cat_fast::group_norm_silu {

// x[n][c][p] for p < spatial; channels-last memory is [n][p][c].
//
// Reductions run over chunks of `chunk` positions and store the partial result of chunk k of channel c at
// [n][k][c]. Chunks depend only on the shape, never on the number of threads, so results are deterministic.
struct Shape {
  int64_t samples, channels, spatial, groups;
  bool channels_last;
  int64_t chunk, chunks;  // positions per chunk, and number of chunks

  CAT_FAST_HOST_DEVICE int64_t channels_per_group() const { return channels / groups; }
  CAT_FAST_HOST_DEVICE int64_t group_size() const { return channels_per_group() * spatial; }
  CAT_FAST_HOST_DEVICE int64_t positions(int64_t k) const { return k + 1 < chunks ? chunk : spatial - k * chunk; }
  CAT_FAST_HOST_DEVICE int64_t partials() const { return samples * chunks * channels; }
  CAT_FAST_HOST_DEVICE bool empty() const { return samples * channels * spatial == 0; }
};

}  // namespace cat_fast::group_norm_silu
