// What GroupNorm + SiLU works on, for every device: sizes, memory order, and the chunks that partial sums
// are taken over.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cat_fast::group_norm_silu {

// x[n][c][p] for p < spatial; channels-last memory is [n][p][c].
//
// Reductions run over chunks of `chunk` positions and leave one partial result at [n][k][c] for chunk k of
// channel c. Chunks depend on the shape alone, never on the number of threads, so results are reproducible.
struct Shape {
  int64_t samples, channels, spatial, groups;
  bool channels_last;
  int64_t chunk;

  int64_t channels_per_group() const { return channels / groups; }
  int64_t group_size() const { return channels_per_group() * spatial; }
  int64_t chunks() const { return (spatial + chunk - 1) / chunk; }
  int64_t positions(int64_t k) const { return std::min(chunk, spatial - k * chunk); }
  int64_t partials() const { return samples * chunks() * channels; }
  bool empty() const { return samples * channels * spatial == 0; }
};

}  // namespace cat_fast::group_norm_silu
