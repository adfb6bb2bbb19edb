// The inner loops of exponential sums on the CPU: each walks plain arrays, so that compilers vectorise it.
#pragma once

#include <bit>
#include <cstdint>

#include "common/cpu_math.h"

namespace cat_fast::scalar_attention {

constexpr int64_t kNodes = 8;        // Chebyshev nodes of a block of targets
constexpr int64_t kSourceTile = 64;  // sources whose terms are held in the L1 cache, and whose sum is taken first
constexpr int64_t kTargetTile = 32;  // targets that the direct sum works on at once

// The range and the sum of each of `width` columns, to be initialised by the caller. special[i] becomes non-zero
// where a value is not finite.
CAT_FAST_CLONES inline void add_statistics(const float* __restrict x, int64_t rows, int64_t width,
                                           float* __restrict low, float* __restrict high, float* __restrict sum,
                                           int32_t* __restrict special) {
  for (int64_t row = 0; row < rows; ++row, x += width) {
    for (int64_t i = 0; i < width; ++i) {
      low[i] = x[i] < low[i] ? x[i] : low[i];
      high[i] = x[i] > high[i] ? x[i] : high[i];
      sum[i] += x[i];
      special[i] |= (std::bit_cast<int32_t>(x[i]) & 0x7f800000) == 0x7f800000 ? 1 : 0;
    }
  }
}

// values[i] -= offset
CAT_FAST_CLONES inline void subtract(float* values, float offset, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] -= offset;
}

// weights[j] = e^(target * positions[j] - offsets[j] - exponent)
CAT_FAST_CLONES inline void source_weights(const float* __restrict positions, const float* __restrict offsets,
                                           float target, float exponent, int64_t count, float* __restrict weights) {
  for (int64_t j = 0; j < count; ++j) {
    weights[j] = exponential(target * positions[j] - (exponent + offsets[j]));
  }
}

// One value a node, in a register; may lie anywhere in memory. Loops over nodes are written with it because
// compilers would rather vectorise the loop around them, and shuffle.
using NodeVector __attribute__((vector_size(kNodes * sizeof(float)), aligned(alignof(float)))) = float;

// terms[j][c][r] = e^(node[r] * positions[j]) * values[c][j]
template <int kChannels>
CAT_FAST_CLONES void node_terms(const float* __restrict positions, const float* const* values,
                                const float* __restrict nodes, int64_t count, float* __restrict terms) {
  float powers[kSourceTile * kNodes];
  const NodeVector node = *reinterpret_cast<const NodeVector*>(nodes);
  NodeVector* const power = reinterpret_cast<NodeVector*>(powers);
  NodeVector* __restrict row = reinterpret_cast<NodeVector*>(terms);
  for (int64_t j = 0; j < count; ++j) power[j] = node * positions[j];
  for (int64_t i = 0; i < count * kNodes; ++i) powers[i] = exponential(powers[i]);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = 0; c < kChannels; ++c) *row++ = power[j] * values[c][j];
  }
}

// table[c][r] += sum over j of weights[j] * terms[j][c][r]; four sums at once because an
// addition waits for the one before it.
template <int kChannels>
CAT_FAST_CLONES void add_weighted(const float* __restrict weights, const float* __restrict terms, int64_t count,
                                  float* __restrict table) {
  constexpr int64_t kWays = 4;
  const NodeVector* __restrict rows = reinterpret_cast<const NodeVector*>(terms);
  NodeVector* __restrict totals = reinterpret_cast<NodeVector*>(table);
  NodeVector sums[kWays][kChannels] = {};
  int64_t j = 0;
  for (; j + kWays <= count; j += kWays) {
    for (int64_t way = 0; way < kWays; ++way) {
      for (int64_t c = 0; c < kChannels; ++c) sums[way][c] += weights[j + way] * rows[(j + way) * kChannels + c];
    }
  }
  for (; j < count; ++j) {
    for (int64_t c = 0; c < kChannels; ++c) sums[0][c] += weights[j] * rows[j * kChannels + c];
  }
  for (int64_t c = 0; c < kChannels; ++c) totals[c] += (sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]);
}

// sums[i] = sum over k of coefficients[k] * T_k(x[i]), by Clenshaw's recurrence; x in [-1, 1]
CAT_FAST_CLONES inline void chebyshev_series(const float* __restrict coefficients, const float* __restrict x,
                                             int64_t count, float* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) {
    const float twice = 2.0f * x[i];
    float next = 0.0f, here = coefficients[kNodes - 1];
    for (int64_t k = kNodes - 2; k > 0; --k) {
      const float previous = twice * here - next + coefficients[k];
      next = here;
      here = previous;
    }
    sums[i] = x[i] * here - next + coefficients[0];
  }
}

// sums[c][i] += sum over j of e^(targets[i] * positions[j] - offsets[j] - exponents[i]) * values[c][j], for
// kTargetTile targets
template <int kChannels>
CAT_FAST_CLONES void add_direct(const float* __restrict positions, const float* __restrict offsets,
                                const float* const* values, int64_t count, const float* __restrict targets,
                                const float* __restrict exponents, float* __restrict sums) {
  float partial[kChannels * kTargetTile] = {};
  for (int64_t j = 0; j < count; ++j) {
    float value[kChannels];
    for (int64_t c = 0; c < kChannels; ++c) value[c] = values[c][j];
    for (int64_t i = 0; i < kTargetTile; ++i) {
      const float weight = exponential(targets[i] * positions[j] - (exponents[i] + offsets[j]));
      for (int64_t c = 0; c < kChannels; ++c) partial[c * kTargetTile + i] += weight * value[c];
    }
  }
  for (int64_t i = 0; i < kChannels * kTargetTile; ++i) sums[i] += partial[i];
}

}  // namespace cat_fast::scalar_attention
