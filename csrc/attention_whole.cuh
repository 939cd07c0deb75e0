// Forward of window attention and cosine attention where a window of an image is at most 64 tokens.
//
// A block keeps one head, holds that head's bias in registers in the order of the accumulators, and loops over windows:
// the next one is copied to shared memory while this one computes. Offsets within an image are of 32 bits.
#pragma once

#include "attention.cuh"

namespace swinops {

template <class T, int kKeyTiles, bool kCosine>
struct WholeForward {
  using Math = HalfMath<T, 32>;
  static constexpr int kWarps = ceil_div(kKeyTiles, 2);
  static constexpr int kThreads = kWarp * kWarps;
  // on a multiprocessor: cosine attention and 64 keys would spill 128 registers
  static constexpr int kBlocks = (kCosine || kKeyTiles > 7 ? 12 : 16) / kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kTile = kRows * Math::Rows::kStride;  // elements
  static constexpr int kStage = 3 * kTile;
  static constexpr int kShared = 2 * kStage * sizeof(T) + kRows * sizeof(float);
};

template <class T, int kKeyTiles, bool kCosine, bool kPadded>
__global__ void __launch_bounds__(WholeForward<T, kKeyTiles, kCosine>::kThreads,
                                  WholeForward<T, kKeyTiles, kCosine>::kBlocks)
    WholeForwardKernel(const ForwardArguments a) {
  using Form = WholeForward<T, kKeyTiles, kCosine>;
  using Math = typename Form::Math;
  using Rows = typename Math::Rows;
  constexpr int kTile = Form::kTile, kStage = Form::kStage;
  SWINOPS_DYNAMIC_SHARED(T, shared);
  float* const lengths = reinterpret_cast<float*>(shared + 2 * kStage);
  const Geometry& geometry = a.geometry;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row = 16 * warp + g;  // the first of this lane's two; the other is 8 further
  const int head = blockIdx.y;

  int local[2][3], side[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    geometry.locate<1>(row + 8 * i, local[i]);
    side[i] = geometry.far_side(local[i]);
  }
  float bias[kKeyTiles][4];
  uint32_t apart[2] = {};  // by axis: a bit for each of the pairs in `bias` that the seam parts
#pragma unroll
  for (int j = 0; j < kKeyTiles; ++j) {
    const int column = 8 * j + 2 * t;
    const float4 x = bias_fragment(a.inputs.bias, a.bias_dtype, geometry.tokens, head, row, column);
    bias[j][0] = x.x, bias[j][1] = x.y, bias[j][2] = x.z, bias[j][3] = x.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int key[3];
      geometry.locate<1>(column + i % 2, key);
      const int parted = side[i / 2] ^ geometry.far_side(key);
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) apart[axis] |= uint32_t(parted >> (axis + 1) & 1) << (4 * j + i);
    }
  }
  float scale = geometry.scale;
  if constexpr (kCosine) scale = head_scale(a.inputs.logit_scale, a.scale_dtype, head) * kLog2E;

  const int channel = t * Rows::kElements;
  const bool has_channel = channel < geometry.head_dim, has_pad = a.inputs.pad_kv != nullptr;
  const bool exists[2] = {row < geometry.tokens, row + 8 < geometry.tokens};
  const int64_t head_offset = head * a.strides.head + channel;
  const unsigned line_bytes = a.strides.axis[1] * sizeof(T), token_bytes = a.strides.axis[2] * sizeof(T);
  const T* const pad = static_cast<const T*>(a.inputs.pad_kv) + int64_t(head) * geometry.head_dim + channel;
  const T* const pad_v = pad + int64_t(geometry.heads) * geometry.head_dim;

  struct Window {
    int b, cut;    // its image, and the axes along which the seam cuts it
    int token[2];  // of this lane's rows, in the image; -1 for pads and past the window's end
  };
  // Start copying a window.
  const auto load = [&](int window, int stage) {
    Window result;
    int place[3];
    result.b = geometry.find<1>(window, place);
    result.cut = geometry.cut(place);
    const int64_t start = result.b * a.strides.batch + head_offset;
    const T* const q = static_cast<const T*>(a.inputs.q) + start;
    const T* const k = static_cast<const T*>(a.inputs.k) + start;
    const T* const v = static_cast<const T*>(a.inputs.v) + start;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int at[3];
      const bool inside = geometry.find<1>(place, local[i], at) || !kPadded;
      const unsigned from = at[1] * line_bytes + at[2] * token_bytes;
      T* const to = shared + stage * kStage + Rows::chunk(row + 8 * i, t);
      const bool copied = exists[i] && has_channel;
      cp_async(to, advance(q, from), inside && copied);
      cp_async(to + kTile, inside ? advance(k, from) : pad, (inside || has_pad) && copied);
      cp_async(to + 2 * kTile, inside ? advance(v, from) : pad_v, (inside || has_pad) && copied);
      result.token[i] = inside && exists[i] ? at[1] * geometry.size[2] + at[2] : -1;
    }
    cp_async_commit();
    return result;
  };

  int stage = 0;
  Window next = load(blockIdx.x, 0);
  for (int window = blockIdx.x; window < geometry.windows; window += gridDim.x) {
    const Window current = next;
    cp_async_wait<0>();
    __syncthreads();  // this window is there, and the other stage is free
    if (window + int(gridDim.x) < geometry.windows) next = load(window + gridDim.x, stage ^ 1);

    T* const q = shared + stage * kStage + 16 * warp * Rows::kStride;
    const T* const k = shared + stage * kStage + kTile;
    float s[kKeyTiles][4] = {};
    Math::scores(s, q, k);
    float row_scale[2] = {scale, scale};
    if constexpr (kCosine) {
      const float2 k_squares = Math::squares(q + kTile);
      if (t == 0) {
        lengths[row] = inverse_length<T>(k_squares.x);
        lengths[row + 8] = inverse_length<T>(k_squares.y);
      }
      const float2 q_squares = Math::squares(q);
      row_scale[0] *= inverse_length<T>(q_squares.x);
      row_scale[1] *= inverse_length<T>(q_squares.y);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      float2 key = make_float2(1.f, 1.f);
      if constexpr (kCosine) key = *reinterpret_cast<const float2*>(lengths + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float factor = row_scale[i / 2];
        if constexpr (kCosine) factor *= i % 2 ? key.y : key.x;
        s[j][i] = s[j][i] * factor + bias[j][i];
      }
    }
    const uint32_t masked = (current.cut & 2 ? apart[0] : 0) | (current.cut & 4 ? apart[1] : 0);
    if (__any_sync(kWholeWarp, masked)) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (masked >> (4 * j + i) & 1) s[j][i] += geometry.mask;
        }
      }
    }

    float top[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[j][i]);
    }
    top[0] = quad_max(top[0]);
    top[1] = quad_max(top[1]);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = exp2_fast(s[j][i] - top[i / 2]);
    }
    float out[4][4] = {}, total[2] = {};
    Math::weigh(out, total, s, k + kTile);

    // rows leave through the place of this warp's queries, which only it reads, to be written as chunks
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_fast(total[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Math::store(q, g + 8 * i, 8 * j + 2 * t, out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
      }
    }
    __syncwarp();
    const int64_t start = int64_t(current.b) * geometry.size[1] * geometry.size[2] * geometry.heads + head;
    T* const image = static_cast<T*>(a.out) + start * geometry.head_dim + channel;
    float* const lse = a.lse + start;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned at = current.token[i] * geometry.heads;
      const uint4 chunk = *reinterpret_cast<const uint4*>(q + Rows::chunk(g + 8 * i, t));
      if (current.token[i] >= 0 && has_channel) {
        *reinterpret_cast<uint4*>(advance(image, at * geometry.head_dim * unsigned(sizeof(T)))) = chunk;
      }
      if (current.token[i] >= 0 && t == 0) *advance(lse, at * unsigned(sizeof(float))) = top[i] + log2_fast(total[i]);
    }
    stage ^= 1;
  }
}

template <class T, int kKeyTiles, bool kCosine, bool kPadded>
cudaError_t launch_whole(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream) {
  using Form = WholeForward<T, kKeyTiles, kCosine>;
  const auto kernel = WholeForwardKernel<T, kKeyTiles, kCosine, kPadded>;
  if (const cudaError_t error = allow_shared(kernel, Form::kShared)) return error;
  const dim3 grid(programs(a.geometry.windows, Form::kBlocks, s.heads, s), s.heads);
  SWINOPS_LAUNCH(kernel, grid, dim3(Form::kThreads), Form::kShared, stream, a);
  return cudaGetLastError();
}

template <class T, int kKeyTiles, bool kCosine>
cudaError_t launch_whole(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream) {
  return a.geometry.padded ? launch_whole<T, kKeyTiles, kCosine, true>(a, s, stream)
                           : launch_whole<T, kKeyTiles, kCosine, false>(a, s, stream);
}

template <class T, bool kCosine>
cudaError_t launch_whole(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream) {
  if (a.geometry.tokens <= 16) return launch_whole<T, 2, kCosine>(a, s, stream);
  if (a.geometry.tokens <= 56) return launch_whole<T, 7, kCosine>(a, s, stream);
  return launch_whole<T, 8, kCosine>(a, s, stream);
}

template <bool kCosine>
cudaError_t launch_whole(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream) {
  return s.dtype == Dtype::kFloat16 ? launch_whole<half, kCosine>(a, s, stream)
                                    : launch_whole<bfloat16, kCosine>(a, s, stream);
}

}  // namespace swinops
