// Backward of window attention and cosine attention where a window of an image is at most 64 tokens.
//
// The probabilities are computed again. A warp owns 16 rows of queries: their scores, their bias gradient, summed over
// the block's windows in registers, and dq. Probabilities and gradients of scores then cross shared memory, and a warp
// makes dk and dv of the 16 keys at the same rows.
#pragma once

#include "attention_whole.cuh"

namespace swinops {

template <class T, int kKeyTiles, bool kCosine, bool kPadded>
struct WholeBackward {
  using Math = HalfMath<T, 32>;
  static constexpr int kWarps = ceil_div(kKeyTiles, 2);
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kTile = kRows * Math::Rows::kStride;  // elements
  static constexpr int kStage = 4 * kTile;
  // pairs [query, key]: eight rows' chunks of one column lie in different banks
  static constexpr int kPairStride = 8 * (kKeyTiles | 1);
  static constexpr int kPairs = kRows * kPairStride;
  static constexpr int kBiases = kWarps * kKeyTiles * kWarp;
  static constexpr int kShared =
      (2 * kStage + 2 * kPairs) * sizeof(T) + kBiases * sizeof(float4) + (kCosine ? kRows * sizeof(float) : 0);
  // on a multiprocessor: with three, cosine attention would spill what it sums over pads
  static constexpr int kBlocks = kWarps == 1 ? 8 : kCosine && kPadded ? 2 : 3;
};

template <class T, int kKeyTiles, bool kCosine, bool kPadded>
__global__ void __launch_bounds__(WholeBackward<T, kKeyTiles, kCosine, kPadded>::kThreads,
                                  WholeBackward<T, kKeyTiles, kCosine, kPadded>::kBlocks)
    WholeBackwardKernel(const BackwardArguments a) {
  using Form = WholeBackward<T, kKeyTiles, kCosine, kPadded>;
  using Math = typename Form::Math;
  using Rows = typename Math::Rows;
  constexpr int kTile = Form::kTile, kStage = Form::kStage, kPairStride = Form::kPairStride;
  SWINOPS_DYNAMIC_SHARED(T, shared);
  T* const p_pairs = shared + 2 * kStage;
  T* const ds_pairs = p_pairs + Form::kPairs;
  float4* const biases = reinterpret_cast<float4*>(ds_pairs + Form::kPairs);
  float* const lengths = reinterpret_cast<float*>(biases + Form::kBiases);  // one over the keys', of cosine attention
  const Math math;
  const Geometry& geometry = a.geometry;
  const int tokens = geometry.tokens;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row = 16 * warp + g;  // the first of this lane's two; the other is 8 further
  const int head = blockIdx.y;

  const LaneRows<T, kPadded> rows(geometry, row);

#pragma unroll
  for (int j = 0; j < kKeyTiles; ++j) {
    biases[(warp * kKeyTiles + j) * kWarp + lane] =
        bias_fragment(a.inputs.bias, a.bias_dtype, tokens, head, row, 8 * j + 2 * t);
  }
  uint32_t apart[2];
  rows.template parted<kKeyTiles>(row, apart);
  float scale = a.scale;
  if constexpr (kCosine) scale = head_scale(a.inputs.logit_scale, a.scale_dtype, head);
  const float score_scale = scale * kLog2E;

  const int channel = t * Rows::kElements;
  const bool has_pad = a.inputs.pad_kv != nullptr;
  const T* const pad_k = static_cast<const T*>(a.inputs.pad_kv) + int64_t(head) * geometry.head_dim + channel;
  const T* const pad_v = pad_k + int64_t(geometry.heads) * geometry.head_dim;
  const unsigned place = keep(unsigned(sizeof(T)) * Rows::chunk(row, t));
  const auto bytes = [](int64_t stride) { return unsigned(stride * sizeof(T)); };

  struct Window {
    unsigned image;
    uint32_t masked;   // of this lane's pairs
    bool inside[2];    // its rows are no pads
    unsigned grad[2];  // where their gradients lie in the image, in bytes
    float lse[2];
  };
  // Start copying a window: q, k, v and dout.
  const auto load = [&](int window, unsigned stage) {
    const auto found = rows.find(window, apart);
    Window loaded{found.image, found.masked};
    const int64_t start = found.image * a.strides.batch + (head * a.strides.head + channel);
    const T* const q = static_cast<const T*>(a.inputs.q) + start;
    const T* const k = static_cast<const T*>(a.inputs.k) + start;
    const T* const v = static_cast<const T*>(a.inputs.v) + start;
    const T* const dout =
        static_cast<const T*>(a.dout) + (found.image * a.dout_strides.batch + head * a.dout_strides.head + channel);
    const unsigned row_floats = geometry.heads, image_floats = geometry.size[1] * geometry.size[2] * row_floats;
    const float* const lse = a.lse + (uint64_t(found.image) * image_floats + head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned line = found.line[i], column = found.column[i];
      const unsigned from = line * bytes(a.strides.axis[1]) + column * bytes(a.strides.axis[2]);
      const unsigned dout_from = line * bytes(a.dout_strides.axis[1]) + column * bytes(a.dout_strides.axis[2]);
      const bool inside = found.inside[i], copied = rows.exists[i] && rows.has_channel;
      T* const to = advance(shared, place + stage) + Rows::chunk(8 * i, 0);
      cp_async(to, advance(q, from), inside && copied);
      cp_async(to + kTile, inside ? advance(k, from) : pad_k, (inside || has_pad) && copied);
      cp_async(to + 2 * kTile, inside ? advance(v, from) : pad_v, (inside || has_pad) && copied);
      cp_async(to + 3 * kTile, advance(dout, dout_from), inside && copied);
      loaded.inside[i] = inside;
      loaded.grad[i] = line * bytes(a.grad_strides.axis[1]) + column * bytes(a.grad_strides.axis[2]);
      // of what is no query the probabilities are zero
      const uint64_t token = line * geometry.size[2] + column;
      loaded.lse[i] = inside && rows.exists[i] ? lse[token * row_floats] : INFINITY;
    }
    cp_async_commit();
    return loaded;
  };

  float dbias[kKeyTiles][4] = {}, dlogit_scale = 0.f;
  float dpad[2][4][2] = {};  // of key and value: this lane's columns of every eight channels
  unsigned stage = 0;        // in bytes
  Window next = load(blockIdx.x, stage);
  for (int window = blockIdx.x; window < geometry.windows; window += gridDim.x) {
    const Window current = next;
    cp_async_wait<0>();
    __syncthreads();  // this window is there, and the other stage is free
    const unsigned other = kStage * unsigned(sizeof(T)) - stage;
    if (window + int(gridDim.x) < geometry.windows) next = load(window + gridDim.x, other);

    T* const q = advance(shared, stage);
    T* const k = q + kTile;
    T* const v = k + kTile;
    T* const dout = v + kTile;
    const int own = 16 * warp * Rows::kStride;
    float row_scale[2] = {score_scale, score_scale}, q_length[2], k_length[2];  // one over lengths
    float q_inverse[2], k_inverse[2];
    if constexpr (kCosine) {
      const float2 k_squares = math.squares(k + own), q_squares = math.squares(q + own);
      k_length[0] = inverse_length<T>(k_squares.x);
      k_length[1] = inverse_length<T>(k_squares.y);
      q_length[0] = inverse_length<T>(q_squares.x);
      q_length[1] = inverse_length<T>(q_squares.y);
      q_inverse[0] = inverse_or_zero<T>(q_squares.x);
      q_inverse[1] = inverse_or_zero<T>(q_squares.y);
      k_inverse[0] = inverse_or_zero<T>(k_squares.x);
      k_inverse[1] = inverse_or_zero<T>(k_squares.y);
      if (t == 0) {
        lengths[row] = k_length[0];
        lengths[row + 8] = k_length[1];
      }
      row_scale[0] *= q_length[0];
      row_scale[1] *= q_length[1];
      __syncthreads();
    }
    float p[kKeyTiles][4] = {}, ds[kKeyTiles][4] = {};
    math.scores(p, q + own, k);
    float total[2] = {}, delta[2] = {};
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      const float4 x = biases[(warp * kKeyTiles + j) * kWarp + lane];
      const float bias[4] = {x.x, x.y, x.z, x.w};
      float2 key = make_float2(1.f, 1.f);
      if constexpr (kCosine) key = *reinterpret_cast<const float2*>(lengths + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float factor = row_scale[i / 2];
        if constexpr (kCosine) factor *= i % 2 ? key.y : key.x;
        p[j][i] = p[j][i] * factor + bias[i];  // as forward rounds it
      }
    }
    if (__any_sync(kWholeWarp, current.masked)) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (current.masked >> (4 * j + i) & 1) p[j][i] += geometry.mask;
        }
      }
    }
    if constexpr (kCosine) {
      __syncthreads();  // all have read the keys as they came: from here on they and the queries are directions
      scale_rows<Rows>(q + own, q_length);
      scale_rows<Rows>(k + own, k_length);
    }
    // scores of the gradient: dp = dout v^T
    math.scores(ds, dout + own, v);
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[j][i] = exp2_fast(p[j][i] - current.lse[i / 2]);
        total[i / 2] += p[j][i];
        delta[i / 2] += p[j][i] * ds[j][i];
      }
    }
    // rounding in lse leaves the sum of probabilities off one, which the same way in every window would bias dbias
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_fast(fmaxf(quad_sum(total[i]), 1e-30f));
      delta[i] = quad_sum(delta[i]) * inverse;
      total[i] = inverse;
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[j][i] *= total[i / 2];
        ds[j][i] = p[j][i] * (ds[j][i] - delta[i / 2]);
        dbias[j][i] += ds[j][i];
      }
      const int at = row * kPairStride + 8 * j + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pair = at + 8 * i * kPairStride;
        *reinterpret_cast<uint32_t*>(p_pairs + pair) = pack<T>(p[j][2 * i], p[j][2 * i + 1]);
        *reinterpret_cast<uint32_t*>(ds_pairs + pair) = pack<T>(ds[j][2 * i], ds[j][2 * i + 1]);
      }
    }
    __syncthreads();  // pairs are there, and the values are free: gradients leave through their place
    float dx[4][4] = {}, unused[2] = {};
    math.weigh(dx, unused, ds, k);

    const auto write = [&](void* to, float factor, const T* unit, const float (&inverse)[2], float (*sums)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float along = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            dx[j][2 * i + c] *= factor;
            if (kCosine && unit)
              along += dx[j][2 * i + c] * to_float(unit[Rows::element(g + 8 * i, 8 * j + 2 * t + c)]);
          }
        }
        if (kCosine && unit) {
          along = quad_sum(along);
          if (sums == nullptr) dlogit_scale += along;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (kCosine && unit) {
              const float direction = to_float(unit[Rows::element(g + 8 * i, 8 * j + 2 * t + c)]);
              dx[j][2 * i + c] = (dx[j][2 * i + c] - along * direction) * inverse[i];
            }
            if (kPadded && sums && rows.exists[i] && !current.inside[i]) sums[j][c] += dx[j][2 * i + c];
          }
          Math::store(v + own, g + 8 * i, 8 * j + 2 * t, dx[j][2 * i], dx[j][2 * i + 1]);
        }
      }
      __syncwarp();
      T* const image =
          static_cast<T*>(to) + (current.image * a.grad_strides.batch + head * a.grad_strides.head + channel);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 chunk = *reinterpret_cast<const uint4*>(advance(v, place) + Rows::chunk(8 * i, 0));
        const bool written = rows.exists[i] && rows.has_channel && (!kPadded || current.inside[i]);
        if (written) *reinterpret_cast<uint4*>(advance(image, current.grad[i])) = chunk;
      }
      __syncwarp();
    };
    write(a.dq, scale, q + own, q_inverse, nullptr);
    const auto transposed = [&](const T* pairs, const T* x) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dx[j][i] = 0.f;
      }
      math.template weigh_transposed<Form::kRows, kPairStride>(dx, pairs + 16 * warp, x);
    };
    transposed(ds_pairs, q);
    write(a.dk, scale, k + own, k_inverse, dpad[0]);
    transposed(p_pairs, dout);
    write(a.dv, 1.f, nullptr, k_inverse, dpad[1]);
    stage = other;
  }

  if (a.dbias) {
    float* const partial = a.dbias + (int64_t(blockIdx.x) * geometry.heads + head) * tokens * tokens;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * j + 2 * t + i % 2;
        if (rows.exists[i / 2] && key < tokens) partial[(row + i / 2 * 8) * tokens + key] = dbias[j][i];
      }
    }
  }
  // the rest is summed over the lanes that share columns, then over warps
  float* const sums = reinterpret_cast<float*>(p_pairs);
  __syncthreads();
  if (kCosine && a.dlogit_scale) {
    dlogit_scale = column_sum(dlogit_scale);
    if (lane == 0) sums[warp] = dlogit_scale;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.f;
      for (int w = 0; w < Form::kWarps; ++w) total += sums[w];
      const bool clamped = load_float(a.inputs.logit_scale, a.scale_dtype, head) > kMaxLogitScale;
      a.dlogit_scale[int64_t(blockIdx.x) * geometry.heads + head] = clamped ? 0.f : total;
    }
    __syncthreads();
  }
  if (kPadded && a.dpad) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float total = column_sum(dpad[n][j][c]);
          if (g == 0) sums[(warp * 2 + n) * 32 + 8 * j + 2 * t + c] = total;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * geometry.head_dim; i += Form::kThreads) {
      const int n = i / geometry.head_dim, c = i % geometry.head_dim;
      float total = 0.f;
      for (int w = 0; w < Form::kWarps; ++w) total += sums[(w * 2 + n) * 32 + c];
      a.dpad[((int64_t(blockIdx.x) * 2 + n) * geometry.heads + head) * geometry.head_dim + c] = total;
    }
  }
}

// Blocks a head: each leaves one partial of the sums over windows.
template <bool kCosine, bool kPadded>
int whole_backward_programs(const Geometry& geometry, const AttentionShape& s) {
  const int blocks = geometry.tokens <= 16   ? WholeBackward<half, 2, kCosine, kPadded>::kBlocks
                     : geometry.tokens <= 56 ? WholeBackward<half, 7, kCosine, kPadded>::kBlocks
                                             : WholeBackward<half, 8, kCosine, kPadded>::kBlocks;
  return programs(geometry.windows, blocks, s.heads, s);
}

template <bool kCosine>
int whole_backward_programs(const Geometry& geometry, const AttentionShape& s) {
  return geometry.padded ? whole_backward_programs<kCosine, true>(geometry, s)
                         : whole_backward_programs<kCosine, false>(geometry, s);
}

template <class T, int kKeyTiles, bool kCosine, bool kPadded>
cudaError_t launch_whole_backward(const BackwardArguments& a, int programs, cudaStream_t stream) {
  using Form = WholeBackward<T, kKeyTiles, kCosine, kPadded>;
  const auto kernel = WholeBackwardKernel<T, kKeyTiles, kCosine, kPadded>;
  if (const cudaError_t error = allow_shared(kernel, Form::kShared)) return error;
  const dim3 grid(programs, a.geometry.heads);
  SWINOPS_LAUNCH(kernel, grid, dim3(Form::kThreads), Form::kShared, stream, a);
  return cudaGetLastError();
}

template <class T, int kKeyTiles, bool kCosine>
cudaError_t launch_whole_backward(const BackwardArguments& a, int programs, cudaStream_t stream) {
  return a.geometry.padded ? launch_whole_backward<T, kKeyTiles, kCosine, true>(a, programs, stream)
                           : launch_whole_backward<T, kKeyTiles, kCosine, false>(a, programs, stream);
}

template <class T, bool kCosine>
cudaError_t launch_whole_backward(const BackwardArguments& a, int programs, cudaStream_t stream) {
  if (a.geometry.tokens <= 16) return launch_whole_backward<T, 2, kCosine>(a, programs, stream);
  if (a.geometry.tokens <= 56) return launch_whole_backward<T, 7, kCosine>(a, programs, stream);
  return launch_whole_backward<T, 8, kCosine>(a, programs, stream);
}

template <bool kCosine>
cudaError_t launch_whole_backward(const BackwardArguments& a, const AttentionShape& s, int programs,
                                  cudaStream_t stream) {
  return s.dtype == Dtype::kFloat16 ? launch_whole_backward<half, kCosine>(a, programs, stream)
                                    : launch_whole_backward<bfloat16, kCosine>(a, programs, stream);
}

}  // namespace swinops
