// Building blocks of attention on the CPU: products of small matrices, packing, and element-wise steps.
//
// Matrices are fp32 and row-major; rows start at multiples of 64 bytes if they are read as vectors. Scores are stored
// transposed, [key][query]: the softmax then runs down columns, and the lanes of a vector are queries, so no lanes
// are wasted on a head dimension such as 72.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/simd.h"

namespace cat_fast::varlen_attention {

constexpr int64_t kRowTile = 8;  // rows of products are multiples of this
constexpr int64_t kLanes = 16;   // widths of matrices that are read as vectors are multiples of this

// A matrix whose elements are broadcast: element (i, s) is data[i * row + s * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// c (+)= a b, with kRows x kVectors vectors of kWidth sums in registers.
template <int kWidth, int kRows, int kVectors>
CAT_FAST_INLINE void multiply_tiles(Left a, const float* b, int64_t b_row, int64_t rows, int64_t depth, float* c,
                                    int64_t c_row, bool accumulate) {
  using V = Vector<kWidth>;
  for (int64_t i = 0; i < rows; i += kRows, c += kRows * c_row) {
    V sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = accumulate ? load<kWidth>(c + r * c_row + v * kWidth) : V{};
    }
    const float* a_s = a.data + i * a.row;
    const float* b_s = b;
    for (int64_t s = 0; s < depth; ++s, a_s += a.column, b_s += b_row) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] += a_s[r * a.row] * load<kWidth>(b_s + v * kWidth);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums[r][v], c + r * c_row + v * kWidth);
    }
  }
}

// c (+)= a b: c is rows x width, a rows x depth, b depth x width; rows are a multiple of kRowTile, width of kLanes.
template <int kWidth>
CAT_FAST_INLINE void multiply(Left a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t width,
                              float* c, int64_t c_row, bool accumulate) {
  constexpr int kRows = kWidth == 16 ? 8 : 4;  // AVX-512 has twice the registers
  int64_t n = 0;
  for (; n + 2 * kWidth <= width; n += 2 * kWidth) {
    multiply_tiles<kWidth, kRows, 2>(a, b + n, b_row, rows, depth, c + n, c_row, accumulate);
  }
  for (; n < width; n += kWidth) {
    multiply_tiles<kWidth, kRows, 1>(a, b + n, b_row, rows, depth, c + n, c_row, accumulate);
  }
}

inline void multiply(Left a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t width, float* c,
                     int64_t c_row, bool accumulate) {
  CAT_FAST_DISPATCH(multiply<kWidth>)(a, b, b_row, rows, depth, width, c, c_row, accumulate);
}

// packed[i] = scale * source[i], with zeros in columns >= `width` and in rows >= `rows`.
template <typename T>
CAT_FAST_INLINE void pack_rows(const T* source, int64_t source_row, int64_t rows, int64_t width, float scale,
                               float* __restrict packed, int64_t packed_row, int64_t packed_rows) {
  for (int64_t i = 0; i < packed_rows; ++i, source += source_row, packed += packed_row) {
    const int64_t filled = i < rows ? width : 0;
    for (int64_t d = 0; d < filled; ++d) packed[d] = scale * to_float(source[d]);
    for (int64_t d = filled; d < packed_row; ++d) packed[d] = 0.0f;
  }
}

// target[i] = scale * packed[i]
template <typename T>
CAT_FAST_INLINE void unpack_rows(const float* __restrict packed, int64_t packed_row, int64_t rows, int64_t width,
                                 float scale, T* __restrict target, int64_t target_row) {
  for (int64_t i = 0; i < rows; ++i, packed += packed_row, target += target_row) {
    for (int64_t d = 0; d < width; ++d) target[d] = from_float<T>(scale * packed[d]);
  }
}

// to[j][i] = from[i][j]; rows and columns are multiples of 8. Eight rows are transposed by interleaving their upper
// and lower halves three times.
CAT_FAST_INLINE void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                               int64_t to_row) {
  using Eight = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Indices = int32_t __attribute__((vector_size(32)));
  constexpr Indices kLow = {0, 8, 1, 9, 2, 10, 3, 11}, kHigh = {4, 12, 5, 13, 6, 14, 7, 15};
  for (int64_t i = 0; i < rows; i += 8) {
    for (int64_t j = 0; j < columns; j += 8) {
      Eight x[8], y[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) x[r] = *reinterpret_cast<const Eight*>(from + (i + r) * from_row + j);
#pragma GCC unroll 3
      for (int round = 0; round < 3; ++round) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          y[2 * r] = __builtin_shuffle(x[r], x[r + 4], kLow);
          y[2 * r + 1] = __builtin_shuffle(x[r], x[r + 4], kHigh);
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) x[r] = y[r];
      }
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) *reinterpret_cast<Eight*>(to + (j + r) * to_row + i) = x[r];
    }
  }
}

// One step of the online softmax over a block of keys. Replaces scores[key][query] by e^(score - maximum), updates
// the queries' maxima and sums, and rescales outputs[d][query], the weighted sums so far.
template <int kWidth>
CAT_FAST_INLINE void softmax_step(float* scores, int64_t keys, int64_t width, bool first, float* maxima, float* sums,
                                  float* outputs, int64_t dim) {
  using V = Vector<kWidth>;
  for (int64_t n = 0; n < width; n += kWidth) {
    float* const column = scores + n;
    const V before = load<kWidth>(first ? column : maxima + n);
    V highest[4] = {before, before, before, before};  // four independent chains, to hide latency
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) highest[c] = maximum(highest[c], load<kWidth>(column + (j + c) * width));
    }
    for (; j < keys; ++j) highest[0] = maximum(highest[0], load<kWidth>(column + j * width));
    const V now = maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3]));
    V sum = {};
    for (j = 0; j < keys; ++j) {
      const V weight = exponential<kWidth>(load<kWidth>(column + j * width) - now);
      store(weight, column + j * width);
      sum += weight;
    }
    if (!first) {
      const V correction = exponential<kWidth>(before - now);
      sum += correction * load<kWidth>(sums + n);
      for (int64_t d = 0; d < dim; ++d) {
        float* const output = outputs + d * width + n;
        store<V>(correction * load<kWidth>(output), output);
      }
    }
    store(now, maxima + n);
    store(sum, sums + n);
  }
}

// outputs[d][query] /= sums[query]
template <int kWidth>
CAT_FAST_INLINE void normalize(float* outputs, int64_t dim, int64_t width, const float* sums) {
  using V = Vector<kWidth>;
  for (int64_t n = 0; n < width; n += kWidth) {
    const V inverse = 1.0f / load<kWidth>(sums + n);
    for (int64_t d = 0; d < dim; ++d) {
      float* const output = outputs + d * width + n;
      store<V>(inverse * load<kWidth>(output), output);
    }
  }
}

// Replaces scores[key][query] by the weights p = e^(score - lse), and dweights by dscores = p (dweight - delta).
template <int kWidth>
CAT_FAST_INLINE void softmax_backward(float* scores, float* dweights, int64_t keys, int64_t width, const float* lse,
                                      const float* delta) {
  using V = Vector<kWidth>;
  for (int64_t n = 0; n < width; n += kWidth) {
    const V shift = load<kWidth>(lse + n), mean = load<kWidth>(delta + n);
    for (int64_t j = 0; j < keys; ++j) {
      float* const score = scores + j * width + n;
      float* const gradient = dweights + j * width + n;
      const V weight = exponential<kWidth>(load<kWidth>(score) - shift);
      store(weight, score);
      store<V>(weight * (load<kWidth>(gradient) - mean), gradient);
    }
  }
}

// sums[i] = sum over d of a[i][d] b[i][d]; the width is a multiple of kLanes.
template <int kWidth>
CAT_FAST_INLINE void dot_rows(const float* a, const float* b, int64_t rows, int64_t width, float* sums) {
  for (int64_t i = 0; i < rows; ++i, a += width, b += width) {
    Vector<kWidth> total = {};
    for (int64_t d = 0; d < width; d += kWidth) total += load<kWidth>(a + d) * load<kWidth>(b + d);
    float sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) sum += total[lane];
    sums[i] = sum;
  }
}

}  // namespace cat_fast::varlen_attention
