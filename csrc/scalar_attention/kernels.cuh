// The CUDA kernels of attention with heads of one dimension.
//
// Sums over sources are taken at the Chebyshev nodes of blocks of targets and interpolated, as on the CPU
// (exponential_sums.h), except that sources stay where they are: a GPU has arithmetic to spare, but would have to
// sort. Tensors are (B, N, H); thread blocks take kHeads neighbouring heads at a time, so that memory is read by
// whole sectors. How many blocks a head has is decided on the device (plan_heads); heads with too many are summed
// directly. Partial results are added in a fixed order: no atomics, so that two runs agree to the bit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/bfloat16.h"
#include "common/float16.h"
#include "common/launch.cuh"

namespace cat_fast::scalar_attention {

constexpr int kThreads = 256;
constexpr int kHeads = 8;                    // neighbouring heads of a thread block
constexpr int kRows = kThreads / kHeads;     // positions that it takes at once
constexpr int kNodes = 8;                    // Chebyshev nodes of a block of targets
constexpr float kReach = 0.8f;               // |target - centre| |source| is at most this
constexpr int kMaxBlocks = 128;              // bounds the tables' memory
constexpr int kLanes = 32;                   // a warp tabulates one head, a block of targets a lane
static_assert(kThreads == kHeads * kLanes && kRows == kLanes);

// How the work is cut: `chunk` positions, a multiple of kRows, for each thread block.
struct Cut {
  int64_t batch, count, heads;
  int64_t chunk, chunks;
  int most_blocks;  // of a head: what tables have room for

  __host__ __device__ int64_t partials() const { return batch * chunks * heads; }
  // Position n of head h in a tensor; where head h of chunk c keeps its partial results.
  __host__ __device__ int64_t at(int64_t b, int64_t n, int64_t h) const { return (b * count + n) * heads + h; }
  __host__ __device__ int64_t partial(int64_t b, int64_t c, int64_t h) const { return (b * chunks + c) * heads + h; }
};

// The blocks of equal width that positions are divided into; none if there would be too many.
struct Partition {
  float low, width, magnitude;  // the largest |position|
  int blocks;

  // The same number in every kernel, hence the explicit fused multiplication.
  __device__ float centre(int block) const { return fmaf(static_cast<float>(block) + 0.5f, width, low); }
  __device__ int block_of(float position) const {
    const int block = width > 0 ? static_cast<int>((position - low) / width) : 0;
    return block < 0 ? 0 : block < blocks ? block : blocks - 1;
  }
};

// What a head's sums need to know of its inputs. Keys are taken from `middle`, and values from `mean`.
struct Plan {
  Partition q, k;
  float middle, mean;
  int finite;
};

template <typename T>
struct Tensors {
  const T *q, *k, *v, *dy;
  T *y, *dq, *dk, *dv;
  float *dy_z, *dy_z_q_y;  // of each query: dy / Z, without the exponent of Z, and that times q y
};

// The sums to take: from which sources, at which targets, of how many channels u_c. u_0 and u_1 come with a source
// s, and u_(c + 2) = s u_c.
struct Forward {
  static constexpr bool kFromKeys = true;
  static constexpr int kChannels = 2;
};
struct AtQueries {  // for backward
  static constexpr bool kFromKeys = true;
  static constexpr int kChannels = 4;
};
struct AtKeys {
  static constexpr bool kFromKeys = false;
  static constexpr int kChannels = 3;
};

template <typename Task>
__device__ __forceinline__ const Partition& targets_of(const Plan& plan) {
  return Task::kFromKeys ? plan.q : plan.k;
}

// The exponent that is divided out of sums at a target: the largest there may be.
template <typename Task>
__device__ __forceinline__ float exponent(const Plan& plan, float target) {
  return Task::kFromKeys ? fabsf(target) * plan.k.magnitude : 0.0f;
}

struct alignas(16) Source {
  float position, offset, u, w;
};

template <typename Task, typename T>
__device__ __forceinline__ Source source_at(const Tensors<T>& tensors, const Plan& plan, int64_t i) {
  if (Task::kFromKeys) return {to_float(tensors.k[i]) - plan.middle, 0.0f, 1.0f, to_float(tensors.v[i]) - plan.mean};
  const float q = to_float(tensors.q[i]);
  const float target = plan.q.blocks > 0 ? plan.q.centre(plan.q.block_of(q)) : q;  // what Z's exponent is of
  return {q, exponent<AtQueries>(plan, target), tensors.dy_z[i], tensors.dy_z_q_y[i]};
}

template <typename Task, typename T>
__device__ __forceinline__ float target_at(const Tensors<T>& tensors, const Plan& plan, int64_t i) {
  return Task::kFromKeys ? to_float(tensors.q[i]) : to_float(tensors.k[i]) - plan.middle;
}

// Writes what follows from the sums at target i.
template <typename Task, typename T>
__device__ __forceinline__ void finish(const Tensors<T>& tensors, const Plan& plan, int64_t i, float target,
                                       const float (&sums)[Task::kChannels]) {
  if constexpr (Task::kChannels == 2) {
    tensors.y[i] = from_float<T>(plan.mean + sums[1] / sums[0]);
  } else if constexpr (Task::kChannels == 4) {
    const float per_z = 1.0f / sums[0], dy = to_float(tensors.dy[i]), y = sums[1] * per_z;
    tensors.dq[i] = from_float<T>(dy * (sums[3] * per_z - y * (sums[2] * per_z)));
    tensors.dy_z[i] = dy * per_z;
    tensors.dy_z_q_y[i] = dy * per_z * target * y;
  } else {
    tensors.dk[i] = from_float<T>((to_float(tensors.v[i]) - plan.mean) * sums[2] - sums[1]);
    tensors.dv[i] = from_float<T>(sums[0]);
  }
}

template <typename Task, typename T>
__device__ __forceinline__ void finish_with_nan(const Tensors<T>& tensors, int64_t i) {
  const T nan = from_float<T>(NAN);
  if constexpr (Task::kChannels == 2) {
    tensors.y[i] = nan;
  } else if constexpr (Task::kChannels == 4) {
    tensors.dq[i] = nan;
  } else {
    tensors.dk[i] = tensors.dv[i] = nan;
  }
}

// The head, the row and the positions that a thread works on where blocks are kRows rows of kHeads heads;
// grid: (chunks, groups of kHeads heads, samples).
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

// Ranges of q and k, the sum of v, and whether all is finite, of one head: of a thread's, of a chunk's positions.
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

__device__ inline Partition partition(float low, float high, float other_magnitude, int most) {
  const float blocks = fmaxf(1.0f, ceilf((high - low) * other_magnitude / (2.0f * kReach)));
  const int count = blocks <= static_cast<float>(most) ? static_cast<int>(blocks) : 0;  // 0 too if it overflows
  return {low, count > 0 ? (high - low) / static_cast<float>(count) : 0.0f, fmaxf(fabsf(low), fabsf(high)), count};
}

// A thread a head.
__global__ void __launch_bounds__(kThreads) plan_heads(Cut cut, const Range* ranges, Plan* plans) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= cut.batch * cut.heads) return;
  const int64_t sample = index / cut.heads, head = index % cut.heads;
  Range range = ranges[cut.partial(sample, 0, head)];
  for (int64_t c = 1; c < cut.chunks; ++c) range.add(ranges[cut.partial(sample, c, head)]);
  const float middle = 0.5f * range.k_low + 0.5f * range.k_high;
  const float k_low = range.k_low - middle, k_high = range.k_high - middle;
  const int most = cut.count / 2 < cut.most_blocks ? static_cast<int>(cut.count / 2) : cut.most_blocks;
  const float q_magnitude = fmaxf(fabsf(range.q_low), fabsf(range.q_high));
  const float k_magnitude = fmaxf(fabsf(k_low), fabsf(k_high));
  plans[index] = {partition(range.q_low, range.q_high, k_magnitude, most),
                  partition(k_low, k_high, q_magnitude, most), middle,
                  range.v_sum / static_cast<float>(cut.count), range.finite};
}

// T_k at node r: cos(pi k (2 r + 1) / 16), by symmetry one of nine numbers.
__host__ __device__ constexpr float chebyshev_at_node(int k, int r) {
  constexpr float kCosines[] = {1.0f,         0.980785280f, 0.923879533f, 0.831469612f, 0.707106781f,
                                0.555570233f, 0.382683432f, 0.195090322f, 0.0f};
  const int angle = k * (2 * r + 1) % 32, half = angle > 16 ? 32 - angle : angle;
  return half > 8 ? -kCosines[16 - half] : kCosines[half];
}

// A value for each node of a block, or a coefficient for each degree: moved sixteen bytes at a time.
struct alignas(16) NodeValues {
  float values[kNodes];
};

// Sums of a chunk of sources at the nodes, [sample][chunk][head][block][channel][node].
template <typename Task, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    tabulate(Cut cut, Tensors<T> tensors, const Plan* plans, NodeValues* partial_tables) {
  struct Terms {
    Source source;
    NodeValues powers;  // e^(node position)
  };
  __shared__ Terms terms[kHeads][kRows + 1];  // one more: heads then lie in different banks
  constexpr int kChannels = Task::kChannels;
  const Place place(cut);
  const Plan* const group = plans + place.sample * cut.heads + static_cast<int64_t>(blockIdx.y) * kHeads;
  const int heads = cut.heads - static_cast<int64_t>(blockIdx.y) * kHeads < kHeads
                        ? static_cast<int>(cut.heads - static_cast<int64_t>(blockIdx.y) * kHeads)
                        : kHeads;
  int passes = 0;  // alike in all threads, for __syncthreads
  for (int h = 0; h < heads; ++h) {
    const int needed = (targets_of<Task>(group[h]).blocks + kLanes - 1) / kLanes;
    passes = needed > passes ? needed : passes;
  }
  const int mine = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int pass = 0; pass < passes; ++pass) {
    const int block = pass * kLanes + lane;
    const bool active = mine < heads && block < targets_of<Task>(group[mine]).blocks;
    const float centre = active ? targets_of<Task>(group[mine]).centre(block) : 0.0f;
    const float scale = active ? exponent<Task>(group[mine], centre) : 0.0f;
    NodeValues sums[kChannels] = {};
    for (int64_t begin = place.begin; begin < place.end; begin += kRows) {
      __syncthreads();  // the last tile's readers are done
      const int64_t n = begin + place.row;
      Terms& filling = terms[place.column][place.row];
      filling.source = {};
      if (place.column < heads && n < place.end) {
        const Plan& plan = group[place.column];
        filling.source = source_at<Task>(tensors, plan, cut.at(place.sample, n, place.head));
        const float reach = 0.5f * targets_of<Task>(plan).width * filling.source.position;
#pragma unroll
        for (int r = 0; r < kNodes; ++r) filling.powers.values[r] = __expf(chebyshev_at_node(1, r) * reach);
      }
      __syncthreads();
      const int filled = place.end - begin < kRows ? static_cast<int>(place.end - begin) : kRows;
      for (int j = 0; active && j < filled; ++j) {
        const Terms term = terms[mine][j];
        const Source& s = term.source;
        const float weight = __expf(fmaf(centre, s.position, -(scale + s.offset)));
        const float values[] = {weight * s.u, weight * s.w, weight * s.u * s.position, weight * s.w * s.position};
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int r = 0; r < kNodes; ++r) sums[c].values[r] += values[c] * term.powers.values[r];
        }
      }
    }
    if (!active) continue;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * kHeads + mine;
    NodeValues* const table =
        partial_tables + (cut.partial(place.sample, blockIdx.x, head) * cut.most_blocks + block) * kChannels;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) table[c] = sums[c];
  }
}

// The polynomials through the nodes, [sample][head][block][channel][degree]; a thread a block. grid: (groups of
// heads, samples), blocks of kHeads rows of kLanes threads.
template <typename Task>
__global__ void __launch_bounds__(kThreads)
    find_coefficients(Cut cut, const Plan* plans, const NodeValues* partial_tables, NodeValues* coefficients) {
  constexpr int kChannels = Task::kChannels;
  const int64_t sample = blockIdx.y, head = static_cast<int64_t>(blockIdx.x) * kHeads + threadIdx.x / kLanes;
  if (head >= cut.heads) return;
  const int blocks = targets_of<Task>(plans[sample * cut.heads + head]).blocks;
  for (int i = threadIdx.x % kLanes; i < blocks * kChannels; i += kLanes) {
    NodeValues at_nodes = {}, out;
    for (int64_t c = 0; c < cut.chunks; ++c) {
      const NodeValues part = partial_tables[cut.partial(sample, c, head) * cut.most_blocks * kChannels + i];
#pragma unroll
      for (int r = 0; r < kNodes; ++r) at_nodes.values[r] += part.values[r];
    }
#pragma unroll
    for (int k = 0; k < kNodes; ++k) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < kNodes; ++r) sum += chebyshev_at_node(k, r) * at_nodes.values[r];
      out.values[k] = sum * ((k == 0 ? 1.0f : 2.0f) / kNodes);
    }
    coefficients[(sample * cut.heads + head) * cut.most_blocks * kChannels + i] = out;
  }
}

// Evaluates the polynomials at the targets by Clenshaw's recurrence.
template <typename Task, typename T>
__global__ void __launch_bounds__(kThreads)
    interpolate(Cut cut, Tensors<T> tensors, const Plan* plans, const NodeValues* coefficients) {
  constexpr int kChannels = Task::kChannels;
  const Place place(cut);
  if (place.head >= cut.heads) return;
  const int64_t index = place.sample * cut.heads + place.head;
  const Plan plan = plans[index];
  const Partition targets = targets_of<Task>(plan);
  const NodeValues* const polynomials = coefficients + index * cut.most_blocks * kChannels;
  const float per_half_width = targets.width > 0 ? 2.0f / targets.width : 0.0f;
  for (int64_t n = place.begin + place.row; n < place.end; n += kRows) {
    const int64_t i = cut.at(place.sample, n, place.head);
    if (!plan.finite) {
      finish_with_nan<Task>(tensors, i);
    } else if (targets.blocks > 0) {
      const float target = target_at<Task>(tensors, plan, i);
      const int block = targets.block_of(target);
      const float x = (target - targets.centre(block)) * per_half_width;
      float sums[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const NodeValues p = polynomials[block * kChannels + c];
        float next = 0, here = p.values[kNodes - 1];
#pragma unroll
        for (int k = kNodes - 2; k > 0; --k) {
          const float previous = 2.0f * x * here - next + p.values[k];
          next = here;
          here = previous;
        }
        sums[c] = x * here - next + p.values[0];
      }
      finish<Task>(tensors, plan, i, target, sums);
    }
  }
}

// The sums of heads without blocks, term by term.
template <typename Task, typename T>
__global__ void __launch_bounds__(kThreads) sum_directly(Cut cut, Tensors<T> tensors, const Plan* plans) {
  __shared__ Source sources[kHeads][kRows + 1];
  constexpr int kChannels = Task::kChannels;
  const Place place(cut);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kHeads;
  bool any = false;  // alike in all threads, for __syncthreads
  for (int64_t h = first; h < first + kHeads && h < cut.heads; ++h) {
    const Plan& plan = plans[place.sample * cut.heads + h];
    any = any || (plan.finite && targets_of<Task>(plan).blocks == 0);
  }
  if (!any) return;
  const bool real = place.head < cut.heads;
  const Plan plan = plans[place.sample * cut.heads + (real ? place.head : first)];
  const bool mine = real && plan.finite && targets_of<Task>(plan).blocks == 0;
  for (int64_t begin = place.begin; begin < place.end; begin += kRows) {
    const int64_t n = begin + place.row;
    const bool active = mine && n < place.end;
    const float target = active ? target_at<Task>(tensors, plan, cut.at(place.sample, n, place.head)) : 0.0f;
    const float scale = exponent<Task>(plan, target);
    float sums[kChannels] = {};
    for (int64_t tile = 0; tile < cut.count; tile += kRows) {
      __syncthreads();  // the last tile's readers are done
      if (mine && tile + place.row < cut.count) {
        sources[place.column][place.row] =
            source_at<Task>(tensors, plan, cut.at(place.sample, tile + place.row, place.head));
      }
      __syncthreads();
      const int filled = cut.count - tile < kRows ? static_cast<int>(cut.count - tile) : kRows;
      for (int j = 0; active && j < filled; ++j) {
        const Source s = sources[place.column][j];
        const float weight = __expf(fmaf(target, s.position, -(scale + s.offset)));
        const float values[] = {weight * s.u, weight * s.w, weight * s.u * s.position, weight * s.w * s.position};
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums[c] += values[c];
      }
    }
    if (active) finish<Task>(tensors, plan, cut.at(place.sample, n, place.head), target, sums);
  }
}

}  // namespace cat_fast::scalar_attention
