// Requests huge pages for large results.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cat_fast {

// Must be called before newly allocated memory is first written. Otherwise every 4 KiB page faults, which takes
// longer than the computation of streaming operators. NumPy does the same. Ignores small allocations.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin + kHugePage < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace cat_fast
