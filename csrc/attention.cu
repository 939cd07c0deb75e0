// What of attention runs on the host: which form of the kernels serves a call.
#include <climits>

#include "attention.cuh"

namespace swinops {
namespace {

constexpr int kMaxTokens = 8192;  // of which every kernel's tables fit into 99 KB, the least that a block can have

bool is_empty(const AttentionShape& s) { return s.batch == 0; }

// Along an axis of one token, past which only pads lie, whatever stride the tensor has is 0.
int64_t axis_stride(const AttentionShape& s, const int64_t* stride, int axis) {
  return s.size[axis] > 1 ? stride[axis + 1] : 0;
}

bool is_valid(const AttentionShape& s) {
  if (s.batch < 0 || s.heads < 1 || s.heads > 65535 || s.head_dim < 1 || s.head_dim > 128) return false;
  int64_t tokens = 1, windows = s.batch;
  for (int axis = 0; axis < 3; ++axis) {
    if (s.size[axis] < 1 || s.window[axis] < 1 || s.shift[axis] < 0 || s.shift[axis] >= s.window[axis]) return false;
    // positions, shifted and padded, are counted in 32 bits
    if (int64_t(s.size[axis]) + 2 * int64_t(s.window[axis]) > INT_MAX) return false;
    tokens *= s.window[axis];
    if (tokens > kMaxTokens) return false;
    windows *= ceil_div(s.size[axis], s.window[axis]);
    if (windows > INT_MAX / 2) return false;
    for (const int64_t* strides : {s.qkv_stride, s.dout_stride, s.grad_stride}) {
      const int64_t stride = axis_stride(s, strides, axis);
      if (stride < INT_MIN || stride > INT_MAX) return false;
    }
  }
  return s.multiprocessors > 0;
}

Strides strides_of(const AttentionShape& s, const int64_t (&stride)[5]) {
  const auto axis = [&](int i) { return int(axis_stride(s, stride, i)); };
  return {stride[0], stride[4], {axis(0), axis(1), axis(2)}};
}

// Whether chunks of 16 bytes of every row can be moved whole.
bool is_vector(const AttentionShape& s, const int64_t (&stride)[5], std::initializer_list<const void*> pointers) {
  const int elements = s.dtype == Dtype::kFloat32 ? 4 : 8;
  if (s.head_dim % elements) return false;
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  }
  const int64_t extent[5] = {s.batch, s.size[0], s.size[1], s.size[2], s.heads};
  for (int axis = 0; axis < 5; ++axis) {
    if (extent[axis] > 1 && stride[axis] % elements) return false;
  }
  return true;
}

// Whether an image's offsets in bytes fit in 32 bits, those of its output and log-sum-exp too.
bool is_short(const AttentionShape& s, const int64_t (&stride)[5]) {
  int64_t last = s.head_dim, tokens = 1;
  for (int axis = 0; axis < 3; ++axis) {
    last += (s.size[axis] - 1) * stride[axis + 1];
    tokens *= s.size[axis];
  }
  return std::max(last, tokens * s.heads * std::max(s.head_dim, 2)) * int64_t(sizeof(half)) <= UINT_MAX;
}

// Whether the kernels that keep a whole window serve a call whose tensors are aligned.
bool is_whole(const AttentionShape& s) {
  return s.size[0] == 1 && s.window[0] == 1 && s.dtype != Dtype::kFloat32 && s.head_dim <= 32 &&
         s.window[1] * s.window[2] <= 64 && is_short(s, s.qkv_stride);
}

bool is_whole_backward(const AttentionShape& s) {
  return is_whole(s) && is_short(s, s.dout_stride) && is_short(s, s.grad_stride);
}

// The parts of a workspace, in floats.
struct Workspace {
  int sums;            // partials of dlogit_scale and dpad
  int dbias;           // partials of dbias
  int64_t scale_size;  // of a partial
  int64_t bias_size, pad_size;
  int64_t stats;  // floats of delta, and of norm
  bool whole;

  int64_t size() const { return sums * (scale_size + pad_size) + dbias * bias_size + 2 * stats; }
};

cudaError_t lay_out(const AttentionInputs& inputs, const AttentionGradients& gradients, const AttentionShape& s,
                    const Geometry& geometry, bool whole, Workspace& w) {
  w.whole = whole;
  w.scale_size = gradients.dlogit_scale ? s.heads : 0;
  w.bias_size = gradients.dbias ? int64_t(s.heads) * geometry.tokens * geometry.tokens : 0;
  w.pad_size = gradients.dpad_kv && geometry.padded ? int64_t(2) * s.heads * s.head_dim : 0;
  w.stats = 0;
  if (whole) {
    w.sums = w.dbias =
        inputs.logit_scale ? whole_backward_programs<true>(geometry, s) : whole_backward_programs<false>(geometry, s);
    return cudaSuccess;
  }
  TiledPrograms programs;
  const cudaError_t error = tiled_backward_programs(geometry, s, programs);
  w.sums = programs.rows;
  w.dbias = programs.chunks;
  w.stats = s.batch * s.size[0] * s.size[1] * s.size[2] * s.heads;
  return error;
}

bool is_vector(const AttentionInputs& inputs, const AttentionGradients& gradients, const void* dout, const void* out,
               const AttentionShape& s) {
  return is_vector(s, s.qkv_stride, {inputs.q, inputs.k, inputs.v, inputs.pad_kv}) &&
         is_vector(s, s.dout_stride, {dout}) && is_vector(s, s.grad_stride, {gradients.dq, gradients.dk, gradients.dv});
}

constexpr int kSumThreads = 256, kSumSlices = 8;

// out[i] = the sum of partials [programs, size], in a fixed order: by eight slices, which are then added.
__global__ void __launch_bounds__(kSumThreads)
    SumKernel(const float* partials, int programs, int64_t size, void* out, Dtype dtype) {
  SWINOPS_DYNAMIC_SHARED(float, slices);
  constexpr int kElements = kSumThreads / kSumSlices;
  const int element = threadIdx.x % kElements, slice = threadIdx.x / kElements;
  const int64_t i = int64_t(blockIdx.x) * kElements + element;
  float total = 0.f;
  if (i < size) {
    for (int p = slice; p < programs; p += kSumSlices) total += partials[p * size + i];
  }
  slices[threadIdx.x] = total;
  __syncthreads();
  if (slice || i >= size) return;
  for (int n = 1; n < kSumSlices; ++n) total += slices[n * kElements + element];
  switch (dtype) {
    case Dtype::kFloat16: static_cast<half*>(out)[i] = from_float<half>(total); break;
    case Dtype::kBFloat16: static_cast<bfloat16*>(out)[i] = from_float<bfloat16>(total); break;
    default: static_cast<float*>(out)[i] = total;
  }
}

cudaError_t sum(const float* partials, int programs, int64_t size, void* out, Dtype dtype, cudaStream_t stream) {
  if (out == nullptr || size == 0) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div<int64_t>(size, kSumThreads / kSumSlices)));
  SWINOPS_LAUNCH(SumKernel, grid, dim3(kSumThreads), kSumThreads * sizeof(float), stream, partials, programs, size, out,
                 dtype);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention(const AttentionInputs& inputs, void* out, float* lse, const AttentionShape& s,
                      cudaStream_t stream) {
  if (is_empty(s)) return cudaSuccess;
  if (!is_valid(s)) return cudaErrorInvalidValue;
  ForwardArguments a{};
  a.inputs = inputs;
  a.out = out;
  a.lse = lse;
  a.geometry = Geometry(s);
  a.strides = strides_of(s, s.qkv_stride);
  a.scale_dtype = s.scale_dtype;
  a.bias_dtype = s.bias_dtype;
  a.vector = is_vector(s, s.qkv_stride, {inputs.q, inputs.k, inputs.v, inputs.pad_kv, out});
  if (a.vector && is_whole(s)) {
    return inputs.logit_scale ? launch_whole<true>(a, s, stream) : launch_whole<false>(a, s, stream);
  }
  return launch_tiled(a, s, stream);
}

int64_t attention_workspace(const AttentionInputs& inputs, const AttentionGradients& gradients,
                            const AttentionShape& s) {
  if (is_empty(s) || !is_valid(s)) return 0;
  const Geometry geometry(s);
  // whether tensors are aligned is not known yet: room for either form
  Workspace whole{}, tiled{};
  if (is_whole_backward(s)) lay_out(inputs, gradients, s, geometry, true, whole);
  if (lay_out(inputs, gradients, s, geometry, false, tiled)) return whole.size();
  return std::max(whole.size(), tiled.size());
}

cudaError_t attention_backward(const void* dout, const AttentionInputs& inputs, const void* out, const float* lse,
                               const AttentionGradients& gradients, float* workspace, const AttentionShape& s,
                               cudaStream_t stream) {
  if (is_empty(s)) return cudaSuccess;
  if (!is_valid(s)) return cudaErrorInvalidValue;
  BackwardArguments a{};
  a.inputs = inputs;
  a.dout = dout;
  a.out = out;
  a.lse = lse;
  a.dq = gradients.dq;
  a.dk = gradients.dk;
  a.dv = gradients.dv;
  a.geometry = Geometry(s);
  a.strides = strides_of(s, s.qkv_stride);
  a.dout_strides = strides_of(s, s.dout_stride);
  a.grad_strides = strides_of(s, s.grad_stride);
  a.scale = s.scale;
  a.scale_dtype = s.scale_dtype;
  a.bias_dtype = s.bias_dtype;
  a.vector = is_vector(inputs, gradients, dout, out, s);
  Workspace w;
  if (const cudaError_t error = lay_out(inputs, gradients, s, a.geometry, a.vector && is_whole_backward(s), w)) {
    return error;
  }
  float* const scales = workspace;
  float* const biases = scales + w.sums * w.scale_size;
  float* const pads = biases + w.dbias * w.bias_size;
  float* const delta = pads + w.sums * w.pad_size;
  a.dlogit_scale = w.scale_size ? scales : nullptr;
  a.dbias = w.bias_size ? biases : nullptr;
  a.dpad = w.pad_size ? pads : nullptr;
  cudaError_t error;
  if (w.whole) {
    error = inputs.logit_scale ? launch_whole_backward<true>(a, s, w.sums, stream)
                               : launch_whole_backward<false>(a, s, w.sums, stream);
  } else {
    error = launch_tiled_backward(a, s, {w.sums, w.dbias}, delta, delta + w.stats, stream);
  }
  if (error) return error;
  if ((error = sum(scales, w.sums, w.scale_size, gradients.dlogit_scale, gradients.scale_dtype, stream))) return error;
  if ((error = sum(biases, w.dbias, w.bias_size, gradients.dbias, gradients.bias_dtype, stream))) return error;
  return sum(pads, w.sums, w.pad_size, gradients.dpad_kv, gradients.pad_dtype, stream);
}

}  // namespace swinops
