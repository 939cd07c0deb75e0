// CUDA for a host compiler: what csrc/ uses of the language, of the runtime and of its intrinsics, and the emulated
// side of csrc/common.cuh. Kernels run on the emulator of emulator.cpp. There are no atomics, on purpose: the package
// has none.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SWINOPS_EMULATED

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ kernels_take_their_shared_memory_by_SWINOPS_DYNAMIC_SHARED_only

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

#define EMULATOR_VECTOR_TYPES(T, name)                                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                    \
  struct name##3 { T x, y, z; };                                        \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };              \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned, uint)
EMULATOR_VECTOR_TYPES(float, float)
#undef EMULATOR_VECTOR_TYPES

#include "numbers.h"

#define CUDART_VERSION 0
using cudaStream_t = struct Stream*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorMisalignedAddress,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure,  // the emulator has found a fault: cudaGetErrorString is its report
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

// Registers go in and out by value, so that a kernel's own stay out of memory, and out of the checks of memory.
struct Floats {
  float of[4];
};
struct Words {
  uint32_t of[4];
};
enum class Format { half, bfloat16, tf32 };

void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
            void (*run)(const void*), const void* arguments);
cudaError_t set_shared_limit(const void* kernel, int bytes);
void* shared_memory();
unsigned lane();

void sync_block();
int sync_block_count(bool predicate);
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned from);
unsigned ballot(unsigned mask, bool predicate);
Floats mma_k16(Format format, Floats d, Words a, uint32_t b0, uint32_t b1);
Floats mma_k8(Format format, Floats d, Words a, uint32_t b0, uint32_t b1);
Words ldmatrix(const void* row, bool transposed);
void cp_async(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);
[[noreturn]] void trap();

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

// The thread's copies of the arguments are made by code that is not checked: they come from the launcher's stack.
#define SWINOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                      \
  do {                                                                                                      \
    static_cast<void>(stream);                                                                              \
    const auto run = [&]() __attribute__((no_sanitize("thread"))) { kernel(__VA_ARGS__); };                 \
    using Run = decltype(run);                                                                              \
    ::emulator::launch(                                                                                     \
        #kernel, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,                          \
        [](const void* run) __attribute__((no_sanitize("thread"))) { (*static_cast<Run*>(run))(); }, &run); \
  } while (false)
#define SWINOPS_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulator::shared_memory())

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  return emulator::set_shared_limit(reinterpret_cast<const void*>(kernel), bytes);
}

inline void __syncthreads() { emulator::sync_block(); }
inline int __syncthreads_count(int predicate) { return emulator::sync_block_count(predicate); }
inline int __syncthreads_or(int predicate) { return emulator::sync_block_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return emulator::sync_block_count(!predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulator::ballot(mask, !predicate) == 0; }

// A lane that is asked for and lies outside of the segment of `width` lanes is the thread's own.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize) {
  const unsigned start = emulator::lane() & -unsigned(width);
  return emulator::shuffle(mask, value, start + (from & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned own = emulator::lane();
  return emulator::shuffle(mask, value, (own & (width - 1)) < delta ? own : own - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned own = emulator::lane();
  return emulator::shuffle(mask, value, (own & (width - 1)) + delta >= unsigned(width) ? own : own + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize) {
  const unsigned own = emulator::lane(), from = own ^ flip;
  return emulator::shuffle(mask, value, from > (own | unsigned(width - 1)) ? own : from);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
[[noreturn]] inline void __trap() { emulator::trap(); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// csrc/common.cuh says what these do.
namespace swinops {

template <class T>
constexpr emulator::Format format_of() {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  return std::is_same_v<T, __half> ? emulator::Format::half : emulator::Format::bfloat16;
}

template <class T>
__forceinline__ uint32_t pack(float low, float high) {
  return format_of<T>() == emulator::Format::half
             ? emulator::half_bits(low) | uint32_t(emulator::half_bits(high)) << 16
             : emulator::bfloat16_bits(low) | uint32_t(emulator::bfloat16_bits(high)) << 16;
}

// To the nearest, ties away from zero: half a unit is added to the magnitude, and the lower bits fall off.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = emulator::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

inline unsigned keep(unsigned x) { return x; }
inline int64_t keep(int64_t x) { return x; }

// The fast functions take subnormal numbers for zeros and return none.
inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_fast(float x) { return without_subnormals(exp2f(x)); }
inline float log2_fast(float x) { return log2f(without_subnormals(x)); }
inline float reciprocal_fast(float x) { return without_subnormals(1.0f / without_subnormals(x)); }
inline float rsqrt_fast(float x) { return without_subnormals(rsqrtf(without_subnormals(x))); }

template <class T>
__forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Floats r =
      emulator::mma_k16(format_of<T>(), {d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, b0, b1);
  for (int i = 0; i < 4; ++i) d[i] = r.of[i];
}

template <class T>
__forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const emulator::Floats r = emulator::mma_k8(format_of<T>(), {d[0], d[1], d[2], d[3]}, {a0, a1}, b, 0);
  for (int i = 0; i < 4; ++i) d[i] = r.of[i];
}

__forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Floats r =
      emulator::mma_k8(emulator::Format::tf32, {d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, b0, b1);
  for (int i = 0; i < 4; ++i) d[i] = r.of[i];
}

__forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  const emulator::Words words = emulator::ldmatrix(row, false);
  for (int i = 0; i < 4; ++i) r[i] = words.of[i];
}

__forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  const emulator::Words words = emulator::ldmatrix(row, true);
  for (int i = 0; i < 4; ++i) r[i] = words.of[i];
}

inline void cp_async(void* shared, const void* global, bool valid) { emulator::cp_async(shared, global, valid); }
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int kGroups>
void cp_async_wait() {
  emulator::cp_async_wait(kGroups);
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return bytes > (48 << 10) ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))
                            : cudaSuccess;
}

}  // namespace swinops
