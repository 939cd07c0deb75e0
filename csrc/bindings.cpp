// The extension module swinops._C: integers to pointers, error codes to exceptions. The only file that knows Python.
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  m.attr("archs") = SWINOPS_ARCHS;

  m.def("window_partition", cyclic_shift<swinops::window_partition>, py::kw_only(), "image"_a, "windows"_a, "batch"_a,
        "size"_a, "channels"_a, "window"_a, "shift"_a, "image_stride"_a, "windows_stride"_a, "element_size"_a,
        "stream"_a);
  m.def("window_merge", cyclic_shift<swinops::window_merge>, py::kw_only(), "windows"_a, "image"_a, "batch"_a, "size"_a,
        "channels"_a, "window"_a, "shift"_a, "image_stride"_a, "windows_stride"_a, "element_size"_a, "stream"_a);

  m.def("relative_position_bias", relative_position_bias);
  m.def("relative_position_bias_backward", relative_position_bias_backward);
  m.def("continuous_position_bias", continuous_position_bias);
  m.def("continuous_position_bias_workspace", continuous_position_bias_workspace);
  m.def("continuous_position_bias_backward", continuous_position_bias_backward);
}
