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

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// Images [B, D, H, W, heads, head_dim] and the windows that attention cuts them into; two dimensions have D = 1. The
// sizes need not divide by the window: pads are keys and never queries.
struct AttentionShape {
  int64_t batch;
  int size[3];  // D, H, W
  int heads, head_dim;
  int window[3], shift[3];  // 0 <= shift < window
  bool roll_pad;            // pads come after the shift (timm), not before
  float scale, mask_value;  // cosine attention takes its scale from logit_scale
  Dtype dtype, scale_dtype, bias_dtype;
  bool tf32;  // float32 may be rounded to tf32 for the tensor cores
  // B, D, H, W, heads; in elements, and channels lie side by side. Those of D, H and W fit in 32 bits
  int64_t qkv_stride[5], dout_stride[5], grad_stride[5];
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

// null where there is none; with logit_scale it is cosine attention.
struct AttentionInputs {
  const void *q, *k, *v;
  const void* logit_scale;  // [heads], scale_dtype
  const void* bias;         // [heads, N, N], bias_dtype
  const void* pad_kv;       // [2, heads, head_dim], dtype
};

// out, of q's shape and contiguous, and the log2-sum-exp of its scores [B, D, H, W, heads].
cudaError_t attention(const AttentionInputs& inputs, void* out, float* lse, const AttentionShape& shape,
                      cudaStream_t stream);

// dq, dk and dv in image layout, grad_stride; the others contiguous, and null where not wanted.
struct AttentionGradients {
  void *dq, *dk, *dv;
  void *dlogit_scale, *dbias, *dpad_kv;
  Dtype scale_dtype, bias_dtype, pad_dtype;
};

// How many floats backward works in, for the gradients that are not null.
int64_t attention_workspace(const AttentionInputs& inputs, const AttentionGradients& gradients,
                            const AttentionShape& shape);

// out and lse are those of forward, and dout's strides dout_stride.
cudaError_t attention_backward(const void* dout, const AttentionInputs& inputs, const void* out, const float* lse,
                               const AttentionGradients& gradients, float* workspace, const AttentionShape& shape,
                               cudaStream_t stream);

// Windows [D, H, W] of N tokens, and their position bias [heads, N, N]: the bias of a pair (query, key) is the row of a
// table [(2D - 1)(2H - 1)(2W - 1), heads] for the offset between them. Two dimensions have D = 1.
struct BiasShape {
  int heads;
  int window[3];
};

// table of any strides -> bias, bit for bit, for elements of 2 or 4 bytes.
cudaError_t relative_position_bias(const void* table, void* bias, const BiasShape& shape, int64_t row_stride,
                                   int64_t head_stride, int element_size, cudaStream_t stream);

// dbias, whose strides are those of heads, queries and keys, -> dtable; sums are in float32.
cudaError_t relative_position_bias_backward(const void* dbias, void* dtable, const BiasShape& shape,
                                            const int64_t (&stride)[3], Dtype dtype, cudaStream_t stream);

// The network of the continuous position bias, of two coordinates: w1 [hidden, 2], b1 [hidden], w2 [heads, hidden].
struct BiasNetwork {
  int hidden;
  int pretrained[2];  // the window whose offsets fill the coordinates' range
  bool log_spaced;
  Dtype dtype;  // of the weights, their gradients and the bias
};

// bias, and the table that it is rounded from. Windows have two dimensions.
cudaError_t continuous_position_bias(const void* w1, const void* b1, const void* w2, void* bias, float* table,
                                     const BiasShape& shape, const BiasNetwork& network, cudaStream_t stream);

// How many floats backward works in.
int64_t continuous_position_bias_workspace(const BiasShape& shape);

// dbias as above, of a dtype of its own, -> dw1, db1, dw2.
cudaError_t continuous_position_bias_backward(const void* dbias, const float* table, const void* w1, const void* b1,
                                              const void* w2, void* dw1, void* db1, void* dw2, float* workspace,
                                              const BiasShape& shape, const BiasNetwork& network,
                                              const int64_t (&stride)[3], Dtype dbias_dtype, cudaStream_t stream);

}  // namespace swinops
