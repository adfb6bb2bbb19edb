// The CUDA kernels of attention with head dimension 1.
//
// As on the CPU (exponential_sums.h), sums over sources are computed at the Chebyshev nodes of blocks of targets and
// interpolated. Sources are not moved to nodes, since that would need sorting, while a GPU has arithmetic to
// spare. Tensors are (B, N, H); thread blocks process kHeads adjacent heads, so that memory is read in complete
// sectors. The number of blocks of a head is decided on the device (plan_heads); heads with too many are summed
// directly. Partial results are added in a fixed order, without atomics, so results are deterministic.
#pragma once

#include "scalar_attention/plan.cuh"

namespace cat_fast::scalar_attention {

constexpr int kNodes = 8;   // Chebyshev nodes of a block of targets
constexpr int kLanes = 32;  // a warp tabulates one head, with one block of targets per lane
static_assert(kThreads == kHeads * kLanes && kRows == kLanes);

// The sums to compute: their sources, their targets and the number of channels u_c. u_0 and u_1 are given per
// source s, and u_(c + 2) = s u_c.
struct Forward {
  static constexpr bool kFromKeys = true;
  static constexpr int kChannels = 2;
};
struct AtQueries {  // in backward
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

// Returns the exponent that is divided out of sums at a target: the largest possible one.
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
  const float target = plan.q.blocks > 0 ? plan.q.centre(plan.q.block_of(q)) : q;  // sets the exponent of Z
  return {q, exponent<AtQueries>(plan, target), tensors.dy_z[i], tensors.dy_z_q_y[i]};
}

template <typename Task, typename T>
__device__ __forceinline__ float target_at(const Tensors<T>& tensors, const Plan& plan, int64_t i) {
  return Task::kFromKeys ? to_float(tensors.q[i]) : to_float(tensors.k[i]) - plan.middle;
}

// Computes and writes the results at target i from its sums.
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

// Returns T_k at node r: cos(pi k (2 r + 1) / 16), by symmetry one of nine numbers.
__host__ __device__ constexpr float chebyshev_at_node(int k, int r) {
  constexpr float kCosines[] = {1.0f,         0.980785280f, 0.923879533f, 0.831469612f, 0.707106781f,
                                0.555570233f, 0.382683432f, 0.195090322f, 0.0f};
  const int angle = k * (2 * r + 1) % 32, half = angle > 16 ? 32 - angle : angle;
  return half > 8 ? -kCosines[16 - half] : kCosines[half];
}

// One value per node of a block, or one coefficient per degree; moved sixteen bytes at a time.
struct alignas(16) NodeValues {
  float values[kNodes];
};

// Computes the sums of a chunk of sources at the nodes, [sample][chunk][head][block][channel][node].
template <typename Task, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    tabulate(Cut cut, Tensors<T> tensors, const Plan* plans, NodeValues* partial_tables) {
  struct Terms {
    Source source;
    NodeValues powers;  // e^(node position)
  };
  __shared__ Terms terms[kHeads][kRows + 1];  // padded by one, so that heads use different banks
  constexpr int kChannels = Task::kChannels;
  const Place place(cut);
  const Plan* const group = plans + place.sample * cut.heads + static_cast<int64_t>(blockIdx.y) * kHeads;
  const int heads = cut.heads - static_cast<int64_t>(blockIdx.y) * kHeads < kHeads
                        ? static_cast<int>(cut.heads - static_cast<int64_t>(blockIdx.y) * kHeads)
                        : kHeads;
  int passes = 0;  // equal in all threads, for __syncthreads
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
      __syncthreads();  // all threads have read the previous tile
      const int64_t n = begin + place.row;
      Terms& filling = terms[place.column][place.row];
      filling.source = {};
      if (place.column < heads && n < place.end && targets_of<Task>(group[place.column]).blocks > 0) {
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
        partial_tables + (cut.partial(place.sample, blockIdx.x, head) * cut.max_blocks + block) * kChannels;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) table[c] = sums[c];
  }
}

// Computes the polynomials through the nodes, [sample][head][block][channel][degree], with one thread per block and
// channel. grid: (groups of heads, samples), thread blocks of kHeads rows of kLanes threads.
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
      const NodeValues part = partial_tables[cut.partial(sample, c, head) * cut.max_blocks * kChannels + i];
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
    coefficients[(sample * cut.heads + head) * cut.max_blocks * kChannels + i] = out;
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
  const NodeValues* const polynomials = coefficients + index * cut.max_blocks * kChannels;
  // 0 for blocks so narrow that their positions are equal, as the reciprocal would overflow.
  const float per_half_width = targets.width > 1e-30f ? 2.0f / targets.width : 0.0f;
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

// Computes the sums of heads without blocks, term by term.
template <typename Task, typename T>
__global__ void __launch_bounds__(kThreads) sum_directly(Cut cut, Tensors<T> tensors, const Plan* plans) {
  __shared__ Source sources[kHeads][kRows + 1];
  constexpr int kChannels = Task::kChannels;
  const Place place(cut);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kHeads;
  bool any = false;  // equal in all threads, for __syncthreads
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
      __syncthreads();  // all threads have read the previous tile
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
