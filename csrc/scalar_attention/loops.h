// The inner loops of exponential sums on the CPU, each over an entire head or tile.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "common/cpu_math.h"

namespace cat_fast::scalar_attention {

constexpr int64_t kNodes = 8;        // Chebyshev nodes per block
constexpr int64_t kLanes = 16;       // positions processed at once; blocks are padded to multiples of it
constexpr int64_t kSourceTile = 64;  // sources whose terms fit the L1 cache, summed first
constexpr int64_t kTargetTile = 32;  // targets that the direct sum processes at once

// Vectors without alignment, with one value per node or per position. They are explicit because for plain loops
// compilers would vectorise the surrounding loop and shuffle.
using NodeVector __attribute__((vector_size(kNodes * sizeof(float)), aligned(alignof(float)))) = float;
using LaneVector __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)))) = float;

CAT_FAST_INLINE const LaneVector& lanes(const float* values) { return *reinterpret_cast<const LaneVector*>(values); }

// `count` blocks of equal width. Their centres are stored, because recomputing them with another instruction set
// could change the last digit.
struct Blocks {
  int64_t count;
  float first, width;
  const float* centres;

  // 0 for blocks so narrow that their positions are equal, as the reciprocal would overflow.
  float per_width() const { return width > 1e-30f ? 1.0f / width : 0.0f; }
};

// Conversion of values at the nodes of a block to the polynomial sum over k of coefficients[k] * T_k(x):
// coefficients[k] = sum over r of node[r][k] * values[r]. `degree` is the transpose of `node`.
struct Basis {
  float node[kNodes][kNodes], degree[kNodes][kNodes];
};

// Statistics of values arranged in kColumns columns. special[i] is not 0 if column i has a non-finite value.
struct Columns {
  static constexpr int64_t kColumns = 32;
  float low[kColumns], high[kColumns], sum[kColumns];
  int32_t special[kColumns];

  // Adds a complete or partial row.
  CAT_FAST_INLINE void add(const float* __restrict x, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      low[i] = x[i] < low[i] ? x[i] : low[i];
      high[i] = x[i] > high[i] ? x[i] : high[i];
      sum[i] += x[i];
      special[i] |= (std::bit_cast<int32_t>(x[i]) & 0x7f800000) == 0x7f800000 ? 1 : 0;
    }
  }
};

CAT_FAST_INLINE Columns columns_of(const float* __restrict x, int64_t count) {
  Columns columns = {};
  std::fill_n(columns.low, Columns::kColumns, std::numeric_limits<float>::infinity());
  std::fill_n(columns.high, Columns::kColumns, -std::numeric_limits<float>::infinity());
  const int64_t whole = count / Columns::kColumns * Columns::kColumns;
  for (int64_t i = 0; i < whole; i += Columns::kColumns) columns.add(x + i, Columns::kColumns);
  columns.add(x + whole, count - whole);
  return columns;
}

// values[i] -= offset
CAT_FAST_INLINE void subtract(float* values, float offset, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] -= offset;
}

// Finds the block that contains each position.
CAT_FAST_INLINE void find_blocks(const float* __restrict positions, int64_t count, Blocks blocks,
                                 int32_t* __restrict block) {
  const float first = blocks.first, per_width = blocks.per_width();
  const auto last = static_cast<int32_t>(blocks.count - 1);
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<int32_t>((positions[i] - first) * per_width);
    block[i] = std::min(std::max(index, 0), last);
  }
}

// Moves the sources of every block to its nodes. With two values per source, u_0 = u and u_1 = w,
//   at_nodes[c][b][r] = sum over j of L_r(x_j) u_c(j),
// where L_r is the polynomial that is 1 at node r and 0 at the others. The sum of u_c(j) f(x_j) then equals that of
// at_nodes[c][b][r] f(x_r), up to the interpolation error of f.
CAT_FAST_INLINE void gather_at_nodes(Blocks blocks, const int32_t* __restrict begin, const float* __restrict positions,
                                     const float* __restrict u, const float* __restrict w, const Basis& basis,
                                     float* __restrict at_nodes) {
  const float scale = 2.0f * blocks.per_width();
  for (int64_t b = 0; b < blocks.count; ++b) {
    const float centre = blocks.centres[b];
    LaneVector sums[2 * kNodes] = {};  // sums of u_c T_k
    for (int64_t i = begin[b]; i < begin[b + 1]; i += kLanes) {
      const LaneVector u_i = lanes(u + i), w_i = lanes(w + i);
      const LaneVector x = (lanes(positions + i) - centre) * scale, twice = x + x;
      LaneVector before = LaneVector{} + 1.0f, here = x;
      sums[0] += u_i;
      sums[kNodes] += w_i;
      for (int64_t k = 1; k < kNodes; ++k) {
        sums[k] += u_i * here;
        sums[kNodes + k] += w_i * here;
        const LaneVector next = twice * here - before;
        before = here;
        here = next;
      }
    }
    // Horizontal sums of the sixteen vectors, as one vector: pairs of vectors are merged, halving each sum's terms.
    for (int64_t i = 0; i < 8; ++i) {
      const LaneVector p = sums[i], q = sums[i + 8];
      sums[i] = __builtin_shufflevector(p, q, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(p, q, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int64_t i = 0; i < 4; ++i) {
      const LaneVector p = sums[i], q = sums[i + 4];
      sums[i] = __builtin_shufflevector(p, q, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                __builtin_shufflevector(p, q, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    for (int64_t i = 0; i < 2; ++i) {
      const LaneVector p = sums[i], q = sums[i + 2];
      sums[i] = __builtin_shufflevector(p, q, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                __builtin_shufflevector(p, q, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const LaneVector p = sums[0], q = sums[1];
    float moments[2 * kNodes];
    *reinterpret_cast<LaneVector*>(moments) =
        __builtin_shufflevector(p, q, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(p, q, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int64_t c = 0; c < 2; ++c) {
      NodeVector value = {};
      for (int64_t k = 0; k < kNodes; ++k) {
        value += *reinterpret_cast<const NodeVector*>(basis.degree[k]) * moments[c * kNodes + k];
      }
      *reinterpret_cast<NodeVector*>(at_nodes + (c * blocks.count + b) * kNodes) = value;
    }
  }
}

// weights[j] = e^(target (positions[j] + residuals[j]) - offsets[j] - exponent); the residuals are small.
CAT_FAST_INLINE void source_weights(const float* __restrict positions, const float* __restrict residuals,
                                    const float* __restrict offsets, float target, float exponent, int64_t count,
                                    float* __restrict weights) {
  for (int64_t j = 0; j < count; ++j) {
    weights[j] = exponential((target * positions[j] - (exponent + offsets[j])) + target * residuals[j]);
  }
}

// terms[j][c][r] = e^(node[r] s_j) * u_c(j), where s_j = positions[j] + residuals[j], u_0 and u_1 are given, and
// u_(c + 2) = s u_c.
template <int kChannels>
CAT_FAST_INLINE void node_terms(const float* __restrict positions, const float* __restrict residuals,
                                const float* __restrict u, const float* __restrict w, const float* __restrict nodes,
                                int64_t count, float* __restrict terms) {
  float powers[kSourceTile * kNodes];
  const NodeVector node = *reinterpret_cast<const NodeVector*>(nodes);
  NodeVector* const power = reinterpret_cast<NodeVector*>(powers);
  NodeVector* __restrict row = reinterpret_cast<NodeVector*>(terms);
  for (int64_t j = 0; j < count; ++j) power[j] = node * (positions[j] + residuals[j]);
  for (int64_t i = 0; i < count * kNodes; ++i) powers[i] = exponential(powers[i]);
  for (int64_t j = 0; j < count; ++j) {
    const float s = positions[j] + residuals[j];
    const float values[] = {u[j], w[j], s * u[j], s * w[j]};
    for (int64_t c = 0; c < kChannels; ++c) *row++ = power[j] * values[c];
  }
}

// table[c][r] += sum over j of weights[j] * terms[j][c][r]; with four independent sums to hide the latency of
// additions.
template <int kChannels>
CAT_FAST_INLINE void add_weighted(const float* __restrict weights, const float* __restrict terms, int64_t count,
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

// sums[c][i] = the polynomial through table[block][c] at position i of the block, by Clenshaw's recurrence.
template <int kChannels>
CAT_FAST_INLINE void interpolate(Blocks blocks, const int32_t* __restrict begin, const float* __restrict positions,
                                 const float* __restrict table, const Basis& basis, float* const* sums) {
  const float scale = 2.0f * blocks.per_width();
  for (int64_t b = 0; b < blocks.count; ++b) {
    const float centre = blocks.centres[b];
    float coefficients[kChannels][kNodes];
    for (int64_t c = 0; c < kChannels; ++c) {
      NodeVector coefficient = {};
      for (int64_t r = 0; r < kNodes; ++r) {
        coefficient += *reinterpret_cast<const NodeVector*>(basis.node[r]) * table[(b * kChannels + c) * kNodes + r];
      }
      *reinterpret_cast<NodeVector*>(coefficients[c]) = coefficient;
    }
    for (int64_t i = begin[b]; i < begin[b + 1]; i += kLanes) {
      const LaneVector x = (lanes(positions + i) - centre) * scale, twice = x + x;
      for (int64_t c = 0; c < kChannels; ++c) {
        LaneVector next = {}, here = LaneVector{} + coefficients[c][kNodes - 1];
        for (int64_t k = kNodes - 2; k > 0; --k) {
          const LaneVector previous = twice * here - next + coefficients[c][k];
          next = here;
          here = previous;
        }
        *reinterpret_cast<LaneVector*>(sums[c] + i) = x * here - next + coefficients[c][0];
      }
    }
  }
}

// sums[c][i] += sum over j of e^(targets[i] s_j - offsets[j] - exponents[i]) * u_c(j), for kTargetTile targets and
// channels as in node_terms
template <int kChannels>
CAT_FAST_INLINE void add_direct(const float* __restrict positions, const float* __restrict offsets,
                                const float* __restrict u, const float* __restrict w, int64_t count,
                                const float* __restrict targets, const float* __restrict exponents,
                                float* __restrict sums) {
  float partial[kChannels * kTargetTile] = {};
  for (int64_t j = 0; j < count; ++j) {
    const float values[] = {u[j], w[j], positions[j] * u[j], positions[j] * w[j]};
    for (int64_t i = 0; i < kTargetTile; ++i) {
      const float weight = exponential(targets[i] * positions[j] - (exponents[i] + offsets[j]));
      for (int64_t c = 0; c < kChannels; ++c) partial[c * kTargetTile + i] += weight * values[c];
    }
  }
  for (int64_t i = 0; i < kChannels * kTargetTile; ++i) sums[i] += partial[i];
}

}  // namespace cat_fast::scalar_attention
