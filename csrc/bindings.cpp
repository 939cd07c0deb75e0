// The extension module swinops._C: integers to pointers, error codes to exceptions. The only file that knows Python.
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "swinops.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Launcher = cudaError_t (*)(const void*, void*, const swinops::WindowShape&, int, cudaStream_t);

template <Launcher launcher>
void cyclic_shift(uintptr_t src, uintptr_t dst, int64_t batch, std::array<int, 3> size, int channels,
                  std::array<int, 3> window, std::array<int, 3> shift, std::array<int64_t, 4> image_stride,
                  std::array<int64_t, 4> windows_stride, int element_size, uintptr_t stream) {
  const swinops::WindowShape shape{
      batch,
      {size[0], size[1], size[2]},
      channels,
      {window[0], window[1], window[2]},
      {shift[0], shift[1], shift[2]},
      {image_stride[0], image_stride[1], image_stride[2], image_stride[3]},
      {windows_stride[0], windows_stride[1], windows_stride[2], windows_stride[3]},
  };
  check(launcher(pointer(src), pointer(dst), shape, element_size, reinterpret_cast<cudaStream_t>(stream)));
}

void relative_position_bias(uintptr_t table, uintptr_t bias, int heads, std::array<int, 3> window, int64_t row_stride,
                            int64_t head_stride, int element_size, uintptr_t stream) {
  check(swinops::relative_position_bias(pointer(table), pointer(bias), {heads, {window[0], window[1], window[2]}},
                                        row_stride, head_stride, element_size, reinterpret_cast<cudaStream_t>(stream)));
}

void relative_position_bias_backward(uintptr_t dbias, uintptr_t dtable, int heads, std::array<int, 3> window,
                                     std::array<int64_t, 3> stride, int dtype, uintptr_t stream) {
  check(swinops::relative_position_bias_backward(
      pointer(dbias), pointer(dtable), {heads, {window[0], window[1], window[2]}}, {stride[0], stride[1], stride[2]},
      swinops::Dtype(dtype), reinterpret_cast<cudaStream_t>(stream)));
}

void continuous_position_bias(uintptr_t w1, uintptr_t b1, uintptr_t w2, uintptr_t bias, uintptr_t table, int heads,
                              std::array<int, 2> window, int hidden, std::array<int, 2> pretrained, bool log_spaced,
                              int dtype, uintptr_t stream) {
  check(swinops::continuous_position_bias(pointer(w1), pointer(b1), pointer(w2), pointer(bias), pointer<float>(table),
                                          {heads, {1, window[0], window[1]}},
                                          {hidden, {pretrained[0], pretrained[1]}, log_spaced, swinops::Dtype(dtype)},
                                          reinterpret_cast<cudaStream_t>(stream)));
}

int64_t continuous_position_bias_workspace(int heads, std::array<int, 2> window) {
  return swinops::continuous_position_bias_workspace({heads, {1, window[0], window[1]}});
}

void continuous_position_bias_backward(uintptr_t dbias, uintptr_t table, uintptr_t w1, uintptr_t b1, uintptr_t w2,
                                       uintptr_t dw1, uintptr_t db1, uintptr_t dw2, uintptr_t workspace, int heads,
                                       std::array<int, 2> window, int hidden, std::array<int, 2> pretrained,
                                       bool log_spaced, int dtype, std::array<int64_t, 3> stride, int dbias_dtype,
                                       uintptr_t stream) {
  check(swinops::continuous_position_bias_backward(
      pointer(dbias), pointer<float>(table), pointer(w1), pointer(b1), pointer(w2), pointer(dw1), pointer(db1),
      pointer(dw2), pointer<float>(workspace), {heads, {1, window[0], window[1]}},
      {hidden, {pretrained[0], pretrained[1]}, log_spaced, swinops::Dtype(dtype)}, {stride[0], stride[1], stride[2]},
      swinops::Dtype(dbias_dtype), reinterpret_cast<cudaStream_t>(stream)));
}

template <size_t n, class T, class U>
void copy(const std::array<T, n>& from, U (&to)[n]) {
  std::copy(from.begin(), from.end(), to);
}

// Made once for all calls of a shape: a launch then takes it and addresses only.
swinops::AttentionShape attention_shape(int64_t batch, std::array<int, 3> size, int heads, int head_dim,
                                        std::array<int, 3> window, std::array<int, 3> shift, bool roll_pad, float scale,
                                        float mask_value, int dtype, int scale_dtype, int bias_dtype, bool tf32,
                                        std::array<int64_t, 5> qkv_stride, std::array<int64_t, 5> dout_stride,
                                        std::array<int64_t, 5> grad_stride, int multiprocessors, int shared_bytes) {
  swinops::AttentionShape s{};
  s.batch = batch;
  copy(size, s.size);
  s.heads = heads;
  s.head_dim = head_dim;
  copy(window, s.window);
  copy(shift, s.shift);
  s.roll_pad = roll_pad;
  s.scale = scale;
  s.mask_value = mask_value;
  s.dtype = swinops::Dtype(dtype);
  s.scale_dtype = swinops::Dtype(scale_dtype);
  s.bias_dtype = swinops::Dtype(bias_dtype);
  s.tf32 = tf32;
  copy(qkv_stride, s.qkv_stride);
  copy(dout_stride, s.dout_stride);
  copy(grad_stride, s.grad_stride);
  s.multiprocessors = multiprocessors;
  s.shared_bytes = shared_bytes;
  return s;
}

using Pointers = std::array<uintptr_t, 6>;

swinops::AttentionInputs attention_inputs(const Pointers& p) {
  return {pointer(p[0]), pointer(p[1]), pointer(p[2]), pointer(p[3]), pointer(p[4]), pointer(p[5])};
}

swinops::AttentionGradients attention_gradients(const Pointers& p, const std::array<int, 3>& dtypes = {}) {
  return {pointer(p[0]),
          pointer(p[1]),
          pointer(p[2]),
          pointer(p[3]),
          pointer(p[4]),
          pointer(p[5]),
          swinops::Dtype(dtypes[0]),
          swinops::Dtype(dtypes[1]),
          swinops::Dtype(dtypes[2])};
}

void attention(const swinops::AttentionShape& shape, const Pointers& inputs, uintptr_t out, uintptr_t lse,
               uintptr_t stream) {
  check(swinops::attention(attention_inputs(inputs), pointer(out), pointer<float>(lse), shape,
                           reinterpret_cast<cudaStream_t>(stream)));
}

int64_t attention_workspace(const swinops::AttentionShape& shape, const Pointers& inputs, const Pointers& gradients) {
  return swinops::attention_workspace(attention_inputs(inputs), attention_gradients(gradients), shape);
}

void attention_backward(const swinops::AttentionShape& shape, uintptr_t dout, const Pointers& inputs, uintptr_t out,
                        uintptr_t lse, const Pointers& gradients, const std::array<int, 3>& dtypes, uintptr_t workspace,
                        uintptr_t stream) {
  check(swinops::attention_backward(pointer(dout), attention_inputs(inputs), pointer(out), pointer<float>(lse),
                                    attention_gradients(gradients, dtypes), pointer<float>(workspace), shape,
                                    reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("archs") = SWINOPS_ARCHS;

  m.def("window_partition", cyclic_shift<swinops::window_partition>, py::kw_only(), "image"_a, "windows"_a, "batch"_a,
        "size"_a, "channels"_a, "window"_a, "shift"_a, "image_stride"_a, "windows_stride"_a, "element_size"_a,
        "stream"_a);
  m.def("window_merge", cyclic_shift<swinops::window_merge>, py::kw_only(), "windows"_a, "image"_a, "batch"_a, "size"_a,
        "channels"_a, "window"_a, "shift"_a, "image_stride"_a, "windows_stride"_a, "element_size"_a, "stream"_a);

  py::class_<swinops::AttentionShape>(m, "AttentionShape", py::module_local())
      .def(py::init(&attention_shape), py::kw_only(), "batch"_a, "size"_a, "heads"_a, "head_dim"_a, "window"_a,
           "shift"_a, "roll_pad"_a, "scale"_a, "mask_value"_a, "dtype"_a, "scale_dtype"_a, "bias_dtype"_a, "tf32"_a,
           "qkv_stride"_a, "dout_stride"_a, "grad_stride"_a, "multiprocessors"_a, "shared_bytes"_a);
  m.def("attention", attention);
  m.def("attention_workspace", attention_workspace);
  m.def("attention_backward", attention_backward);

  m.def("relative_position_bias", relative_position_bias);
  m.def("relative_position_bias_backward", relative_position_bias_backward);
  m.def("continuous_position_bias", continuous_position_bias);
  m.def("continuous_position_bias_workspace", continuous_position_bias_workspace);
  m.def("continuous_position_bias_backward", continuous_position_bias_backward);
}
