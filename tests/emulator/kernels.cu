// Small kernels that test the emulator: what they compute is checked, and their sources are broken on purpose.
#include <cstdint>

#include "common.cuh"

namespace swinops {
namespace {

constexpr int kTile = 32;

// out [columns, rows] = in [rows, columns] transposed, in tiles by way of shared memory.
__global__ void TransposeKernel(const float* in, float* out, int rows, int columns) {
  SWINOPS_DYNAMIC_SHARED(float, tile);  // [kTile, kTile + 1]
  const int column = blockIdx.x * kTile + threadIdx.x;
  for (int i = threadIdx.y; i < kTile; i += blockDim.y) {
    const int row = blockIdx.y * kTile + i;
    if (row < rows && column < columns) tile[i * (kTile + 1) + threadIdx.x] = in[row * columns + column];
  }
  __syncthreads();
  const int row = blockIdx.y * kTile + threadIdx.x;
  for (int i = threadIdx.y; i < kTile; i += blockDim.y) {
    const int to = blockIdx.x * kTile + i;
    if (row < rows && to < columns) out[to * rows + row] = tile[threadIdx.x * (kTile + 1) + i];
  }
}

// out [blocks] = the sums of in [blocks, n]: by shuffles within a warp, by shared memory between warps.
__global__ void SumKernel(const float* in, float* out, int n) {
  SWINOPS_DYNAMIC_SHARED(float, sums);  // [warps]
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[blockIdx.x * n + i];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < int(blockDim.x) / kWarp; ++w) sum += sums[w];
    out[blockIdx.x] = sum;
  }
}

// out [n] = the sums over rows of in [rows, n], n = 4 numbers a thread: each row is fetched while its predecessor is
// added. Thread i adds what thread n / 4 - 1 - i has fetched, which takes a barrier.
__global__ void PipelineKernel(const float* in, float* out, int rows) {
  SWINOPS_DYNAMIC_SHARED(float4, buffers);  // [2, blockDim.x]
  const int thread = threadIdx.x, other = blockDim.x - 1 - thread;
  const float4* const rows_in = reinterpret_cast<const float4*>(in);
  cp_async(&buffers[thread], &rows_in[thread], true);
  cp_async_commit();
  float4 sum{};
  for (int row = 0; row < rows; ++row) {
    const bool more = row + 1 < rows;
    const int next = more ? row + 1 : row;
    cp_async(&buffers[(row + 1) % 2 * blockDim.x + thread], &rows_in[next * blockDim.x + thread], more);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const float4 x = buffers[row % 2 * blockDim.x + other];
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    __syncthreads();  // before the next copies overwrite it
  }
  cp_async_wait<0>();
  reinterpret_cast<float4*>(out)[other] = sum;
}

// d [16, 8] += a [16, 16] b [16, 8] for one warp: a from shared memory as it lies there, b transposed on the way.
template <class T>
__global__ void MatmulKernel(const T* a, const T* b, float* d) {
  SWINOPS_DYNAMIC_SHARED(T, tile);  // a, then b
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 16; i += kWarp) tile[i] = a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) tile[16 * 16 + i] = b[i];
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix(left, &tile[lane % 16 * 16 + lane / 16 * 8]);
  ldmatrix_transposed(right, &tile[16 * 16 + lane % 16 * 8]);  // two matrices, twice
  float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
  mma<T>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

}  // namespace
}  // namespace swinops

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT cudaError_t transpose(const float* in, float* out, int64_t rows, int64_t columns) {
  using namespace swinops;
  const dim3 grid(ceil_div(int(columns), kTile), ceil_div(int(rows), kTile));
  SWINOPS_LAUNCH(TransposeKernel, grid, dim3(kTile, 4), kTile * (kTile + 1) * sizeof(float), nullptr, in, out,
                 int(rows), int(columns));
  return cudaGetLastError();
}

EXPORT cudaError_t sum(const float* in, float* out, int64_t blocks, int64_t n) {
  using namespace swinops;
  SWINOPS_LAUNCH(SumKernel, dim3(blocks), dim3(128), 4 * sizeof(float), nullptr, in, out, int(n));
  return cudaGetLastError();
}

EXPORT cudaError_t pipeline(const float* in, float* out, int64_t rows, int64_t n) {
  using namespace swinops;
  SWINOPS_LAUNCH(PipelineKernel, 1, dim3(n / 4), 2 * n * sizeof(float), nullptr, in, out, int(rows));
  return cudaGetLastError();
}

EXPORT cudaError_t matmul(const swinops::half* a, const swinops::half* b, float* d) {
  using namespace swinops;
  SWINOPS_LAUNCH(MatmulKernel<half>, 1, kWarp, (16 * 16 + 16 * 8) * sizeof(half), nullptr, a, b, d);
  return cudaGetLastError();
}

EXPORT cudaError_t ask_for_shared(float* out, int64_t bytes, int64_t allowed) {
  using namespace swinops;
  if (allowed) {
    if (allow_shared(SumKernel, size_t(bytes))) return cudaGetLastError();
  }
  SWINOPS_LAUNCH(SumKernel, 1, 32, size_t(bytes), nullptr, nullptr, out, 0);
  return cudaGetLastError();
}
