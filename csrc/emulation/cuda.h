// CUDA emulation for tests: runs CUDA C++ on the CPU with one fiber per CUDA thread, one block after another.
//
// It supports only what this project's kernels use: static shared memory, __syncthreads and full-warp shuffles.
// With -fsanitize=thread it reports a missing __syncthreads as a data race: the fibers take turns on one CPU
// thread, but ThreadSanitizer sees them as ordered only by barriers.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cat_fast::emulation {

// Excludes the management of fibers from ThreadSanitizer, which should check kernels only.
#define CAT_FAST_UNWATCHED __attribute__((no_sanitize("thread")))

// Annotations of fibers and barriers for ThreadSanitizer; empty in a build without it.
#if defined(__SANITIZE_THREAD__)
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void announce_switch(void* to, bool in_order) {
  __tsan_switch_to_fiber(to, in_order ? 0 : __tsan_switch_to_fiber_no_sync);
}
inline void arrive(void* place) { __tsan_release(place); }
inline void leave(void* place) { __tsan_acquire(place); }
#else
inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void announce_switch(void*, bool) {}
inline void arrive(void*) {}
inline void leave(void*) {}
#endif

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* announced;
};

inline Fiber caller;  // the caller of launch
inline Fiber* fibers;
inline unsigned fiber_count, current;  // current: index of the running fiber
inline std::function<void()> work;

// Switches to the next fiber; returns when it is this fiber's turn again.
CAT_FAST_UNWATCHED inline void yield() {
  Fiber& self = fibers[current];
  current = (current + 1) % fiber_count;
  threadIdx.x = current;
  announce_switch(fibers[current].announced, false);
  swapcontext(&self.context, &fibers[current].context);
}

class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}

  CAT_FAST_UNWATCHED void wait() {
    const unsigned turn = turn_;
    arrive(&places_[turn % 2]);  // two places: a fiber that leaves late is ordered after this turn, not the next
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
    }
    while (turn_ == turn) yield();
    leave(&places_[turn % 2]);
  }

 private:
  unsigned size_, arrived_ = 0, turn_ = 0;
  std::array<uint64_t, 2> places_;
};

struct Warp {
  static constexpr unsigned kSize = 32;
  Barrier barrier{kSize};
  std::array<float, kSize> lanes;
};

inline Barrier block_barrier{0};
inline std::vector<Warp> warps;

CAT_FAST_UNWATCHED inline void enter_block(unsigned x, unsigned y, unsigned z) {
  blockIdx.x = x;
  blockIdx.y = y;
  blockIdx.z = z;
}

inline void fiber_main() {
  work();
  announce_switch(caller.announced, true);
  setcontext(&caller.context);
}

// Calls `f` in each of `count` fibers. `f` must end with a barrier.
inline void run_fibers(unsigned count, std::function<void()> f) {
  constexpr size_t kStackBytes = 1 << 16;
  work = std::move(f);
  std::vector<Fiber> owned(count);
  fibers = owned.data();
  fiber_count = count;
  current = threadIdx.x = 0;
  for (Fiber& fiber : owned) {
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, fiber_main, 0);
  }
  caller.announced = current_fiber();
  for (Fiber& fiber : owned) fiber.announced = create_fiber();  // last: a fiber is ordered after its creation
  announce_switch(fibers[0].announced, true);
  swapcontext(&caller.context, &fibers[0].context);
  for (Fiber& fiber : owned) destroy_fiber(fiber.announced);
}

}  // namespace cat_fast::emulation

inline void __syncthreads() { cat_fast::emulation::block_barrier.wait(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using cat_fast::emulation::Warp;
  const unsigned lane = threadIdx.x % Warp::kSize;
  Warp& warp = cat_fast::emulation::warps[threadIdx.x / Warp::kSize];
  warp.lanes[lane] = value;
  warp.barrier.wait();
  const float other = warp.lanes[lane ^ static_cast<unsigned>(mask)];
  warp.barrier.wait();
  return other;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace cat_fast {

// Blocks must be one-dimensional and consist of complete warps. All fibers process the blocks together.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, Arguments... arguments) {
  gridDim = grid;
  blockDim = block;
  emulation::block_barrier = emulation::Barrier(block.x);
  emulation::warps = std::vector<emulation::Warp>(block.x / emulation::Warp::kSize);
  emulation::run_fibers(block.x, [=] {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          emulation::enter_block(x, y, z);
          kernel(arguments...);
          __syncthreads();  // the next block reuses the shared memory
        }
      }
    }
  });
}

}  // namespace cat_fast
