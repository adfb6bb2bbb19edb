// Sums y_c(t) = sum over j of e^(t s_j - o_j) u_c(j) of sources s_j for many targets t, in linear time.
//
// The range of the targets is cut into blocks with |t - centre| |s| <= kReach. Within a block, e^((t - centre) s)
// is a polynomial of t in the kNodes Chebyshev nodes of the block, so y is needed at the nodes only; and because
// all blocks are alike, e^(node s) = e^(centre s) e^((node - centre) s) takes an exponential a block and one a
// node of *one* block. kernels/scalar_attention/README.md derives the error bound.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include "scalar_attention/loops.h"

namespace cat_fast::scalar_attention {

constexpr float kReach = 0.8f;        // each term e^(t s) is then right to 1.6e-7 of itself, before rounding
constexpr int64_t kMaxBlocks = 1024;  // keeps the table in the L2 cache

template <int kChannels>
struct Sources {
  int64_t count;
  const float* positions;
  float magnitude;       // the largest |position|
  const float* offsets;  // o_j
  // Whether e^(t s_j - o_j) may be large: then e^(|t| magnitude) is divided out and told as the exponent.
  // The offsets of sources that are not scaled keep it at e^(2 kReach) or below.
  bool scaled;
  std::array<const float*, kChannels> values;

  float exponent(float target) const { return scaled ? std::fabs(target) * magnitude : 0.0f; }
};

struct Targets {
  int64_t count;
  const float* positions;
  float first, last;  // the range of the positions
};

// The value of channel c at target i is values[c][i] * e^exponents[i].
template <int kChannels>
struct Sums {
  std::array<std::vector<float>, kChannels> values;
  std::vector<float> exponents;

  void resize(int64_t count) {
    for (std::vector<float>& channel : values) channel.resize(count);
    exponents.resize(count);
  }
};

template <int kChannels>
void exponential_sums(const Sources<kChannels>& sources, const Targets& targets, Sums<kChannels>& sums);

// The blocks that the targets' range is cut into, 0 if summing directly is cheaper.
inline int64_t count_blocks(float range, float magnitude, int64_t sources) {
  const float blocks = std::max(1.0f, std::ceil(range * magnitude / (2.0f * kReach)));
  const int64_t most = std::min(kMaxBlocks, sources / 2);
  return blocks <= static_cast<float>(most) ? static_cast<int64_t>(blocks) : 0;  // 0 too where the range overflows
}

template <int kChannels>
void sum_directly(const Sources<kChannels>& sources, const Targets& targets, Sums<kChannels>& sums) {
  for (int64_t begin = 0; begin < targets.count; begin += kTargetTile) {
    const int64_t size = std::min(kTargetTile, targets.count - begin);
    float positions[kTargetTile] = {}, exponents[kTargetTile] = {}, totals[kChannels * kTargetTile] = {};
    std::copy_n(targets.positions + begin, size, positions);
    for (int64_t i = 0; i < size; ++i) exponents[i] = sources.exponent(positions[i]);
    for (int64_t j = 0; j < sources.count; j += kSourceTile) {
      std::array<const float*, kChannels> values = sources.values;
      for (const float*& channel : values) channel += j;
      add_direct<kChannels>(sources.positions + j, sources.offsets + j, values.data(),
                            std::min(kSourceTile, sources.count - j), positions, exponents, totals);
    }
    std::copy_n(exponents, size, &sums.exponents[begin]);
    for (int64_t c = 0; c < kChannels; ++c) std::copy_n(totals + c * kTargetTile, size, &sums.values[c][begin]);
  }
}

// Blocks of equal width over the range of the targets.
struct Blocks {
  int64_t count;
  float first, width;

  float centre(int64_t b) const { return first + (static_cast<float>(b) + 0.5f) * width; }
};

// T_k at the Chebyshev nodes x_r = cos(pi (r + 1/2) / kNodes); row 1 is the nodes.
inline std::array<std::array<float, kNodes>, kNodes> chebyshev_at_nodes() {
  std::array<std::array<float, kNodes>, kNodes> values;
  for (int64_t k = 0; k < kNodes; ++k) {
    for (int64_t r = 0; r < kNodes; ++r) {
      const double angle = std::numbers::pi * (static_cast<double>(r) + 0.5) / static_cast<double>(kNodes);
      values[k][r] = static_cast<float>(std::cos(static_cast<double>(k) * angle));
    }
  }
  return values;
}

// The sums at the nodes of every block, [block][channel][node].
template <int kChannels>
std::vector<float> tabulate(const Sources<kChannels>& sources, const Blocks& blocks, const float* unit_nodes) {
  constexpr int64_t kWidth = kChannels * kNodes;
  std::vector<float> table(blocks.count * kWidth);
  float nodes[kNodes], terms[kSourceTile * kWidth], weights[kSourceTile];
  for (int64_t r = 0; r < kNodes; ++r) nodes[r] = unit_nodes[r] * 0.5f * blocks.width;
  for (int64_t j = 0; j < sources.count; j += kSourceTile) {
    const int64_t size = std::min(kSourceTile, sources.count - j);
    std::array<const float*, kChannels> values = sources.values;
    for (const float*& channel : values) channel += j;
    node_terms<kChannels>(sources.positions + j, values.data(), nodes, size, terms);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const float centre = blocks.centre(b);
      source_weights(sources.positions + j, sources.offsets + j, centre, sources.exponent(centre), size, weights);
      add_weighted<kChannels>(weights, terms, size, &table[b * kWidth]);
    }
  }
  return table;
}

// Targets ordered by block, so that the polynomial of a block is read once for all of them.
struct Buckets {
  std::vector<int64_t> begin;  // of each block's targets, and the end of the last's
  std::vector<int64_t> order;  // the targets' indices
  std::vector<float> x;        // where in its block each lies, from -1 to 1, in that order

  Buckets(const Targets& targets, const Blocks& blocks)
      : begin(blocks.count + 1), order(targets.count), x(targets.count) {
    const float per_width = blocks.width > 0 ? 1.0f / blocks.width : 0.0f;
    std::vector<int64_t> block(targets.count);
    for (int64_t i = 0; i < targets.count; ++i) {
      const auto index = static_cast<int64_t>((targets.positions[i] - blocks.first) * per_width);
      block[i] = std::clamp<int64_t>(index, 0, blocks.count - 1);
      ++begin[block[i] + 1];
    }
    for (int64_t b = 0; b < blocks.count; ++b) begin[b + 1] += begin[b];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < targets.count; ++i) {
      const int64_t place = next[block[i]]++;
      order[place] = i;
      x[place] = 2.0f * (targets.positions[i] - blocks.centre(block[i])) * per_width;
    }
  }
};

template <int kChannels>
void sum_by_table(const Sources<kChannels>& sources, const Targets& targets, int64_t block_count,
                  Sums<kChannels>& sums) {
  static const auto chebyshev = chebyshev_at_nodes();
  const Blocks blocks{block_count, targets.first, (targets.last - targets.first) / static_cast<float>(block_count)};
  const std::vector<float> table = tabulate(sources, blocks, chebyshev[1].data());
  const Buckets buckets(targets, blocks);
  std::vector<float> ordered(targets.count);
  for (int64_t c = 0; c < kChannels; ++c) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      const float* at_nodes = &table[(b * kChannels + c) * kNodes];
      float coefficients[kNodes] = {};
      for (int64_t k = 0; k < kNodes; ++k) {
        for (int64_t r = 0; r < kNodes; ++r) coefficients[k] += at_nodes[r] * chebyshev[k][r];
        coefficients[k] *= (k == 0 ? 1.0f : 2.0f) / static_cast<float>(kNodes);
      }
      const int64_t begin = buckets.begin[b];
      chebyshev_series(coefficients, buckets.x.data() + begin, buckets.begin[b + 1] - begin, ordered.data() + begin);
    }
    for (int64_t i = 0; i < targets.count; ++i) sums.values[c][buckets.order[i]] = ordered[i];
  }
  for (int64_t b = 0; b < blocks.count; ++b) {
    const float exponent = sources.exponent(blocks.centre(b));
    for (int64_t i = buckets.begin[b]; i < buckets.begin[b + 1]; ++i) sums.exponents[buckets.order[i]] = exponent;
  }
}

template <int kChannels>
void exponential_sums(const Sources<kChannels>& sources, const Targets& targets, Sums<kChannels>& sums) {
  sums.resize(targets.count);
  const int64_t blocks = count_blocks(targets.last - targets.first, sources.magnitude, sources.count);
  if (blocks == 0) {
    sum_directly(sources, targets, sums);
  } else {
    sum_by_table(sources, targets, blocks, sums);
  }
}

}  // namespace cat_fast::scalar_attention
