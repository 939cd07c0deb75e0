// Continuous position bias: a small network of the offset between two tokens, copied to every pair that has it.
//
// Forward, a warp evaluates the network at four offsets for eight heads: its lanes share the hidden units out, and each
// ends with one of the 32 results. A second kernel, the relative position bias's, copies them.
//
// Backward, the pairs' gradients are summed as that of the relative position bias is. A block of the second kernel then
// owns four hidden units, at all offsets and for all heads, so that no sum crosses blocks: its lanes share the offsets
// out, and each ends with the gradient of one of the 32 weights from four units to eight heads.
#include "relative_position_bias.cuh"

namespace swinops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeads = 8;
constexpr int kOffsets = kWarp / kHeads;  // of a warp, forward
constexpr int kUnits = kWarp / kHeads;    // of a block, backward
constexpr int kTableThreads = 128;        // few offsets spread over more multiprocessors

// The network's inputs: 8 at the far end of the pretrained window, or log2(9) / 3.
struct Coordinates {
  int window[2];
  float scale[2];
  bool log_spaced;

  __device__ float along(int axis, int offset) const {
    const float x = offset * scale[axis];
    return log_spaced ? copysignf(log2f(1.0f + fabsf(x)) * (1.0f / 3), x) : x;
  }

  __device__ float2 operator()(int row) const {
    const int width = 2 * window[1] - 1;
    return {along(0, row / width - (window[0] - 1)), along(1, row % width - (window[1] - 1))};
  }
};

struct Unit {
  float h, w, b;

  // NaN stays NaN
  __device__ float operator()(float2 x) const {
    const float y = h * x.x + w * x.y + b;
    return y <= 0.0f ? 0.0f : y;
  }
};

template <class T>
__device__ Unit load_unit(const T* w1, const T* b1, int k) {
  return {to_float(w1[2 * int64_t(k)]), to_float(w1[2 * int64_t(k) + 1]), to_float(b1[k])};
}

// The sums over a warp of 32 numbers of each lane: of the n-th in lane n. 31 shuffles, in a fixed order.
template <int kSpan = kWarp / 2>
__device__ float warp_sums(float (&x)[kWarp]) {
  const bool upper = threadIdx.x & kSpan;
#pragma unroll
  for (int n = 0; n < kSpan; ++n) {
    const float kept = upper ? x[n + kSpan] : x[n];
    const float given = upper ? x[n] : x[n + kSpan];
    x[n] = kept + __shfl_xor_sync(kWholeWarp, given, kSpan);
  }
  if constexpr (kSpan > 1) {
    return warp_sums<kSpan / 2>(x);
  } else {
    return x[0];
  }
}

// The sums over a block of 32 numbers of each thread: of the n-th in lane n of the first warp.
__device__ inline float block_sums(float (&x)[kWarp], float* shared) {
  shared[threadIdx.x] = warp_sums(x);
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * kWarp + threadIdx.x];
  }
  __syncthreads();  // before the next sums are written
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kTableThreads)
    TableKernel(const T* __restrict__ w1, const T* __restrict__ b1, const T* __restrict__ w2, float* __restrict__ table,
                int rows, int heads, int hidden, const Coordinates coordinates) {
  const int lane = threadIdx.x % kWarp;
  const int first_row = (blockIdx.x * kTableThreads + threadIdx.x) / kWarp * kOffsets;
  const int first_head = blockIdx.y * kHeads;
  if (first_row >= rows) return;                                // the whole warp
  const float2 own = coordinates(first_row + lane % kOffsets);  // one a lane: logarithms cost more than shuffles
  float2 x[kOffsets];
#pragma unroll
  for (int r = 0; r < kOffsets; ++r) {
    x[r] = {__shfl_sync(kWholeWarp, own.x, r), __shfl_sync(kWholeWarp, own.y, r)};
  }

  float sums[kWarp] = {};
#pragma unroll 4
  for (int k = lane; k < hidden; k += kWarp) {
    const Unit unit = load_unit(w1, b1, k);
    float weights[kHeads];
#pragma unroll
    for (int n = 0; n < kHeads; ++n) {
      const int head = first_head + n;
      weights[n] = head < heads ? to_float(w2[int64_t(head) * hidden + k]) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kOffsets; ++r) {
      const float y = unit(x[r]);
#pragma unroll
      for (int n = 0; n < kHeads; ++n) sums[r * kHeads + n] += weights[n] * y;
    }
  }
  const float z = warp_sums(sums);
  const int row = first_row + lane / kHeads, head = first_head + lane % kHeads;
  if (row < rows && head < heads) table[int64_t(row) * heads + head] = 16.0f / (1.0f + expf(-z));
}

// dz [heads, rows]: the gradient of the table, and through 16 * sigmoid.
struct StoreSigmoid {
  const float* table;
  float* dz;
  int rows, heads;

  __device__ void operator()(int head, int row, float sum) const {
    const float t = table[int64_t(row) * heads + head];
    dz[int64_t(head) * rows + row] = sum * t * (16.0f - t) / 16.0f;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    WeightsKernel(const float* __restrict__ dz, const T* __restrict__ w1, const T* __restrict__ b1,
                  const T* __restrict__ w2, T* __restrict__ dw1, T* __restrict__ db1, T* __restrict__ dw2, int rows,
                  int heads, int hidden, const Coordinates coordinates) {
  SWINOPS_DYNAMIC_SHARED(float, shared);
  const int first = blockIdx.x * kUnits;
  Unit unit[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) unit[u] = load_unit(w1, b1, min(first + u, hidden - 1));

  float dunit[kWarp] = {};  // [kUnits, 8]: of w1 along both axes and of b1
  for (int first_head = 0; first_head < heads; first_head += kHeads) {
    float weights[kUnits][kHeads];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int n = 0; n < kHeads; ++n) {
        const int head = first_head + n;
        const bool exists = head < heads && first + u < hidden;
        weights[u][n] = exists ? to_float(w2[int64_t(head) * hidden + first + u]) : 0.0f;
      }
    }
    float dweight[kWarp] = {};  // [kUnits, kHeads]
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      const float2 x = coordinates(row);
      float gradient[kHeads];
#pragma unroll
      for (int n = 0; n < kHeads; ++n) {
        const int head = first_head + n;
        gradient[n] = head < heads ? dz[int64_t(head) * rows + row] : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float y = unit[u](x);
        float dy = 0.0f;
#pragma unroll
        for (int n = 0; n < kHeads; ++n) {
          dweight[u * kHeads + n] += gradient[n] * y;
          dy += gradient[n] * weights[u][n];
        }
        if (y <= 0.0f) dy = 0.0f;
        dunit[8 * u] += dy * x.x;
        dunit[8 * u + 1] += dy * x.y;
        dunit[8 * u + 2] += dy;
      }
    }
    const float sum = block_sums(dweight, shared);
    const int k = first + int(threadIdx.x) / kHeads, head = first_head + threadIdx.x % kHeads;
    if (threadIdx.x < kWarp && k < hidden && head < heads) dw2[int64_t(head) * hidden + k] = from_float<T>(sum);
  }

  const float sum = block_sums(dunit, shared);
  const int k = first + int(threadIdx.x) / 8, which = threadIdx.x % 8;
  if (threadIdx.x >= kWarp || k >= hidden) return;
  if (which < 2) dw1[2 * int64_t(k) + which] = from_float<T>(sum);
  if (which == 2) db1[k] = from_float<T>(sum);
}

bool is_valid(const BiasShape& s, const BiasNetwork& network) {
  return is_valid(s) && s.window[0] == 1 && network.pretrained[0] >= 1 && network.pretrained[1] >= 1 &&
         network.hidden >= 1 && network.hidden <= INT_MAX / 2;
}

Coordinates coordinates(const BiasShape& s, const BiasNetwork& network) {
  Coordinates c{{s.window[1], s.window[2]}, {}, network.log_spaced};
  // a pretrained window of 1 has the offset 0 alone, which nothing is divided by
  for (int axis = 0; axis < 2; ++axis) c.scale[axis] = 8.0f / std::max(network.pretrained[axis] - 1, 1);
  return c;
}

template <class T>
cudaError_t forward(const void* w1, const void* b1, const void* w2, void* bias, float* table, const BiasShape& s,
                    const BiasNetwork& network, cudaStream_t stream) {
  const int rows = table_rows(s);
  const Coordinates x = coordinates(s, network);
  const dim3 grid(ceil_div(rows, kTableThreads / kWarp * kOffsets), ceil_div(s.heads, kHeads));
  const auto kernel = TableKernel<T>;
  SWINOPS_LAUNCH(kernel, grid, kTableThreads, 0, stream, static_cast<const T*>(w1), static_cast<const T*>(b1),
                 static_cast<const T*>(w2), table, rows, s.heads, network.hidden, x);
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? error : expand<float, T>(table, static_cast<T*>(bias), s, s.heads, 1, stream);
}

template <class T>
cudaError_t weights_backward(const float* dz, const void* w1, const void* b1, const void* w2, void* dw1, void* db1,
                             void* dw2, const BiasShape& s, const BiasNetwork& network, cudaStream_t stream) {
  const int rows = table_rows(s);
  const Coordinates x = coordinates(s, network);
  const auto kernel = WeightsKernel<T>;
  SWINOPS_LAUNCH(kernel, ceil_div(network.hidden, kUnits), kThreads, kThreads * sizeof(float), stream, dz,
                 static_cast<const T*>(w1), static_cast<const T*>(b1), static_cast<const T*>(w2), static_cast<T*>(dw1),
                 static_cast<T*>(db1), static_cast<T*>(dw2), rows, s.heads, network.hidden, x);
  return cudaGetLastError();
}

template <class T>
cudaError_t sum(const void* dbias, const float* table, float* dz, const BiasShape& s, const int64_t (&stride)[3],
                cudaStream_t stream) {
  const StoreSigmoid store{table, dz, table_rows(s), s.heads};
  return sum_pairs(static_cast<const T*>(dbias), store, s, stride, stream);
}

cudaError_t table_backward(const void* dbias, const float* table, float* dz, const BiasShape& s,
                           const int64_t (&stride)[3], Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32: return sum<float>(dbias, table, dz, s, stride, stream);
    case Dtype::kFloat16: return sum<half>(dbias, table, dz, s, stride, stream);
    case Dtype::kBFloat16: return sum<bfloat16>(dbias, table, dz, s, stride, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t continuous_position_bias(const void* w1, const void* b1, const void* w2, void* bias, float* table,
                                     const BiasShape& shape, const BiasNetwork& network, cudaStream_t stream) {
  if (!is_valid(shape, network)) return cudaErrorInvalidValue;
  if (shape.heads == 0) return cudaSuccess;
  switch (network.dtype) {
    case Dtype::kFloat32: return forward<float>(w1, b1, w2, bias, table, shape, network, stream);
    case Dtype::kFloat16: return forward<half>(w1, b1, w2, bias, table, shape, network, stream);
    case Dtype::kBFloat16: return forward<bfloat16>(w1, b1, w2, bias, table, shape, network, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t continuous_position_bias_workspace(const BiasShape& shape) {
  return is_valid(shape) ? int64_t(table_rows(shape)) * shape.heads : 0;
}

cudaError_t continuous_position_bias_backward(const void* dbias, const float* table, const void* w1, const void* b1,
                                              const void* w2, void* dw1, void* db1, void* dw2, float* workspace,
                                              const BiasShape& shape, const BiasNetwork& network,
                                              const int64_t (&stride)[3], Dtype dbias_dtype, cudaStream_t stream) {
  if (!is_valid(shape, network)) return cudaErrorInvalidValue;
  if (shape.heads > 0) {  // without heads the other weights have gradients too: zeros
    const cudaError_t error = table_backward(dbias, table, workspace, shape, stride, dbias_dtype, stream);
    if (error != cudaSuccess) return error;
  }
  switch (network.dtype) {
    case Dtype::kFloat32: return weights_backward<float>(workspace, w1, b1, w2, dw1, db1, dw2, shape, network, stream);
    case Dtype::kFloat16: return weights_backward<half>(workspace, w1, b1, w2, dw1, db1, dw2, shape, network, stream);
    case Dtype::kBFloat16:
      return weights_backward<bfloat16>(workspace, w1, b1, w2, dw1, db1, dw2, shape, network, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace swinops
