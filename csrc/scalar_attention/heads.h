// Copies heads, which are interleaved in a tensor, to and from separate arrays: transposition in tiles.
#pragma once

#include <cstdint>

#include "common/cpu_math.h"

namespace cat_fast::scalar_attention {

constexpr int64_t kHeads = 16;  // heads read and written together: a cache line of fp32
constexpr int64_t kRows = 8;    // positions per tile

// Eight floats in a register.
using Row __attribute__((vector_size(kRows * sizeof(float)), aligned(alignof(float)))) = float;

// Transposes an 8 x 8 matrix by swapping off-diagonal blocks of 1 x 1, 2 x 2 and 4 x 4.
CAT_FAST_INLINE void transpose(Row (&rows)[kRows]) {
  Row half[kRows];
  for (int64_t i = 0; i < kRows; i += 2) {
    half[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    half[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int64_t i = 0; i < kRows; ++i) {
    if (i % 4 < 2) {
      rows[i] = __builtin_shufflevector(half[i], half[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      rows[i + 2] = __builtin_shufflevector(half[i], half[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int64_t i = 0; i < kRows / 2; ++i) {
    half[i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    half[i + 4] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int64_t i = 0; i < kRows; ++i) rows[i] = half[i];
}

// columns[h * pitch + n] = tensor[n * stride + h] for n < count and h < width <= kHeads
template <typename T>
CAT_FAST_INLINE void read_heads(const T* __restrict tensor, int64_t count, int64_t stride, int64_t width,
                                float* __restrict columns, int64_t pitch) {
  const int64_t tiled = width == kHeads ? count / kRows * kRows : 0;
  for (int64_t n = 0; n < tiled; n += kRows) {
    Row tile[kHeads / kRows][kRows];
    for (int64_t row = 0; row < kRows; ++row) {
      float values[kHeads];
      for (int64_t h = 0; h < kHeads; ++h) values[h] = to_float(tensor[(n + row) * stride + h]);
      for (int64_t part = 0; part < kHeads / kRows; ++part) {
        tile[part][row] = *reinterpret_cast<const Row*>(values + part * kRows);
      }
    }
    for (int64_t part = 0; part < kHeads / kRows; ++part) {
      transpose(tile[part]);
      float* const first = columns + part * kRows * pitch + n;
      for (int64_t h = 0; h < kRows; ++h) *reinterpret_cast<Row*>(first + h * pitch) = tile[part][h];
    }
  }
  for (int64_t n = tiled; n < count; ++n) {
    for (int64_t h = 0; h < width; ++h) columns[h * pitch + n] = to_float(tensor[n * stride + h]);
  }
}

// tensor[n * stride + h] = columns[h * pitch + n]
template <typename T>
CAT_FAST_INLINE void write_heads(const float* __restrict columns, int64_t pitch, int64_t count, int64_t stride,
                                 int64_t width, T* __restrict tensor) {
  const int64_t tiled = width == kHeads ? count / kRows * kRows : 0;
  for (int64_t n = 0; n < tiled; n += kRows) {
    float values[kRows][kHeads];
    for (int64_t part = 0; part < kHeads / kRows; ++part) {
      Row tile[kRows];
      const float* const first = columns + part * kRows * pitch + n;
      for (int64_t h = 0; h < kRows; ++h) tile[h] = *reinterpret_cast<const Row*>(first + h * pitch);
      transpose(tile);
      for (int64_t row = 0; row < kRows; ++row) *reinterpret_cast<Row*>(values[row] + part * kRows) = tile[row];
    }
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t h = 0; h < kHeads; ++h) tensor[(n + row) * stride + h] = from_float<T>(values[row][h]);
    }
  }
  for (int64_t n = tiled; n < count; ++n) {
    for (int64_t h = 0; h < width; ++h) tensor[n * stride + h] = from_float<T>(columns[h * pitch + n]);
  }
}

}  // namespace cat_fast::scalar_attention
