// Latents <-> packed tokens on the CPU, in a parallel loop over all rows of patches of all latents.
//
// Only bytes are moved, so elements are unsigned integers of the dtype's size. One pixel row of a latent with
// contiguous rows is a (channels, width) matrix, and its tokens hold the transpose. It is transposed in 8 x 8 tiles
// in vector registers, with contiguous accesses on both sides.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "common/instruction_set.h"

namespace cat_fast::pack {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 8;
constexpr int64_t kGrainElements = 32768;

// A (c, h*p, w*p) latent and the location of its tokens.
template <typename T>
struct Latent {
  T* data;
  int64_t stride_c, stride_y, stride_x;
  int64_t h, w;       // in patches
  T* tokens;          // its first token
  int64_t first_row;  // its first row of patches, counted over all latents

  T* at(int64_t c, int64_t y, int64_t x) const { return data + c * stride_c + y * stride_y + x * stride_x; }
};

// Layout shared by all latents.
struct Layout {
  int64_t channels, patch, token_stride;
  std::vector<int64_t> offsets;  // of column x of a pixel row, relative to the first token of its row of patches
};

template <typename T>
struct Tile {
  typedef T Row __attribute__((vector_size(kTile * sizeof(T))));
  Row rows[kTile];
};

// Interleave two rows: the first or the second halves of both.
#if defined(__clang__)
#define CAT_FAST_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define CAT_FAST_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else  // GCC supports __builtin_shufflevector only since version 12
#define CAT_FAST_LOW(a, b) __builtin_shuffle(a, b, decltype(a){0, 8, 1, 9, 2, 10, 3, 11})
#define CAT_FAST_HIGH(a, b) __builtin_shuffle(a, b, decltype(a){4, 12, 5, 13, 6, 14, 7, 15})
#endif

// Rows i and i + 4 interleaved become rows 2i and 2i + 1; three such rounds transpose 8 x 8.
template <typename T>
CAT_FAST_INLINE void transpose(Tile<T>& tile) {
  for (int round = 0; round < 3; ++round) {
    Tile<T> next;
    for (int64_t i = 0; i < kTile / 2; ++i) {
      const auto a = tile.rows[i], b = tile.rows[i + kTile / 2];
      next.rows[2 * i] = CAT_FAST_LOW(a, b);
      next.rows[2 * i + 1] = CAT_FAST_HIGH(a, b);
    }
    tile = next;
  }
}

// Copies pixel row y of one latent into its tokens or out of them.
template <typename T, bool kPack>
CAT_FAST_INLINE void move_row(const Latent<T>& latent, const Layout& layout, int64_t y) {
  const int64_t channels = layout.channels, patch = layout.patch, width = latent.w * patch;
  T* const row = latent.tokens + y / patch * latent.w * layout.token_stride + y % patch * patch * channels;
  const auto token_at = [&](int64_t x) { return row + layout.offsets[x]; };
  const auto copy = [](T* in_latent, T* in_tokens, int64_t count) {
    std::memcpy(kPack ? in_tokens : in_latent, kPack ? in_latent : in_tokens, count * sizeof(T));
  };

  if (latent.stride_x == 1 && channels >= kTile && width >= kTile) {
    for (int64_t c = 0; c < channels; c += kTile) {
      c = std::min(c, channels - kTile);  // the last tile may overlap the previous one
      for (int64_t x = 0; x < width; x += kTile) {
        x = std::min(x, width - kTile);
        T* const corner = latent.at(c, y, x);
        Tile<T> tile;
        for (int64_t i = 0; i < kTile; ++i) {
          std::memcpy(&tile.rows[i], kPack ? corner + i * latent.stride_c : token_at(x + i) + c, sizeof(tile.rows[i]));
        }
        transpose(tile);
        for (int64_t i = 0; i < kTile; ++i) {
          std::memcpy(kPack ? token_at(x + i) + c : corner + i * latent.stride_c, &tile.rows[i], sizeof(tile.rows[i]));
        }
      }
    }
  } else if (latent.stride_c == 1 && latent.stride_x == channels) {  // channels-last
    for (int64_t x = 0; x < width; x += patch) copy(latent.at(0, y, x), token_at(x), patch * channels);
  } else {
    for (int64_t x = 0; x < width; ++x) {
      T* const position = token_at(x);
      for (int64_t c = 0; c < channels; ++c) copy(latent.at(c, y, x), position + c, 1);
    }
  }
}

// Copies the rows of patches [begin, end), counted over all latents.
template <typename T, bool kPack>
CAT_FAST_INLINE void move_rows(const std::vector<Latent<T>>& latents, const Layout& layout, int64_t begin,
                               int64_t end) {
  const auto after = std::upper_bound(latents.begin(), latents.end(), begin,
                                      [](int64_t row, const Latent<T>& latent) { return row < latent.first_row; });
  for (auto latent = after - 1; begin < end; ++latent) {
    for (; begin < std::min(end, latent->first_row + latent->h); ++begin) {
      const int64_t y = (begin - latent->first_row) * layout.patch;
      for (int64_t a = 0; a < layout.patch; ++a) move_row<T, kPack>(*latent, layout, y + a);
    }
  }
}

template <typename T, bool kPack>
void move(const std::vector<Tensor>& latents, const Tensor& tokens, int64_t patch) {
  Layout layout{latents[0].size(0), patch, tokens.stride(0), {}};
  std::vector<Latent<T>> list;
  int64_t rows = 0, widest = 0;
  T* next = static_cast<T*>(tokens.data_ptr());
  for (const Tensor& x : latents) {
    const int64_t h = x.size(1) / patch, w = x.size(2) / patch;
    list.push_back({static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), h, w, next, rows});
    next += h * w * layout.token_stride;
    rows += h;
    widest = std::max(widest, w * patch);
  }
  for (int64_t x = 0; x < widest; ++x) {
    layout.offsets.push_back(x / patch * layout.token_stride + x % patch * layout.channels);
  }
  const int64_t elements = tokens.size(0) * tokens.size(1);
  if (elements == 0) return;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, rows * kGrainElements / elements),
                              [&](int64_t begin, int64_t end) {
                                CAT_FAST_DISPATCH(move_rows<T, kPack>)(std::cref(list), std::cref(layout), begin, end);
                              });
}

template <bool kPack>
void move(const std::vector<Tensor>& latents, const Tensor& tokens, int64_t patch) {
  const ScalarType dtype = tokens.scalar_type();
  if (dtype == ScalarType::Float) {
    move<uint32_t, kPack>(latents, tokens, patch);
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "pack on the CPU: expected float32, bfloat16 or float16");
    move<uint16_t, kPack>(latents, tokens, patch);
  }
}

Tensor pack_cpu(std::vector<Tensor> latents, int64_t patch_size) {
  STD_TORCH_CHECK(!latents.empty() && patch_size > 0, "pack: expected at least one latent and a positive patch size");
  const Tensor& first = latents[0];
  int64_t count = 0;
  for (const Tensor& x : latents) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == first.size(0) && x.scalar_type() == first.scalar_type() &&
                        x.size(1) % patch_size == 0 && x.size(2) % patch_size == 0,
                    "pack: expected latents (c, h*p, w*p) of one channel count and one dtype");
    count += (x.size(1) / patch_size) * (x.size(2) / patch_size);
  }
  Tensor tokens = torch::stable::new_empty(first, {count, patch_size * patch_size * first.size(0)});
  move<true>(latents, tokens, patch_size);
  return tokens;
}

std::vector<Tensor> unpack_cpu(Tensor tokens, std::vector<int64_t> grids, int64_t patch_size) {
  const int64_t p = patch_size;
  STD_TORCH_CHECK(p > 0 && tokens.dim() == 2 && tokens.size(1) % (p * p) == 0,
                  "unpack: expected tokens (T, p*p*c) and a positive patch size p");
  STD_TORCH_CHECK(!grids.empty() && grids.size() % 2 == 0, "unpack: expected grids h0, w0, h1, w1 and so on");
  std::vector<Tensor> latents;
  int64_t count = 0;
  for (size_t i = 0; i < grids.size(); i += 2) {
    STD_TORCH_CHECK(grids[i] >= 0 && grids[i + 1] >= 0, "unpack: expected grids that are not negative");
    count += grids[i] * grids[i + 1];
    latents.push_back(torch::stable::new_empty(tokens, {tokens.size(1) / (p * p), grids[i] * p, grids[i + 1] * p}));
  }
  STD_TORCH_CHECK(count == tokens.size(0), "unpack: expected ", count, " tokens for these grids, got ", tokens.size(0));
  const bool rows_are_dense = tokens.size(1) <= 1 || tokens.stride(1) == 1;
  move<false>(latents, rows_are_dense ? tokens : torch::stable::contiguous(tokens), p);
  return latents;
}

}  // namespace
}  // namespace cat_fast::pack

STABLE_TORCH_LIBRARY_IMPL(cat_fast, CPU, m) {
  m.impl("pack", TORCH_BOX(&cat_fast::pack::pack_cpu));
  m.impl("unpack", TORCH_BOX(&cat_fast::pack::unpack_cpu));
}
