// Attention with heads of one dimension on the CPU, fp32 and bf16, in time linear in the sequence's length.
//
// Per head, y_i = sum over j of p_ij v_j with p_ij = e^(q_i k_j) / Z_i, Z_i = sum over j of e^(q_i k_j), and
//   dv_j = sum over i of dy_i p_ij
//   dk_j = sum over i of dy_i p_ij q_i (v_j - y_i)
//   dq_i = dy_i (sum over j of p_ij k_j v_j - y_i sum over j of p_ij k_j),
// all of them exponential sums: over keys for each query, or over queries for each key. Keys are taken from the
// middle of their range, which changes no p_ij, and values from their mean, which moves y by as much; both save
// digits. Sums run in fixed order: the result does not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "scalar_attention/exponential_sums.h"

namespace cat_fast::scalar_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHeads = 8;  // heads that are read and written together: half a cache line of fp32

struct Statistics {
  float low, high, mean;
  bool finite;

  explicit Statistics(const std::vector<float>& values) {
    constexpr int64_t kColumns = 64;
    float lows[kColumns], highs[kColumns], sums[kColumns] = {};
    int32_t special[kColumns] = {};
    std::fill_n(lows, kColumns, std::numeric_limits<float>::infinity());
    std::fill_n(highs, kColumns, -std::numeric_limits<float>::infinity());
    const auto count = static_cast<int64_t>(values.size());
    const int64_t rows = count / kColumns, rest = count % kColumns;
    add_statistics(values.data(), rows, kColumns, lows, highs, sums, special);
    add_statistics(values.data() + rows * kColumns, 1, rest, lows, highs, sums, special);
    low = *std::min_element(lows, lows + kColumns);
    high = *std::max_element(highs, highs + kColumns);
    mean = static_cast<float>(std::accumulate(sums, sums + kColumns, 0.0) / static_cast<double>(count));
    finite = std::none_of(special, special + kColumns, [](int32_t flag) { return flag != 0; });
  }

  float middle() const { return 0.5f * low + 0.5f * high; }
  float magnitude() const { return std::max(std::fabs(low), std::fabs(high)); }
};

// One head's tensors: vectors of as many elements as there are positions.
struct Head {
  std::vector<float> q, k, v, dy;  // dy only in backward
  std::vector<float> y, dq, dk, dv;

  explicit Head(int64_t count) : q(count), k(count), v(count), dy(count), y(count), dq(count), dk(count), dv(count) {}
  int64_t count() const { return static_cast<int64_t>(q.size()); }
};

// What a head's sums need to know of its inputs. Keys are taken from the middle of their range here, and values
// from their mean.
struct Prepared {
  Statistics q, k, v;
  bool finite;

  explicit Prepared(Head& head) : q(head.q), k(head.k), v(head.v), finite(q.finite && k.finite && v.finite) {
    const float middle = k.middle();
    subtract(head.k.data(), middle, head.count());
    subtract(head.v.data(), v.mean, head.count());
    k.low -= middle;
    k.high -= middle;
  }

  Targets queries(const Head& head) const { return {head.count(), head.q.data(), q.low, q.high}; }
  Targets keys(const Head& head) const { return {head.count(), head.k.data(), k.low, k.high}; }
};

void forward(Head& head) {
  const Prepared prepared(head);
  if (!prepared.finite) {
    std::fill(head.y.begin(), head.y.end(), std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const std::vector<float> ones(head.count(), 1.0f), zeros(head.count());
  const Sources<2> keys{head.count(), head.k.data(), prepared.k.magnitude(), zeros.data(), true,
                        {ones.data(), head.v.data()}};
  Sums<2> sums;
  exponential_sums(keys, prepared.queries(head), sums);
  for (int64_t i = 0; i < head.count(); ++i) head.y[i] = prepared.v.mean + sums.values[1][i] / sums.values[0][i];
}

void backward(Head& head) {
  const Prepared prepared(head);
  if (!prepared.finite || !Statistics(head.dy).finite) {
    for (std::vector<float>* gradient : {&head.dq, &head.dk, &head.dv}) {
      std::fill(gradient->begin(), gradient->end(), std::numeric_limits<float>::quiet_NaN());
    }
    return;
  }
  const int64_t count = head.count();
  const std::vector<float> ones(count, 1.0f), zeros(count);
  std::vector<float> kv(count);
  for (int64_t j = 0; j < count; ++j) kv[j] = head.k[j] * head.v[j];
  const Sources<4> keys{count, head.k.data(), prepared.k.magnitude(), zeros.data(), true,
                        {ones.data(), head.v.data(), head.k.data(), kv.data()}};
  Sums<4> at_queries;
  exponential_sums(keys, prepared.queries(head), at_queries);

  std::vector<float> dy_z(count), dy_z_q(count), dy_z_q_y(count);  // dy / Z, without the exponent of Z
  for (int64_t i = 0; i < count; ++i) {
    const float z = at_queries.values[0][i];
    const float y = at_queries.values[1][i] / z, mean_k = at_queries.values[2][i] / z;
    head.dq[i] = head.dy[i] * (at_queries.values[3][i] / z - y * mean_k);
    dy_z[i] = head.dy[i] / z;
    dy_z_q[i] = dy_z[i] * head.q[i];
    dy_z_q_y[i] = dy_z_q[i] * y;
  }

  const Sources<3> queries{count, head.q.data(), prepared.q.magnitude(), at_queries.exponents.data(), false,
                           {dy_z.data(), dy_z_q.data(), dy_z_q_y.data()}};
  Sums<3> at_keys;
  exponential_sums(queries, prepared.keys(head), at_keys);
  for (int64_t j = 0; j < count; ++j) head.dk[j] = head.v[j] * at_keys.values[1][j] - at_keys.values[2][j];
  head.dv = at_keys.values[0];
}

// (B, N, H), contiguous.
struct Shape {
  int64_t batch, count, heads;
  bool empty() const { return batch * count * heads == 0; }
};

// `width` heads from `first` on of one sample, copied to and from a tensor.
struct Group {
  int64_t offset, width, stride;

  template <typename T>
  void read(const T* tensor, std::vector<Head>& heads, std::vector<float> Head::* member) const {
    const int64_t count = heads.front().count();
    float* columns[kHeads];
    for (int64_t h = 0; h < width; ++h) columns[h] = (heads[h].*member).data();
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t h = 0; h < width; ++h) columns[h][n] = to_float(tensor[offset + n * stride + h]);
    }
  }

  template <typename T>
  void write(const std::vector<Head>& heads, std::vector<float> Head::* member, T* tensor) const {
    const int64_t count = heads.front().count();
    const float* columns[kHeads];
    for (int64_t h = 0; h < width; ++h) columns[h] = (heads[h].*member).data();
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t h = 0; h < width; ++h) tensor[offset + n * stride + h] = from_float<T>(columns[h][n]);
    }
  }
};

// Calls f(group, heads) for groups of at most kHeads heads, `heads` being as many buffers.
template <typename F>
void for_each_group(const Shape& shape, const F& f) {
  const int64_t groups = (shape.heads + kHeads - 1) / kHeads;
  torch::stable::parallel_for(0, shape.batch * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<Head> heads(std::min(kHeads, shape.heads), Head(shape.count));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / groups, first = index % groups * kHeads;
      const int64_t offset = n * shape.count * shape.heads + first;
      f(Group{offset, std::min(kHeads, shape.heads - first), shape.heads}, heads);
    }
  });
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 3, "scalar_attention: q must be (B, N, H)");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(k.dim() == 3 && v.dim() == 3 && k.size(dim) == q.size(dim) && v.size(dim) == q.size(dim),
                    "scalar_attention: q, k and v must have one shape");
  }
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "scalar_attention: q, k and v must have one dtype");
  return {q.size(0), q.size(1), q.size(2)};
}

template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f.template operator()<float>();
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "scalar_attention on the CPU takes float32 and bfloat16");
    f.template operator()<BFloat16>();
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor scalar_attention_cpu(Tensor q_given, Tensor k_given, Tensor v_given) {
  const Shape shape = shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given);
  Tensor y = torch::stable::empty_like(q);
  if (shape.empty()) return y;
  dispatch(q.scalar_type(), [&]<typename T>() {
    T* const output = mutable_data<T>(y);
    for_each_group(shape, [&](const Group& group, std::vector<Head>& heads) {
      group.read(data<T>(q), heads, &Head::q);
      group.read(data<T>(k), heads, &Head::k);
      group.read(data<T>(v), heads, &Head::v);
      for (int64_t h = 0; h < group.width; ++h) forward(heads[h]);
      group.write(heads, &Head::y, output);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> scalar_attention_backward_cpu(Tensor grad_y, Tensor q_given, Tensor k_given,
                                                                 Tensor v_given) {
  const Shape shape = shape_of(q_given, k_given, v_given);
  const Tensor q = torch::stable::contiguous(q_given), k = torch::stable::contiguous(k_given),
               v = torch::stable::contiguous(v_given), dy = torch::stable::contiguous(grad_y);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  if (shape.empty()) return {dq, dk, dv};
  dispatch(q.scalar_type(), [&]<typename T>() {
    T *const grad_q = mutable_data<T>(dq), *const grad_k = mutable_data<T>(dk), *const grad_v = mutable_data<T>(dv);
    for_each_group(shape, [&](const Group& group, std::vector<Head>& heads) {
      group.read(data<T>(q), heads, &Head::q);
      group.read(data<T>(k), heads, &Head::k);
      group.read(data<T>(v), heads, &Head::v);
      group.read(data<T>(dy), heads, &Head::dy);
      for (int64_t h = 0; h < group.width; ++h) backward(heads[h]);
      group.write(heads, &Head::dq, grad_q);
      group.write(heads, &Head::dk, grad_k);
      group.write(heads, &Head::dv, grad_v);
    });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace cat_fast::scalar_attention

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("scalar_attention", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_cpu));
  m.impl("scalar_attention_backward", TORCH_BOX(&cat_fast::scalar_attention::scalar_attention_backward_cpu));
}
