// Sums y_c(t) = sum over j of e^(t s_j - o_j) u_c(j) of sources s_j for many targets t, in linear time.
//
// The range of the targets is divided into blocks with |t - centre| |s| <= kReach. Within a block, e^((t - centre) s)
// is interpolated by a polynomial of t through the block's kNodes Chebyshev nodes, so y is needed only at the nodes.
// All blocks have the same width, so e^(node s) = e^(centre s) e^((node - centre) s) takes one exponential per block,
// plus one per node of a *single* block. The range of the sources is divided in the same way, with
// |s - centre| |t| <= kReach: e^(t s) is interpolated in s, too, and the sources of a block are moved to its nodes.
// Then only sums of nodes over nodes remain. kernels/scalar_attention/README.md derives the error bound.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numbers>
#include <numeric>
#include <vector>

#include "scalar_attention/loops.h"

namespace cat_fast::scalar_attention {

constexpr float kReach = 0.8f;        // relative error of each term e^(t s): 1.6e-7 in t and in s
constexpr int64_t kMaxBlocks = 1024;  // keeps the table in the L2 cache

// Positions of queries or of keys, ordered by block and padded. Block b has the entries begin[b] to begin[b + 1];
// `present` is 1 for positions and 0 for padding. If there are no blocks (count is 0), the order is unchanged.
struct Axis {
  Blocks blocks;
  float magnitude;             // the largest |position|
  int64_t given;               // number of positions without padding
  std::vector<int32_t> begin;  // multiples of kLanes
  std::vector<int32_t> place;  // ordered index of each position
  std::vector<float> positions, present;

  int64_t size() const { return begin.back(); }

  // Orders positions in [low, high]; `other` is the largest magnitude on the other axis.
  void order(const float* unordered, int64_t count, float low, float high, float other);

  // Reorders values[i], one per position, into the axis' order and back; padding becomes 0.
  void scatter(const float* values, std::vector<float>& ordered) const {
    ordered.resize(size());
    for (size_t b = 1; b < begin.size(); ++b) {
      if (begin[b] > begin[b - 1]) std::fill_n(&ordered[begin[b] - kLanes], kLanes, 0.0f);
    }
    for (int64_t i = 0; i < given; ++i) ordered[place[i]] = values[i];
  }

  void gather(const std::vector<float>& ordered, float* values) const {
    for (int64_t i = 0; i < given; ++i) values[i] = ordered[place[i]];
  }

 private:
  std::vector<float> centres_;
  std::vector<int32_t> block_, rank_;
};

// The values u_0 and u_1 of sources on an axis, in its order; u_(c + 2) = s u_c. If e^(t s_j - o_j) may be large
// (`scaled`), it is divided by e^(|t| magnitude). Otherwise `offsets` keep it below e^(2 kReach), and are equal
// within a block.
struct Sources {
  const Axis& axis;
  const float *u, *w;
  const float* offsets;
  bool scaled;

  float exponent(float target) const { return scaled ? std::fabs(target) * axis.magnitude : 0.0f; }
};

// A thread's buffers, reused for all its heads.
struct Scratch {
  std::vector<float> zeros, positions, residuals, offsets, values, table;
};

// Computes sums such that sums[c][i] e^(exponents[i]) is the sum of channel c at target i, in the axis' order.
template <int kChannels>
void exponential_sums(const Sources& sources, const Axis& targets, Scratch& scratch,
                      std::array<std::vector<float>, kChannels>& sums, std::vector<float>& exponents);

// Returns the number of blocks of a range, or 0 if it would be too large for `count` positions on the other side.
inline int64_t count_blocks(float range, float magnitude, int64_t count) {
  const float blocks = std::max(1.0f, std::ceil(range * magnitude / (2.0f * kReach)));
  const int64_t limit = std::min(kMaxBlocks, count / 2);
  return blocks <= static_cast<float>(limit) ? static_cast<int64_t>(blocks) : 0;  // 0 also if the range overflows
}

inline void Axis::order(const float* unordered, int64_t count, float low, float high, float other) {
  const auto padded = [](int64_t n) { return static_cast<int32_t>((n + kLanes - 1) / kLanes * kLanes); };
  given = count;
  magnitude = std::max(std::fabs(low), std::fabs(high));
  blocks.count = count_blocks(high - low, other, count);
  blocks.first = low;
  blocks.width = blocks.count > 0 ? (high - low) / static_cast<float>(blocks.count) : 0.0f;
  const int64_t runs = std::max<int64_t>(1, blocks.count);
  centres_.resize(runs);
  for (int64_t b = 0; b < runs; ++b) centres_[b] = low + (static_cast<float>(b) + 0.5f) * blocks.width;
  blocks.centres = centres_.data();
  place.resize(count);
  begin.assign(runs + 1, 0);
  if (blocks.count == 0) {
    begin[1] = padded(count);
    std::iota(place.begin(), place.end(), 0);
  } else {
    block_.resize(count);
    rank_.resize(count);
    CAT_FAST_DISPATCH(find_blocks)(unordered, count, blocks, block_.data());
    for (int64_t i = 0; i < count; ++i) rank_[i] = begin[block_[i] + 1]++;
    for (int64_t b = 0; b < runs; ++b) begin[b + 1] = begin[b] + padded(begin[b + 1]);
    for (int64_t i = 0; i < count; ++i) place[i] = begin[block_[i]] + rank_[i];
  }
  positions.resize(size());
  present.resize(size());
  for (int64_t b = 0; b < runs; ++b) {
    if (begin[b + 1] > begin[b]) std::fill_n(&positions[begin[b + 1] - kLanes], kLanes, blocks.centres[b]);
  }
  std::fill(present.begin(), present.end(), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    positions[place[i]] = unordered[i];
    present[place[i]] = 1.0f;
  }
}

// Returns T_k at the Chebyshev node x_r = cos(pi (r + 1/2) / kNodes); T_1 gives the nodes themselves.
inline double chebyshev_at_node(int64_t k, int64_t r) {
  return std::cos(static_cast<double>(k) * std::numbers::pi * (static_cast<double>(r) + 0.5) / kNodes);
}

inline Basis chebyshev_basis() {
  Basis basis;
  for (int64_t k = 0; k < kNodes; ++k) {
    for (int64_t r = 0; r < kNodes; ++r) {
      basis.node[r][k] = static_cast<float>((k == 0 ? 1.0 : 2.0) / kNodes * chebyshev_at_node(k, r));
      basis.degree[k][r] = basis.node[r][k];
    }
  }
  return basis;
}

inline const Basis& basis() {
  static const Basis basis = chebyshev_basis();
  return basis;
}

// Returns the nodes of a block of this width, relative to its centre.
inline std::array<float, kNodes> nodes_of(float width) {
  std::array<float, kNodes> nodes;
  for (int64_t r = 0; r < kNodes; ++r) nodes[r] = static_cast<float>(chebyshev_at_node(1, r)) * 0.5f * width;
  return nodes;
}

template <int kChannels>
void sum_directly(const Sources& sources, const Axis& targets, std::array<std::vector<float>, kChannels>& sums,
                  std::vector<float>& exponents) {
  for (int64_t begin = 0; begin < targets.size(); begin += kTargetTile) {
    const int64_t size = std::min(kTargetTile, targets.size() - begin);
    float positions[kTargetTile] = {}, scales[kTargetTile] = {}, totals[kChannels * kTargetTile] = {};
    std::copy_n(&targets.positions[begin], size, positions);
    for (int64_t i = 0; i < size; ++i) scales[i] = sources.exponent(positions[i]);
    for (int64_t j = 0; j < sources.axis.size(); j += kSourceTile) {
      CAT_FAST_DISPATCH(add_direct<kChannels>)(&sources.axis.positions[j], sources.offsets + j, sources.u + j,
                                               sources.w + j, std::min(kSourceTile, sources.axis.size() - j), positions,
                                               scales, totals);
    }
    std::copy_n(scales, size, &exponents[begin]);
    for (int64_t c = 0; c < kChannels; ++c) std::copy_n(totals + c * kTargetTile, size, &sums[c][begin]);
  }
}

// The sources themselves, or the nodes that they were moved to.
struct Points {
  int64_t count;
  const float *positions, *residuals;  // a point is their sum
  const float *offsets, *u, *w;
};

inline Points points_of(const Sources& sources, Scratch& scratch) {
  const Axis& axis = sources.axis;
  const int64_t count = axis.blocks.count * kNodes;
  if (count == 0 || count >= axis.given) {
    scratch.zeros.resize(axis.size());
    return {axis.size(), axis.positions.data(), scratch.zeros.data(), sources.offsets, sources.u, sources.w};
  }
  scratch.positions.resize(count);
  scratch.residuals.resize(count);
  scratch.offsets.assign(count, 0.0f);
  scratch.values.resize(2 * count);
  const std::array<float, kNodes> nodes = nodes_of(axis.blocks.width);
  for (int64_t b = 0; b < axis.blocks.count; ++b) {
    std::fill_n(&scratch.positions[b * kNodes], kNodes, axis.blocks.centres[b]);
    std::copy_n(nodes.data(), kNodes, &scratch.residuals[b * kNodes]);
    if (axis.begin[b] < axis.begin[b + 1]) {
      std::fill_n(&scratch.offsets[b * kNodes], kNodes, sources.offsets[axis.begin[b]]);
    }
  }
  CAT_FAST_DISPATCH(gather_at_nodes)(axis.blocks, axis.begin.data(), axis.positions.data(), sources.u, sources.w,
                                     std::cref(basis()), scratch.values.data());
  return {count, scratch.positions.data(), scratch.residuals.data(), scratch.offsets.data(), scratch.values.data(),
          scratch.values.data() + count};
}

// Computes the sums at the nodes of every block of targets, [block][channel][node].
template <int kChannels>
void tabulate(const Sources& sources, const Blocks& blocks, Scratch& scratch) {
  constexpr int64_t kWidth = kChannels * kNodes;
  const Points points = points_of(sources, scratch);
  const std::array<float, kNodes> nodes = nodes_of(blocks.width);
  float terms[kSourceTile * kWidth], weights[kSourceTile];
  scratch.table.assign(blocks.count * kWidth, 0.0f);
  for (int64_t j = 0; j < points.count; j += kSourceTile) {
    const int64_t size = std::min(kSourceTile, points.count - j);
    CAT_FAST_DISPATCH(node_terms<kChannels>)(points.positions + j, points.residuals + j, points.u + j, points.w + j,
                                             nodes.data(), size, terms);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const float centre = blocks.centres[b];
      CAT_FAST_DISPATCH(source_weights)(points.positions + j, points.residuals + j, points.offsets + j, centre,
                                        sources.exponent(centre), size, weights);
      CAT_FAST_DISPATCH(add_weighted<kChannels>)(weights, terms, size, &scratch.table[b * kWidth]);
    }
  }
}

template <int kChannels>
void exponential_sums(const Sources& sources, const Axis& targets, Scratch& scratch,
                      std::array<std::vector<float>, kChannels>& sums, std::vector<float>& exponents) {
  for (std::vector<float>& channel : sums) channel.resize(targets.size());
  exponents.resize(targets.size());
  const Blocks& blocks = targets.blocks;
  if (blocks.count == 0) return sum_directly<kChannels>(sources, targets, sums, exponents);
  tabulate<kChannels>(sources, blocks, scratch);
  std::array<float*, kChannels> channels;
  for (int64_t c = 0; c < kChannels; ++c) channels[c] = sums[c].data();
  CAT_FAST_DISPATCH(interpolate<kChannels>)(blocks, targets.begin.data(), targets.positions.data(),
                                            scratch.table.data(), std::cref(basis()), channels.data());
  for (int64_t b = 0; b < blocks.count; ++b) {
    std::fill(exponents.data() + targets.begin[b], exponents.data() + targets.begin[b + 1],
              sources.exponent(blocks.centres[b]));
  }
}

}  // namespace cat_fast::scalar_attention
