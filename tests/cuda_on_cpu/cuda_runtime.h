// Enough of CUDA for a host compiler to build csrc/ and run its kernels, one thread after the other. Kernels whose
// threads meet at a barrier need more than this.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define CUDART_VERSION 0
using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMisalignedAddress, cudaErrorInvalidConfiguration };
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  constexpr const char* names[] = {"no error", "invalid argument", "misaligned address",
                                   "invalid configuration argument"};
  return names[error];
}

inline bool within_limits(dim3 grid, dim3 block) {
  return grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 &&
         block.x > 0 && block.x <= 1024 && block.y > 0 && block.y <= 1024 && block.z > 0 && block.z <= 64 &&
         block.x * block.y * block.z <= 1024;
}

template <class Body>
void for_each(dim3 extent, dim3& index, Body body) {
  for (index.z = 0; index.z < extent.z; ++index.z)
    for (index.y = 0; index.y < extent.y; ++index.y)
      for (index.x = 0; index.x < extent.x; ++index.x) body();
}

#define SWINOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
  if (!within_limits(grid, block)) {                                                             \
    last_error = cudaErrorInvalidConfiguration;                                                  \
  } else {                                                                                       \
    gridDim = grid, blockDim = block;                                                            \
    for_each(grid, blockIdx, [&] { for_each(block, threadIdx, [&] { kernel(__VA_ARGS__); }); }); \
  }
