// Selection of the CPU kernels' instruction set, once per process, and compilation of kernels for each of them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <type_traits>

// Always inlined: a kernel and its helpers are compiled for the instruction set of the function that they are
// inlined into, and vectors are passed in registers.
#define CAT_FAST_INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // how functions that are not inlined would pass vectors
#endif

namespace cat_fast {

enum class InstructionSet { kDefault, kAvx2, kAvx512 };  // what the compiler targets; x86-64-v3; x86-64-v4

inline const char* name_of(InstructionSet set) {
  return set == InstructionSet::kAvx512 ? "avx512" : set == InstructionSet::kAvx2 ? "avx2" : "default";
}

// Returns the best instruction set of this CPU and its operating system.
inline InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return InstructionSet::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kDefault;
}

// Returns the one that CAT_FAST_CPU names if the CPU has it, else the best; kernels/library.py checks the value.
inline InstructionSet choose_instruction_set() {
  const InstructionSet best = best_instruction_set();
  const char* const wanted = std::getenv("CAT_FAST_CPU");
  for (const InstructionSet set : {InstructionSet::kDefault, InstructionSet::kAvx2}) {
    if (wanted != nullptr && std::string_view(wanted) == name_of(set)) return std::min(best, set);
  }
  return best;
}

// The instruction set in use, chosen when the library is loaded. It is not a static variable in a function,
// whose guard would slow down kernels that are entered once per row of a tensor.
inline const InstructionSet kInstructionSet = choose_instruction_set();

// Entry points of kernels: one function per instruction set, with the number of floats per vector register.
#if defined(__x86_64__)
template <typename Kernel, typename... Arguments>
[[gnu::noinline, gnu::target("arch=x86-64-v4")]] auto run_avx512(Kernel kernel, Arguments... arguments) {
  return kernel.template operator()<16>(arguments...);
}

template <typename Kernel, typename... Arguments>
[[gnu::noinline, gnu::target("arch=x86-64-v3")]] auto run_avx2(Kernel kernel, Arguments... arguments) {
  return kernel.template operator()<8>(arguments...);
}
#endif

template <typename Kernel, typename... Arguments>
[[gnu::noinline]] auto run_default(Kernel kernel, Arguments... arguments) {
  return kernel.template operator()<4>(arguments...);
}

template <typename Kernel>
struct Dispatched {
  Kernel kernel;

  template <typename... Arguments>
  CAT_FAST_INLINE auto operator()(Arguments... arguments) const {
    static_assert(((std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 64) && ...),
                  "arguments are copied: pass a large one as std::cref");
#if defined(__x86_64__)
    switch (kInstructionSet) {
      case InstructionSet::kAvx512: return run_avx512(kernel, arguments...);
      case InstructionSet::kAvx2: return run_avx2(kernel, arguments...);
      case InstructionSet::kDefault: break;
    }
#endif
    return run_default(kernel, arguments...);
  }
};

// CAT_FAST_DISPATCH(f)(x, n) calls f(x, n) on the instruction set in use. f and the hot functions that it calls must
// be CAT_FAST_INLINE. f may use the template argument kWidth, the number of floats per vector register: 16, 8 or 4.
// Arguments are passed by value, because references captured by a closure would lose the effect of __restrict.
#define CAT_FAST_DISPATCH(...)                                                                             \
  ::cat_fast::Dispatched {                                                                                 \
    []<int kWidth>(auto... arguments) __attribute__((always_inline)) { return __VA_ARGS__(arguments...); } \
  }

}  // namespace cat_fast
