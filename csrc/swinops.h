// The native API. It knows nothing of torch: raw pointers, sizes and strides in, an error code out.
//
// A launcher runs asynchronously on its stream on the current device, allocates nothing, launches nothing where there
// is nothing to do, and returns cudaErrorInvalidValue for arguments it cannot serve.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace swinops {

// Images [B, D, H, W, C] and the windows [B * nW, Md, Mh, Mw, C] they are cut into after a cyclic shift by -shift, both
// in row-major order. A two-dimensional image has D = 1. Every image axis is divisible by its window.
struct WindowShape {
  int64_t batch;
  int size[3];  // D, H, W
  int channels;
  int window[3];              // Md, Mh, Mw
  int shift[3];               // 0 <= shift < size
  int64_t image_stride[4];    // B, D, H, W; in elements, and channels lie side by side
  int64_t windows_stride[4];  // window, Md, Mh, Mw; likewise
};

// image -> windows, bit for bit, for elements of 1, 2, 4, 8 or 16 bytes.
cudaError_t window_partition(const void* image, void* windows, const WindowShape& shape, int element_size,
                             cudaStream_t stream);

// windows -> image, the inverse.
cudaError_t window_merge(const void* windows, void* image, const WindowShape& shape, int element_size,
                         cudaStream_t stream);

}  // namespace swinops
