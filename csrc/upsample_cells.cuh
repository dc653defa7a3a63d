// Final upsampling a cell at a time: what the loss and the argmax of a segmenter share.
//
// Four neighbouring low-resolution logits enclose a cell, and every full-resolution pixel lies in
// one cell. A block owns kCells neighbouring columns of cells and walks down output rows: it
// interpolates the logits of a row once, into shared memory, from where a pixel `g` across its cell
// takes left + g (right - left), so that full-resolution logits never exist in memory. The number
// of classes is no template parameter, since every loop over classes reads shared memory.
#pragma once

#include "bilinear.cuh"
#include "numeric.cuh"

namespace lgcnet {

constexpr int kMaxClasses = 32;
constexpr int kCells = 32;
constexpr int kCellThreads = 128;

struct LogitsArguments {
  View logits;  // T (images, source_height, source_width, classes)
  int classes;
  int source_height;
  int source_width;
  int target_height;
  int target_width;
  int rows;  // of cells in a band
};

// The block's part of the image. Grid: x blocks of cells, y bands, z images.
struct CellBlock {
  Axis columns;
  Axis rows;
  int classes;
  int first_cell;
  int cells;  // of this block
  int first_row;
  int end_row;  // of cells

  __device__ __forceinline__ explicit CellBlock(const LogitsArguments& a)
      : columns{a.source_width, a.target_width},
        rows{a.source_height, a.target_height},
        classes(a.classes),
        first_cell(blockIdx.x * kCells),
        cells(minimum(kCells, a.source_width - first_cell)),
        first_row(blockIdx.y * a.rows),
        end_row(minimum(first_row + a.rows, a.source_height)) {}

  static __device__ __forceinline__ int minimum(int a, int b) { return a < b ? a : b; }
  __device__ __forceinline__ int first_pixel() const { return columns.first_from(first_cell); }
  __device__ __forceinline__ int end_pixel() const {
    return columns.first_from(first_cell + cells);
  }
};

// Calls of next() take a thread through items t, t + kCellThreads ... of (cells, classes), the
// classes of a cell being neighbours.
struct ClassItem {
  int classes;
  int cell;
  int c;

  __device__ __forceinline__ explicit ClassItem(int of_classes)
      : classes(of_classes), cell(threadIdx.x / of_classes), c(threadIdx.x % of_classes) {}
  __device__ __forceinline__ void next() {
    cell += kCellThreads / classes;
    c += kCellThreads % classes;
    if (c >= classes) {
      c -= classes;
      ++cell;
    }
  }
};

// One output row of a block's logits.
struct LogitsRow {
  float value[kMaxClasses][kCells + 1];  // at the left ends of the cells
  int known;                             // columns

  template <typename T>
  __device__ __forceinline__ void interpolate(const LogitsArguments& a, const CellBlock& block,
                                              int row) {
    float f;
    const int i = block.rows.before(row, f);
    const int below = CellBlock::minimum(i + 1, a.source_height - 1);
    const long long start = block.first_cell * a.logits.pixel_stride;
    const T* upper = pixel_row<const T>(a.logits, blockIdx.z, i) + start;
    const T* lower = pixel_row<const T>(a.logits, blockIdx.z, below) + start;
    const int columns = CellBlock::minimum(block.cells + 1, a.source_width - block.first_cell);
    for (ClassItem item(a.classes); item.cell < columns; item.next()) {
      const long long place = item.cell * a.logits.pixel_stride + item.c;
      float from[1], to[1];
      load<T, 1>(upper + place, true, from);
      load<T, 1>(lower + place, true, to);
      value[item.c][item.cell] = from[0] + f * (to[0] - from[0]);
    }
    if (threadIdx.x == 0) known = columns;
  }

  __device__ __forceinline__ float left(int c, int cell) const { return value[c][cell]; }
  // The rise across a cell; nothing lies right of the last cell's left end.
  __device__ __forceinline__ float slope(int c, int cell) const {
    return value[c][cell + 1 < known ? cell + 1 : cell] - value[c][cell];
  }
  __device__ __forceinline__ float at(int c, int cell, float g) const {
    return fmaf(g, slope(c, cell), left(c, cell));
  }
};

struct ArgmaxArguments {
  LogitsArguments logits;
  unsigned char* labels;  // (images, target_height, target_width)
};

// The lowest class of the largest logit of every pixel.
template <typename T>
__global__ void __launch_bounds__(kCellThreads) upsample_argmax(const ArgmaxArguments a) {
  __shared__ LogitsRow logits;
  const CellBlock block(a.logits);
  const int end_row = block.rows.first_from(block.end_row);
  const int end_pixel = block.end_pixel();
  for (int row = block.rows.first_from(block.first_row); row < end_row; ++row) {
    logits.interpolate<T>(a.logits, block, row);
    __syncthreads();
    unsigned char* labels =
        a.labels + (static_cast<long long>(blockIdx.z) * a.logits.target_height + row) *
                       a.logits.target_width;
    for (int pixel = block.first_pixel() + threadIdx.x; pixel < end_pixel;
         pixel += kCellThreads) {
      float g;
      const int cell = block.columns.before(pixel, g) - block.first_cell;
      float best = logits.at(0, cell, g);
      int label = 0;
      for (int c = 1; c < a.logits.classes; ++c) {
        const float value = logits.at(c, cell, g);
        label = value > best ? c : label;
        best = value > best ? value : best;
      }
      labels[pixel] = static_cast<unsigned char>(label);
    }
    __syncthreads();
  }
}

}  // namespace lgcnet
