// The CUDA implementation compiled for the CPU, with a C interface for the test of the same name.

#include "group_norm_silu/cuda.cu"

using namespace cat_fast::group_norm_silu;

extern "C" {

int64_t workspace_floats(const Shape* shape) { return workspace_size(*shape); }

void forward(int dtype, const Shape* shape, const void* x, const float* weight, const float* bias,
             const float* input_bias, float eps, int activation, void* y, float* center, float* rstd,
             float* deviation, float* workspace) {
  forward_cuda(static_cast<Dtype>(dtype), *shape, x, {weight, bias}, input_bias, eps, activation, y,
               {center, rstd, deviation}, workspace, nullptr);
}

void backward(int dtype, const Shape* shape, const void* dy, const void* x, const float* weight, const float* bias,
              float* center, float* rstd, float* deviation, int activation, void* dx, float* dweight, float* dbias,
              float* dinput_bias, float* workspace) {
  backward_cuda(static_cast<Dtype>(dtype), *shape, dy, x, {weight, bias}, {center, rstd, deviation}, activation, dx,
                {dweight, dbias, dinput_bias}, workspace, nullptr);
}
}

#if defined(RACE_CHECK)
#include <vector>

int main() {  // run under -fsanitize=thread, which reports races by the exit status
  for (const bool channels_last : {false, true}) {
    const Shape shape{1, 8, 1200, 2, channels_last, channels_last ? 150 : 1200, channels_last ? 8 : 1};
    const size_t size = shape.samples * shape.channels * shape.spatial;
    std::vector<float> x(size, 0.5f), y(size), dx(size), weight(8, 1.0f), bias(8), input_bias(8), dweight(8);
    std::vector<float> dbias(8), dinput_bias(8), center(8), rstd(2), deviation(8), workspace(workspace_size(shape));
    forward(0, &shape, x.data(), weight.data(), bias.data(), input_bias.data(), 1e-5f, 1, y.data(), center.data(),
            rstd.data(), deviation.data(), workspace.data());
    backward(0, &shape, y.data(), x.data(), weight.data(), bias.data(), center.data(), rstd.data(),
             deviation.data(), 1, dx.data(), dweight.data(), dbias.data(), dinput_bias.data(), workspace.data());
  }
}
#endif
