// What the kernels share that take a window of an image, of at most 64 tokens, as one tile.
//
// A block keeps one head and loops over windows: the next one is copied to shared memory while this one computes.
// Offsets within an image are of 32 bits.
#pragma once

#include "attention.cuh"

namespace swinops {

// The two rows of a window that a lane copies and writes, `row` and 8 further: a chunk of 16 bytes of each.
template <class T, bool kPadded>
struct LaneRows {
  using Rows = Tile<T, 32>;
  const Geometry& geometry;
  int shifted[2][3];  // places in a window, plus the shift
  bool exists[2], has_channel;

  __device__ LaneRows(const Geometry& geometry, int row)
      : geometry(geometry),
        exists{row < geometry.tokens, row + 8 < geometry.tokens},
        has_channel(int(threadIdx.x % 4) * Rows::kElements < geometry.head_dim) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      geometry.locate<1>(row + 8 * i, shifted[i]);
#pragma unroll
      for (int axis = 1; axis < 3; ++axis) shifted[i][axis] = keep(unsigned(shifted[i][axis] + geometry.shift[axis]));
    }
  }

  // By axis, a bit for each of this lane's pairs that the seam parts: bit 4j + i is element i of tile j.
  template <int kKeyTiles>
  __device__ void parted(int row, uint32_t (&apart)[2]) const {
    int side[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int local[3];
      geometry.locate<1>(row + 8 * i, local);
      side[i] = geometry.far_side(local);
    }
    apart[0] = apart[1] = 0;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int key[3];
        geometry.locate<1>(8 * j + int(threadIdx.x % 4) * 2 + i % 2, key);
        const int parts = side[i / 2] ^ geometry.far_side(key);
        apart[0] |= uint32_t(parts >> 1 & 1) << (4 * j + i);
        apart[1] |= uint32_t(parts >> 2 & 1) << (4 * j + i);
      }
    }
  }

  struct Window {
    unsigned image;
    uint32_t masked;              // of this lane's pairs
    unsigned line[2], column[2];  // of its rows in the image
    bool inside[2];               // rows are no pads
  };

  __device__ Window find(int window, const uint32_t (&apart)[2]) const {
    Window found;
    int place[3];
    found.image = geometry.find<1>(window, place);
    const int cut = geometry.cut(place);
    found.masked = (cut & 2 ? apart[0] : 0) | (cut & 4 ? apart[1] : 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int at[3];
      found.inside[i] = geometry.find_shifted<1>(place, shifted[i], at) || !kPadded;
      found.line[i] = at[1];
      found.column[i] = at[2];
    }
    return found;
  }
};

}  // namespace swinops
