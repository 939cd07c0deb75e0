// Forward of window attention and cosine attention for windows of any size, strides and head_dim.
//
// A block takes some rows of queries of one head's windows against their keys in chunks, with a running maximum. Shared
// memory holds two stages of as many chunks as there is room for, at best all of a window's: while the block computes
// with one the other is copied.
#include "attention_tiled.cuh"

namespace swinops {
namespace {

// What a block of the tiled kernel has in shared memory, in bytes.
template <class Math, int kKeys>
struct TiledShared {
  using T = typename Math::Element;
  static constexpr int kRow = Math::Rows::kStride * sizeof(T);
  static constexpr int kWarps = sizeof(T) == 2 ? 12 : 8;  // for whose sums a multiprocessor has registers

  __host__ __device__ static int rows(int warps) { return 2 * 16 * warps * kRow; }
  // keys and values of a chunk, twice, and the keys' lengths
  __host__ __device__ static int chunk() { return 2 * 2 * kKeys * kRow + kKeys * int(sizeof(float)); }
  __host__ __device__ static int sides(int tokens) { return ceil_div(tokens, kKeys) * kKeys * int(sizeof(int)); }
  __host__ __device__ static int bias(int warps, int tokens) {
    return warps * ceil_div(tokens, kKeys) * kKeys / 8 * kWarp * int(sizeof(float4));
  }
  __host__ __device__ static int without_bias(int warps, int tokens) { return rows(warps) + chunk() + sides(tokens); }
};

template <class Math, int kKeys>
__global__ void __launch_bounds__(kWarp* most_warps(kKeys), 1) TiledForwardKernel(const ForwardArguments a) {
  using T = typename Math::Element;
  using Rows = typename Math::Rows;
  using Shared = TiledShared<Math, kKeys>;
  constexpr int kWidth = Rows::kChunks * Rows::kElements, kStride = Rows::kStride, kTiles = kKeys / 8;
  SWINOPS_DYNAMIC_SHARED(uint4, shared);
  const Math math;
  const Geometry& geometry = a.geometry;
  const int tokens = geometry.tokens, chunks = ceil_div(tokens, kKeys);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4, head = blockIdx.y;
  const int first = blockIdx.x % a.groups * 16 * warps;  // of the block's rows
  const int row = first + 16 * warp + g;                 // of this lane's two, the other is 8 further
  const bool active = first + 16 * warp < tokens;

  const int stage_keys = a.stage_chunks * kKeys;
  const int rows_size = 16 * warps * kStride, keys_size = stage_keys * kStride;  // elements
  T* const q_stages = reinterpret_cast<T*>(shared);
  T* const kv_stages = q_stages + 2 * rows_size;
  float4* const bias = reinterpret_cast<float4*>(kv_stages + 4 * keys_size);
  float* const lengths =
      reinterpret_cast<float*>(bias) + (a.bias_resident ? Shared::bias(warps, tokens) / sizeof(float) : 0);
  int* const sides = reinterpret_cast<int*>(lengths + stage_keys);

  for (int i = threadIdx.x; i < chunks * kKeys; i += blockDim.x) {
    int local[3];
    geometry.locate(i, local);
    sides[i] = geometry.far_side(local);
  }
  if (a.bias_resident) {
    for (int j = 0; j < chunks * kTiles; ++j) {
      bias[(warp * chunks * kTiles + j) * kWarp + lane] =
          bias_fragment(a.inputs.bias, a.bias_dtype, tokens, head, row, 8 * j + 2 * t);
    }
  }
  int side[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int local[3];
    geometry.locate(row + 8 * i, local);
    side[i] = geometry.far_side(local);
  }
  const bool cosine = a.inputs.logit_scale != nullptr;
  const float scale = cosine ? head_scale(a.inputs.logit_scale, a.scale_dtype, head) * kLog2E : geometry.scale;

  const T* const q[1] = {static_cast<const T*>(a.inputs.q)};
  const T* const no_pad[1] = {nullptr};
  const T* const kv[2] = {static_cast<const T*>(a.inputs.k), static_cast<const T*>(a.inputs.v)};
  const T* const pad = static_cast<const T*>(a.inputs.pad_kv);
  const int64_t pad_offset = int64_t(head) * geometry.head_dim, pad_v = int64_t(geometry.heads) * geometry.head_dim;
  const T* const pad_kv[2] = {pad ? pad + pad_offset : nullptr, pad ? pad + pad_v + pad_offset : nullptr};

  const auto load_rows = [&](int window, T* stage) {
    int place[3];
    const int b = geometry.find(window, place);
    copy_rows<Rows>(stage, rows_size, 16 * warps, first, q, no_pad, a.strides, geometry, head, b, place, a.vector);
  };
  const auto load_keys = [&](int window, int start, T* stage) {
    int place[3];
    const int b = geometry.find(window, place);
    copy_rows<Rows>(stage, keys_size, stage_keys, start, kv, pad_kv, a.strides, geometry, head, b, place, a.vector);
  };

  const int step = gridDim.x / a.groups;
  int q_stage = 0, kv_stage = 0;
  load_rows(blockIdx.x / a.groups, q_stages);
  load_keys(blockIdx.x / a.groups, 0, kv_stages);
  cp_async_commit();
  for (int window = blockIdx.x / a.groups; window < geometry.windows; window += step) {
    int place[3];
    const int b = geometry.find(window, place);
    const int cut = geometry.cut(place);
    T* const rows = q_stages + q_stage * rows_size + 16 * warp * kStride;
    q_stage ^= 1;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, row_scale[2] = {scale, scale};
    float out[kWidth / 8][4] = {};
    T* stage = nullptr;
    for (int chunk = 0, part = 0; chunk < chunks; ++chunk) {
      if (part == 0) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is there, and the other is free
        stage = kv_stages + kv_stage * 2 * keys_size;
        kv_stage ^= 1;
        T* const ahead = kv_stages + kv_stage * 2 * keys_size;
        if (chunk + a.stage_chunks < chunks) {
          load_keys(window, chunk * kKeys + stage_keys, ahead);
        } else if (window + step < geometry.windows) {
          load_rows(window + step, q_stages + q_stage * rows_size);
          load_keys(window + step, 0, ahead);
        }
        cp_async_commit();

        if (cosine) {
          measure(math, stage, stage_keys, lengths);
          if (chunk == 0) {
            const float2 length = measure(math, rows);
            row_scale[0] *= length.x;
            row_scale[1] *= length.y;
          }
          __syncthreads();
        }
      }
      const T* const keys = stage + part * kKeys * kStride;
      const float* const key_lengths = lengths + part * kKeys;
      if (++part == a.stage_chunks) part = 0;
      if (!active) continue;

      float s[kTiles][4] = {};
      math.scores(s, rows, keys);
      const int column = chunk * kKeys + 2 * t;
      float x[kTiles][4];
      if (a.bias_resident) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) unpack(bias[((warp * chunks + chunk) * kTiles + j) * kWarp + lane], x[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          unpack(bias_fragment(a.inputs.bias, a.bias_dtype, tokens, head, row, column + 8 * j), x[j]);
        }
      }
      add_bias(s, x, row_scale, cosine ? key_lengths + 2 * t : nullptr);
      if (cut) add_mask(s, side, sides + column, cut, geometry.mask);
      float new_top[2] = {top[0], top[1]};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) new_top[i / 2] = fmaxf(new_top[i / 2], s[j][i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        new_top[i] = quad_max(new_top[i]);
        // a row whose scores are all -inf so far has nothing to rescale: -inf less -inf would be NaN
        const float base = new_top[i] == -INFINITY ? 0.f : new_top[i];
        const float rescale = exp2_fast(top[i] - base);
        top[i] = new_top[i];
        total[i] *= rescale;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
          out[j][2 * i] *= rescale;
          out[j][2 * i + 1] *= rescale;
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          s[j][2 * i] = exp2_fast(s[j][2 * i] - base);
          s[j][2 * i + 1] = exp2_fast(s[j][2 * i + 1] - base);
        }
      }
      math.weigh(out, total, s, keys + keys_size);
    }
    if (!active) continue;

    // rows leave through the place of this warp's queries, which only it reads, to be written as chunks
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_fast(total[i]);
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        Math::store(rows, g + 8 * i, 8 * j + 2 * t, out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int local[3], at[3];
      geometry.locate(row + 8 * i, local);
      if (geometry.find(place, local, at) && row + 8 * i < tokens) {
        const int64_t to = geometry.token(b, at) * geometry.heads + head;
        for (int c = t; c < Rows::kChunks; c += 4) {
          write_chunk(static_cast<T*>(a.out) + to * geometry.head_dim + c * Rows::kElements,
                      rows + Rows::chunk(g + 8 * i, c), geometry.head_dim - c * Rows::kElements, a.vector);
        }
        if (t == 0) a.lse[to] = top[i] + log2_fast(total[i]);
      }
    }
  }
}

template <class Math, int kKeys>
cudaError_t launch(ForwardArguments a, const AttentionShape& s, cudaStream_t stream) {
  using Shared = TiledShared<Math, kKeys>;
  const int tokens = a.geometry.tokens, tiles = ceil_div(tokens, 16), chunks = ceil_div(tokens, kKeys);
  // the least that split `n` into as many parts as parts of `most`
  const auto share = [](int n, int most) { return ceil_div(n, ceil_div(n, most)); };
  int warps = share(tiles, most_warps(kKeys));
  while (warps > 1 && Shared::without_bias(warps, tokens) > s.shared_bytes) warps = share(tiles, warps - 1);
  int shared = Shared::without_bias(warps, tokens);
  if (shared > s.shared_bytes) return cudaErrorInvalidValue;
  a.groups = ceil_div(tiles, warps);
  const int64_t bias = Shared::bias(warps, tokens);
  a.bias_resident = a.inputs.bias != nullptr && shared + bias <= s.shared_bytes;
  if (a.bias_resident) shared += bias;
  const int most_blocks = std::max(1, Shared::kWarps / warps);  // on a multiprocessor
  const int room = s.shared_bytes / most_blocks - shared;
  a.stage_chunks = share(chunks, std::clamp(1 + room / Shared::chunk(), 1, chunks));
  shared += (a.stage_chunks - 1) * Shared::chunk();

  const auto kernel = TiledForwardKernel<Math, kKeys>;
  if (const cudaError_t error = allow_shared(kernel, shared)) return error;
  const int blocks = std::clamp(s.shared_bytes / shared, 1, most_blocks);
  const dim3 grid(a.groups * programs(a.geometry.windows, blocks, s.heads * a.groups, s), s.heads);
  SWINOPS_LAUNCH(kernel, grid, dim3(kWarp * warps), shared, stream, a);
  return cudaGetLastError();
}

struct Launch {
  const ForwardArguments& a;
  const AttentionShape& s;
  cudaStream_t stream;

  template <class Math, int kKeys>
  cudaError_t run() const {
    // the size of chunk that pads the keys less: 144 are three times 48
    if constexpr (kKeys == 64) {
      const int tokens = a.geometry.tokens;
      if (ceil_div(tokens, 48) * 48 < ceil_div(tokens, 64) * 64) return launch<Math, 48>(a, s, stream);
    }
    return launch<Math, kKeys>(a, s, stream);
  }
};

}  // namespace

cudaError_t launch_tiled(const ForwardArguments& a, const AttentionShape& s, cudaStream_t stream) {
  return with_math<64>(s, Launch{a, s, stream});
}

}  // namespace swinops
