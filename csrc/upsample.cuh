// Bilinear resizing with align_corners=True, NHWC, from or into a slice of channels.
//
// bilinear.cuh has the maths. The backward is a gather, with the weights of the forward:
// dx[i] = sum_o max(0, 1 - |s(o) - i|) dy[o]; no atomics.
#pragma once

#include "bilinear.cuh"
#include "numeric.cuh"

namespace lgcnet {

constexpr int kUpsampleThreads = 256;
constexpr int kUpsampleRows = 4;  // target rows a thread writes
constexpr int kGatherLanes = 8;   // threads that share one sum of upsample_backward_axis

struct UpsampleArguments {
  View source;  // T (images, source_height, source_width, channels): x, or dx
  View target;  // T (images, target_height, target_width, channels): y, or dy
  int channels;
  int source_height;
  int source_width;
  int target_height;
  int target_width;
  int channel_tiles;
};

// The backward along rows: (images, targets, pixels, channels) becomes (images, sources, pixels,
// channels). With rows and pixels exchanged in the Views, the backward along columns.
struct UpsampleAxisArguments {
  View from;
  View to;
  int targets;
  int sources;
  int pixels;
  int channels;
  int channel_tiles;
};

// Block: (channel vectors, columns). Grid: x column tiles, y groups of kUpsampleRows target rows,
// z images x channel tiles.
template <typename T, int V>
__global__ void __launch_bounds__(kUpsampleThreads, 1) upsample_forward(const UpsampleArguments a) {
  const int image = blockIdx.z / a.channel_tiles;
  const int channel = (blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int ox = blockIdx.x * blockDim.y + threadIdx.y;
  if (channel >= a.channels || ox >= a.target_width) return;
  const Axis columns = {a.source_width, a.target_width};
  const Axis rows = {a.source_height, a.target_height};
  float fx;
  const int left = columns.before(ox, fx);
  const long long near = left * a.source.pixel_stride + channel;
  const long long far = near + (left + 1 < a.source_width ? a.source.pixel_stride : 0);
#pragma unroll
  for (int k = 0; k < kUpsampleRows; ++k) {
    const int oy = blockIdx.y * kUpsampleRows + k;
    if (oy >= a.target_height) return;
    float fy;
    const int top = rows.before(oy, fy);
    const int below = top + 1 < a.source_height ? top + 1 : top;
    const T* first = pixel_row<const T>(a.source, image, top);
    const T* second = pixel_row<const T>(a.source, image, below);
    float corner[4][V];
    load<T, V>(first + near, true, corner[0]);
    load<T, V>(first + far, fx > 0.0f, corner[1]);
    load<T, V>(second + near, fy > 0.0f, corner[2]);
    load<T, V>(second + far, fx > 0.0f && fy > 0.0f, corner[3]);
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float upper = (1.0f - fx) * corner[0][v] + fx * corner[1][v];
      const float lower = (1.0f - fx) * corner[2][v] + fx * corner[3][v];
      out[v] = (1.0f - fy) * upper + fy * lower;
    }
    store<T, V>(pixel_row<T>(a.target, image, oy) + ox * a.target.pixel_stride + channel, out);
  }
}

// For targets up to a few times the source: a thread sums the whole support of its source pixel.
// Block: (channel vectors, columns). Grid: x column tiles, y source rows, z images x channel tiles.
template <typename T, int V>
__global__ void __launch_bounds__(kUpsampleThreads, 1) upsample_backward(const UpsampleArguments a) {
  const int image = blockIdx.z / a.channel_tiles;
  const int channel = (blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int ix = blockIdx.x * blockDim.y + threadIdx.y;
  const int iy = blockIdx.y;
  if (channel >= a.channels || ix >= a.source_width) return;
  const Axis columns = {a.source_width, a.target_width};
  const Axis rows = {a.source_height, a.target_height};
  int left, right, top, bottom;
  columns.support(ix, left, right);
  rows.support(iy, top, bottom);
  float sum[V] = {};
  for (int oy = top; oy <= bottom; ++oy) {
    const float wy = rows.weight(iy, oy);
    const T* row = pixel_row<const T>(a.target, image, oy) + channel;
#pragma unroll 4
    for (int ox = left; ox <= right; ++ox) {
      const float weight = wy * columns.weight(ix, ox);
      float gradient[V];
      load<T, V>(row + ox * a.target.pixel_stride, true, gradient);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = fmaf(weight, gradient[v], sum[v]);
    }
  }
  store<T, V>(pixel_row<T>(a.source, image, iy) + ix * a.source.pixel_stride + channel, sum);
}

// For large enlargements, where few sources have long supports: one axis at a time, rows into a
// float buffer and columns from it, kGatherLanes threads to a sum.
// Block: (channel vectors, pixels, lanes). Grid: x pixel tiles x channel tiles, y sources, z images.
template <typename From, typename To, int V>
__global__ void __launch_bounds__(kUpsampleThreads, 1)
    upsample_backward_axis(const UpsampleAxisArguments a) {
  __shared__ float shared[V][kUpsampleThreads];
  const int channel = (blockIdx.x % a.channel_tiles * blockDim.x + threadIdx.x) * V;
  const int pixel = blockIdx.x / a.channel_tiles * blockDim.y + threadIdx.y;
  const int image = blockIdx.z;
  const int i = blockIdx.y;
  const bool active = channel < a.channels && pixel < a.pixels;
  const Axis axis = {a.sources, a.targets};
  int first, last;
  axis.support(i, first, last);
  float sum[V] = {};
  if (active) {
    const long long place = pixel * a.from.pixel_stride + channel;
#pragma unroll 4
    for (int o = first + static_cast<int>(threadIdx.z); o <= last; o += kGatherLanes) {
      float gradient[V];
      load<From, V>(pixel_row<const From>(a.from, image, o) + place, true, gradient);
      const float weight = axis.weight(i, o);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = fmaf(weight, gradient[v], sum[v]);
    }
  }
  const int lane_threads = blockDim.x * blockDim.y;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) shared[v][threadIdx.z * lane_threads + thread] = sum[v];
  __syncthreads();
  if (threadIdx.z > 0 || !active) return;
  for (int lane = 1; lane < kGatherLanes; ++lane) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += shared[v][lane * lane_threads + thread];
  }
  store<To, V>(pixel_row<To>(a.to, image, i) + pixel * a.to.pixel_stride + channel, sum);
}

}  // namespace lgcnet
