// Attention forward: tiles of scores with the online softmax (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include "varlen_attention/problem.h"

namespace cat_fast::varlen_attention {

constexpr int64_t kItemQueries = 256;  // queries that share the packing of keys and values

template <typename T>
struct ForwardTensors {
  View<const T> q, k, v;
  View<T> out;
  float* lse;  // (H, T)
};

// Computes out = softmax(scale q k^T) v and the logarithms of the softmax denominators, one item at a time.
template <typename T>
class Forward {
 public:
  Forward(const Problem& problem, const ForwardTensors<T>& tensors)
      : problem_(problem),
        tensors_(tensors),
        dim_(problem.dim),
        rows_(kQueries * dim_),
        keys_(kKeys * dim_),
        values_(kKeys * dim_),
        scores_(kKeys * kQueries),
        queries_(kItemQueries * dim_),
        outputs_(kItemQueries * dim_),
        maxima_(kItemQueries),
        sums_(kItemQueries) {}

  void operator()(const Item& item) {
    for (int64_t i = 0; i < item.queries; i += kQueries) pack_queries(item, QueryBlock(i, item.queries));
    for (int64_t j = 0; j < item.sequence.keys.length; j += kKeys) {
      const int64_t keys = std::min(kKeys, item.sequence.keys.length - j), padded = round_up(keys, kRowTile);
      const int64_t token = item.sequence.keys.start + j;
      CAT_FAST_DISPATCH(pack_rows)(tensors_.k.at(token, item.head), tensors_.k.token, keys, dim_, 1.0f, keys_.data(),
                                   dim_, padded);
      CAT_FAST_DISPATCH(pack_rows)(tensors_.v.at(token, item.head), tensors_.v.token, keys, dim_, 1.0f, values_.data(),
                                   dim_, keys);
      for (int64_t i = 0; i < item.queries; i += kQueries) attend(QueryBlock(i, item.queries), keys, padded, j == 0);
    }
    for (int64_t i = 0; i < item.queries; i += kQueries) unpack(item, QueryBlock(i, item.queries));
  }

 private:
  void pack_queries(const Item& item, const QueryBlock& block) {
    const int64_t token = item.sequence.queries.start + item.first + block.first;
    CAT_FAST_DISPATCH(pack_rows)(tensors_.q.at(token, item.head), tensors_.q.token, block.count, dim_, problem_.scale,
                                 rows_.data(), dim_, block.width);
    CAT_FAST_DISPATCH(transpose)(rows_.data(), dim_, block.width, dim_, queries_.data() + block.first * dim_,
                                 block.width);
  }

  void attend(const QueryBlock& block, int64_t keys, int64_t padded, bool first) {
    const int64_t width = block.width;
    float* const outputs = outputs_.data() + block.first * dim_;
    multiply({keys_.data(), dim_, 1}, queries_.data() + block.first * dim_, width, padded, dim_, width, scores_.data(),
             width, false);
    CAT_FAST_DISPATCH(softmax_step<kWidth>)(scores_.data(), keys, width, first, maxima_.data() + block.first,
                                            sums_.data() + block.first, outputs, dim_);
    multiply({values_.data(), 1, dim_}, scores_.data(), width, dim_, keys, width, outputs, width, !first);
  }

  void unpack(const Item& item, const QueryBlock& block) {
    const int64_t token = item.sequence.queries.start + item.first + block.first;
    float* const outputs = outputs_.data() + block.first * dim_;
    CAT_FAST_DISPATCH(normalize<kWidth>)(outputs, dim_, block.width, sums_.data() + block.first);
    CAT_FAST_DISPATCH(transpose)(outputs, block.width, dim_, block.width, rows_.data(), dim_);
    CAT_FAST_DISPATCH(unpack_rows)(rows_.data(), dim_, block.count, dim_, 1.0f, tensors_.out.at(token, item.head),
                                   tensors_.out.token);
    for (int64_t i = 0; i < block.count; ++i) {
      const float maximum = maxima_.data()[block.first + i], sum = sums_.data()[block.first + i];
      tensors_.lse[item.head * problem_.tokens + token + i] = maximum + std::log(sum);
    }
  }

  const Problem& problem_;
  const ForwardTensors<T>& tensors_;
  const int64_t dim_;
  Buffer rows_, keys_, values_, scores_;      // for one tile
  Buffer queries_, outputs_, maxima_, sums_;  // for all queries of an item; the first two are [block][dim][query]
};

}  // namespace cat_fast::varlen_attention
