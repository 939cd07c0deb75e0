// What the tiled kernels share: rows of any strides and head_dim to and from shared memory.
#pragma once

#include <algorithm>

#include "attention.cuh"

namespace swinops {

// Copy a chunk of a row to shared memory, of which `channels` are left in the row: the rest is zeros.
template <class T>
__device__ void copy_chunk(T* to, const T* from, int channels, bool vector) {
  if (vector) {
    cp_async(to, from, channels > 0);
    return;
  }
  constexpr int kElements = 16 / sizeof(T);
  alignas(16) T x[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = i < channels ? from[i] : T(0.f);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(x);
}

template <class T>
__device__ void write_chunk(T* to, const T* from, int channels, bool vector) {
  if (vector) {
    if (channels > 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    return;
  }
#pragma unroll
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) {
    if (i < channels) to[i] = from[i];
  }
}

// A window's rows of some tensors with the same strides. `pad`: rows outside the image, or zeros where null.
template <class Rows, class T, int kTensors>
__device__ void copy_rows(T* tile, int tile_size, int rows, int first, const T* const (&x)[kTensors],
                          const T* const (&pad)[kTensors], const Strides& strides, const Geometry& geometry, int head,
                          int b, const int (&place)[3], bool vector) {
  for (int i = threadIdx.x; i < rows * Rows::kChunks; i += blockDim.x) {
    const int row = i / Rows::kChunks, c = i % Rows::kChunks, channel = c * Rows::kElements;
    int local[3], at[3];
    geometry.locate(first + row, local);
    const bool inside = geometry.find(place, local, at);
    const int64_t from = b * strides.batch + head * strides.head + offset(strides, at) + channel;
    const bool exists = first + row < geometry.tokens;
    T* const to = tile + Rows::chunk(row, c);
#pragma unroll
    for (int n = 0; n < kTensors; ++n) {
      const bool valid = exists && (inside || pad[n] != nullptr);
      copy_chunk(to + n * tile_size, inside ? x[n] + from : pad[n] + channel, valid ? geometry.head_dim - channel : 0,
                 vector);
    }
  }
}

// What scores of 16 rows are multiplied with to be cosines: one over the lengths of rows g and g + 8. Rows of float32
// become directions in place and the factors 1; to directions of 16 bits rows would be rounded.
template <class Math>
__device__ float2 measure(const Math& math, typename Math::Element* x) {
  const float2 squares = math.squares(x);
  const float factor[2] = {inverse_length<typename Math::Element>(squares.x),
                           inverse_length<typename Math::Element>(squares.y)};
  if constexpr (!std::is_same_v<typename Math::Element, float>) return make_float2(factor[0], factor[1]);
  __syncwarp();
  scale_rows<typename Math::Rows>(x, factor);
  __syncwarp();
  return make_float2(1.f, 1.f);
}

// The same of 16 rows after 16, by all warps of a block, with the factors left in shared memory.
template <class Math>
__device__ void measure(const Math& math, typename Math::Element* x, int rows, float* factors) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int r = 16 * warp; r < rows; r += blockDim.x / 2) {
    const float2 factor = measure(math, x + r * Math::Rows::kStride);
    if (lane % 4 == 0) {
      factors[r + lane / 4] = factor.x;
      factors[r + lane / 4 + 8] = factor.y;
    }
  }
}

__device__ inline void unpack(const float4& from, float (&to)[4]) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Scores of rows g and g + 8, in place: times the rows' factors, and those of the columns 8j and 8j + 1 of `factors`
// where not null, plus the bias.
template <int kTiles>
__device__ void add_bias(float (&s)[kTiles][4], const float (&bias)[kTiles][4], const float (&row_factor)[2],
                         const float* factors) {
  if (factors == nullptr) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = s[j][i] * row_factor[i / 2] + bias[j][i];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = s[j][i] * (row_factor[i / 2] * (i % 2 ? factor.y : factor.x)) + bias[j][i];
    }
  }
}

// The mask, to the scores of a row and a column that the seam parts: of columns 8j and 8j + 1 of `sides`.
template <int kTiles>
__device__ void add_mask(float (&s)[kTiles][4], const int (&side)[2], const int* sides, int cut, float mask) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int2 column = *reinterpret_cast<const int2*>(sides + 8 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((side[i / 2] ^ (i % 2 ? column.y : column.x)) & cut) s[j][i] += mask;
    }
  }
}

// Warps of a block of forward: 144 tokens are nine tiles of 16, and three chunks of 48.
constexpr int most_warps(int keys) { return keys == 48 ? 9 : 8; }

// Calls `launch.run<Math, kKeys>()` with the arithmetic of a call and the tokens of a chunk, at most kMost: fewer where
// rows are longer, so that two stages of two tensors leave room.
template <int kMost, template <int> class Math, class Launch>
cudaError_t with_width(const AttentionShape& s, Launch launch) {
  if (s.head_dim <= 32) return launch.template run<Math<32>, kMost>();
  if (s.head_dim <= 64) return launch.template run<Math<64>, 32>();
  return launch.template run<Math<128>, 16>();
}

template <int kWidth>
using Float16Math = HalfMath<half, kWidth>;
template <int kWidth>
using BFloat16Math = HalfMath<bfloat16, kWidth>;
template <int kWidth>
using Tf32Math = FloatMath<true, kWidth>;
template <int kWidth>
using Float32Math = FloatMath<false, kWidth>;

template <int kMost, class Launch>
cudaError_t with_math(const AttentionShape& s, Launch launch) {
  switch (s.dtype) {
    case Dtype::kFloat16: return with_width<kMost, Float16Math>(s, launch);
    case Dtype::kBFloat16: return with_width<kMost, BFloat16Math>(s, launch);
    default: return s.tf32 ? with_width<kMost, Tf32Math>(s, launch) : with_width<kMost, Float32Math>(s, launch);
  }
}

}  // namespace swinops
