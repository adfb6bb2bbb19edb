// Marks a function that both the host and CUDA code call.
#pragma once

#if defined(__CUDACC__)
#define CAT_FAST_HOST_DEVICE __host__ __device__
#else
#define CAT_FAST_HOST_DEVICE
#endif
