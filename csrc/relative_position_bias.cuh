// What the two position biases share: a table's rows copied to the pairs of tokens that read them, and the sums back.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common.cuh"
#include "swinops.h"

namespace swinops {

constexpr int kBiasThreads = 256;
constexpr int kBiasUnroll = 8;              // loads in flight per thread
constexpr int kBiasQueries = 32;            // of a block: it reads the rows they share once
constexpr int kBiasColumnBytes = 48 << 10;  // of a head's column in shared memory, which every GPU has without asking

__host__ __device__ inline int tokens(const BiasShape& s) { return s.window[0] * s.window[1] * s.window[2]; }

__host__ __device__ inline int table_rows(const BiasShape& s) {
  return (2 * s.window[0] - 1) * (2 * s.window[1] - 1) * (2 * s.window[2] - 1);
}

// The row of the offset of `token` from the first token, counted from that of offset 0. It is linear in the token's
// coordinates, so that the pair (i, j) reads row place(i) + place(N - 1 - j): N - 1 - j is j mirrored.
__device__ inline int place(const BiasShape& s, int token) {
  const int line = token / s.window[2], plane = line / s.window[1];
  return token + line * (s.window[2] - 1) + plane * (s.window[1] - 1) * (2 * s.window[2] - 1);
}

template <class T, class From>
__device__ T rounded(From x) {
  if constexpr (std::is_same_v<T, From>) {
    return x;  // bits, NaN's too
  } else {
    return from_float<T>(x);
  }
}

// A block writes kBiasQueries queries of a head. Threads: x over vectors of keys, whose places stay in registers while
// y goes over the queries. The rows that they read are side by side; where those fit, shared memory holds them.
template <int kKeys, class From, class T>
__global__ void __launch_bounds__(kBiasThreads)
    ExpandKernel(const From* __restrict__ table, T* __restrict__ bias, const BiasShape s, int64_t row_stride,
                 int64_t head_stride, bool fits) {
  SWINOPS_DYNAMIC_SHARED(T, column);
  const int N = tokens(s);
  const int64_t head = blockIdx.y;
  const int first = blockIdx.x * kBiasQueries, end = min(first + kBiasQueries, N);
  const int low = place(s, first), high = place(s, end - 1) + place(s, N - 1);
  table += head * head_stride;
  bias += head * N * N;
  if (fits) {
    for (int row = low + threadIdx.y * blockDim.x + threadIdx.x; row <= high; row += blockDim.x * blockDim.y) {
      column[row - low] = rounded<T>(table[row * row_stride]);
    }
    __syncthreads();
  }

  for (int j = kKeys * threadIdx.x; j < N; j += kKeys * blockDim.x) {
    int key[kKeys];
#pragma unroll
    for (int u = 0; u < kKeys; ++u) key[u] = place(s, N - 1 - (j + u));
    for (int i = first + threadIdx.y; i < end; i += blockDim.y) {
      const int query = place(s, i);
      T values[kKeys];
#pragma unroll
      for (int u = 0; u < kKeys; ++u) {
        const int row = query + key[u];
        values[u] = fits ? column[row - low] : rounded<T>(table[row * row_stride]);
      }
      Vector<kKeys * sizeof(T)> vector;
      memcpy(&vector, values, sizeof(vector));
      *reinterpret_cast<Vector<kKeys * sizeof(T)>*>(bias + int64_t(i) * N + j) = vector;
    }
  }
}

// A block sums the pairs of a head whose offsets differ along W alone, and gives each sum to `store`.
//
// Query w of a line meets the keys of another line at the offsets w - (W - 1) to w. Thread x takes two offsets, x and
// x - W, of which each query has one: no thread idles, and neighbours read neighbouring keys. Threads y share the lines
// out. Sums are in a fixed order.
template <class T, class Store>
__global__ void __launch_bounds__(kBiasThreads)
    SumKernel(const T* __restrict__ dbias, const Store store, const BiasShape s, int64_t head_stride,
              int64_t query_stride, int64_t key_stride) {
  SWINOPS_DYNAMIC_SHARED(float2, sums);
  const int W = s.window[2];
  const int offset = blockIdx.z * blockDim.x + threadIdx.x;  // and offset - W
  const int grid_h = 2 * s.window[1] - 1;
  const int dd = int(blockIdx.x) / grid_h - (s.window[0] - 1), dh = int(blockIdx.x) % grid_h - (s.window[1] - 1);
  const int count_d = s.window[0] - abs(dd), count_h = s.window[1] - abs(dh);  // lines that have a partner

  dbias += blockIdx.y * head_stride;
  float2 sum = {0.0f, 0.0f};
  if (offset < W) {
    for (int n = threadIdx.y; n < count_d * count_h; n += blockDim.y) {
      const int line = (n / count_h + max(dd, 0)) * s.window[1] + n % count_h + max(dh, 0);
      const int partner = line - (dd * s.window[1] + dh);
      // query w with key w - offset + W, which at w = offset is behind the line: with key w - offset from there on
      const T* pair = dbias + int64_t(line) * W * query_stride + (int64_t(partner + 1) * W - offset) * key_stride;
      for (int w = 0; w < W; w += kBiasUnroll) {
        float x[kBiasUnroll];
#pragma unroll
        for (int u = 0; u < kBiasUnroll; ++u, pair += query_stride + key_stride) {
          if (w + u == offset) pair -= W * key_stride;
          x[u] = w + u < W ? to_float(*pair) : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < kBiasUnroll; ++u) {
          if (w + u < offset) {
            sum.y += x[u];
          } else {
            sum.x += x[u];
          }
        }
      }
    }
  }
  sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();

  if (threadIdx.y > 0 || offset >= W) return;
  for (unsigned y = 1; y < blockDim.y; ++y) {
    const float2 other = sums[y * blockDim.x + threadIdx.x];
    sum.x += other.x;
    sum.y += other.y;
  }
  const int row = blockIdx.x * (2 * W - 1) + W - 1 + offset;
  store(blockIdx.y, row, sum.x);
  if (offset > 0) store(blockIdx.y, row - W, sum.y);
}

// Every offset fits 32 bits twice, which leaves room for strides past the last.
inline bool is_valid(const BiasShape& s) {
  int64_t rows = 1;
  for (int m : s.window) {
    if (m < 1) return false;
    rows *= 2 * int64_t(m) - 1;
    if (rows > INT_MAX / 2) return false;
  }
  return s.heads >= 0 && s.heads <= 65535;  // a grid's height
}

template <int kKeys, class From, class T>
cudaError_t launch_expand(const From* table, T* bias, const BiasShape& s, int64_t row_stride, int64_t head_stride,
                          cudaStream_t stream) {
  const int vectors = tokens(s) / kKeys;
  const int x = std::min(vectors, kBiasThreads), y = std::min(kBiasThreads / x, kBiasQueries);
  const int64_t column_bytes = int64_t(table_rows(s)) * sizeof(T);
  const bool fits = column_bytes <= kBiasColumnBytes;
  const auto kernel = ExpandKernel<kKeys, From, T>;
  SWINOPS_LAUNCH(kernel, dim3(ceil_div(tokens(s), kBiasQueries), s.heads), dim3(x, y), fits ? column_bytes : 0, stream,
                 table, bias, s, row_stride, head_stride, fits);
  return cudaGetLastError();
}

// table [rows, heads] -> bias [heads, N, N], in vectors of as many keys as the rows of N keys begin aligned for.
template <class From, class T>
cudaError_t expand(const From* table, T* bias, const BiasShape& s, int64_t row_stride, int64_t head_stride,
                   cudaStream_t stream) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(bias) | uint64_t(tokens(s)) * sizeof(T) | kMaxVectorBytes;
  const int bytes = int(bits & -bits);  // the lowest bit set
  switch (bytes / int(sizeof(T))) {
    case 0: return cudaErrorMisalignedAddress;
    case 1: return launch_expand<1>(table, bias, s, row_stride, head_stride, stream);
    case 2: return launch_expand<2>(table, bias, s, row_stride, head_stride, stream);
    case 4: return launch_expand<4>(table, bias, s, row_stride, head_stride, stream);
    default: return launch_expand<kMaxVectorBytes / sizeof(T)>(table, bias, s, row_stride, head_stride, stream);
  }
}

// dbias [heads, N, N] -> store(head, row, sum) for each row of the table.
template <class T, class Store>
cudaError_t sum_pairs(const T* dbias, const Store& store, const BiasShape& s, const int64_t (&stride)[3],
                      cudaStream_t stream) {
  const int W = s.window[2];
  const int x = std::min(W, kBiasThreads), y = std::min(kBiasThreads / x, s.window[0] * s.window[1]);
  const dim3 grid((2 * s.window[0] - 1) * (2 * s.window[1] - 1), s.heads, ceil_div(W, x));
  if (grid.z > 65535) return cudaErrorInvalidValue;
  const auto kernel = SumKernel<T, Store>;
  SWINOPS_LAUNCH(kernel, grid, dim3(x, y), x * y * sizeof(float2), stream, dbias, store, s, stride[0], stride[1],
                 stride[2]);
  return cudaGetLastError();
}

}  // namespace swinops
