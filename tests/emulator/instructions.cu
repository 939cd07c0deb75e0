// Kernels of one instruction each, for tests that compare it with its definition.
#include <cstdint>
#include <cstring>

#include "common.cuh"

namespace swinops {
namespace {

// The matrix kernels hold the fragments of PTX ISA 8.5, section 9.7.14, in its own words: element i of a register pair,
// groupID and threadID_in_group.

// d [16, 8] += a [16, kDepth] b [kDepth, 8]
template <class T, int kDepth>
__global__ void FragmentsKernel(const T* a, const T* b, float* d) {
  const int groupID = threadIdx.x >> 2, threadID_in_group = threadIdx.x % 4;
  T a_elements[kDepth / 2], b_elements[kDepth / 4];
  for (int i = 0; i < kDepth / 2; ++i) {
    const int row = i % 4 < 2 ? groupID : groupID + 8;
    const int column = threadID_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a_elements[i] = a[row * kDepth + column];
  }
  for (int i = 0; i < kDepth / 4; ++i) {
    const int row = threadID_in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
    b_elements[i] = b[row * 8 + groupID];
  }
  uint32_t a_registers[kDepth / 4], b_registers[kDepth / 8];
  memcpy(a_registers, a_elements, sizeof a_registers);
  memcpy(b_registers, b_elements, sizeof b_registers);
  float c[4];
  const auto at = [&](int i) { return (i < 2 ? groupID : groupID + 8) * 8 + threadID_in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) c[i] = d[at(i)];
  if constexpr (kDepth == 16) {
    mma<T>(c, a_registers, b_registers[0], b_registers[1]);
  } else {
    mma<T>(c, a_registers[0], a_registers[1], b_registers[0]);
  }
  for (int i = 0; i < 4; ++i) d[at(i)] = c[i];
}

__global__ void Tf32FragmentsKernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int groupID = threadIdx.x >> 2, threadID_in_group = threadIdx.x % 4;
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? groupID : groupID + 8;
    const int column = i == 0 || i == 1 ? threadID_in_group : threadID_in_group + 4;
    a_registers[i] = a[row * 8 + column];
  }
  for (int i = 0; i < 2; ++i) b_registers[i] = b[(i == 0 ? threadID_in_group : threadID_in_group + 4) * 8 + groupID];
  float c[4];
  const auto at = [&](int i) { return (i < 2 ? groupID : groupID + 8) * 8 + threadID_in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) c[i] = d[at(i)];
  mma_tf32(c, a_registers, b_registers[0], b_registers[1]);
  for (int i = 0; i < 4; ++i) d[at(i)] = c[i];
}

// out [4, 32] = the registers that ldmatrix gives each lane, of in [4, 8, 8].
template <bool kTransposed>
__global__ void LdmatrixKernel(const uint16_t* in, uint32_t* out) {
  SWINOPS_DYNAMIC_SHARED(uint16_t, tile);
  for (int i = threadIdx.x; i < 4 * 8 * 8; i += kWarp) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  kTransposed ? ldmatrix_transposed(r, &tile[threadIdx.x * 8]) : ldmatrix(r, &tile[threadIdx.x * 8]);
  for (int i = 0; i < 4; ++i) out[i * kWarp + threadIdx.x] = r[i];
}

// out [7, threads] = shuffles of in [threads] in segments of `width` lanes, then votes on whether it is odd.
__global__ void LanesKernel(const int* in, int* out, int by, int width) {
  const int x = in[threadIdx.x];
  const int results[] = {__shfl_sync(kWholeWarp, x, by, width),
                         __shfl_up_sync(kWholeWarp, x, by, width),
                         __shfl_down_sync(kWholeWarp, x, by, width),
                         __shfl_xor_sync(kWholeWarp, x, by, width),
                         int(__ballot_sync(kWholeWarp, x & 1)),
                         __any_sync(kWholeWarp, x & 1) + 2 * __all_sync(kWholeWarp, x & 1),
                         __syncthreads_count(x & 1)};
  for (int i = 0; i < 7; ++i) out[i * blockDim.x + threadIdx.x] = results[i];
}

// out [n] = what a GPU rounds in [n] to, as bits.
__global__ void RoundKernel(const float* in, uint32_t* half_bits, uint32_t* bfloat16_bits, uint32_t* tf32_bits, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  half_bits[i] = pack<half>(in[i], -in[i]);
  bfloat16_bits[i] = pack<bfloat16>(in[i], -in[i]);
  tf32_bits[i] = to_tf32(in[i]);
}

template <class T>
__global__ void WidenKernel(const T* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = to_float(in[i]);
}

}  // namespace
}  // namespace swinops

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT cudaError_t fragments(const void* a, const void* b, float* d, int64_t depth, int64_t is_half) {
  using namespace swinops;
  const auto run = [&](auto kernel, auto example) {
    using T = decltype(example);
    SWINOPS_LAUNCH(kernel, 1, kWarp, 0, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), d);
  };
  if (is_half) {
    run(depth == 16 ? FragmentsKernel<half, 16> : FragmentsKernel<half, 8>, half());
  } else {
    run(depth == 16 ? FragmentsKernel<bfloat16, 16> : FragmentsKernel<bfloat16, 8>, bfloat16());
  }
  return cudaGetLastError();
}

EXPORT cudaError_t tf32_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  SWINOPS_LAUNCH(swinops::Tf32FragmentsKernel, 1, 32, 0, nullptr, a, b, d);
  return cudaGetLastError();
}

EXPORT cudaError_t ldmatrix(const uint16_t* in, uint32_t* out, int64_t transposed) {
  using namespace swinops;
  const auto kernel = transposed ? LdmatrixKernel<true> : LdmatrixKernel<false>;
  SWINOPS_LAUNCH(kernel, 1, kWarp, 4 * 8 * 8 * 2, nullptr, in, out);
  return cudaGetLastError();
}

EXPORT cudaError_t lanes(const int* in, int* out, int64_t threads, int64_t by, int64_t width) {
  SWINOPS_LAUNCH(swinops::LanesKernel, 1, unsigned(threads), 0, nullptr, in, out, int(by), int(width));
  return cudaGetLastError();
}

EXPORT cudaError_t round_to(const float* in, uint32_t* half_bits, uint32_t* bfloat16_bits, uint32_t* tf32_bits,
                            int64_t n) {
  SWINOPS_LAUNCH(swinops::RoundKernel, swinops::ceil_div(int(n), 256), 256, 0, nullptr, in, half_bits, bfloat16_bits,
                 tf32_bits, int(n));
  return cudaGetLastError();
}

EXPORT cudaError_t widen(const void* in, float* out, int64_t n, int64_t is_half) {
  using namespace swinops;
  const int blocks = ceil_div(int(n), 256);
  if (is_half) {
    SWINOPS_LAUNCH(WidenKernel<half>, blocks, 256, 0, nullptr, static_cast<const half*>(in), out, int(n));
  } else {
    SWINOPS_LAUNCH(WidenKernel<bfloat16>, blocks, 256, 0, nullptr, static_cast<const bfloat16*>(in), out, int(n));
  }
  return cudaGetLastError();
}
