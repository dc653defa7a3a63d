// Final upsampling fused with the cross entropy, of all valid pixels or of the hard ones (OHEM).
//
// With z the logits at full resolution and y the labels, over the counted pixels p of weight v_p:
//
//   loss = sum_p v_p l_p / V,   l_p = log sum_c exp z_pc - z_p,y_p,   V = sum_p v_p
//   dloss / dz_pc = v_p (softmax(z_p)_c - [c = y_p]) / V
//
// A thread computes the softmax of a pixel; then the threads turn to pairs of (cell, class) and sum
// the gradient of the cell's pixels into its four corners. V is a factor of the whole gradient, so
// loss and gradient come from one pass, the corner sums still to be divided by V. The lower corners
// of a cell are the upper ones of the next: a block that walks down a band of rows of cells stores
// two sums, left and right, a low-resolution row, which the backward adds up. No atomics.
#pragma once

#include "upsample_cells.cuh"

namespace lgcnet {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kCornerPairs = kCells * kMaxClasses / kCellThreads;  // (cell, class) of a thread

// Integers of 1, 2, 4 or 8 bytes; negative `bytes`: signed.
struct Labels {
  const void* data;  // (images, target_height, target_width)
  int bytes;

  __device__ __forceinline__ int at(long long i) const {
    switch (bytes) {
      case 1: return static_cast<const unsigned char*>(data)[i];
      case -1: return static_cast<const signed char*>(data)[i];
      case -2: return static_cast<const short*>(data)[i];
      case -4: return static_cast<const int*>(data)[i];
      default: return static_cast<int>(static_cast<const long long*>(data)[i]);
    }
  }
};

struct UpsampleLossArguments {
  LogitsArguments logits;
  Labels labels;
  const float* weight;   // (classes,), or null: 1
  const float* hardest;  // the loss from which on a pixel is hard; null: all valid pixels count
  float* losses;         // (images, target_height, target_width), -1 where ignored
  float* corners;        // (images, bands, rows + 1, 2, source_width, classes), or null
  float* sums;           // (2, blocks): sums of v l and of v
  int ignore_index;
  float easy;  // hard are also the losses above
};

struct LossMeanArguments {
  const float* sums;  // (2, count)
  float* loss;
  float* mass;  // V
  int count;
};

struct LogitsGradientArguments {
  const float* corners;
  const float* mass;
  const float* grad_loss;
  View gradient;  // T (images, height, width, classes)
  int classes;
  int height;
  int width;
  int rows;
};

struct Softmax {
  float top;    // the largest logit
  float total;  // sum of exp(z - top)
  float loss;   // NaN where the label is no class

  __device__ __forceinline__ Softmax(const LogitsRow& logits, int classes, int cell, float g,
                                     int label) {
    top = minus_infinity();
    for (int c = 0; c < classes; ++c) top = fmaxf(top, logits.at(c, cell, g));
    total = 0.0f;
    for (int c = 0; c < classes; ++c) {
      total += exp2f(fmaf(logits.at(c, cell, g), kLog2E, -top * kLog2E));
    }
    const bool is_class = static_cast<unsigned>(label) < static_cast<unsigned>(classes);
    const float truth = is_class ? logits.at(label, cell, g) : bits_to_float(0x7fc00000u);
    loss = top + logf(total) - truth;
    // Rounding may leave it below 0, which stands for an ignored pixel.
    loss = loss < 0.0f ? 0.0f : loss;
  }
};

__device__ __forceinline__ long long first_of_row(const LogitsArguments& a, int row) {
  return (static_cast<long long>(blockIdx.z) * a.target_height + row) * a.target_width;
}

// The loss of every pixel, -1 where it is ignored.
template <typename T>
__global__ void __launch_bounds__(kCellThreads) upsample_losses(const UpsampleLossArguments a) {
  __shared__ LogitsRow logits;
  const CellBlock block(a.logits);
  const int end_row = block.rows.first_from(block.end_row);
  const int end_pixel = block.end_pixel();
  for (int row = block.rows.first_from(block.first_row); row < end_row; ++row) {
    logits.interpolate<T>(a.logits, block, row);
    __syncthreads();
    const long long start = first_of_row(a.logits, row);
    for (int pixel = block.first_pixel() + threadIdx.x; pixel < end_pixel;
         pixel += kCellThreads) {
      float g;
      const int cell = block.columns.before(pixel, g) - block.first_cell;
      const int label = a.labels.at(start + pixel);
      const Softmax softmax(logits, a.logits.classes, cell, g, label);
      a.losses[start + pixel] = label == a.ignore_index ? -1.0f : softmax.loss;
    }
    __syncthreads();
  }
}

// What the gradient needs of kCellThreads pixels of a row.
struct PixelChunk {
  float top[kCellThreads];    // times log2 e
  float scale[kCellThreads];  // v / total
  float v[kCellThreads];
  float g[kCellThreads];
  int label[kCellThreads];
};

// The weight of a pixel, 0 where it does not count; NaN with the loss.
__device__ __forceinline__ float pixel_weight(const UpsampleLossArguments& a, int label,
                                              float loss, long long place) {
  if (label == a.ignore_index) return 0.0f;
  if (a.hardest) {
    const float known = a.losses[place];
    if (!(known >= *a.hardest) && known <= a.easy) return 0.0f;  // a NaN counts
  }
  if (loss != loss) return loss;
  return a.weight ? a.weight[label] : 1.0f;
}

__device__ __forceinline__ float sum_of_block(float value, float (&shared)[kCellThreads]) {
  __syncthreads();
  shared[threadIdx.x] = value;
  for (int half = kCellThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[0];  // of use to thread 0
}

// Level and moment of the gradient of a class over the pixels of a cell that a chunk holds: its sums
// with weights 1 and g.
__device__ __forceinline__ void sum_cell(const PixelChunk& chunk, const LogitsRow& logits, int c,
                                         int cell, int first, int end, float& level,
                                         float& moment) {
  const float left = logits.left(c, cell);
  const float slope = logits.slope(c, cell);
  for (int p = first; p < end; ++p) {
    const float v = chunk.v[p];
    if (v == 0.0f) continue;
    const float g = chunk.g[p];
    const float exponential = exp2f(fmaf(fmaf(g, slope, left), kLog2E, -chunk.top[p]));
    const float gradient = chunk.scale[p] * exponential - (chunk.label[p] == c ? v : 0.0f);
    level += gradient;
    moment = fmaf(g, gradient, moment);
  }
}

// Sums of v l and of v over the block's pixels, and the corner sums of the gradient where they are
// asked for: for the low-resolution rows around and inside the band, what the cells right of a
// column (0) and left of it, under their own column (1), give to it.
template <typename T>
__global__ void __launch_bounds__(kCellThreads, 2) upsample_loss_sums(const UpsampleLossArguments a) {
  __shared__ LogitsRow logits;
  __shared__ PixelChunk chunk;
  __shared__ int pixel_from[kCells + 1];
  __shared__ float shared[kCellThreads];
  const int thread = threadIdx.x;
  const CellBlock block(a.logits);
  const int classes = a.logits.classes;
  for (int cell = thread; cell <= block.cells; cell += kCellThreads) {
    pixel_from[cell] = block.columns.first_from(block.first_cell + cell);
  }
  const int end_pixel = block.end_pixel();
  const long long row_values = static_cast<long long>(a.logits.source_width) * classes;
  const long long slot = (static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y) *
                         (a.logits.rows + 1);
  float* corners = a.corners + slot * 2 * row_values + block.first_cell * classes;

  float loss_sum = 0.0f;
  float mass = 0.0f;
  float upper[kCornerPairs][2] = {};  // left, right
  for (int i = block.first_row; i < block.end_row; ++i) {
    float lower[kCornerPairs][2] = {};
    const int end_row = block.rows.first_from(i + 1);
    for (int row = block.rows.first_from(i); row < end_row; ++row) {
      logits.interpolate<T>(a.logits, block, row);
      __syncthreads();
      float f;
      block.rows.before(row, f);
      for (int start = block.first_pixel(); start < end_pixel; start += kCellThreads) {
        const int pixel = start + thread;
        chunk.v[thread] = 0.0f;
        if (pixel < end_pixel) {
          float g;
          const int cell = block.columns.before(pixel, g) - block.first_cell;
          const long long place = first_of_row(a.logits, row) + pixel;
          const int label = a.labels.at(place);
          const Softmax softmax(logits, classes, cell, g, label);
          const float v = pixel_weight(a, label, softmax.loss, place);
          if (v != 0.0f) loss_sum = fmaf(v, softmax.loss, loss_sum);
          mass += v;
          chunk.top[thread] = softmax.top * kLog2E;
          chunk.scale[thread] = v / softmax.total;
          chunk.v[thread] = v;
          chunk.g[thread] = g;
          chunk.label[thread] = label;
        }
        __syncthreads();
        if (a.corners) {
          ClassItem pair(classes);
#pragma unroll
          for (int q = 0; q < kCornerPairs; ++q, pair.next()) {
            if (pair.cell >= block.cells) break;
            const int first = pixel_from[pair.cell] - start;
            const int end = pixel_from[pair.cell + 1] - start;
            float level = 0.0f;
            float moment = 0.0f;
            sum_cell(chunk, logits, pair.c, pair.cell, first > 0 ? first : 0,
                     CellBlock::minimum(end, kCellThreads), level, moment);
            upper[q][0] = fmaf(1.0f - f, level - moment, upper[q][0]);
            upper[q][1] = fmaf(1.0f - f, moment, upper[q][1]);
            lower[q][0] = fmaf(f, level - moment, lower[q][0]);
            lower[q][1] = fmaf(f, moment, lower[q][1]);
          }
        }
        __syncthreads();
      }
    }
    if (a.corners) {
#pragma unroll
      for (int q = 0; q < kCornerPairs; ++q) {
        const int item = thread + q * kCellThreads;
        if (item >= block.cells * classes) break;
        corners[item] = upper[q][0];
        corners[row_values + item] = upper[q][1];
        if (i + 1 == block.end_row) {
          corners[2 * row_values + item] = lower[q][0];
          corners[3 * row_values + item] = lower[q][1];
        }
      }
      corners += 2 * row_values;
    }
#pragma unroll
    for (int q = 0; q < kCornerPairs; ++q) {
      upper[q][0] = lower[q][0];
      upper[q][1] = lower[q][1];
    }
  }

  const int blocks = gridDim.x * gridDim.y * gridDim.z;
  const int number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  loss_sum = sum_of_block(loss_sum, shared);
  if (thread == 0) a.sums[number] = loss_sum;
  mass = sum_of_block(mass, shared);
  if (thread == 0) a.sums[blocks + number] = mass;
}

// Loss and V from the sums of the blocks; one block.
template <int Threads>
__global__ void __launch_bounds__(Threads) upsample_loss_mean(const LossMeanArguments a) {
  __shared__ float shared[2][Threads];
  const int thread = threadIdx.x;
  float loss = 0.0f;
  float mass = 0.0f;
  for (int i = thread; i < a.count; i += Threads) {
    loss += a.sums[i];
    mass += a.sums[a.count + i];
  }
  shared[0][thread] = loss;
  shared[1][thread] = mass;
  for (int half = Threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    shared[0][thread] += shared[0][thread + half];
    shared[1][thread] += shared[1][thread + half];
  }
  if (thread > 0) return;
  // Without any counted pixel the loss is 0, as the sum over them is.
  *a.loss = shared[0][0] / (shared[1][0] == 0.0f ? 1.0f : shared[1][0]);
  *a.mass = shared[1][0];
}

// gradient = grad_loss / V times the sum of the corners. Block: values of a row of logits. Grid: x
// their tiles, y rows, z images.
template <typename T>
__global__ void __launch_bounds__(256) logits_gradient(const LogitsGradientArguments a) {
  const int item = blockIdx.x * blockDim.x + threadIdx.x;
  const int row_values = a.width * a.classes;
  if (item >= row_values) return;
  const int i = blockIdx.y;
  const int column = item / a.classes;
  const long long bands = (a.height + a.rows - 1) / a.rows;
  const int band = i / a.rows;
  const long long row = (blockIdx.z * bands + band) * (a.rows + 1) + i % a.rows;
  // The first row of a band is also below the last cells of the band above.
  const int shares = i % a.rows == 0 && band > 0 ? 2 : 1;
  float total[1] = {};
  for (int share = 0; share < shares; ++share) {
    const float* corners = a.corners + (row - share) * 2 * row_values + item;
    total[0] += corners[0];
    if (column > 0) total[0] += corners[row_values - a.classes];
  }
  const float mass = *a.mass;
  total[0] *= *a.grad_loss / (mass == 0.0f ? 1.0f : mass);
  store<T, 1>(pixel_row<T>(a.gradient, blockIdx.z, i) + column * a.gradient.pixel_stride +
                  item % a.classes,
              total);
}

}  // namespace lgcnet
