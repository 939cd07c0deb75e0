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
  const cudaError_t error = launcher(reinterpret_cast<const void*>(src), reinterpret_cast<void*>(dst), shape,
                                     element_size, reinterpret_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
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
}
