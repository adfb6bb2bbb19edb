// Attention with head dimension 1 on the CPU in fp32, bf16 and fp16, in time linear in the sequence length.
//
// Per head, y_i = sum over j of p_ij v_j with p_ij = e^(q_i k_j) / Z_i, Z_i = sum over j of e^(q_i k_j), and
//   dv_j = sum over i of dy_i p_ij
//   dk_j = sum over i of dy_i p_ij q_i (v_j - y_i)
//   dq_i = dy_i (sum over j of p_ij k_j v_j - y_i sum over j of p_ij k_j).
// All of these are exponential sums, over keys for each query or over queries for each key. Keys are shifted by the
// middle of their range, which changes no p_ij, and values by their mean, which shifts y equally; both reduce
// rounding errors. Sums run in a fixed order, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/float16.h"
#include "scalar_attention/arguments.h"
#include "scalar_attention/exponential_sums.h"
#include "scalar_attention/heads.h"

namespace cat_fast::scalar_attention {
namespace {

struct Statistics {
  float low, high, mean;
  bool finite;

  Statistics(const float* values, int64_t count) {
    const Columns columns = CAT_FAST_DISPATCH(columns_of)(values, count);
    low = *std::min_element(std::begin(columns.low), std::end(columns.low));
    high = *std::max_element(std::begin(columns.high), std::end(columns.high));
    const double sum = std::accumulate(std::begin(columns.sum), std::end(columns.sum), 0.0);
    mean = static_cast<float>(sum / static_cast<double>(count));
    finite =
        std::none_of(std::begin(columns.special), std::end(columns.special), [](int32_t flag) { return flag != 0; });
  }

  float middle() const { return 0.5f * low + 0.5f * high; }
};

// One head's tensors, `count` elements each. Gradients overwrite their tensors, and y overwrites q.
struct Head {
  int64_t count;
  float *q, *k, *v, *dy;  // dy only in backward
};

// A thread's buffers, reused for all its heads.
struct Workspace {
  Axis queries, keys;
  Scratch scratch;
  std::vector<float> no_offsets, v, dy, dy_z, dy_z_q_y, dq, exponents, unused;
  std::array<std::vector<float>, 2> forward;
  std::array<std::vector<float>, 4> at_queries;
  std::array<std::vector<float>, 3> at_keys;
};

// Orders a head's queries, keys and values, shifting keys by the middle of their range and values by their mean.
// Returns that mean, or NaN if any input is not finite.
float prepare(Head& head, Workspace& work) {
  const Statistics q(head.q, head.count), k(head.k, head.count), v(head.v, head.count);
  if (!q.finite || !k.finite || !v.finite) return std::numeric_limits<float>::quiet_NaN();
  const float middle = k.middle(), low = k.low - middle, high = k.high - middle;
  CAT_FAST_DISPATCH(subtract)(head.k, middle, head.count);
  CAT_FAST_DISPATCH(subtract)(head.v, v.mean, head.count);
  work.queries.order(head.q, head.count, q.low, q.high, std::max(std::fabs(low), std::fabs(high)));
  work.keys.order(head.k, head.count, low, high, std::max(std::fabs(q.low), std::fabs(q.high)));
  work.keys.scatter(head.v, work.v);
  work.no_offsets.resize(work.keys.size());
  return v.mean;
}

void forward(Head& head, Workspace& work) {
  const float mean = prepare(head, work);
  if (std::isnan(mean)) return static_cast<void>(std::fill_n(head.q, head.count, mean));
  const Sources keys{work.keys, work.keys.present.data(), work.v.data(), work.no_offsets.data(), true};
  exponential_sums<2>(keys, work.queries, work.scratch, work.forward, work.exponents);
  auto& [z, y_z] = work.forward;
  for (int64_t i = 0; i < work.queries.size(); ++i) y_z[i] = mean + y_z[i] / z[i];
  work.queries.gather(y_z, head.q);
}

void backward(Head& head, Workspace& work) {
  const float mean = prepare(head, work);
  if (std::isnan(mean) || !Statistics(head.dy, head.count).finite) {
    for (float* gradient : {head.q, head.k, head.v}) {
      std::fill_n(gradient, head.count, std::numeric_limits<float>::quiet_NaN());
    }
    return;
  }
  const Sources keys{work.keys, work.keys.present.data(), work.v.data(), work.no_offsets.data(), true};
  exponential_sums<4>(keys, work.queries, work.scratch, work.at_queries, work.exponents);
  const auto& [z, y_z, k_z, kv_z] = work.at_queries;
  work.queries.scatter(head.dy, work.dy);
  for (std::vector<float>* values : {&work.dy_z, &work.dy_z_q_y, &work.dq}) values->resize(work.queries.size());
  for (int64_t i = 0; i < work.queries.size(); ++i) {
    const float y = y_z[i] / z[i];
    work.dq[i] = work.dy[i] * (kv_z[i] / z[i] - y * (k_z[i] / z[i]));
    work.dy_z[i] = work.dy[i] / z[i];  // the exponent of Z is kept separately
    work.dy_z_q_y[i] = work.dy_z[i] * work.queries.positions[i] * y;
  }
  work.queries.gather(work.dq, head.q);

  const Sources queries{work.queries, work.dy_z.data(), work.dy_z_q_y.data(), work.exponents.data(), false};
  exponential_sums<3>(queries, work.keys, work.scratch, work.at_keys, work.unused);
  auto& [dv, dy_q_y, dy_q] = work.at_keys;
  for (int64_t j = 0; j < work.keys.size(); ++j) dy_q[j] = work.v[j] * dy_q[j] - dy_q_y[j];
  work.keys.gather(dy_q, head.k);
  work.keys.gather(dv, head.v);
}

// kHeads heads of one sample, or fewer at the end.
struct Group {
  int64_t offset, width, stride;  // offset of its first element in a tensor, number of heads, stride of positions
};

// Calls f(group, columns, pitch, work) for every group. `columns` has room for `tensors` tensors of kHeads heads,
// one column of `pitch` floats per head; `work` is the thread's workspace.
template <typename F>
void for_each_group(const Shape& shape, int64_t tensors, const F& f) {
  const int64_t groups = (shape.heads + kHeads - 1) / kHeads;
  const int64_t pitch = (shape.count + 15) / 16 * 16 + 16;  // not a power of two: avoids L1 cache conflicts
  torch::stable::parallel_for(0, shape.batch * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> columns(tensors * kHeads * pitch);
    Workspace work;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / groups, first = index % groups * kHeads;
      const Group group{n * shape.count * shape.heads + first, std::min(kHeads, shape.heads - first), shape.heads};
      f(group, columns.data(), pitch, work);
    }
  });
}

Shape cpu_shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Shape shape = shape_of(q, k, v);
  STD_TORCH_CHECK(shape.count <= int64_t{1} << 30, "scalar_attention on the CPU: expected at most 2^30 positions, got ",
                  shape.count);
  return shape;
}

template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    f.template operator()<BFloat16>();
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "scalar_attention on the CPU: expected float32, bfloat16 or float16");
    f.template operator()<Float16>();
  }
}

// Applies f(head, workspace) to every head of the inputs and writes the head's first arrays to the outputs.
template <typename T, typename F>
void for_each_head(const Shape& shape, std::initializer_list<const Tensor*> inputs,
                   std::initializer_list<Tensor*> outputs, const F& f) {
  std::vector<const T*> read;
  std::vector<T*> write;
  for (const Tensor* tensor : inputs) read.push_back(static_cast<const T*>(tensor->const_data_ptr()));
  for (Tensor* tensor : outputs) write.push_back(static_cast<T*>(tensor->mutable_data_ptr()));
  for_each_group(shape, read.size(), [&](const Group& group, float* columns, int64_t pitch, Workspace& work) {
    const int64_t size = kHeads * pitch;  // of one tensor's columns
    for (size_t i = 0; i < read.size(); ++i) {
      CAT_FAST_DISPATCH(read_heads)(read[i] + group.offset, shape.count, group.stride, group.width, columns + i * size,
                                    pitch);
    }
    for (int64_t h = 0; h < group.width; ++h) {
      float* const q = columns + h * pitch;
      Head head{shape.count, q, q + size, q + 2 * size, read.size() > 3 ? q + 3 * size : nullptr};
      f(head, work);
    }
    for (size_t i = 0; i < write.size(); ++i) {
      CAT_FAST_DISPATCH(write_heads)(columns + i * size, pitch, shape.count, group.stride, group.width,
                                     write[i] + group.offset);
    }
  });
}

Tensor scalar_attention_cpu(Tensor q_given, Tensor k_given, Tensor v_given) {
  const Shape shape = cpu_shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given);
  Tensor y = torch::stable::empty_like(q);
  if (shape.empty()) return y;
  dispatch(q.scalar_type(), [&]<typename T>() { for_each_head<T>(shape, {&q, &k, &v}, {&y}, forward); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scalar_attention_backward_cpu(Tensor grad_y, Tensor q_given, Tensor k_given,
                                                                 Tensor v_given) {
  const Shape shape = cpu_shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given), dy = torch::stable::contiguous(grad_y);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  if (shape.empty()) return {dq, dk, dv};
  dispatch(q.scalar_type(),
           [&]<typename T>() { for_each_head<T>(shape, {&q, &k, &v, &dy}, {&dq, &dk, &dv}, backward); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace cat_fast::scalar_attention

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("scalar_attention", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_cpu));
  m.impl("scalar_attention_backward", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_backward_cpu));
}
