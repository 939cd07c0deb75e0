// What the attention kernels share: where a window's tokens lie, tiles in shared memory, and products of tiles.
//
// A warp owns 16 rows of a matrix. With g = lane / 4 and t = lane % 4 its lanes hold, of every eight columns, rows g
// and g + 8 at columns 2t and 2t + 1: the layout of the tensor cores' accumulators. Exponentials are base 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "swinops.h"

namespace swinops {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMaxLogitScale = 4.6051701859880914f;  // ln 100
constexpr float kShortest = 1e-12f;                    // length that a vector is divided by, as in torch's normalize

// Division of numbers below 2^31 by a number of the launch.
struct Divisor {
  unsigned multiplier = 0;
  int shift = 0;
  int divisor = 1;

  Divisor() = default;
  explicit Divisor(int n) : divisor(n) {
    while ((int64_t(1) << shift) < n) ++shift;
    multiplier = unsigned(((uint64_t(1) << (31 + shift)) + n - 1) / n);
  }

  // n / divisor; n becomes the remainder.
  __device__ int divide(int& n) const {
    const int quotient = int(__umulhi(2u * unsigned(n), multiplier) >> shift);
    n -= quotient * divisor;
    return quotient;
  }
};

// Of a tensor [B, D, H, W, heads, head_dim], in elements; channels lie side by side.
struct Strides {
  int64_t batch, head;
  int axis[3];
};

// Where windows and tokens lie; the same in every kernel of a call.
struct Geometry {
  int size[3], window[3];
  int shift[3], wrap[3];  // position p of the padded, shifted axis is p + shift, less wrap where that is reached
  int seam[3];            // place in a window of the first token behind the seam; the window's end where none is
  int windows, tokens, heads, head_dim;
  bool padded, roll_pad;
  Divisor counts[3];   // windows along each axis
  Divisor plane, row;  // tokens of a window's plane and row
  float scale;         // times log2(e); 0 for cosine attention, whose scale is the head's
  float mask;          // times log2(e)

  Geometry() = default;
  explicit Geometry(const AttentionShape& s)
      : tokens(s.window[0] * s.window[1] * s.window[2]),
        heads(s.heads),
        head_dim(s.head_dim),
        padded(false),
        plane(s.window[1] * s.window[2]),
        row(s.window[2]),
        scale(s.scale * kLog2E),
        mask(s.mask_value * kLog2E) {
    windows = int(s.batch);
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = s.size[axis];
      window[axis] = s.window[axis];
      counts[axis] = Divisor(ceil_div(size[axis], window[axis]));
      windows *= counts[axis].divisor;
      padded |= size[axis] % window[axis] != 0;
      seam[axis] = window[axis] - s.shift[axis];
    }
    roll_pad = padded && s.roll_pad;
    for (int axis = 0; axis < 3; ++axis) {
      wrap[axis] = roll_pad ? size[axis] : counts[axis].divisor * window[axis];
      shift[axis] = s.shift[axis] % wrap[axis];
    }
  }

  // The axes from kAxis on: 1 where the image has two, and then the first one's numbers are 0.

  // Window number `window`: its image, and its place along each axis among the windows.
  template <int kAxis = 0>
  __device__ int find(int window, int (&place)[3]) const {
    place[0] = 0;
#pragma unroll
    for (int axis = 2; axis >= kAxis; --axis) {
      place[axis] = window;
      window = counts[axis].divide(place[axis]);
    }
    return window;
  }

  template <int kAxis = 0>
  __device__ void locate(int token, int (&local)[3]) const {
    local[0] = kAxis ? 0 : plane.divide(token);
    local[1] = row.divide(token);
    local[2] = token;
  }

  // The axes, one bit each, along which a token lies behind the seam in a window that the seam cuts.
  __device__ int far_side(const int (&local)[3]) const {
    return (local[0] >= seam[0]) | (local[1] >= seam[1]) << 1 | (local[2] >= seam[2]) << 2;
  }

  // The axes, one bit each, along which the seam cuts a window: the last ones.
  __device__ int cut(const int (&place)[3]) const {
    return (place[0] == counts[0].divisor - 1) | (place[1] == counts[1].divisor - 1) << 1 |
           (place[2] == counts[2].divisor - 1) << 2;
  }

  // Where a window's token lies along the image's axes; false for a pad.
  template <int kAxis = 0>
  __device__ bool find(const int (&place)[3], const int (&local)[3], int (&at)[3]) const {
    const int shifted[3] = {local[0] + shift[0], local[1] + shift[1], local[2] + shift[2]};
    return find_shifted<kAxis>(place, shifted, at);
  }

  // The same of a place in a window to which `shift` was added.
  template <int kAxis = 0>
  __device__ bool find_shifted(const int (&place)[3], const int (&shifted)[3], int (&at)[3]) const {
    bool inside = true;
    at[0] = 0;
#pragma unroll
    for (int axis = kAxis; axis < 3; ++axis) {
      const int p = place[axis] * window[axis] + shifted[axis];
      at[axis] = int(min(unsigned(p), unsigned(p) - wrap[axis]));  // below wrap the difference is above 2^31
      inside &= (roll_pad ? p - shift[axis] : at[axis]) < size[axis];
    }
    return inside;
  }

  __device__ int64_t token(int b, const int (&at)[3]) const {
    return ((int64_t(b) * size[0] + at[0]) * size[1] + at[1]) * size[2] + at[2];
  }
};

__device__ inline int64_t offset(const Strides& s, const int (&at)[3]) {
  return int64_t(at[0]) * s.axis[0] + int64_t(at[1]) * s.axis[1] + int64_t(at[2]) * s.axis[2];
}

// A pointer further by 32 bits of bytes, which takes one addition where an index takes three.
template <class T>
__device__ T* advance(T* p, unsigned bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
}

// Element `i` of a tensor of any float type.
__device__ inline float load_float(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat16: return to_float(static_cast<const half*>(p)[i]);
    case Dtype::kBFloat16: return to_float(static_cast<const bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

// A head's exp(min(logit_scale, ln 100)), to all of float's digits; NaN stays NaN.
__device__ inline float head_scale(const void* logit_scale, Dtype dtype, int head) {
  const float x = load_float(logit_scale, dtype, head);
  return float(exp(double(x > kMaxLogitScale ? kMaxLogitScale : x)));
}

// One over the length of a vector of T. Scores of cosine attention are up to 100: an error in it is in all of a row's.
template <class T>
__device__ float inverse_length(float squares) {
  const float most = fmaxf(squares, kShortest * kShortest);
  return std::is_same_v<T, float> ? __frsqrt_rn(most) : rsqrt_fast(most);
}

// What gradients are multiplied with: those of vectors too short for a direction are 0.
template <class T>
__device__ float inverse_or_zero(float squares) {
  return squares < kShortest * kShortest ? 0.f : inverse_length<T>(squares);
}

// Over the four lanes that share rows.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

// Over the eight lanes that share columns.
__device__ inline float column_sum(float x) {
  for (int lanes = 4; lanes < kWarp; lanes *= 2) x += __shfl_xor_sync(kWholeWarp, x, lanes);
  return x;
}

// Rows of kWidth channels in shared memory, as chunks of 16 bytes. A chunk is left free after each row, so that eight
// rows' chunks of one column lie in different banks.
template <class T, int kWidth>
struct Tile {
  static constexpr int kElements = 16 / sizeof(T);  // of a chunk
  static constexpr int kChunks = kWidth / kElements;
  static constexpr int kStride = kWidth + kElements;
  static_assert(kWidth % 32 == 0, "eight rows would meet in the same banks");

  __device__ static constexpr int chunk(int row, int chunk) { return row * kStride + chunk * kElements; }
  __device__ static constexpr int element(int row, int column) { return row * kStride + column; }
};

// 16 rows times a factor each, in place: this lane's two are for rows g and g + 8.
template <class Rows, class T>
__device__ void scale_rows(T* x, const float (&factor)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = t; c < Rows::kChunks; c += 4) {
      uint4* const chunk = reinterpret_cast<uint4*>(x + Rows::chunk(g + 8 * i, c));
      alignas(16) T y[Rows::kElements];
      *reinterpret_cast<uint4*>(y) = *chunk;
#pragma unroll
      for (int e = 0; e < Rows::kElements; ++e) y[e] = from_float<T>(to_float(y[e]) * factor[i]);
      *chunk = *reinterpret_cast<const uint4*>(y);
    }
  }
}

// Products of tiles. `s`, `p` and `out` are a warp's 16 rows.
//   squares(x):        the squares' sums of rows g and g + 8 of 16 rows
//   scores(s, q, k):   s[j] += q k^T for keys 8j to 8j + 7
//   weigh(out, total, p, v):  out[j] += p v for channels 8j to 8j + 7, and total += the sums of rows g and g + 8 of p
// Every kWidth is a multiple of 32.
template <class T, int kWidth>
struct HalfMath {
  using Element = T;
  using Rows = Tile<T, kWidth>;

  const unsigned lane_operand, lane_strip;  // in bytes

  __device__ HalfMath()
      : lane_operand(keep(unsigned(sizeof(T)) * Rows::chunk(threadIdx.x % 16, threadIdx.x % kWarp / 16))),
        lane_strip(keep(unsigned(sizeof(T)) * Rows::chunk(threadIdx.x % 8, threadIdx.x % kWarp / 8))) {}

  // Address of this lane's row for a 16 x 16 matrix operand: rows from `row`, chunks `chunk` and `chunk` + 1.
  __device__ const T* operand(const T* x, int row, int chunk) const {
    return advance(x, lane_operand) + Rows::chunk(row, chunk);
  }

  // Address of this lane's row for eight rows, chunks `chunk` to `chunk` + 3.
  __device__ const T* strip(const T* x, int row, int chunk) const {
    return advance(x, lane_strip) + Rows::chunk(row, chunk);
  }

  // The products of 16 rows with themselves have the sums on their diagonal. Eight channels at a time: registers of one
  // operand then serve as the other where they are.
  __device__ float2 squares(const T* x) const {
    float low[4] = {}, high[4] = {};
#pragma unroll
    for (int c = 0; c < Rows::kChunks; c += 2) {
      uint32_t a[4];
      ldmatrix(a, operand(x, 0, c));
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        mma<T>(low, a[i], a[i + 1], a[i]);
        mma<T>(high, a[i], a[i + 1], a[i + 1]);
      }
    }
    const int lane = threadIdx.x % kWarp, g = lane / 4;
    const int diagonal = g * 4 + g / 2;
    return make_float2(__shfl_sync(kWholeWarp, g % 2 ? low[1] : low[0], diagonal),
                       __shfl_sync(kWholeWarp, g % 2 ? high[3] : high[2], diagonal));
  }

  template <int kTiles>
  __device__ void scores(float (&s)[kTiles][4], const T* q, const T* k) const {
#pragma unroll
    for (int c = 0; c < Rows::kChunks; c += 4) {
      uint32_t a[2][4];
      ldmatrix(a[0], operand(q, 0, c));
      ldmatrix(a[1], operand(q, 0, c + 2));
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t b[4];
        ldmatrix(b, strip(k, 8 * j, c));
        mma<T>(s[j], a[0], b[0], b[1]);
        mma<T>(s[j], a[1], b[2], b[3]);
      }
    }
  }

  template <int kTiles>
  __device__ void weigh(float (&out)[kWidth / 8][4], float (&total)[2], const float (&p)[kTiles][4], const T* v) const {
    // the sums are products with ones: of what the values are weighed with, and in all lanes of a quad
    float sums[4] = {total[0], 0.f, total[1], 0.f};
    const uint32_t ones = pack<T>(1.f, 1.f);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t a[4] = {pack<T>(p[j][0], p[j][1]), pack<T>(p[j][2], p[j][3])};
      if (j + 1 < kTiles) {
        a[2] = pack<T>(p[j + 1][0], p[j + 1][1]);
        a[3] = pack<T>(p[j + 1][2], p[j + 1][3]);
        mma<T>(sums, a, ones, ones);
      } else {
        mma<T>(sums, a[0], a[1], ones);
      }
#pragma unroll
      for (int c = 0; c < Rows::kChunks; c += 2) {
        uint32_t b[4];
        if (j + 1 < kTiles) {
          ldmatrix_transposed(b, operand(v, 8 * j, c));
          mma<T>(out[c], a, b[0], b[1]);
          mma<T>(out[c + 1], a, b[2], b[3]);
        } else if (c % 4 == 0) {
          ldmatrix_transposed(b, strip(v, 8 * j, c));
          for (int i = 0; i < 4; ++i) mma<T>(out[c + i], a[0], a[1], b[i]);
        }
      }
    }
    total[0] = sums[0];
    total[1] = sums[2];
  }

  // out[j] += pairs^T x for channels 8j to 8j + 7: of `pairs` [kRows, 16 columns], kStride apart, and kRows rows of x.
  template <int kRows, int kStride>
  __device__ void weigh_transposed(float (&out)[kWidth / 8][4], const T* pairs, const T* x) const {
    const int lane = threadIdx.x % kWarp;
    pairs += (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int r = 0; r < kRows; r += 16) {
      uint32_t a[4];
      ldmatrix_transposed(a, pairs + r * kStride);
#pragma unroll
      for (int c = 0; c < Rows::kChunks; c += 2) {
        uint32_t b[4];
        ldmatrix_transposed(b, operand(x, r, c));
        mma<T>(out[c], a, b[0], b[1]);
        mma<T>(out[c + 1], a, b[2], b[3]);
      }
    }
  }

  // Write a warp's rows to a tile: two neighbouring columns at a time.
  __device__ static void store(T* x, int row, int column, float low, float high) {
    *reinterpret_cast<uint32_t*>(x + Rows::element(row, column)) = pack<T>(low, high);
  }
};

// float32, with tensor cores in tf32 or in full precision without.
template <bool kTf32, int kWidth>
struct FloatMath {
  using Element = float;
  using Rows = Tile<float, kWidth>;

  __device__ float2 squares(const float* x) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int c = t; c < Rows::kChunks; c += 4) {
        const float4 y = *reinterpret_cast<const float4*>(x + Rows::chunk(g + 8 * i, c));
        sum[i] += y.x * y.x + y.y * y.y + y.z * y.z + y.w * y.w;
      }
    }
    return make_float2(quad_sum(sum[0]), quad_sum(sum[1]));
  }

  template <int kTiles>
  __device__ void scores(float (&s)[kTiles][4], const float* q, const float* k) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int c = 0; c < Rows::kChunks; c += kTf32 ? 2 : 1) {
      if constexpr (kTf32) {
        // a matrix of 16-bit numbers read as one of float: row g, column t
        uint32_t a[4];
        ldmatrix(a, q + Rows::chunk(lane % 16, c + lane / 16));
        for (uint32_t& x : a) x = to_tf32(__uint_as_float(x));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint32_t b0 = to_tf32(k[Rows::chunk(8 * j + g, c) + t]);
          const uint32_t b1 = to_tf32(k[Rows::chunk(8 * j + g, c + 1) + t]);
          mma_tf32(s[j], a, b0, b1);
        }
      } else {
        const float4 a0 = *reinterpret_cast<const float4*>(q + Rows::chunk(g, c));
        const float4 a1 = *reinterpret_cast<const float4*>(q + Rows::chunk(g + 8, c));
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float4 b = *reinterpret_cast<const float4*>(k + Rows::chunk(8 * j + 2 * t + i, c));
            s[j][i] = fmaf(a0.x, b.x, fmaf(a0.y, b.y, fmaf(a0.z, b.z, fmaf(a0.w, b.w, s[j][i]))));
            s[j][i + 2] = fmaf(a1.x, b.x, fmaf(a1.y, b.y, fmaf(a1.z, b.z, fmaf(a1.w, b.w, s[j][i + 2]))));
          }
        }
      }
    }
  }

  template <int kTiles>
  __device__ void weigh(float (&out)[kWidth / 8][4], float (&total)[2], const float (&p)[kTiles][4],
                        const float* v) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      sum[0] += p[j][0] + p[j][1];
      sum[1] += p[j][2] + p[j][3];
    }
    total[0] += quad_sum(sum[0]);
    total[1] += quad_sum(sum[1]);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if constexpr (kTf32) {
        // the order of keys is free: a lane's own two, 2t and 2t + 1, stand for t and t + 4
        const uint32_t a[4] = {to_tf32(p[j][0]), to_tf32(p[j][2]), to_tf32(p[j][1]), to_tf32(p[j][3])};
#pragma unroll
        for (int i = 0; i < kWidth / 8; ++i) {
          const uint32_t b0 = to_tf32(v[Rows::element(8 * j + 2 * t, 8 * i + g)]);
          const uint32_t b1 = to_tf32(v[Rows::element(8 * j + 2 * t + 1, 8 * i + g)]);
          mma_tf32(out[i], a, b0, b1);
        }
      } else {
#pragma unroll
        for (int key = 0; key < 8; ++key) {
          const int owner = lane / 4 * 4 + key / 2;
          const float p0 = __shfl_sync(kWholeWarp, p[j][key % 2], owner);
          const float p1 = __shfl_sync(kWholeWarp, p[j][key % 2 + 2], owner);
#pragma unroll
          for (int i = 0; i < kWidth / 8; ++i) {
            const float2 y = *reinterpret_cast<const float2*>(v + Rows::element(8 * j + key, 8 * i + 2 * t));
            out[i][0] = fmaf(p0, y.x, out[i][0]);
            out[i][1] = fmaf(p0, y.y, out[i][1]);
            out[i][2] = fmaf(p1, y.x, out[i][2]);
            out[i][3] = fmaf(p1, y.y, out[i][3]);
          }
        }
      }
    }
  }

  __device__ static void store(float* x, int row, int column, float low, float high) {
    *reinterpret_cast<float2*>(x + Rows::element(row, column)) = make_float2(low, high);
  }
};

// What the forward kernels take.
struct ForwardArguments {
  AttentionInputs inputs;
  void* out;
  float* lse;
  Geometry geometry;
  Strides strides;  // of q, k and v
  Dtype scale_dtype, bias_dtype;
  bool vector;         // chunks of 16 bytes are aligned in memory
  bool bias_resident;  // tiled: the bias of a block's rows fits into shared memory
  int groups;          // tiled: blocks that share a window's rows
  int stage_chunks;    // tiled: chunks of keys that are copied at once
};

// What the backward kernels take. Gradients that are sums over windows are left in partials, one for each of the
// programs of a head, in float: dlogit_scale [programs, heads], dbias [programs, heads, N, N] and dpad [programs, 2,
// heads, head_dim]; null where not wanted.
struct BackwardArguments {
  AttentionInputs inputs;
  const void *dout, *out;
  const float* lse;
  void *dq, *dk, *dv;
  float *dlogit_scale, *dbias, *dpad;
  Geometry geometry;
  Strides strides, dout_strides, grad_strides;
  float scale;
  Dtype scale_dtype, bias_dtype;
  bool vector;
};

// Bias of a warp's rows g and g + 8 for columns 8j + 2t and the next, in base-2 units; -inf for keys past the window's
// end. Rows are queries and columns keys, or the other way round where transposed.
template <bool kTransposed = false>
__device__ inline float4 bias_fragment(const void* bias, Dtype dtype, int tokens, int head, int row, int column) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row + i / 2 * 8, c = column + i % 2;
    const int query = kTransposed ? c : r, key = kTransposed ? r : c;
    const bool exists = bias != nullptr && query < tokens && key < tokens;
    x[i] = exists ? load_float(bias, dtype, (int64_t(head) * tokens + query) * tokens + key) * kLog2E : 0.f;
    if (key >= tokens) x[i] = -INFINITY;
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

// Programs a head that share `items` evenly, at most `blocks` on a multiprocessor over all heads.
inline int programs(int items, int blocks, int heads, const AttentionShape& s) {
  const int most = std::max(1, s.multiprocessors * blocks / heads);
  return ceil_div(items, ceil_div(items, most));
}

// Defined where they are instantiated: windows of at most 64 tokens, 16-bit numbers and head_dim up to 32; and any.
template <bool kCosine>
cudaError_t launch_whole(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream);
template <bool kCosine>
int whole_backward_programs(const Geometry& geometry, const AttentionShape& s);
template <bool kCosine>
cudaError_t launch_whole_backward(const BackwardArguments& a, const AttentionShape& s, int programs,
                                  cudaStream_t stream);
cudaError_t launch_tiled(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream);

// Partials of the tiled kernels' sums: of those over rows (dlogit_scale, dpad), and of dbias.
struct TiledPrograms {
  int rows, chunks;
};
cudaError_t tiled_backward_programs(const Geometry& geometry, const AttentionShape& s, TiledPrograms& programs);
cudaError_t launch_tiled_backward(const BackwardArguments& a, const AttentionShape& s, const TiledPrograms& programs,
                                  float* delta, float* norm, cudaStream_t stream);

}  // namespace swinops
