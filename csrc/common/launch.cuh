// launch(kernel, grid, block, stream, arguments...) wraps <<<>>>, so that the same code also compiles against the
// thread emulation (csrc/emulation).
#pragma once

#if defined(CAT_FAST_EMULATION)
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>

namespace cat_fast {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
}

}  // namespace cat_fast
#endif
