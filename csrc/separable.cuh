// A branch of an inference network in one launch, NHWC, with batch norm folded into P and bias:
//
//   y[p, n] = [y[p, n] +] bias[n] + sum_c P[c, n] f[p, c]
//
// with f = depthwise 3x3 of r(x), dilation and padding d, stride S, or f = r(x) where there is no
// window (Taps = 1); r = relu or the identity. The filtered map f never exists in memory.
//
// A block computes 64 pixels x Width outputs: 16 columns by a walk of 4 rows that lie a dilation
// apart, so that the window's inputs are shared down a walk. Chunk by chunk of kChunk channels the
// threads filter the pixels into shared memory and then multiply, thread (tx, ty) the 4 pixels of
// column ty by the outputs 4 tx + 32 j: each read of shared memory is 16 bytes wide, without bank
// conflicts, and feeds 8 to 16 multiply-adds.
#pragma once

#include "numeric.cuh"
#include "walks.cuh"

namespace lgcnet {

constexpr int kChunk = 32;
constexpr int kPixelColumns = 16;
constexpr int kPixelRows = 4;
constexpr int kOutputThreads = 8;  // beside each other in the outputs of a pixel
constexpr int kSeparableThreads = kPixelColumns * kOutputThreads;
constexpr int kPixelPitch = kChunk + 4;  // keeps neighbouring pixels in different banks

// Blocks that a multiprocessor holds, which is what bounds their registers.
template <int S, int Width>
constexpr int kSeparableBlocks = S == 2 && Width == 64 ? 3 : 4;

struct SeparableArguments {
  View x;                  // T (images, in_height, in_width, in_channels)
  View y;                  // T (images, out_height, out_width, out_channels)
  const float* depthwise;  // (3, 3, in_channels)
  const float* pointwise;  // (in_channels, out_channels): P
  const float* bias;       // (out_channels,)
  int in_channels;
  int out_channels;
  int in_height;
  int in_width;
  int out_height;
  int out_width;
  int dilation;
  int relu;
  int accumulate;  // add to what y holds
  int output_tiles;
};

// Where a block works.
struct PixelTile {
  int image;
  int column;  // the first
  int row;     // the first; the others are dilations apart
  int output;  // the first

  __device__ __forceinline__ PixelTile(const SeparableArguments& a, int width)
      : image(blockIdx.z / a.output_tiles),
        column(blockIdx.x * kPixelColumns),
        row(walk_start(blockIdx.y, kPixelRows, a.dilation, a.out_height)),
        output(blockIdx.z % a.output_tiles * width) {}
};

// f at the pixels of a walk down from (tile.row, ox), V channels from `channel` on; zeros where
// `active` is false.
template <typename T, int V, int S, int Taps>
__device__ __forceinline__ void filter_walk(const SeparableArguments& a, const PixelTile& tile,
                                            int ox, int channel, bool active,
                                            float (&sum)[kPixelRows][V]) {
  const float bound = relu_bound(a.relu);
  if constexpr (Taps == 1) {
#pragma unroll
    for (int t = 0; t < kPixelRows; ++t) {
      const int iy = S * (tile.row + t * a.dilation);
      const T* from = pixel_row<const T>(a.x, tile.image, iy) + S * ox * a.x.pixel_stride;
      load_at_least<T, V>(from + channel, active && iy < a.in_height, bound, sum[t]);
    }
  } else {
    const int d = a.dilation;
    // A column of the window at a time, to leave registers to the product.
#pragma unroll 1
    for (int kx = 0; kx < 3; ++kx) {
      const int ix = S * ox + (kx - 1) * d;
      const bool column_inside =
          active && static_cast<unsigned>(ix) < static_cast<unsigned>(a.in_width);
      float w[3][V];
#pragma unroll
      for (int ky = 0; ky < 3; ++ky) {
        load<float, V>(a.depthwise + (3 * ky + kx) * a.in_channels + channel, active, w[ky]);
      }
#pragma unroll
      for (int j = 0; j < S * (kPixelRows - 1) + 3; ++j) {
        const int iy = S * tile.row + (j - 1) * d;
        const bool inside =
            column_inside && static_cast<unsigned>(iy) < static_cast<unsigned>(a.in_height);
        const T* from = pixel_row<const T>(a.x, tile.image, iy) + ix * a.x.pixel_stride;
        float in[V];
        load_at_least<T, V>(from + channel, inside, bound, in);
#pragma unroll
        for (int t = 0; t < kPixelRows; ++t) {
          const int ky = j - S * t;
          if (ky < 0 || ky > 2) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sum[t][v] = fmaf(w[ky][v], in[v], sum[t][v]);
        }
      }
    }
  }
}

// Grid: x column tiles, y row walks, z images x output tiles. Block: (kOutputThreads, columns).
template <typename T, int V, int S, int Taps, int Width>
__global__ void __launch_bounds__(kSeparableThreads, kSeparableBlocks<S, Width>)
    separable(const SeparableArguments a) {
  constexpr int kOutputs = Width / kOutputThreads;  // of a thread
  constexpr int kVectors = kChunk / V;
  __shared__ __align__(16) float filtered[kPixelRows * kPixelColumns][kPixelPitch];
  __shared__ __align__(16) float weight[kChunk][Width];
  const int thread = threadIdx.y * kOutputThreads + threadIdx.x;
  const PixelTile tile(a, Width);
  if (tile.row >= a.out_height) return;

  float sum[kPixelRows][kOutputs] = {};
  for (int first = 0; first < a.in_channels; first += kChunk) {
    for (int item = thread; item < kChunk * Width; item += kSeparableThreads) {
      const int channel = first + item / Width;
      const int output = tile.output + item % Width;
      const bool inside = channel < a.in_channels && output < a.out_channels;
      const float* from = a.pointwise + static_cast<long long>(channel) * a.out_channels + output;
      weight[item / Width][item % Width] = inside ? __ldg(from) : 0.0f;
    }
    for (int item = thread; item < kPixelColumns * kVectors; item += kSeparableThreads) {
      const int vector = item % kVectors;
      const int column = item / kVectors;
      const int channel = first + vector * V;
      const bool active = channel < a.in_channels && tile.column + column < a.out_width;
      float value[kPixelRows][V] = {};
      filter_walk<T, V, S, Taps>(a, tile, tile.column + column, channel, active, value);
#pragma unroll
      for (int t = 0; t < kPixelRows; ++t) {
        store<float, V>(&filtered[t * kPixelColumns + column][vector * V], value[t]);
      }
    }
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < kChunk; k += 4) {
      float pixel[kPixelRows][4];
#pragma unroll
      for (int t = 0; t < kPixelRows; ++t) {
        load<float, 4, false>(&filtered[t * kPixelColumns + threadIdx.y][k], true, pixel[t]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kOutputs / 4; ++j) {
          float p[4];
          load<float, 4, false>(&weight[k + i][4 * (threadIdx.x + kOutputThreads * j)], true, p);
#pragma unroll
          for (int t = 0; t < kPixelRows; ++t) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              sum[t][4 * j + n] = fmaf(pixel[t][i], p[n], sum[t][4 * j + n]);
            }
          }
        }
      }
    }
    __syncthreads();
  }

  const int ox = tile.column + threadIdx.y;
  if (ox >= a.out_width) return;
#pragma unroll
  for (int t = 0; t < kPixelRows; ++t) {
    const int oy = tile.row + t * a.dilation;
    if (oy >= a.out_height) return;
    T* pixel = pixel_row<T>(a.y, tile.image, oy) + ox * a.y.pixel_stride;
#pragma unroll
    for (int n = 0; n < kOutputs; n += V) {
      const int output = tile.output + 4 * (threadIdx.x + kOutputThreads * (n / 4)) + n % 4;
      if (output >= a.out_channels) continue;
      float out[V], bias[V], before[V];
      load<float, V>(a.bias + output, true, bias);
      load<T, V, false>(pixel + output, a.accumulate, before);
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = sum[t][n + v] + bias[v] + before[v];
      store<T, V>(pixel + output, out);
    }
  }
}

}  // namespace lgcnet
