// The operator's tensors, checked, and how its work is shared among threads.
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

constexpr int64_t kKeys = 64;        // of one tile of scores: with their values they fit the L1 cache
constexpr int64_t kQueries = 32;     // of one tile of scores: two vectors of AVX-512
constexpr double kThreadWork = 1e6;  // multiplications that are worth another thread

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
  std::vector<Sequence> sequences;  // the most work first, those without any left out
  int64_t longest = 0;              // queries of a sequence
  bool gaps = false;                // queries without keys, or keys without queries, whose results are zeros
};

// The runs that offsets (S + 1,) make of `tokens` tokens.
inline std::vector<Run> runs_of(const Tensor& cu_seqlens, int64_t tokens) {
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == ScalarType::Int,
                  "varlen_attention: cu_seqlens must be int32 (S + 1,)");
  const Tensor dense = torch::stable::contiguous(cu_seqlens);
  const int32_t* const offsets = dense.const_data_ptr<int32_t>();
  const int64_t count = dense.size(0) - 1;
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[count] == tokens, "varlen_attention: cu_seqlens runs from ", offsets[0],
                  " to ", offsets[count], ", and must from 0 to ", tokens);
  std::vector<Run> runs;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t length = int64_t{offsets[s + 1]} - offsets[s];
    STD_TORCH_CHECK(length >= 0, "varlen_attention: cu_seqlens falls from ", offsets[s], " to ", offsets[s + 1]);
    runs.push_back({offsets[s], length});
  }
  return runs;
}

inline Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                          const Tensor& cu_seqlens_k) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "varlen_attention: q, k and v must be (T, H, D)");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(v.size(dim) == k.size(dim) && (dim == 0 || k.size(dim) == q.size(dim)),
                    "varlen_attention: k and v must have one shape, and q's heads");
  }
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "varlen_attention: q, k and v must have one dtype");
  STD_TORCH_CHECK(q.size(2) > 0 && q.size(2) % kRowTile == 0, "varlen_attention: the head dimension ", q.size(2),
                  " is no multiple of ", kRowTile);
  Problem problem{q.size(0), k.size(0), q.size(1), q.size(2), 1.0f / std::sqrt(static_cast<float>(q.size(2))), {}};
  const std::vector<Run> queries = runs_of(cu_seqlens, problem.tokens);
  const std::vector<Run> keys = runs_of(cu_seqlens_k, problem.key_tokens);
  STD_TORCH_CHECK(queries.size() == keys.size(), "varlen_attention: cu_seqlens has ", queries.size(),
                  " sequences of queries and ", keys.size(), " of keys");
  for (size_t s = 0; s < queries.size(); ++s) {
    const bool asked = queries[s].length > 0, answered = keys[s].length > 0;
    if (asked && answered) {
      problem.sequences.push_back({queries[s], keys[s]});
      problem.longest = std::max(problem.longest, queries[s].length);
    }
    problem.gaps |= asked != answered;
  }
  std::stable_sort(problem.sequences.begin(), problem.sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.work() > b.work(); });
  return problem;
}

// A (T, H, D) tensor whose last stride is 1, as its elements lie in memory.
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

// Part of the work: queries [first, first + queries) of one head of a sequence.
struct Item {
  Sequence sequence;
  int64_t head, first, queries;
};

inline std::vector<Item> items_of(const Problem& problem, int64_t most_queries) {
  std::vector<Item> items;
  for (const Sequence& sequence : problem.sequences) {
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (int64_t first = 0; first < sequence.queries.length; first += most_queries) {
        items.push_back({sequence, head, first, std::min(most_queries, sequence.queries.length - first)});
      }
    }
  }
  return items;
}

// Calls make_work()(item) for every item, on threads that call make_work once and take the next item when they are
// done with one. An item writes to places of its own, so it does not matter which thread takes it.
template <typename MakeWork>
void share(const Problem& problem, const std::vector<Item>& items, const MakeWork& make_work) {
  double work = 0;
  for (const Item& item : items) work += static_cast<double>(item.queries * item.sequence.keys.length * problem.dim);
  const auto most = std::min<double>(static_cast<double>(items.size()), torch::stable::get_num_threads());
  const auto threads = static_cast<int64_t>(std::clamp(work / kThreadWork, 1.0, std::max(most, 1.0)));
  std::atomic<size_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto compute = make_work();
    for (size_t i = next++; i < items.size(); i = next++) compute(items[i]);
  });
}

// fp32 from a multiple of 64 bytes on.
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

// A run of at most kQueries queries, the unit that scores are computed for. Its transposed matrices have `width`
// columns; those past `count` belong to no query.
struct QueryBlock {
  int64_t first, count, width;

  QueryBlock(int64_t first, int64_t end)
      : first(first), count(std::min(kQueries, end - first)), width(round_up(count, kLanes)) {}
};

}  // namespace cat_fast::varlen_attention
