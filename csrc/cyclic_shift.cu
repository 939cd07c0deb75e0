// Cyclic shift with window partition, and its inverse: one copy, with the permutation in the addresses.
//
// A line is one row of the shifted image, W tokens side by side. Its place along B, D and H is worked out once; along
// it a thread steps by vectors, which costs two 32-bit divisions for each. Offsets are 64-bit.
#include <algorithm>
#include <climits>
#include <cstdint>

#include "common.cuh"
#include "swinops.h"

namespace swinops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight per thread

struct Offsets {
  int64_t image, windows;
};

// Where position `p` of an axis of the shifted image lies in the image.
__host__ __device__ inline int unshifted(int p, int shift, int size) {
  return p < size - shift ? p + shift : p - (size - shift);
}

// The first token of the line at (d, h) of the shifted image, without the part of the image that depends on w.
__host__ __device__ inline Offsets line_offsets(const WindowShape& s, int64_t b, int d, int h) {
  const int nH = s.size[1] / s.window[1], nW = s.size[2] / s.window[2];
  const int window_d = d / s.window[0], window_h = h / s.window[1];
  const int64_t window = ((b * (s.size[0] / s.window[0]) + window_d) * nH + window_h) * nW;
  return {b * s.image_stride[0] + unshifted(d, s.shift[0], s.size[0]) * s.image_stride[1] +
              unshifted(h, s.shift[1], s.size[1]) * s.image_stride[2],
          window * s.windows_stride[0] + (d - window_d * s.window[0]) * s.windows_stride[1] +
              (h - window_h * s.window[1]) * s.windows_stride[2]};
}

// Element `i` of a line: channel i % C of the token at w = i / C of the shifted image.
__host__ __device__ inline Offsets element_offsets(const WindowShape& s, Offsets line, int i) {
  const int w = i / s.channels, c = i - w * s.channels;
  const int window = w / s.window[2];
  return {line.image + unshifted(w, s.shift[2], s.size[2]) * s.image_stride[3] + c,
          line.windows + window * s.windows_stride[0] + (w - window * s.window[2]) * s.windows_stride[3] + c};
}

// Threads: x along a line, y over the lines of an image, z over the batch. The shape counts in vectors.
template <class Vec, bool kMerge>
__global__ void __launch_bounds__(kThreads)
    CyclicShiftKernel(const Vec* __restrict__ src, Vec* __restrict__ dst, const WindowShape s) {
  const int line = blockIdx.x * blockDim.y + threadIdx.y;
  if (line >= s.size[0] * s.size[1]) return;
  const int d = line / s.size[1], h = line - d * s.size[1];
  const int n = s.size[2] * s.channels;

  for (int64_t b = int64_t(blockIdx.y) * blockDim.z + threadIdx.z; b < s.batch; b += int64_t(gridDim.y) * blockDim.z) {
    const Offsets start = line_offsets(s, b, d, h);
    for (int i = threadIdx.x; i < n; i += kUnroll * blockDim.x) {
      Vec v[kUnroll];
      int64_t to[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int j = i + u * blockDim.x;
        if (j < n) {
          const Offsets at = element_offsets(s, start, j);
          v[u] = src[kMerge ? at.windows : at.image];
          to[u] = kMerge ? at.image : at.windows;
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * blockDim.x < n) dst[to[u]] = v[u];
      }
    }
  }
}

bool is_empty(const WindowShape& s) {
  return s.batch == 0 || s.channels == 0 || s.size[0] == 0 || s.size[1] == 0 || s.size[2] == 0;
}

bool is_valid(const WindowShape& s, int element_size) {
  if (element_size < 1 || element_size > kMaxVectorBytes || (element_size & (element_size - 1))) return false;
  if (s.batch < 0 || s.channels < 0) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (s.window[axis] < 1 || s.size[axis] < 1 || s.size[axis] % s.window[axis]) return false;
    if (s.shift[axis] < 0 || s.shift[axis] >= s.size[axis]) return false;
  }
  // the kernel counts lines, and elements along a line with a stride to spare, in 32 bits
  return int64_t(s.size[0]) * s.size[1] <= INT_MAX / 2 && int64_t(s.size[2]) * s.channels <= INT_MAX / 2;
}

// The most bytes, at most 16, that divide a token, both pointers and every stride that is ever taken.
int vector_bytes(const void* src, const void* dst, const WindowShape& s, int element_size) {
  uint64_t bits = reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) |
                  uint64_t(s.channels) * element_size | kMaxVectorBytes;
  const auto add = [&](int64_t extent, int64_t stride) {
    if (extent > 1) bits |= uint64_t(stride) * element_size;
  };
  add(s.batch, s.image_stride[0]);
  int64_t windows = s.batch;
  for (int axis = 0; axis < 3; ++axis) {
    add(s.size[axis], s.image_stride[axis + 1]);
    add(s.window[axis], s.windows_stride[axis + 1]);
    windows *= s.size[axis] / s.window[axis];
  }
  add(windows, s.windows_stride[0]);
  return int(bits & -bits);  // the lowest bit set
}

template <int kBytes, bool kMerge>
cudaError_t launch(const void* src, void* dst, WindowShape s, int element_size, cudaStream_t stream) {
  using Vec = Vector<kBytes>;
  const int elements = kBytes / element_size;  // of a vector
  s.channels /= elements;
  for (int64_t& stride : s.image_stride) stride /= elements;
  for (int64_t& stride : s.windows_stride) stride /= elements;

  // A block as wide as the line, then as tall as the image, then as deep as the batch (64 is CUDA's limit in z).
  const auto fit = [](int64_t extent, int most) {
    int threads = 1;
    while (threads < most && threads < extent) threads *= 2;
    return threads;
  };
  const int lines = s.size[0] * s.size[1];
  const int x = fit(s.size[2] * s.channels, kThreads);
  const int y = fit(lines, kThreads / x);
  const int z = fit(s.batch, std::min(kThreads / (x * y), 64));
  const dim3 block(x, y, z);
  const dim3 grid(ceil_div(lines, y), unsigned(std::min<int64_t>(ceil_div<int64_t>(s.batch, z), 65535)));

  const auto kernel = CyclicShiftKernel<Vec, kMerge>;
  SWINOPS_LAUNCH(kernel, grid, block, 0, stream, static_cast<const Vec*>(src), static_cast<Vec*>(dst), s);
  return cudaGetLastError();
}

template <bool kMerge>
cudaError_t cyclic_shift(const void* src, void* dst, const WindowShape& s, int element_size, cudaStream_t stream) {
  if (is_empty(s)) return cudaSuccess;
  if (!is_valid(s, element_size)) return cudaErrorInvalidValue;
  const int bytes = vector_bytes(src, dst, s, element_size);
  if (bytes < element_size) return cudaErrorMisalignedAddress;
  switch (bytes) {
    case 1: return launch<1, kMerge>(src, dst, s, element_size, stream);
    case 2: return launch<2, kMerge>(src, dst, s, element_size, stream);
    case 4: return launch<4, kMerge>(src, dst, s, element_size, stream);
    case 8: return launch<8, kMerge>(src, dst, s, element_size, stream);
    default: return launch<16, kMerge>(src, dst, s, element_size, stream);
  }
}

}  // namespace

cudaError_t window_partition(const void* image, void* windows, const WindowShape& shape, int element_size,
                             cudaStream_t stream) {
  return cyclic_shift<false>(image, windows, shape, element_size, stream);
}

cudaError_t window_merge(const void* windows, void* image, const WindowShape& shape, int element_size,
                         cudaStream_t stream) {
  return cyclic_shift<true>(windows, image, shape, element_size, stream);
}

}  // namespace swinops
