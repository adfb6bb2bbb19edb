// The CUDA implementation compiled for the CPU, with a C interface for the test of the same name.

#include "scalar_attention/cuda.cu"

using namespace cat_fast::scalar_attention;

extern "C" {

int64_t workspace_floats(const int64_t* sizes, int backward) {
  return workspace_size({sizes[0], sizes[1], sizes[2]}, backward != 0);
}

void forward(int dtype, const int64_t* sizes, const void* q, const void* k, const void* v, void* y, float* workspace) {
  forward_cuda(static_cast<Dtype>(dtype), {sizes[0], sizes[1], sizes[2]}, q, k, v, y, workspace, nullptr);
}

void backward(int dtype, const int64_t* sizes, const void* dy, const void* q, const void* k, const void* v, void* dq,
              void* dk, void* dv, float* workspace) {
  backward_cuda(static_cast<Dtype>(dtype), {sizes[0], sizes[1], sizes[2]}, dy, q, k, v, dq, dk, dv, workspace,
                nullptr);
}
}

#if defined(RACE_CHECK)
#include <cmath>
#include <vector>

int main() {  // run under -fsanitize=thread, which reports races by the exit status
  const int64_t sizes[] = {1, 70, 3}, size = 70 * 3;
  std::vector<float> q(size), y(size), dq(size), dk(size), dv(size), workspace(workspace_floats(sizes, 1));
  for (const float scale : {1.0f, 100.0f}) {  // by table, and directly
    for (int64_t i = 0; i < size; ++i) q[i] = scale * std::sin(static_cast<float>(i));
    forward(0, sizes, q.data(), q.data(), q.data(), y.data(), workspace.data());
    backward(0, sizes, y.data(), q.data(), q.data(), q.data(), dq.data(), dk.data(), dv.data(), workspace.data());
  }
}
#endif
