// Work distribution of the CUDA kernels of attention with head dimension 1, and the plan of each head: the ranges
// of its inputs and the resulting blocks.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/bfloat16.h"
#include "common/float16.h"
#include "common/launch.cuh"

namespace cat_fast::scalar_attention {

constexpr int kThreads = 256;
constexpr int kHeads = 8;                 // adjacent heads per thread block
constexpr int kRows = kThreads / kHeads;  // positions that it processes at once
constexpr float kReach = 0.8f;            // |target - centre| |source| is at most this
constexpr int kMaxBlocks = 128;           // limits the tables' memory

// Partition of the work: `chunk` positions, a multiple of kRows, per thread block.
struct Cut {
  int64_t batch, count, heads;
  int64_t chunk, chunks;
  int max_blocks;  // of a head: the capacity of the tables

  __host__ __device__ int64_t partials() const { return batch * chunks * heads; }
  // Index of position n of head h in a tensor, and of the partial results of head h of chunk c.
  __host__ __device__ int64_t at(int64_t b, int64_t n, int64_t h) const { return (b * count + n) * heads + h; }
  __host__ __device__ int64_t partial(int64_t b, int64_t c, int64_t h) const { return (b * chunks + c) * heads + h; }
};

// Division of positions into blocks of equal width; 0 blocks if there would be too many.
struct Partition {
  float low, width, magnitude;  // the largest |position|
  int blocks;

  // Explicit fmaf, so that all kernels compute the same bits.
  __device__ float centre(int block) const { return fmaf(static_cast<float>(block) + 0.5f, width, low); }
  __device__ int block_of(float position) const {
    const int block = width > 0 ? static_cast<int>((position - low) / width) : 0;
    return block < 0 ? 0 : block < blocks ? block : blocks - 1;
  }
};

// Parameters of a head's sums. Keys are shifted by `middle`, and values by `mean`.
struct Plan {
  Partition q, k;
  float middle, mean;
  int finite;
};

template <typename T>
struct Tensors {
  const T *q, *k, *v, *dy;
  T *y, *dq, *dk, *dv;
  float *dy_z, *dy_z_q_y;  // per query: dy / Z, without the exponent of Z, and that times q y
};

// The head, the row and the positions of a thread, in blocks of kRows rows of kHeads heads. grid: (chunks, groups
// of kHeads heads, samples)
struct Place {
  int64_t sample, head;
  int row, column;
  int64_t begin, end;  // the chunk's positions

  __device__ explicit Place(const Cut& cut)
      : sample(blockIdx.z),
        head(static_cast<int64_t>(blockIdx.y) * kHeads + threadIdx.x % kHeads),
        row(threadIdx.x / kHeads),
        column(threadIdx.x % kHeads),
        begin(blockIdx.x * cut.chunk),
        end(begin + cut.chunk < cut.count ? begin + cut.chunk : cut.count) {}
};

// Ranges of q and k, the sum of v and a flag for finite inputs, over a thread's or a chunk's positions of one head.
struct Range {
  float q_low, q_high, k_low, k_high, v_sum;
  int finite;

  __device__ void add(const Range& other) {
    q_low = fminf(q_low, other.q_low);
    q_high = fmaxf(q_high, other.q_high);
    k_low = fminf(k_low, other.k_low);
    k_high = fmaxf(k_high, other.k_high);
    v_sum += other.v_sum;
    finite &= other.finite;
  }
};

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads) find_ranges(Cut cut, Tensors<T> tensors, Range* ranges) {
  __shared__ Range rows[kThreads];
  const Place place(cut);
  Range range{FLT_MAX, -FLT_MAX, FLT_MAX, -FLT_MAX, 0.0f, 1};
  if (place.head < cut.heads) {
    for (int64_t n = place.begin + place.row; n < place.end; n += kRows) {
      const int64_t i = cut.at(place.sample, n, place.head);
      const float q = to_float(tensors.q[i]), k = to_float(tensors.k[i]), v = to_float(tensors.v[i]);
      float largest = fmaxf(fabsf(q), fmaxf(fabsf(k), fabsf(v)));
      bool nan = q != q || k != k || v != v;
      if (kBackward) {
        const float dy = to_float(tensors.dy[i]);
        largest = fmaxf(largest, fabsf(dy));
        nan = nan || dy != dy;
      }
      range.add({q, q, k, k, v, largest <= FLT_MAX && !nan ? 1 : 0});
    }
  }
  rows[threadIdx.x] = range;
  __syncthreads();
  if (place.row != 0 || place.head >= cut.heads) return;
  for (int row = 1; row < kRows; ++row) range.add(rows[row * kHeads + place.column]);
  ranges[cut.partial(place.sample, blockIdx.x, place.head)] = range;
}

__device__ inline Partition partition(float low, float high, float other_magnitude, int max_blocks) {
  const float blocks = fmaxf(1.0f, ceilf((high - low) * other_magnitude / (2.0f * kReach)));
  const int count = blocks <= static_cast<float>(max_blocks) ? static_cast<int>(blocks) : 0;  // 0 if it overflows
  return {low, count > 0 ? (high - low) / static_cast<float>(count) : 0.0f, fmaxf(fabsf(low), fabsf(high)), count};
}

// Plans all heads, with one thread per head.
__global__ void __launch_bounds__(kThreads) plan_heads(Cut cut, const Range* ranges, Plan* plans) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= cut.batch * cut.heads) return;
  const int64_t sample = index / cut.heads, head = index % cut.heads;
  Range range = ranges[cut.partial(sample, 0, head)];
  for (int64_t c = 1; c < cut.chunks; ++c) range.add(ranges[cut.partial(sample, c, head)]);
  const float middle = 0.5f * range.k_low + 0.5f * range.k_high;
  const float k_low = range.k_low - middle, k_high = range.k_high - middle;
  int max_blocks = cut.count / 2 < cut.max_blocks ? static_cast<int>(cut.count / 2) : cut.max_blocks;
  if (!range.finite) max_blocks = 0;  // skips the table
  const float q_magnitude = fmaxf(fabsf(range.q_low), fabsf(range.q_high));
  const float k_magnitude = fmaxf(fabsf(k_low), fabsf(k_high));
  plans[index] = {partition(range.q_low, range.q_high, k_magnitude, max_blocks),
                  partition(k_low, k_high, q_magnitude, max_blocks), middle,
                  range.v_sum / static_cast<float>(cut.count), range.finite};
}

}  // namespace cat_fast::scalar_attention
