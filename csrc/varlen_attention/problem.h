// Checks of the operator's tensors, and distribution of its work among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "varlen_attention/tiles.h"

namespace cat_fast::varlen_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kKeys = 64;        // per tile of scores; with their values they fit the L1 cache
constexpr int64_t kQueries = 32;     // per tile of scores: two AVX-512 vectors
constexpr double kThreadWork = 1e6;  // minimum multiplications per thread

struct Run {
  int64_t start, length;  // in tokens
};

struct Sequence {
  Run queries, keys;

  double work() const { return static_cast<double>(queries.length) * static_cast<double>(keys.length); }
};

struct Problem {
  int64_t tokens, key_tokens, heads, dim;
  float scale;
  std::vector<Sequence> sequences;  // sorted by decreasing work, without sequences that have none
  int64_t longest = 0;              // maximum number of queries of a sequence
  bool gaps = false;                // some queries have no keys, or keys no queries; their results are zeros
};

// Returns the runs of tokens between offsets (S + 1,), which must cover `tokens` tokens.
inline std::vector<Run> runs_of(const Tensor& cu_seqlens, int64_t tokens) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == ScalarType::Int,
                  "varlen_attention: expected cu_seqlens (S + 1,) int32");
  const Tensor dense = torch::stable::contiguous(cu_seqlens);
  const int32_t* const offsets = dense.const_data_ptr<int32_t>();
  const int64_t count = dense.size(0) - 1;
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[count] == tokens, "varlen_attention: expected cu_seqlens from 0 to ",
                  tokens, ", got ", offsets[0], " to ", offsets[count]);
  std::vector<Run> runs;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t length = int64_t{offsets[s + 1]} - offsets[s];
    STD_TORCH_CHECK(length >= 0, "varlen_attention: expected cu_seqlens that never fall, got ", offsets[s],
                    " followed by ", offsets[s + 1]);
    runs.push_back({offsets[s], length});
  }
  return runs;
}

inline Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                          const Tensor& cu_seqlens_k) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "varlen_attention: expected q, k and v of shape (T, H, D)");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(v.size(dim) == k.size(dim) && (dim == 0 || k.size(dim) == q.size(dim)),
                    "varlen_attention: expected k and v of one shape, with the heads of q");
  }
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "varlen_attention: expected q, k and v of one dtype");
  STD_TORCH_CHECK(q.size(2) > 0 && q.size(2) % kRowTile == 0, "varlen_attention: expected a multiple of ", kRowTile,
                  " as head dimension, got ", q.size(2));
  Problem problem{q.size(0), k.size(0), q.size(1), q.size(2), 1.0f / std::sqrt(static_cast<float>(q.size(2))), {}};
  const std::vector<Run> queries = runs_of(cu_seqlens, problem.tokens);
  const std::vector<Run> keys = runs_of(cu_seqlens_k, problem.key_tokens);
  STD_TORCH_CHECK(queries.size() == keys.size(), "varlen_attention: expected as many sequences of keys as of queries, ",
                  queries.size(), ", got ", keys.size());
  for (size_t s = 0; s < queries.size(); ++s) {
    const bool has_queries = queries[s].length > 0, has_keys = keys[s].length > 0;
    if (has_queries && has_keys) {
      problem.sequences.push_back({queries[s], keys[s]});
      problem.longest = std::max(problem.longest, queries[s].length);
    }
    problem.gaps |= has_queries != has_keys;
  }
  std::stable_sort(problem.sequences.begin(), problem.sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.work() > b.work(); });
  return problem;
}

// A (T, H, D) tensor whose last stride is 1.
template <typename T>
struct View {
  T* data;
  int64_t token, head;  // strides

  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

inline Tensor unit_stride(const Tensor& tensor) {
  return tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
View<const T> view_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
View<T> mutable_view_of(Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

// A work item: queries [first, first + queries) of one head of a sequence.
struct Item {
  Sequence sequence;
  int64_t head, first, queries;
};

inline std::vector<Item> items_of(const Problem& problem, int64_t max_queries) {
  std::vector<Item> items;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (int64_t first = 0; first < sequence.queries.length; first += max_queries) {
        items.push_back({sequence, head, first, std::min(max_queries, sequence.queries.length - first)});
      }
    }
  }
  return items;
}

// Calls make_work()(item) for every item. Each thread calls make_work once and takes items until none is left. Items
// write to disjoint memory, so the assignment of items to threads does not matter.
template <typename MakeWork>
void share(const Problem& problem, const std::vector<Item>& items, const MakeWork& make_work) {
  double work = 0;
  for (const Item& item : items) work += static_cast<double>(item.queries * item.sequence.keys.length * problem.dim);
  const auto max_threads = std::min<double>(static_cast<double>(items.size()), torch::stable::get_num_threads());
  const auto threads = static_cast<int64_t>(std::clamp(work / kThreadWork, 1.0, std::max(max_threads, 1.0)));
  std::atomic<size_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto compute = make_work();
    for (size_t i = next++; i < items.size(); i = next++) compute(items[i]);
  });
}

// An fp32 array aligned to 64 bytes.
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_((size + kLanes - 1) / kLanes) {}
  float* data() { return lines_.data()->values; }

 private:
  struct alignas(64) Line {
    float values[kLanes];
  };
  std::vector<Line> lines_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A run of at most kQueries queries, for which scores are computed together. Its transposed matrices have `width`
// columns; those past `count` are padding.
struct QueryBlock {
  int64_t first, count, width;

  QueryBlock(int64_t first, int64_t end)
      : first(first), count(std::min(kQueries, end - first)), width(round_up(count, kLanes)) {}
};

}  // namespace cat_fast::varlen_attention
