// Relative position bias: the table expanded to every pair of tokens, and its gradient summed back.
#include "relative_position_bias.cuh"

namespace swinops {
namespace {

// dtable [rows, heads]
template <class T>
struct StoreSum {
  T* dtable;
  int heads;

  __device__ void operator()(int head, int row, float sum) const {
    dtable[int64_t(row) * heads + head] = from_float<T>(sum);
  }
};

template <class T>
cudaError_t sum(const void* dbias, void* dtable, const BiasShape& s, const int64_t (&stride)[3], cudaStream_t stream) {
  const StoreSum<T> store{static_cast<T*>(dtable), s.heads};
  return sum_pairs(static_cast<const T*>(dbias), store, s, stride, stream);
}

template <class Bits>
cudaError_t copy(const void* table, void* bias, const BiasShape& s, int64_t row_stride, int64_t head_stride,
                 cudaStream_t stream) {
  return expand(static_cast<const Bits*>(table), static_cast<Bits*>(bias), s, row_stride, head_stride, stream);
}

}  // namespace

cudaError_t relative_position_bias(const void* table, void* bias, const BiasShape& shape, int64_t row_stride,
                                   int64_t head_stride, int element_size, cudaStream_t stream) {
  if (!is_valid(shape)) return cudaErrorInvalidValue;
  if (shape.heads == 0) return cudaSuccess;
  switch (element_size) {
    case 2: return copy<uint16_t>(table, bias, shape, row_stride, head_stride, stream);
    case 4: return copy<uint32_t>(table, bias, shape, row_stride, head_stride, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t relative_position_bias_backward(const void* dbias, void* dtable, const BiasShape& shape,
                                            const int64_t (&stride)[3], Dtype dtype, cudaStream_t stream) {
  if (!is_valid(shape)) return cudaErrorInvalidValue;
  if (shape.heads == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kFloat32: return sum<float>(dbias, dtable, shape, stride, stream);
    case Dtype::kFloat16: return sum<half>(dbias, dtable, shape, stride, stream);
    case Dtype::kBFloat16: return sum<bfloat16>(dbias, dtable, shape, stride, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace swinops
