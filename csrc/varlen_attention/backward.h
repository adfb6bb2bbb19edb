// Attention backward. The weights p are recomputed from the scores and the saved logarithms, tile by tile:
//   dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q,
// where delta is the sum over d of do * o. A head of a sequence is one item, so nothing is summed across threads.
#pragma once

#include "varlen_attention/problem.h"

namespace cat_fast::varlen_attention {

template <typename T>
struct BackwardTensors {
  View<const T> grad_out, q, k, v, out;
  const float* lse;  // (H, T)
  View<T> dq, dk, dv;
};

template <typename T>
class Backward {
 public:
  Backward(const Problem& problem, const BackwardTensors<T>& tensors)
      : problem_(problem),
        tensors_(tensors),
        dim_(problem.dim),
        row_(round_up(dim_, kLanes)),
        max_queries_(round_up(problem.longest, kQueries)),
        keys_(kKeys * dim_),
        values_(kKeys * dim_),
        grad_keys_(kKeys * row_),
        grad_values_(kKeys * row_),
        weights_(kKeys * kQueries),
        grad_scores_(kKeys * kQueries),
        rows_(kQueries * row_),
        query_rows_(max_queries_ * row_),
        grad_rows_(max_queries_ * row_),
        queries_(max_queries_ * dim_),
        grads_(max_queries_ * dim_),
        grad_queries_(max_queries_ * dim_),
        lse_(max_queries_),
        delta_(max_queries_) {}

  void operator()(const Item& item) {
    const int64_t length = item.sequence.queries.length, all_keys = item.sequence.keys.length;
    for (int64_t i = 0; i < length; i += kQueries) pack_queries(item, QueryBlock(i, length));
    for (int64_t j = 0; j < all_keys; j += kKeys) {
      const int64_t keys = std::min(kKeys, all_keys - j), padded = round_up(keys, kRowTile);
      const int64_t token = item.sequence.keys.start + j;
      CAT_FAST_DISPATCH(pack_rows)(tensors_.k.at(token, item.head), tensors_.k.token, keys, dim_, 1.0f, keys_.data(),
                                   dim_, padded);
      CAT_FAST_DISPATCH(pack_rows)(tensors_.v.at(token, item.head), tensors_.v.token, keys, dim_, 1.0f, values_.data(),
                                   dim_, padded);
      for (int64_t i = 0; i < length; i += kQueries) add_gradients(QueryBlock(i, length), keys, padded, j == 0);
      CAT_FAST_DISPATCH(unpack_rows)(grad_keys_.data(), row_, keys, dim_, 1.0f, tensors_.dk.at(token, item.head),
                                     tensors_.dk.token);
      CAT_FAST_DISPATCH(unpack_rows)(grad_values_.data(), row_, keys, dim_, 1.0f, tensors_.dv.at(token, item.head),
                                     tensors_.dv.token);
    }
    for (int64_t i = 0; i < length; i += kQueries) unpack_queries(item, QueryBlock(i, length));
  }

 private:
  void pack_queries(const Item& item, const QueryBlock& block) {
    const int64_t token = item.sequence.queries.start + block.first;
    float* const query_rows = query_rows_.data() + block.first * row_;
    float* const grad_rows = grad_rows_.data() + block.first * row_;
    CAT_FAST_DISPATCH(pack_rows)(tensors_.q.at(token, item.head), tensors_.q.token, block.count, dim_, problem_.scale,
                                 query_rows, row_, block.width);
    CAT_FAST_DISPATCH(pack_rows)(tensors_.grad_out.at(token, item.head), tensors_.grad_out.token, block.count, dim_,
                                 1.0f, grad_rows, row_, block.width);
    CAT_FAST_DISPATCH(pack_rows)(tensors_.out.at(token, item.head), tensors_.out.token, block.count, dim_, 1.0f,
                                 rows_.data(), row_, block.width);
    CAT_FAST_DISPATCH(transpose)(query_rows, row_, block.width, dim_, queries_.data() + block.first * dim_,
                                 block.width);
    CAT_FAST_DISPATCH(transpose)(grad_rows, row_, block.width, dim_, grads_.data() + block.first * dim_, block.width);
    CAT_FAST_DISPATCH(dot_rows<kWidth>)(grad_rows, rows_.data(), block.width, row_, delta_.data() + block.first);
    const float* const lse = tensors_.lse + item.head * problem_.tokens + token;
    std::fill(std::copy_n(lse, block.count, lse_.data() + block.first), lse_.data() + block.first + block.width, 0.0f);
  }

  void add_gradients(const QueryBlock& block, int64_t keys, int64_t padded, bool first_keys) {
    const int64_t width = block.width, transposed = block.first * dim_, rows = block.first * row_;
    float *const weights = weights_.data(), *const grad_scores = grad_scores_.data();
    multiply({keys_.data(), dim_, 1}, queries_.data() + transposed, width, padded, dim_, width, weights, width, false);
    multiply({values_.data(), dim_, 1}, grads_.data() + transposed, width, padded, dim_, width, grad_scores, width,
             false);
    CAT_FAST_DISPATCH(softmax_backward<kWidth>)(weights, grad_scores, keys, width, lse_.data() + block.first,
                                                delta_.data() + block.first);
    multiply({keys_.data(), 1, dim_}, grad_scores, width, dim_, keys, width, grad_queries_.data() + transposed, width,
             !first_keys);
    multiply({weights, width, 1}, grad_rows_.data() + rows, row_, padded, block.count, row_, grad_values_.data(), row_,
             block.first > 0);
    multiply({grad_scores, width, 1}, query_rows_.data() + rows, row_, padded, block.count, row_, grad_keys_.data(),
             row_, block.first > 0);
  }

  void unpack_queries(const Item& item, const QueryBlock& block) {
    CAT_FAST_DISPATCH(transpose)(grad_queries_.data() + block.first * dim_, block.width, dim_, block.width,
                                 rows_.data(), row_);
    CAT_FAST_DISPATCH(unpack_rows)(rows_.data(), row_, block.count, dim_, problem_.scale,
                                   tensors_.dq.at(item.sequence.queries.start + block.first, item.head),
                                   tensors_.dq.token);
  }

  const Problem& problem_;
  const BackwardTensors<T>& tensors_;
  const int64_t dim_, row_, max_queries_;  // row_: dim, rounded up to complete vectors
  Buffer keys_, values_, grad_keys_, grad_values_, weights_, grad_scores_, rows_;  // for one tile
  // For all queries: rows, and transposed as [block][dim][query].
  Buffer query_rows_, grad_rows_, queries_, grads_, grad_queries_, lse_, delta_;
};

}  // namespace cat_fast::varlen_attention
