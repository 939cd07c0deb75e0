// Backward of window attention and cosine attention for windows of any size, strides and head_dim.
//
// Three kernels of one form: a warp's 16 rows against the other tokens of their window in chunks, the next of which is
// copied to shared memory while this one computes. Where rows are queries (q, dout) and chunks keys (k, v), they sum dq
// over the chunks of a window, or the bias gradient of one chunk over windows. Where rows are keys and chunks queries
// they sum dk and dv, and all pairs are transposed: scores of rows and chunks are products in the same places.
#include "attention_tiled.cuh"

namespace swinops {
namespace {

constexpr int kBackwardWarps = 4;  // at most; more would leave too few registers

enum class Sum { kDq, kDk, kDv, kDkDv, kDbias };

struct TiledArguments : BackwardArguments {
  float *delta, *norm;  // [B, D, H, W, heads]: sum_j p dp, and what makes the probabilities sum to one
  int groups;           // blocks that share a window's rows
  bool normed;          // a pass of its own sums delta and norm, which are else those of `out` and 1
  bool bias_resident;   // the bias of a block's rows is in shared memory
};

// What a block has in shared memory, in bytes.
template <class Math, int kKeys>
struct BackwardShared {
  using T = typename Math::Element;
  static constexpr int kRow = Math::Rows::kStride * sizeof(T);
  static constexpr int kWidth = Math::Rows::kChunks * Math::Rows::kElements;

  static constexpr int kBlocks = kRow <= 80 ? 3 : 2;  // on a multiprocessor, for whose sums there are registers

  static int bias(int warps, int chunks) { return warps * chunks * (kKeys / 8) * kWarp * int(sizeof(float4)); }
  static int without_bias(int warps, int tokens) {
    const int rows = 2 * 16 * warps * kRow, chunks = 2 * 2 * kKeys * kRow,
              stats = (2 * 3 + 1) * kKeys * int(sizeof(float));
    const int sides = ceil_div(tokens, kKeys) * kKeys * int(sizeof(int)),
              pads = warps * 2 * kWidth * int(sizeof(float));
    return rows + chunks + stats + sides + pads;
  }
};

template <class Math, int kKeys, Sum kSum>
__global__ void __launch_bounds__(kWarp* kBackwardWarps, BackwardShared<Math, kKeys>::kBlocks)
    TiledBackwardKernel(const TiledArguments a) {
  using T = typename Math::Element;
  using Rows = typename Math::Rows;
  static_assert(kKeys <= kWarp, "a warp loads what a chunk's queries have");
  constexpr int kWidth = Rows::kChunks * Rows::kElements, kStride = Rows::kStride, kTiles = kKeys / 8;
  constexpr int kColumns = kWidth / 8;
  constexpr bool kQueries = kSum == Sum::kDq || kSum == Sum::kDbias;  // rows are queries
  constexpr bool kDk = kSum == Sum::kDk || kSum == Sum::kDkDv, kDv = kSum == Sum::kDv || kSum == Sum::kDkDv;
  SWINOPS_DYNAMIC_SHARED(uint4, shared);
  const Math math;
  const Geometry& geometry = a.geometry;
  const int tokens = geometry.tokens, chunks = ceil_div(tokens, kKeys);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4, head = blockIdx.y;
  const int tiles = kSum == Sum::kDbias ? a.groups * chunks : a.groups;  // blocks that share a window
  const int tile = blockIdx.x % tiles, program = blockIdx.x / tiles, step = gridDim.x / tiles;
  const int first = tile % a.groups * 16 * warps;  // of the block's rows
  const int first_chunk = kSum == Sum::kDbias ? tile / a.groups : 0;
  const int row = first + 16 * warp + g;  // of this lane's two, the other is 8 further
  const bool active = first + 16 * warp < tokens;
  const bool exists[2] = {row < tokens, row + 8 < tokens};

  const int rows_size = 16 * warps * kStride, chunk_size = kKeys * kStride;  // elements
  T* const rows = reinterpret_cast<T*>(shared);
  T* const stages = rows + 2 * rows_size;
  float4* const bias = reinterpret_cast<float4*>(stages + 4 * chunk_size);
  const int bias_tiles = kTiles * (kSum == Sum::kDbias ? 1 : a.bias_resident ? chunks : 0);  // of a warp
  float* const stats =
      reinterpret_cast<float*>(bias + warps * bias_tiles * kWarp);  // two stages' lse, delta, norm of queries
  float* const lengths = stats + 2 * 3 * kKeys;  // one over those of a chunk's first tensor, of cosine attention
  int* const sides = reinterpret_cast<int*>(lengths + kKeys);
  float* const pads = reinterpret_cast<float*>(sides + chunks * kKeys) + warp * 2 * kWidth;
  for (int i = threadIdx.x; i < chunks * kKeys; i += blockDim.x) {
    int local[3];
    geometry.locate(i, local);
    sides[i] = geometry.far_side(local);
  }
  for (int i = lane; i < 2 * kWidth; i += kWarp) pads[i] = 0.f;
  for (int j = 0; j < bias_tiles; ++j) {
    bias[(warp * bias_tiles + j) * kWarp + lane] =
        bias_fragment<!kQueries>(a.inputs.bias, a.bias_dtype, tokens, head, row, first_chunk * kKeys + 8 * j + 2 * t);
  }
  int local[2][3], side[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    geometry.locate(row + 8 * i, local[i]);
    side[i] = geometry.far_side(local[i]);
  }
  const bool cosine = a.inputs.logit_scale != nullptr;
  const float scale = cosine ? head_scale(a.inputs.logit_scale, a.scale_dtype, head) : a.scale;

  const int64_t pad_offset = int64_t(head) * geometry.head_dim, pad_v = int64_t(geometry.heads) * geometry.head_dim;
  const T* const pad = static_cast<const T*>(a.inputs.pad_kv);
  const T* const pad_kv[2] = {pad ? pad + pad_offset : nullptr, pad ? pad + pad_v + pad_offset : nullptr};
  const T* const no_pad[1] = {nullptr};
  const T* const kv[2] = {static_cast<const T*>(a.inputs.k), static_cast<const T*>(a.inputs.v)};
  const T* const q[1] = {static_cast<const T*>(a.inputs.q)};
  const T* const dout[1] = {static_cast<const T*>(a.dout)};

  // Copy `count` tokens of a window from `start` on: queries and their gradients, or keys and values.
  const auto load = [&](bool queries, int b, const int (&place)[3], int start, int count, T* to, int size) {
    if (queries) {
      copy_rows<Rows>(to, size, count, start, q, no_pad, a.strides, geometry, head, b, place, a.vector);
      copy_rows<Rows>(to + size, size, count, start, dout, no_pad, a.dout_strides, geometry, head, b, place, a.vector);
    } else {
      copy_rows<Rows>(to, size, count, start, kv, pad_kv, a.strides, geometry, head, b, place, a.vector);
    }
  };
  // Where a token's lse, delta and norm lie, or -1 for what is no query.
  const auto query = [&](int b, const int (&place)[3], const int (&at_window)[3], int token) {
    int at[3];
    const bool inside = geometry.find(place, at_window, at) && token < tokens;
    return inside ? geometry.token(b, at) * geometry.heads + head : -1;
  };

  constexpr int kSums = kSum == Sum::kDkDv ? 2 : 1;
  float sum[kSums][kColumns][4] = {};
  float dbias[kTiles][4] = {}, dlogit_scale = 0.f;
  const int passes = kSum == Sum::kDq && a.normed ? 2 : 1, turns = kSum == Sum::kDbias ? 1 : passes * chunks;
  for (int window = program; window < geometry.windows; window += step) {
    int place[3];
    const int b = geometry.find(window, place);
    const int cut = geometry.cut(place);
    // lse, delta and norm of a query of a chunk, taken to shared memory when there is time: a lane's of the first warp
    float ahead[3];
    const auto load_stats = [&](int start) {
      if (kQueries || warp > 0 || lane >= kKeys) return;
      int at_window[3];
      geometry.locate(start + lane, at_window);
      const int64_t at = query(b, place, at_window, start + lane);
      ahead[0] = at < 0 ? INFINITY : a.lse[at];
      ahead[1] = at < 0 ? 0.f : a.delta[at];
      ahead[2] = at < 0 || !a.normed ? 1.f : a.norm[at];
    };
    const auto store_stats = [&](int stage) {
      if (kQueries || warp > 0 || lane >= kKeys) return;
#pragma unroll
      for (int s = 0; s < 3; ++s) stats[(stage * 3 + s) * kKeys + lane] = ahead[s];
    };

    __syncthreads();  // the last window is done with
    load(kQueries, b, place, first, 16 * warps, rows, rows_size);
    load(!kQueries, b, place, first_chunk * kKeys, kKeys, stages, chunk_size);
    cp_async_commit();
    load_stats(0);
    store_stats(0);
    T* const own = rows + 16 * warp * kStride;
    T* const own_second = own + rows_size;
    int64_t at[2] = {-1, -1};
    float lse[2] = {INFINITY, INFINITY}, delta[2] = {}, total[2] = {}, norm[2] = {1.f, 1.f};
    float row_scale[2] = {scale * kLog2E, scale * kLog2E}, length[2] = {1.f, 1.f}, inverse[2] = {};
    if (kQueries) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        at[i] = query(b, place, local[i], row + 8 * i);
        if (at[i] < 0) continue;
        lse[i] = a.lse[at[i]];
        if (kSum == Sum::kDbias) {
          delta[i] = a.delta[at[i]];
          if (a.normed) norm[i] = a.norm[at[i]];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kSums; ++n) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][j][i] = 0.f;
      }
    }

    for (int turn = 0; turn < turns; ++turn) {
      const int stage = turn % 2, chunk = first_chunk + turn % chunks;
      cp_async_wait<0>();
      __syncthreads();  // this chunk is there, and the other stage is free
      T* const columns = stages + stage * 2 * chunk_size;
      if (turn + 1 < turns) {
        const int start = (turn + 1) % chunks * kKeys;
        load(!kQueries, b, place, start, kKeys, stages + (stage ^ 1) * 2 * chunk_size, chunk_size);
        cp_async_commit();
        load_stats(start);
      }
      if (cosine) {
        measure(math, columns, kKeys, lengths);
        if (turn == 0) {
          const float2 squares = math.squares(own);
          inverse[0] = inverse_or_zero<T>(squares.x);
          inverse[1] = inverse_or_zero<T>(squares.y);
          const float2 factor = measure(math, own);
          length[0] = factor.x;
          length[1] = factor.y;
          row_scale[0] *= length[0];
          row_scale[1] *= length[1];
        }
        __syncthreads();
      }
      if (kSum == Sum::kDq && !a.normed && turn == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const T* const out = static_cast<const T*>(a.out) + at[i] * geometry.head_dim;
          if (at[i] >= 0) {
            for (int c = t; c < geometry.head_dim; c += 4) {
              delta[i] += to_float(out[c]) * to_float(own_second[Rows::element(g + 8 * i, c)]);
            }
          }
          delta[i] = quad_sum(delta[i]);
        }
      }

      float p[kTiles][4] = {}, ds[kTiles][4] = {};
      if (active) {
        math.scores(p, own, columns);
        math.scores(ds, own_second, columns + chunk_size);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int column = 8 * j + 2 * t, token = chunk * kKeys + column;
          const float4 x = bias_tiles ? bias[(warp * bias_tiles + (chunk - first_chunk) * kTiles + j) * kWarp + lane]
                                      : bias_fragment<!kQueries>(a.inputs.bias, a.bias_dtype, tokens, head, row, token);
          const float biases[4] = {x.x, x.y, x.z, x.w};
          float2 other = make_float2(1.f, 1.f);
          if (cosine) other = *reinterpret_cast<const float2*>(lengths + column);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* const stat = stats + stage * 3 * kKeys + column + i % 2;
            const float score = p[j][i] * (row_scale[i / 2] * (i % 2 ? other.y : other.x)) + biases[i];
            const bool parted = cut && ((side[i / 2] ^ sides[token + i % 2]) & cut);
            const float base = kQueries ? lse[i / 2] : stat[0];
            const float less = kQueries ? delta[i / 2] : stat[kKeys];
            p[j][i] =
                exp2_fast((parted ? score + geometry.mask : score) - base) * (kQueries ? norm[i / 2] : stat[2 * kKeys]);
            if (kSum == Sum::kDq && turn < turns - chunks) {  // the pass that sums them
              total[i / 2] += p[j][i];
              delta[i / 2] += p[j][i] * ds[j][i];
            } else {
              ds[j][i] = p[j][i] * (ds[j][i] - less);
              if (kSum == Sum::kDbias) dbias[j][i] += ds[j][i];
            }
          }
        }
      }
      const bool summed = (kSum == Sum::kDq && turn >= turns - chunks) || kDk;
      if (cosine && summed && sizeof(T) == 2) {
        __syncthreads();  // all have read the chunk as it came: its first tensor becomes directions
        for (int r = 16 * warp; r < kKeys; r += 16 * warps) {
          scale_rows<Rows>(columns + r * kStride, {lengths[r + g], lengths[r + g + 8]});
        }
        __syncthreads();
      }
      if (active) {
        float unused[2] = {};
        if (summed) math.weigh(sum[0], unused, ds, columns);
        if (kDv) math.weigh(sum[kSums - 1], unused, p, columns + chunk_size);
      }
      if (kSum == Sum::kDq && turn == turns - chunks - 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          norm[i] = reciprocal_fast(fmaxf(quad_sum(total[i]), 1e-30f));
          delta[i] = quad_sum(delta[i]) * norm[i];
        }
      }
      if (turn + 1 < turns) store_stats(stage ^ 1);
    }

    if (kSum == Sum::kDq && t == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (at[i] < 0) continue;
        a.delta[at[i]] = delta[i];
        if (a.normed) a.norm[at[i]] = norm[i];
      }
    }
    if (kSum == Sum::kDbias || !active) continue;

    // gradients leave through the place of the second rows, which only this warp reads
    const auto write = [&](float (&x)[kColumns][4], void* to, bool direction, float* pad_sums) {
      __syncwarp();
      bool any_pad = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float along = 0.f;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int element = Rows::element(g + 8 * i, 8 * j + 2 * t + c);
            if (direction) x[j][2 * i + c] *= scale;
            if (direction && cosine) along += x[j][2 * i + c] * to_float(own[element]) * length[i];
          }
        }
        if (direction && cosine) {
          along = quad_sum(along);
          if (kSum == Sum::kDq) dlogit_scale += along;
        }
        int place_in_image[3];
        any_pad |= exists[i] && !geometry.find(place, local[i], place_in_image);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int element = Rows::element(g + 8 * i, 8 * j + 2 * t + c);
            if (direction && cosine) {
              const float unit = to_float(own[element]) * length[i];
              x[j][2 * i + c] = (x[j][2 * i + c] - along * unit) * inverse[i];
            }
          }
          Math::store(own_second, g + 8 * i, 8 * j + 2 * t, x[j][2 * i], x[j][2 * i + 1]);
        }
      }
      if (pad_sums && __any_sync(kWholeWarp, any_pad)) {
        bool is_pad[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int place_in_image[3];
          is_pad[i] = exists[i] && !geometry.find(place, local[i], place_in_image);
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float total = column_sum((is_pad[0] ? x[j][c] : 0.f) + (is_pad[1] ? x[j][2 + c] : 0.f));
            if (g == 0) pad_sums[8 * j + 2 * t + c] += total;
          }
        }
      }
      __syncwarp();
      T* const image = static_cast<T*>(to) + b * a.grad_strides.batch + head * a.grad_strides.head;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int place_in_image[3];
        if (!geometry.find(place, local[i], place_in_image) || !exists[i]) continue;
        T* const grad = image + offset(a.grad_strides, place_in_image);
        for (int c = t; c < Rows::kChunks; c += 4) {
          write_chunk(grad + c * Rows::kElements, own_second + Rows::chunk(g + 8 * i, c),
                      geometry.head_dim - c * Rows::kElements, a.vector);
        }
      }
    };
    if (kSum == Sum::kDq) write(sum[0], a.dq, true, nullptr);
    if (kDk) write(sum[0], a.dk, true, a.dpad ? pads : nullptr);
    if (kDv) write(sum[kSums - 1], a.dv, false, a.dpad ? pads + kWidth : nullptr);
  }

  if (kSum == Sum::kDbias) {
    float* const partial = a.dbias + (int64_t(program) * geometry.heads + head) * tokens * tokens;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_chunk * kKeys + 8 * j + 2 * t + i % 2;
        if (exists[i / 2] && key < tokens) partial[int64_t(row + i / 2 * 8) * tokens + key] = dbias[j][i];
      }
    }
  }
  __syncthreads();
  if (kSum == Sum::kDq && a.dlogit_scale) {
    dlogit_scale = column_sum(dlogit_scale);
    if (lane == 0) pads[0] = dlogit_scale;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.f;
      for (int w = 0; w < warps; ++w) total += pads[w * 2 * kWidth];
      const bool clamped = load_float(a.inputs.logit_scale, a.scale_dtype, head) > kMaxLogitScale;
      a.dlogit_scale[int64_t(blockIdx.x) * geometry.heads + head] = clamped ? 0.f : total;
    }
  }
  if ((kDk || kDv) && a.dpad) {
    const float* const all = pads - warp * 2 * kWidth;
    for (int i = threadIdx.x; i < 2 * geometry.head_dim; i += blockDim.x) {
      const int n = i / geometry.head_dim, c = i % geometry.head_dim;
      if (n == 0 ? !kDk : !kDv) continue;
      float total = 0.f;
      for (int w = 0; w < warps; ++w) total += all[(w * 2 + n) * kWidth + c];
      a.dpad[((int64_t(blockIdx.x) * 2 + n) * geometry.heads + head) * geometry.head_dim + c] = total;
    }
  }
}

// How the blocks of a call share rows.
struct Blocks {
  int warps, groups, chunks, shared, per_multiprocessor;
  bool bias_resident;
};

template <class Math, int kKeys>
Blocks share(const Geometry& geometry, const AttentionShape& s) {
  using Shared = BackwardShared<Math, kKeys>;
  const int tiles = ceil_div(geometry.tokens, 16);
  const auto even = [&](int most) { return ceil_div(tiles, ceil_div(tiles, most)); };
  int warps = even(kBackwardWarps);
  while (warps > 1 && Shared::without_bias(warps, geometry.tokens) > s.shared_bytes) warps = even(warps - 1);
  Blocks blocks{warps, ceil_div(tiles, warps), ceil_div(geometry.tokens, kKeys)};
  blocks.shared = Shared::without_bias(warps, geometry.tokens);
  const int64_t bias = Shared::bias(warps, blocks.chunks);
  blocks.bias_resident = 2 * (blocks.shared + bias) <= s.shared_bytes;  // with two blocks on a multiprocessor
  if (blocks.bias_resident) blocks.shared += bias;
  blocks.per_multiprocessor = std::clamp(s.shared_bytes / blocks.shared, 1, Shared::kBlocks);
  return blocks;
}

struct Plan {
  const Geometry& geometry;
  const AttentionShape& s;
  TiledPrograms& result;

  template <class Math, int kKeys>
  cudaError_t run() const {
    const Blocks blocks = share<Math, kKeys>(geometry, s);
    const auto most = [&](int tiles) {
      return programs(geometry.windows, blocks.per_multiprocessor, s.heads * tiles, s);
    };
    result.rows = blocks.groups * most(blocks.groups);
    // a partial of dbias is as large as the bias: as many as fit into 10 MB
    const int64_t bytes = int64_t(s.heads) * geometry.tokens * geometry.tokens * sizeof(float);
    result.chunks = std::min<int64_t>(most(blocks.groups * blocks.chunks), std::max<int64_t>(1, (10 << 20) / bytes));
    return blocks.shared <= s.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
  }
};

struct Launch {
  const BackwardArguments& a;
  const AttentionShape& s;
  TiledPrograms programs;
  float *delta, *norm;
  cudaStream_t stream;

  template <class Math, int kKeys, Sum kSum>
  cudaError_t launch(const TiledArguments& t, const Blocks& blocks) const {
    using Shared = BackwardShared<Math, kKeys>;
    const auto kernel = TiledBackwardKernel<Math, kKeys, kSum>;
    const int one_chunk = Shared::without_bias(blocks.warps, a.geometry.tokens) + Shared::bias(blocks.warps, 1);
    const int shared = kSum == Sum::kDbias ? one_chunk : blocks.shared;
    if (const cudaError_t error = allow_shared(kernel, shared)) return error;
    const int x = kSum == Sum::kDbias ? programs.chunks * blocks.groups * blocks.chunks : programs.rows;
    SWINOPS_LAUNCH(kernel, dim3(x, s.heads), dim3(kWarp * blocks.warps), shared, stream, t);
    return cudaGetLastError();
  }

  template <class Math, int kKeys>
  cudaError_t run() const {
    const Blocks blocks = share<Math, kKeys>(a.geometry, s);
    if (blocks.shared > s.shared_bytes) return cudaErrorInvalidValue;
    // `out` is rounded: too much for float32, for dlogit_scale, whose terms are scores of up to 100, and where a window
    // has few tokens, whose gradients of scores may all be near 0
    const bool normed = s.dtype == Dtype::kFloat32 || a.inputs.logit_scale || a.geometry.tokens <= 64;
    TiledArguments t{a, delta, norm, blocks.groups, normed, blocks.bias_resident};
    if (const cudaError_t error = launch<Math, kKeys, Sum::kDq>(t, blocks)) return error;
    if constexpr (BackwardShared<Math, kKeys>::kWidth * sizeof(typename Math::Element) <= 128) {
      if (const cudaError_t error = launch<Math, kKeys, Sum::kDkDv>(t, blocks)) return error;
    } else {  // the sums of both would not fit into registers
      if (const cudaError_t error = launch<Math, kKeys, Sum::kDk>(t, blocks)) return error;
      if (const cudaError_t error = launch<Math, kKeys, Sum::kDv>(t, blocks)) return error;
    }
    return a.dbias ? launch<Math, kKeys, Sum::kDbias>(t, blocks) : cudaSuccess;
  }
};

}  // namespace

cudaError_t tiled_backward_programs(const Geometry& geometry, const AttentionShape& s, TiledPrograms& programs) {
  return with_math<32>(s, Plan{geometry, s, programs});
}

cudaError_t launch_tiled_backward(const BackwardArguments& a, const AttentionShape& s, const TiledPrograms& programs,
                                  float* delta, float* norm, cudaStream_t stream) {
  return with_math<32>(s, Launch{a, s, programs, delta, norm, stream});
}

}  // namespace swinops
