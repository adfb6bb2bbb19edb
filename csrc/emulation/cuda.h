// Runs CUDA C++ on CPU threads, for tests: one thread a CUDA thread, the blocks of a grid one after another.
//
// It knows what this project's kernels use (static shared memory, __syncthreads, full-warp shuffles) and has no
// notion of speed. Built with -fsanitize=thread it reports a missing __syncthreads as a data race.
#pragma once

#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cat_fast::emulation {

constexpr unsigned kWarp = 32;

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  std::barrier<> barrier;
  std::array<float, kWarp> lanes;
};

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;

}  // namespace cat_fast::emulation

inline void __syncthreads() { cat_fast::emulation::block_barrier->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned lane = threadIdx.x % cat_fast::emulation::kWarp;
  cat_fast::emulation::Warp& warp = *cat_fast::emulation::warps[threadIdx.x / cat_fast::emulation::kWarp];
  warp.lanes[lane] = value;
  warp.barrier.arrive_and_wait();
  const float other = warp.lanes[lane ^ static_cast<unsigned>(mask)];
  warp.barrier.arrive_and_wait();
  return other;
}

inline float __expf(float x) { return std::exp(x); }

namespace cat_fast {

// Blocks are one-dimensional and of whole warps. Threads are started once and walk the blocks together.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, Arguments... arguments) {
  gridDim = grid;
  blockDim = block;
  emulation::block_barrier = std::make_unique<std::barrier<>>(block.x);
  emulation::warps.clear();
  for (unsigned i = 0; i < block.x / emulation::kWarp; ++i) {
    emulation::warps.push_back(std::make_unique<emulation::Warp>(emulation::kWarp));
  }
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) {
    threads.emplace_back([=] {
      threadIdx = dim3(thread);
      for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, z);
            kernel(arguments...);
            __syncthreads();  // shared memory belongs to the next block from here on
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cat_fast
