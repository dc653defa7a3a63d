// Depthwise 3x3 convolution, NHWC, dilation d, padding d, stride S, an optional ReLU on its input.
//
//   y[oy, ox, c] = sum_{ky, kx} w[ky, kx, c] r[S oy + (ky - 1) d, S ox + (kx - 1) d, c]
//
// with r = relu(x), or x, and zero outside the image. A thread owns V neighbouring channels and
// walks over outputs that lie d apart, because those share inputs: R rows by C columns of outputs
// need (S (R - 1) + 3) (S (C - 1) + 3) loads instead of 9 R C. Walks of different phases interleave,
// so that neighbouring threads touch neighbouring pixels whatever d is.
//
// A launch serves several branches, convolutions of one x by windows of their own and dilations of
// their own, so that small maps take one launch instead of many short ones.
//
// Blocks are (channel vectors, columns). No atomics: the weight gradient is summed over a thread's
// own outputs, over the columns of its block in shared memory, and over blocks by sum_partials of
// sums.cuh.
#pragma once

#include "numeric.cuh"
#include "walks.cuh"

namespace lgcnet {

// The most threads that a block may have: 16 bytes of channels a thread take more registers.
template <typename T, int V>
constexpr int kForwardThreads = V * sizeof(T) > 8 ? 256 : 512;
constexpr int kBackwardThreads = 256;
constexpr int kBranchesALaunch = 16;

struct DepthwiseForwardArguments {
  View x;                                 // T (images, in_height, in_width, channels)
  View y;                                 // T (images, out_height, out_width, channels) of a branch
  void* ys[kBranchesALaunch];             // where the y of each branch is
  const float* weight[kBranchesALaunch];  // (3, 3, channels)
  int dilation[kBranchesALaunch];
  int images;
  int channels;
  int in_height;
  int in_width;
  int out_height;
  int out_width;
  int relu;
  int channel_tiles;
};

struct DepthwiseBackwardArguments {
  View x;                                 // T (images, in_height, in_width, channels)
  View dy;                                // T (images, out_height, out_width, channels) of a branch
  View dx;                                // T, as x
  void* dys[kBranchesALaunch];            // where the dy of each branch is
  void* dxs[kBranchesALaunch];            // and where the gradient of x that comes from it goes
  const float* weight[kBranchesALaunch];  // (3, 3, channels)
  float* partial;                         // (branches, gridDim.y, gridDim.x, 3, 3, channels)
  int dilation[kBranchesALaunch];
  int row_groups[kBranchesALaunch];
  int images;
  int channels;
  int in_height;
  int in_width;
  int out_height;
  int out_width;
  int relu;
  int accumulate;  // add to what the dxs hold
  int channel_tiles;
};

// A branch's map of several that lie alike.
__device__ __forceinline__ View view_at(const View& like, void* data) {
  View view = like;
  view.data = data;
  return view;
}

template <int V>
__device__ __forceinline__ void load_weights(const float* weight, int channels, int channel,
                                             bool valid, float (&w)[9][V]) {
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    load<float, V>(weight + static_cast<long long>(k) * channels + channel, valid, w[k]);
  }
}

// Grid: x column tiles, y row walks, z branches x images x channel tiles; walks that a branch has
// not are idle.
template <typename T, int V, int S, int Columns, int Rows>
__global__ void __launch_bounds__(kForwardThreads<T, V>)
    depthwise_forward(const DepthwiseForwardArguments a) {
  constexpr int kInColumns = S * (Columns - 1) + 3;
  constexpr int kInRows = S * (Rows - 1) + 3;
  const int map = blockIdx.z / a.channel_tiles;
  const int branch = map / a.images;
  const int image = map - branch * a.images;
  const int d = a.dilation[branch];
  const int channel = (blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int ox = walk_start(blockIdx.x * blockDim.y + threadIdx.y, Columns, d, a.out_width);
  const int oy = walk_start(blockIdx.y, Rows, d, a.out_height);
  if (channel >= a.channels || ox >= a.out_width || oy >= a.out_height) return;

  float w[9][V];
  load_weights(a.weight[branch], a.channels, channel, true, w);
  const T* x = pixel_row<const T>(a.x, image, 0) + channel;
  T* y = static_cast<T*>(a.ys[branch]) + image * a.y.image_stride + channel;
  const float bound = relu_bound(a.relu);
  const int x_pixel = static_cast<int>(a.x.pixel_stride);
  const int y_pixel = static_cast<int>(a.y.pixel_stride);

  float sum[Rows][Columns][V] = {};
#pragma unroll
  for (int j = 0; j < kInRows; ++j) {
    const int iy = S * oy + (j - 1) * d;
    const bool row_inside = static_cast<unsigned>(iy) < static_cast<unsigned>(a.in_height);
    const T* row = x + iy * a.x.row_stride;
    float in[kInColumns][V];
#pragma unroll
    for (int i = 0; i < kInColumns; ++i) {
      const int ix = S * ox + (i - 1) * d;
      const bool inside =
          row_inside && static_cast<unsigned>(ix) < static_cast<unsigned>(a.in_width);
      load_at_least<T, V>(row + ix * x_pixel, inside, bound, in[i]);
    }
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      const int ky = j - S * t;  // compile-time after unrolling, as every branch on it
      if (ky < 0 || ky > 2) continue;
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sum[t][i][v] = fmaf(w[3 * ky + kx][v], in[S * i + kx][v], sum[t][i][v]);
          }
        }
      }
      if (ky < 2 || oy + t * d >= a.out_height) continue;
      T* out = y + (oy + t * d) * a.y.row_stride;
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        if (ox + i * d < a.out_width) store<T, V>(out + (ox + i * d) * y_pixel, sum[t][i]);
      }
    }
  }
}

// Sums the weight gradients of the block's columns and writes them to its place in `partial`; one
// row of the window at a time, which needs a third of the shared memory.
template <int V>
__device__ __forceinline__ void write_partial(const DepthwiseBackwardArguments& a,
                                              const float (&dw)[9][V]) {
  __shared__ float shared[3 * V][kBackwardThreads];
  const int across = blockDim.x;
  const int threads = across * blockDim.y;
  const int thread = threadIdx.y * across + threadIdx.x;
  const long long branch = blockIdx.z / a.channel_tiles;
  const long long block = (branch * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
#pragma unroll
  for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
    for (int i = 0; i < 3 * V; ++i) shared[i][thread] = dw[3 * ky + i / V][i % V];
    __syncthreads();
    float* partial = a.partial + (block * 9 + 3 * ky) * a.channels;
    for (int item = thread; item < 3 * V * across; item += threads) {
      const int value = item / across;
      const int vector = item % across;
      const int channel = (blockIdx.z % a.channel_tiles * across + vector) * V + value % V;
      if (channel >= a.channels) continue;
      float total = 0.0f;
      for (int first = vector; first < threads; first += across) total += shared[value][first];
      partial[value / V * a.channels + channel] = total;
    }
    __syncthreads();
  }
}

// The gradient of r, where x was above 0, as that of x.
template <typename T, int V>
__device__ __forceinline__ void store_gradient(const DepthwiseBackwardArguments& a, T* to,
                                               const float (&r)[V], const float (&gradient)[V]) {
  float out[V];
  load<T, V, false>(to, a.accumulate, out);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] += a.relu && r[v] <= 0.0f ? 0.0f : gradient[v];
  store<T, V>(to, out);
}

// Both gradients at stride 1 in one pass, at input positions p, from the same nine dy:
//
//   dx[p] = [x[p] > 0] sum_k w[k] dy[p - (k - 1) d]       dw[k] = sum_p r[p] dy[p - (k - 1) d]
//
// Grid: x column tiles, y workers that take (image, row walk) pairs in turn, z branches x channel
// tiles.
template <typename T, int V, int Columns, int Rows>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    depthwise_backward(const DepthwiseBackwardArguments a) {
  const int branch = blockIdx.z / a.channel_tiles;
  const int d = a.dilation[branch];
  const int channel = (blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int ix = walk_start(blockIdx.x * blockDim.y + threadIdx.y, Columns, d, a.in_width);
  const bool active = channel < a.channels && ix < a.in_width;

  float w[9][V];
  load_weights(a.weight[branch], a.channels, channel, active, w);
  float dw[9][V] = {};
  const float bound = relu_bound(a.relu);
  const int x_pixel = static_cast<int>(a.x.pixel_stride);
  const int dy_pixel = static_cast<int>(a.dy.pixel_stride);
  const int dx_pixel = static_cast<int>(a.dx.pixel_stride);
  const View dy = view_at(a.dy, a.dys[branch]);
  const View dx = view_at(a.dx, a.dxs[branch]);
  const int row_groups = a.row_groups[branch];
  const int units = active ? a.images * row_groups : 0;

  for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
    const int image = unit / row_groups;
    const int iy = walk_start(unit % row_groups, Rows, d, a.in_height);
    if (iy >= a.in_height) continue;
    float r[Rows][Columns][V];
    float sum[Rows][Columns][V] = {};
#pragma unroll
    for (int j = 0; j < Rows + 2; ++j) {  // dy row j feeds the inputs of rows j - 2, j - 1 and j
      if (j < Rows) {
        const bool row_inside = iy + j * d < a.in_height;
        const T* row = pixel_row<const T>(a.x, image, iy + j * d) + channel;
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
          const bool inside = row_inside && ix + i * d < a.in_width;
          load_at_least<T, V>(row + (ix + i * d) * x_pixel, inside, bound, r[j][i]);
        }
      }
      const int oy = iy + (j - 1) * d;
      const bool row_inside = static_cast<unsigned>(oy) < static_cast<unsigned>(a.out_height);
      const T* row = pixel_row<const T>(dy, image, oy) + channel;
      float g[Columns + 2][V];
#pragma unroll
      for (int i = 0; i < Columns + 2; ++i) {
        const int ox = ix + (i - 1) * d;
        const bool inside =
            row_inside && static_cast<unsigned>(ox) < static_cast<unsigned>(a.out_width);
        load<T, V>(row + ox * dy_pixel, inside, g[i]);
      }
#pragma unroll
      for (int t = 0; t < Rows; ++t) {
        const int ky = 2 - (j - t);
        if (ky < 0 || ky > 2) continue;
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
#pragma unroll
          for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float gradient = g[i + 2 - kx][v];
              sum[t][i][v] = fmaf(w[3 * ky + kx][v], gradient, sum[t][i][v]);
              dw[3 * ky + kx][v] = fmaf(r[t][i][v], gradient, dw[3 * ky + kx][v]);
            }
          }
        }
        if (ky > 0 || iy + t * d >= a.in_height) continue;
        T* out = pixel_row<T>(dx, image, iy + t * d) + channel;
#pragma unroll
        for (int i = 0; i < Columns; ++i) {
          if (ix + i * d >= a.in_width) continue;
          store_gradient<T, V>(a, out + (ix + i * d) * dx_pixel, r[t][i], sum[t][i]);
        }
      }
    }
  }
  write_partial<V>(a, dw);
}

// Both gradients at stride 2 and odd dilation. A thread owns 2 x 2 inputs. Tap k = 1 of an axis ties
// the even one to output q, taps 0 and 2 tie the odd one to outputs q + (d + 1)/2 and
// q - (d - 1)/2: nine taps, each with one input of the square. (Even dilations: every tap ties even
// inputs, which is depthwise_backward with d/2 on every second pixel.)
//
// Grid as depthwise_backward, with one column and one row of squares a walk.
template <typename T, int V>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    depthwise_backward_stride2(const DepthwiseBackwardArguments a) {
  const int branch = blockIdx.z / a.channel_tiles;
  const int d = a.dilation[branch];
  const int channel = (blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int qx = blockIdx.x * blockDim.y + threadIdx.y;
  const bool active = channel < a.channels && 2 * qx < a.in_width;

  float w[9][V];
  load_weights(a.weight[branch], a.channels, channel, active, w);
  float dw[9][V] = {};
  const float bound = relu_bound(a.relu);
  const int offset[3] = {(d + 1) / 2, 0, -((d - 1) / 2)};
  const View dy = view_at(a.dy, a.dys[branch]);
  const View dx = view_at(a.dx, a.dxs[branch]);
  const int row_groups = a.row_groups[branch];
  const int units = active ? a.images * row_groups : 0;

  for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
    const int image = unit / row_groups;
    const int qy = unit % row_groups;
#pragma unroll
    for (int odd_y = 0; odd_y < 2; ++odd_y) {
#pragma unroll
      for (int odd_x = 0; odd_x < 2; ++odd_x) {
        const int iy = 2 * qy + odd_y;
        const int ix = 2 * qx + odd_x;
        if (iy >= a.in_height || ix >= a.in_width) continue;
        float r[V];
        load_at_least<T, V>(
            pixel_row<const T>(a.x, image, iy) + ix * a.x.pixel_stride + channel, true, bound, r);
        float sum[V] = {};
#pragma unroll
        for (int ky = 1 - odd_y; ky < 3; ky += 2) {
#pragma unroll
          for (int kx = 1 - odd_x; kx < 3; kx += 2) {
            const int oy = qy + offset[ky];
            const int ox = qx + offset[kx];
            const bool inside =
                static_cast<unsigned>(oy) < static_cast<unsigned>(a.out_height) &&
                static_cast<unsigned>(ox) < static_cast<unsigned>(a.out_width);
            float g[V];
            load<T, V>(
                pixel_row<const T>(dy, image, oy) + ox * dy.pixel_stride + channel, inside, g);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sum[v] = fmaf(w[3 * ky + kx][v], g[v], sum[v]);
              dw[3 * ky + kx][v] = fmaf(r[v], g[v], dw[3 * ky + kx][v]);
            }
          }
        }
        store_gradient<T, V>(
            a, pixel_row<T>(dx, image, iy) + ix * dx.pixel_stride + channel, r, sum);
      }
    }
  }
  write_partial<V>(a, dw);
}

}  // namespace lgcnet
