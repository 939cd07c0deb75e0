// What every kernel shares. A kernel's file goes through these macros instead of CUDA's own syntax, so that a host
// compiler can read the same file: it defines SWINOPS_LAUNCH and SWINOPS_DYNAMIC_SHARED before it gets here.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#ifndef SWINOPS_LAUNCH
#define SWINOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

// Declares `type* name`, the block's dynamic shared memory, aligned for 16-byte accesses.
#ifndef SWINOPS_DYNAMIC_SHARED
#define SWINOPS_DYNAMIC_SHARED(type, name)              \
  extern __shared__ uint4 swinops_dynamic_shared_mem[]; \
  type* const name = reinterpret_cast<type*>(swinops_dynamic_shared_mem)
#endif

namespace swinops {

constexpr int kMaxVectorBytes = 16;  // the widest global load or store of one thread

// The unsigned type that one load or store of kBytes moves.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<1> {
  using type = uint8_t;
};
template <>
struct VectorOf<2> {
  using type = uint16_t;
};
template <>
struct VectorOf<4> {
  using type = uint32_t;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<16> {
  using type = uint4;
};
template <int kBytes>
using Vector = typename VectorOf<kBytes>::type;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace swinops
