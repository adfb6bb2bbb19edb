// adaLN over packed tokens on the CPU in fp32, bf16 and fp16, optionally with a gated residual before the norm.
//
// Sequences are split into pieces of at most kPieceTokens tokens; the modulation is converted to fp32 once per
// piece. Gradients of the modulation are summed over each piece, then over the pieces of a sequence. The order is
// fixed, so results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "adaln/rows.h"

namespace cat_fast::adaln {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPieceTokens = 32;
constexpr int64_t kGrainElements = 32768;  // minimum work per thread

struct Piece {
  int64_t sequence, begin, end;
};

// The sizes of x (T, D) and the pieces of its sequences.
struct Batch {
  int64_t tokens, width, sequences;
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece;  // of each sequence, followed by the number of pieces

  Batch(const Tensor& x, const Tensor& cu_seqlens_given) {
    STD_TORCH_CHECK(x.dim() == 2, "adaln: expected x of shape (T, D), got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(cu_seqlens_given.dim() == 1 && cu_seqlens_given.size(0) > 0 &&
                        cu_seqlens_given.scalar_type() == ScalarType::Int,
                    "adaln: expected cu_seqlens (S + 1,) int32");
    tokens = x.size(0), width = x.size(1), sequences = cu_seqlens_given.size(0) - 1;
    const Tensor cu_seqlens = torch::stable::contiguous(cu_seqlens_given);
    const int32_t* const bounds = cu_seqlens.const_data_ptr<int32_t>();
    STD_TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == tokens && std::is_sorted(bounds, bounds + sequences + 1),
                    "adaln: expected cu_seqlens that rise from 0 to ", tokens, ", the number of tokens");
    for (int64_t s = 0; s < sequences; ++s) {
      first_piece.push_back(static_cast<int64_t>(pieces.size()));
      for (int64_t begin = bounds[s]; begin < bounds[s + 1]; begin += kPieceTokens) {
        pieces.push_back({s, begin, std::min<int64_t>(begin + kPieceTokens, bounds[s + 1])});
      }
    }
    first_piece.push_back(static_cast<int64_t>(pieces.size()));
  }

  int64_t count() const { return static_cast<int64_t>(pieces.size()); }

  void check_tokens(const Tensor& tensor, const Tensor& x) const {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == tokens && tensor.size(1) == width &&
                        tensor.scalar_type() == x.scalar_type(),
                    "adaln: expected token tensors with the shape and dtype of x");
  }
};

// One modulation row per sequence, (S, D) with any strides.
class Rows {
 public:
  Rows(const Tensor& rows, const Batch& batch)
      : data_(rows.const_data_ptr()), dtype_(rows.scalar_type()), width_(batch.width) {
    STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == batch.sequences && rows.size(1) == batch.width,
                    "adaln: expected modulation of shape (S, D), one row per sequence");
    STD_TORCH_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half,
                    "adaln on the CPU: expected modulation in float32, bfloat16 or float16");
    row_stride_ = rows.stride(0), stride_ = rows.stride(1);
  }

  // output[i] = row[i] + offset
  void read(int64_t sequence, float offset, float* output) const {
    if (dtype_ == ScalarType::Float) return read_as<float>(sequence, offset, output);
    if (dtype_ == ScalarType::BFloat16) return read_as<BFloat16>(sequence, offset, output);
    read_as<Float16>(sequence, offset, output);
  }

 private:
  template <typename M>
  void read_as(int64_t sequence, float offset, float* output) const {
    const M* const row = static_cast<const M*>(data_) + sequence * row_stride_;
    for (int64_t i = 0; i < width_; ++i) output[i] = to_float(row[i * stride_]) + offset;
  }

  const void* data_;
  ScalarType dtype_;
  int64_t width_, row_stride_, stride_;
};

// Calls f(index of the piece, piece, its sequence's modulation). shift and gate may be null.
template <typename F>
void for_each_piece(const Batch& batch, const Rows& scale, const Rows* shift, const Rows* gate, const F& f) {
  const int64_t width = batch.width;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, kPieceTokens * width));
  torch::stable::parallel_for(0, batch.count(), grain, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(3 * width);
    float *const scales = buffer.data(), *const shifts = scales + width, *const gates = shifts + width;
    int64_t sequence = -1;
    for (int64_t index = first; index < last; ++index) {
      const Piece& piece = batch.pieces[index];
      if (piece.sequence != sequence) {
        sequence = piece.sequence;
        scale.read(sequence, 1.0f, scales);
        if (shift != nullptr) shift->read(sequence, 0.0f, shifts);
        if (gate != nullptr) gate->read(sequence, 0.0f, gates);
      }
      f(index, piece, Modulation{scales, shifts, gates});
    }
  });
}

// Sums of `kinds` gradients over tokens, per piece and then per sequence.
class ModulationGradients {
 public:
  ModulationGradients(const Batch& batch, int64_t kinds)
      : batch_(batch), kinds_(kinds), partials_(batch.count() * kinds * batch.width) {}

  float* partial(int64_t piece, int64_t kind) { return &partials_[(piece * kinds_ + kind) * batch_.width]; }

  // Returns (S, D), zero for sequences without tokens.
  Tensor total(int64_t kind, const Tensor& like) {
    constexpr int64_t kColumns = 256;
    Tensor result = torch::stable::new_zeros(like, {batch_.sequences, batch_.width}, ScalarType::Float);
    float* const totals = result.mutable_data_ptr<float>();
    const int64_t blocks = (batch_.width + kColumns - 1) / kColumns;
    torch::stable::parallel_for(0, batch_.sequences * blocks, 16, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) {
        const int64_t s = index / blocks, column = index % blocks * kColumns;
        const int64_t columns = std::min(kColumns, batch_.width - column);
        for (int64_t piece = batch_.first_piece[s]; piece < batch_.first_piece[s + 1]; ++piece) {
          const float* const sums = partial(piece, kind) + column;
          for (int64_t i = 0; i < columns; ++i) totals[s * batch_.width + column + i] += sums[i];
        }
      }
    });
    return torch::stable::to(result, like.scalar_type());
  }

 private:
  const Batch& batch_;
  int64_t kinds_;
  std::vector<float> partials_;
};

template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f.template operator()<float>();
  if (dtype == ScalarType::BFloat16) return f.template operator()<BFloat16>();
  STD_TORCH_CHECK(dtype == ScalarType::Half, "adaln on the CPU: expected float32, bfloat16 or float16");
  f.template operator()<Float16>();
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor empty_float(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> adaln_cpu(Tensor x_given, Tensor shift, Tensor scale, Tensor cu_seqlens,
                                             double eps) {
  const Batch batch(x_given, cu_seqlens);
  const Rows shifts(shift, batch), scales(scale, batch);
  const Tensor x = torch::stable::contiguous(x_given);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty_float(x, batch.tokens), rstd = empty_float(x, batch.tokens);
  dispatch(x.scalar_type(), [&]<typename T>() {
    const T* const from = data<T>(x);
    T* const to = mutable_data<T>(y);
    float *const means = mutable_data<float>(mean), *const rstds = mutable_data<float>(rstd);
    for_each_piece(batch, scales, &shifts, nullptr, [&](int64_t, const Piece& piece, Modulation modulation) {
      for (int64_t t = piece.begin; t < piece.end; ++t) {
        const int64_t at = t * batch.width;
        CAT_FAST_DISPATCH(modulated_norm)(from + at, modulation, batch.width, static_cast<float>(eps), to + at,
                                          means + t, rstds + t);
      }
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward_cpu(Tensor grad_y, Tensor x_given, Tensor scale, Tensor cu_seqlens,
                                                      Tensor mean, Tensor rstd) {
  const Batch batch(x_given, cu_seqlens);
  batch.check_tokens(grad_y, x_given);
  const Rows scales(scale, batch);
  const Tensor dy = torch::stable::contiguous(grad_y), x = torch::stable::contiguous(x_given);
  Tensor dx = torch::stable::empty_like(x);
  ModulationGradients gradients(batch, 2);
  dispatch(x.scalar_type(), [&]<typename T>() {
    const T *const dys = data<T>(dy), *const xs = data<T>(x);
    const float *const means = data<float>(mean), *const rstds = data<float>(rstd);
    T* const dxs = mutable_data<T>(dx);
    for_each_piece(batch, scales, nullptr, nullptr, [&](int64_t index, const Piece& piece, Modulation modulation) {
      float *const dshift = gradients.partial(index, 0), *const dscale = gradients.partial(index, 1);
      for (int64_t t = piece.begin; t < piece.end; ++t) {
        const int64_t at = t * batch.width;
        const Means row = CAT_FAST_DISPATCH(add_modulation_gradients)(dys + at, xs + at, modulation.scale_plus_1,
                                                                      means[t], rstds[t], batch.width, dshift, dscale);
        CAT_FAST_DISPATCH(input_gradient)(dys + at, xs + at, modulation.scale_plus_1, means[t], rstds[t], row,
                                          batch.width, dxs + at);
      }
    });
  });
  return {dx, gradients.total(0, scale), gradients.total(1, scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_cpu(Tensor x_given, Tensor h_given, Tensor gate,
                                                                   Tensor shift, Tensor scale, Tensor cu_seqlens,
                                                                   double eps) {
  const Batch batch(x_given, cu_seqlens);
  batch.check_tokens(h_given, x_given);
  const Rows gates(gate, batch), shifts(shift, batch), scales(scale, batch);
  const Tensor x = torch::stable::contiguous(x_given), h = torch::stable::contiguous(h_given);
  Tensor x_new = torch::stable::empty_like(x), y = torch::stable::empty_like(x);
  Tensor mean = empty_float(x, batch.tokens), rstd = empty_float(x, batch.tokens);
  dispatch(x.scalar_type(), [&]<typename T>() {
    const T *const xs = data<T>(x), *const hs = data<T>(h);
    T *const sums = mutable_data<T>(x_new), *const to = mutable_data<T>(y);
    float *const means = mutable_data<float>(mean), *const rstds = mutable_data<float>(rstd);
    for_each_piece(batch, scales, &shifts, &gates, [&](int64_t, const Piece& piece, Modulation modulation) {
      for (int64_t t = piece.begin; t < piece.end; ++t) {
        const int64_t at = t * batch.width;
        CAT_FAST_DISPATCH(add_gated)(xs + at, hs + at, modulation.gate, batch.width, sums + at);
        CAT_FAST_DISPATCH(modulated_norm)(sums + at, modulation, batch.width, static_cast<float>(eps), to + at,
                                          means + t, rstds + t);
      }
    });
  });
  return {x_new, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_backward_cpu(
    Tensor grad_x_new, Tensor grad_y, Tensor x_new_given, Tensor h_given, Tensor gate, Tensor scale,
    Tensor cu_seqlens, Tensor mean, Tensor rstd) {
  const Batch batch(x_new_given, cu_seqlens);
  for (const Tensor& tensor : {grad_x_new, grad_y, h_given}) batch.check_tokens(tensor, x_new_given);
  const Rows gates(gate, batch), scales(scale, batch);
  const Tensor dx_new = torch::stable::contiguous(grad_x_new), dy = torch::stable::contiguous(grad_y),
               x_new = torch::stable::contiguous(x_new_given), h = torch::stable::contiguous(h_given);
  Tensor dx = torch::stable::empty_like(x_new), dh = torch::stable::empty_like(x_new);
  ModulationGradients gradients(batch, 3);
  dispatch(x_new.scalar_type(), [&]<typename T>() {
    const T *const dx_news = data<T>(dx_new), *const dys = data<T>(dy), *const xs = data<T>(x_new),
            *const hs = data<T>(h);
    const float *const means = data<float>(mean), *const rstds = data<float>(rstd);
    T *const dxs = mutable_data<T>(dx), *const dhs = mutable_data<T>(dh);
    for_each_piece(batch, scales, nullptr, &gates, [&](int64_t index, const Piece& piece, Modulation modulation) {
      float *const dgate = gradients.partial(index, 0), *const dshift = gradients.partial(index, 1),
                   *const dscale = gradients.partial(index, 2);
      for (int64_t t = piece.begin; t < piece.end; ++t) {
        const int64_t at = t * batch.width;
        const Means row = CAT_FAST_DISPATCH(add_modulation_gradients)(dys + at, xs + at, modulation.scale_plus_1,
                                                                      means[t], rstds[t], batch.width, dshift, dscale);
        CAT_FAST_DISPATCH(gated_input_gradients)(dx_news + at, dys + at, xs + at, hs + at, modulation, means[t],
                                                 rstds[t], row, batch.width, dxs + at, dhs + at, dgate);
      }
    });
  });
  return {dx, dh, gradients.total(0, scale), gradients.total(1, scale), gradients.total(2, scale)};
}

}  // namespace
}  // namespace cat_fast::adaln

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("adaln", TORCH_BOX(&cat_fast::adaln::adaln_cpu));
  m.impl("adaln_backward", TORCH_BOX(&cat_fast::adaln::adaln_backward_cpu));
  m.impl("gate_residual_adaln", TORCH_BOX(&cat_fast::adaln::gate_residual_adaln_cpu));
  m.impl("gate_residual_adaln_backward", TORCH_BOX(&cat_fast::adaln::gate_residual_adaln_backward_cpu));
}
