// Launches the CUDA kernels of attention with head dimension 1. Independent of torch; also compiles against the
// thread emulation.

#include "scalar_attention/cuda.h"

#include <algorithm>
#include <cstdint>

#include "scalar_attention/kernels.cuh"

namespace cat_fast::scalar_attention {
namespace {

constexpr int64_t kThreadBlocks = 1024;  // target per kernel: several per multiprocessor of a large GPU
constexpr int64_t kMaxChunks = 8;        // each chunk has its own tables
#ifndef CAT_FAST_SCRATCH_BYTES           // tests lower it
#define CAT_FAST_SCRATCH_BYTES (128 << 20)
#endif
constexpr int64_t kScratchBytes = CAT_FAST_SCRATCH_BYTES;  // samples that need more are processed in several passes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks depend only on the shape, never on the device, so results are deterministic.
Cut cut_of(const Shape& shape) {
  const int64_t groups = shape.batch * ceil_div(shape.heads, kHeads);
  const int64_t chunks = std::clamp<int64_t>(ceil_div(kThreadBlocks, groups), 1, kMaxChunks);
  const int64_t chunk = ceil_div(ceil_div(shape.count, chunks), kRows) * kRows;
  const int64_t max_blocks = std::clamp<int64_t>(shape.count / 2, 1, kMaxBlocks);
  return {shape.batch, shape.count, shape.heads, chunk, ceil_div(shape.count, chunk), static_cast<int>(max_blocks)};
}

// Layout of the scratch memory: its parts, one after another.
struct Workspace {
  NodeValues *coefficients, *tables;
  Plan* plans;
  Range* ranges;
  float *dy_z, *dy_z_q_y;
  int64_t floats = 0;

  Workspace(float* memory, const Cut& cut, bool backward) {
    const auto take = [&]<typename T>(T*& part, int64_t count) {
      part = reinterpret_cast<T*>(memory + floats);
      floats += ceil_div(count * sizeof(T), 16) * 4;  // parts start at multiples of 16 bytes
    };
    const int64_t channels = backward ? AtQueries::kChannels : Forward::kChannels;
    const int64_t in_backward = backward ? cut.batch * cut.count * cut.heads : 0;
    take(coefficients, cut.batch * cut.heads * cut.max_blocks * channels);
    take(tables, cut.partials() * cut.max_blocks * channels);
    take(plans, cut.batch * cut.heads);
    take(ranges, cut.partials());
    take(dy_z, in_backward);
    take(dy_z_q_y, in_backward);
  }
};

// Returns the cut of a pass: all samples, or as many as the scratch memory holds, at least one.
Cut cut_of_pass(Shape shape, bool backward) {
  while (shape.batch > 1 && Workspace(nullptr, cut_of(shape), backward).floats * 4 > kScratchBytes) {
    shape.batch = ceil_div(shape.batch, 2);
  }
  return cut_of(shape);
}

// Calls run(cut, workspace, offset) for each pass, whose samples start at `offset` in all tensors. All passes have
// the same chunks, so that none needs more memory than the first.
template <typename F>
void in_passes(const Shape& shape, bool backward, float* memory, const F& run) {
  Cut cut = cut_of_pass(shape, backward);
  const int64_t samples = cut.batch;
  for (int64_t first = 0; first < shape.batch; first += samples) {
    cut.batch = std::min(samples, shape.batch - first);
    run(cut, Workspace(memory, cut, backward), cut.at(first, 0, 0));
  }
}

template <typename Task, typename T>
void take_sums(const Cut& cut, const Tensors<T>& tensors, const Workspace& work, cudaStream_t stream) {
  const auto groups = static_cast<unsigned>(ceil_div(cut.heads, kHeads));
  const dim3 grid(cut.chunks, groups, cut.batch);
  launch(tabulate<Task, T>, grid, kThreads, stream, cut, tensors, work.plans, work.tables);
  launch(find_coefficients<Task>, dim3(groups, cut.batch), kThreads, stream, cut, work.plans,
         work.tables, work.coefficients);
  launch(interpolate<Task, T>, grid, kThreads, stream, cut, tensors, work.plans, work.coefficients);
  launch(sum_directly<Task, T>, grid, kThreads, stream, cut, tensors, work.plans);
}

template <bool kBackward, typename T>
void plan(const Cut& cut, const Tensors<T>& tensors, const Workspace& work, cudaStream_t stream) {
  const dim3 grid(cut.chunks, ceil_div(cut.heads, kHeads), cut.batch);
  launch(find_ranges<T, kBackward>, grid, kThreads, stream, cut, tensors, work.ranges);
  launch(plan_heads, dim3(ceil_div(cut.batch * cut.heads, kThreads)), kThreads, stream, cut, work.ranges,
         work.plans);
}

template <typename F>
void dispatch(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat) {
    f.template operator()<float>();
  } else if (dtype == Dtype::kBFloat16) {
    f.template operator()<BFloat16>();
  } else {
    f.template operator()<Float16>();
  }
}

}  // namespace

int64_t workspace_size(const Shape& shape, bool backward) {
  return Workspace(nullptr, cut_of_pass(shape, backward), backward).floats;
}

void forward_cuda(Dtype dtype, const Shape& shape, const void* q, const void* k, const void* v, void* y,
                  float* workspace, void* stream) {
  in_passes(shape, false, workspace, [&](const Cut& cut, const Workspace& work, int64_t offset) {
    dispatch(dtype, [&]<typename T>() {
      const auto input = [&](const void* tensor) { return static_cast<const T*>(tensor) + offset; };
      const Tensors<T> tensors{.q = input(q), .k = input(k), .v = input(v), .y = static_cast<T*>(y) + offset};
      plan<false>(cut, tensors, work, static_cast<cudaStream_t>(stream));
      take_sums<Forward>(cut, tensors, work, static_cast<cudaStream_t>(stream));
    });
  });
}

void backward_cuda(Dtype dtype, const Shape& shape, const void* dy, const void* q, const void* k, const void* v,
                   void* dq, void* dk, void* dv, float* workspace, void* stream) {
  in_passes(shape, true, workspace, [&](const Cut& cut, const Workspace& work, int64_t offset) {
    dispatch(dtype, [&]<typename T>() {
      const auto input = [&](const void* tensor) { return static_cast<const T*>(tensor) + offset; };
      const auto output = [&](void* tensor) { return static_cast<T*>(tensor) + offset; };
      const Tensors<T> tensors{input(q),   input(k),   input(v),   input(dy), nullptr,
                               output(dq), output(dk), output(dv), work.dy_z, work.dy_z_q_y};
      plan<true>(cut, tensors, work, static_cast<cudaStream_t>(stream));
      take_sums<AtQueries>(cut, tensors, work, static_cast<cudaStream_t>(stream));
      take_sums<AtKeys>(cut, tensors, work, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace cat_fast::scalar_attention
