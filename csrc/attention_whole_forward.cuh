// Forward of window attention and cosine attention where a window of an image is at most 64 tokens.
//
// A block holds its head's bias in registers, in the order of the accumulators.
#pragma once

#include "attention_whole.cuh"

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
  const Math math;
  const Geometry& geometry = a.geometry;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row = 16 * warp + g;  // the first of this lane's two; the other is 8 further
  const int head = blockIdx.y;
  const LaneRows<T, kPadded> rows(geometry, row);

  float bias[kKeyTiles][4];
#pragma unroll
  for (int j = 0; j < kKeyTiles; ++j) {
    const float4 x = bias_fragment(a.inputs.bias, a.bias_dtype, geometry.tokens, head, row, 8 * j + 2 * t);
    bias[j][0] = x.x, bias[j][1] = x.y, bias[j][2] = x.z, bias[j][3] = x.w;
  }
  uint32_t apart[2];
  rows.template parted<kKeyTiles>(row, apart);
  float scale = geometry.scale;
  if constexpr (kCosine) scale = head_scale(a.inputs.logit_scale, a.scale_dtype, head) * kLog2E;

  const int channel = t * Rows::kElements;
  const bool has_pad = a.inputs.pad_kv != nullptr;
  const T* const pad_k = static_cast<const T*>(a.inputs.pad_kv) + int64_t(head) * geometry.head_dim + channel;
  const T* const pad_v = pad_k + int64_t(geometry.heads) * geometry.head_dim;
  const int64_t offset = keep(head * a.strides.head + channel);
  const unsigned line_bytes = a.strides.axis[1] * sizeof(T), token_bytes = a.strides.axis[2] * sizeof(T);
  const unsigned place = keep(unsigned(sizeof(T)) * Rows::chunk(row, t));

  struct Window {
    unsigned image;
    uint32_t masked;
    bool inside[2];
    unsigned token[2];  // of this lane's rows, in the image
  };
  // Start copying a window.
  const auto load = [&](int window, unsigned stage) {
    const auto found = rows.find(window, apart);
    Window loaded{found.image, found.masked};
    const int64_t start = found.image * a.strides.batch + offset;
    const T* const q = static_cast<const T*>(a.inputs.q) + start;
    const T* const k = static_cast<const T*>(a.inputs.k) + start;
    const T* const v = static_cast<const T*>(a.inputs.v) + start;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned from = found.line[i] * line_bytes + found.column[i] * token_bytes;
      const bool inside = found.inside[i], copied = rows.exists[i] && rows.has_channel;
      T* const to = advance(shared, place + stage) + Rows::chunk(8 * i, 0);
      cp_async(to, advance(q, from), inside && copied);
      cp_async(to + kTile, inside ? advance(k, from) : pad_k, (inside || has_pad) && copied);
      cp_async(to + 2 * kTile, inside ? advance(v, from) : pad_v, (inside || has_pad) && copied);
      loaded.inside[i] = inside;
      loaded.token[i] = found.line[i] * geometry.size[2] + found.column[i];
    }
    cp_async_commit();
    return loaded;
  };

  const unsigned row_floats = geometry.heads, image_floats = geometry.size[1] * geometry.size[2] * row_floats;
  const int64_t out_offset = keep(int64_t(head) * geometry.head_dim + channel);
  unsigned stage = 0;  // in bytes
  Window next = load(blockIdx.x, stage);
  for (int window = blockIdx.x; window < geometry.windows; window += gridDim.x) {
    const Window current = next;
    cp_async_wait<0>();
    __syncthreads();  // this window is there, and the other stage is free
    const unsigned other = kStage * unsigned(sizeof(T)) - stage;
    if (window + int(gridDim.x) < geometry.windows) next = load(window + gridDim.x, other);

    T* const q = advance(shared, stage) + 16 * warp * Rows::kStride;
    const T* const k = advance(shared, stage) + kTile;
    float s[kKeyTiles][4] = {};
    math.scores(s, q, k);
    float row_scale[2] = {scale, scale};
    if constexpr (kCosine) {
      const float2 k_squares = math.squares(q + kTile);
      if (t == 0) {
        lengths[row] = inverse_length<T>(k_squares.x);
        lengths[row + 8] = inverse_length<T>(k_squares.y);
      }
      const float2 q_squares = math.squares(q);
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
    if (__any_sync(kWholeWarp, current.masked)) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (current.masked >> (4 * j + i) & 1) s[j][i] += geometry.mask;
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
    math.weigh(out, total, s, k + kTile);

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
    T* const image =
        static_cast<T*>(a.out) + (uint64_t(current.image) * (image_floats * geometry.head_dim) + out_offset);
    float* const lse = a.lse + (uint64_t(current.image) * image_floats + head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(advance(shared, place + stage) + Rows::chunk(8 * i, 0));
      const float sum = top[i] + log2_fast(total[i]);
      const uint64_t token = current.token[i];
      T* const to = image + token * (row_floats * geometry.head_dim);
      float* const sum_to = lse + token * row_floats;
      const bool inside = rows.exists[i] && (!kPadded || current.inside[i]);
      if (inside && rows.has_channel) *reinterpret_cast<uint4*>(to) = chunk;
      if (inside && t == 0) *sum_to = sum;
    }
    stage = other;
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
