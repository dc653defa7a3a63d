// Max pooling 3 x 3 with padding 1 and stride S, NHWC, and its gradient.
//
//   y[oy, ox, c] = max_{ky, kx} x[S oy + ky - 1, S ox + kx - 1, c]
//
// As in PyTorch the first maximum of a window, row by row, wins its gradient, and a NaN beats every
// number and an earlier NaN. No index is stored: the gradient is a gather that finds the winners
// again. A pixel wins a window if its row of the window does and the pixel its row: within rows and
// between them a later value wins where it is larger or NaN, so that each row is looked at once.
//
// A thread owns V neighbouring channels and walks down `rows` windows of its column. Blocks are
// (channel vectors, columns); grids (column tiles, walks, images x channel tiles).
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kPoolThreads = 256;

struct MaxPoolArguments {
  View x;   // T (images, in_height, in_width, channels)
  View y;   // T (images, out_height, out_width, channels), or dy
  View dx;  // T, as x; of the backward
  int channels;
  int in_height;
  int in_width;
  int out_height;
  int out_width;
  int rows;
  int channel_tiles;
};

// Where a thread starts: its channels, its column (of windows) and its first row of windows.
template <int V>
struct PoolWalk {
  int image;
  int channel;
  int column;
  int row;

  __device__ __forceinline__ explicit PoolWalk(const MaxPoolArguments& a)
      : image(blockIdx.z / a.channel_tiles),
        channel((blockIdx.z % a.channel_tiles * blockDim.x + threadIdx.x) * V),
        column(blockIdx.x * blockDim.y + threadIdx.y),
        row(blockIdx.y * a.rows) {}
};

// Whether a value wins over the greatest one before it in the window.
__device__ __forceinline__ bool beats(float later, float earlier) {
  return later > earlier || later != later;
}

// Pixels [column, column + N) of a row, minus infinity outside the image.
template <typename T, int V, int N>
__device__ __forceinline__ void load_pixels(const MaxPoolArguments& a, const PoolWalk<V>& walk,
                                            int row, int column, float (&value)[N][V]) {
  const bool row_inside = static_cast<unsigned>(row) < static_cast<unsigned>(a.in_height);
  const T* from = pixel_row<const T>(a.x, walk.image, row) + walk.channel;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int ix = column + i;
    const bool inside =
        row_inside && static_cast<unsigned>(ix) < static_cast<unsigned>(a.in_width);
    load<T, V>(from + ix * a.x.pixel_stride, inside, value[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) value[i][v] = inside ? value[i][v] : minus_infinity();
  }
}

// The maxima of a window's row.
template <typename T, int V, int S>
__device__ __forceinline__ void row_maxima(const MaxPoolArguments& a, const PoolWalk<V>& walk,
                                           int row, float (&maximum)[V]) {
  float in[3][V];
  load_pixels<T, V, 3>(a, walk, row, S * walk.column - 1, in);
#pragma unroll
  for (int v = 0; v < V; ++v) maximum[v] = larger(larger(in[0][v], in[1][v]), in[2][v]);
}

template <typename T, int V, int S>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_forward(const MaxPoolArguments a) {
  const PoolWalk<V> walk(a);
  if (walk.channel >= a.channels || walk.column >= a.out_width) return;
  float top[V], centre[V], bottom[V];
  row_maxima<T, V, S>(a, walk, S * walk.row - 1, top);
  if (S == 1) row_maxima<T, V, S>(a, walk, walk.row, centre);
#pragma unroll 2
  for (int oy = walk.row; oy < walk.row + a.rows && oy < a.out_height; ++oy) {
    if (S == 2) row_maxima<T, V, S>(a, walk, 2 * oy, centre);
    row_maxima<T, V, S>(a, walk, S * oy + 1, bottom);
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = larger(larger(top[v], centre[v]), bottom[v]);
      top[v] = S == 1 ? centre[v] : bottom[v];
      centre[v] = bottom[v];
    }
    T* to = pixel_row<T>(a.y, walk.image, oy) + walk.column * a.y.pixel_stride + walk.channel;
    store<T, V>(to, out);
  }
}

// One row of the windows that share a thread's S columns: 3 windows around its column at stride 1,
// its own window and the next at stride 2.
template <typename T, int V, int S>
struct PooledRow {
  static constexpr int windows = S == 1 ? 3 : 2;
  static constexpr int first = S == 1 ? 2 : 1;  // the own columns among the five that are read
  float maximum[windows][V];
  unsigned wins;  // a bit for each window, own column and channel: the column wins the row

  static __device__ __forceinline__ constexpr unsigned bit(int window, int column, int v) {
    return 1u << ((window * S + column) * V + v);
  }

  __device__ __forceinline__ void read(const MaxPoolArguments& a, const PoolWalk<V>& walk,
                                       int row) {
    const int column = S * walk.column - first;
    float in[5][V];
    load_pixels<T, V, 5>(a, walk, row, column, in);
    wins = 0;
#pragma unroll
    for (int w = 0; w < windows; ++w) {
      const bool outside = column + S * w < 0;  // the left column: never the winner
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool centre_beats = outside || beats(in[S * w + 1][v], in[S * w][v]);
        const float before = larger(in[S * w][v], in[S * w + 1][v]);
        const bool right_beats = beats(in[S * w + 2][v], before);
        maximum[w][v] = larger(before, in[S * w + 2][v]);
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int place = first + i - S * w;  // of the own column in the window
          const bool won = place == 0   ? !centre_beats && !right_beats
                           : place == 1 ? centre_beats && !right_beats
                                        : right_beats;
          if (place >= 0 && place < 3 && won) wins |= bit(w, i, v);
        }
      }
    }
  }
};

// Adds the gradients of a row of windows, `gradient`, to the pixels that won them.
template <typename T, int V, int S>
__device__ __forceinline__ void give_gradients(
    const PooledRow<T, V, S>& top, const PooledRow<T, V, S>& centre,
    const PooledRow<T, V, S>& bottom, bool at_the_top,
    const float (&gradient)[PooledRow<T, V, S>::windows][V], float (&dx_top)[S][V],
    float (&dx_centre)[S][V], float (&dx_bottom)[S][V]) {
  using Row = PooledRow<T, V, S>;
#pragma unroll
  for (int w = 0; w < Row::windows; ++w) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float before = larger(top.maximum[w][v], centre.maximum[w][v]);
      const bool centre_beats =
          at_the_top || beats(centre.maximum[w][v], top.maximum[w][v]);
      const bool bottom_beats = beats(bottom.maximum[w][v], before);
      const unsigned wins = bottom_beats   ? bottom.wins
                            : centre_beats ? centre.wins
                                           : top.wins;
      const float g = gradient[w][v];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const float given = wins & Row::bit(w, i, v) ? g : 0.0f;
        dx_top[i][v] += !centre_beats && !bottom_beats ? given : 0.0f;
        dx_centre[i][v] += centre_beats && !bottom_beats ? given : 0.0f;
        dx_bottom[i][v] += bottom_beats ? given : 0.0f;
      }
    }
  }
}

// Gradients of the row of windows `oy`, from window column `ox` on; zeros outside.
template <typename T, int V, int N>
__device__ __forceinline__ void load_gradients(const MaxPoolArguments& a, const PoolWalk<V>& walk,
                                               int oy, int ox, float (&gradient)[N][V]) {
  const bool row_inside = static_cast<unsigned>(oy) < static_cast<unsigned>(a.out_height);
  const T* from = pixel_row<const T>(a.y, walk.image, oy) + walk.channel;
#pragma unroll
  for (int w = 0; w < N; ++w) {
    const bool inside =
        row_inside && static_cast<unsigned>(ox + w) < static_cast<unsigned>(a.out_width);
    load<T, V>(from + (ox + w) * a.y.pixel_stride, inside, gradient[w]);
  }
}

template <typename T, int V, int S>
__device__ __forceinline__ void store_row(const MaxPoolArguments& a, const PoolWalk<V>& walk,
                                          int iy, const float (&dx)[S][V]) {
  if (iy >= a.in_height) return;
  T* row = pixel_row<T>(a.dx, walk.image, iy) + walk.channel;
#pragma unroll
  for (int i = 0; i < S; ++i) {
    const int ix = S * walk.column + i;
    if (ix < a.in_width) store<T, V>(row + ix * a.dx.pixel_stride, dx[i]);
  }
}

template <int V, int N>
__device__ __forceinline__ void move(float (&to)[N][V], const float (&from)[N][V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) to[i][v] = from[i][v];
  }
}

// Stride 1: a row of windows completes the gradient of the row above it.
template <typename T, int V>
__global__ void __launch_bounds__(kPoolThreads, 1) max_pool_backward(const MaxPoolArguments a) {
  using Row = PooledRow<T, V, 1>;
  const PoolWalk<V> walk(a);
  if (walk.channel >= a.channels || walk.column >= a.in_width) return;
  Row top, centre, bottom;
  top.read(a, walk, walk.row - 2);
  centre.read(a, walk, walk.row - 1);
  float dx_top[1][V] = {};
  float dx_centre[1][V] = {};
  const int end = walk.row + a.rows < a.in_height ? walk.row + a.rows : a.in_height;
#pragma unroll 1
  for (int oy = walk.row - 1; oy <= end; ++oy) {
    bottom.read(a, walk, oy + 1);
    float gradient[Row::windows][V];
    load_gradients<T, V, Row::windows>(a, walk, oy, walk.column - 1, gradient);
    float dx_bottom[1][V] = {};
    give_gradients<T, V, 1>(top, centre, bottom, oy == 0, gradient, dx_top, dx_centre, dx_bottom);
    if (oy > walk.row) store_row<T, V, 1>(a, walk, oy - 1, dx_top);
    top = centre;
    centre = bottom;
    move(dx_top, dx_centre);
    move(dx_centre, dx_bottom);
  }
}

// Stride 2: a thread owns 2 x 2 pixels of each window; the odd ones also belong to the next.
template <typename T, int V>
__global__ void __launch_bounds__(kPoolThreads, 1)
    max_pool_backward_stride2(const MaxPoolArguments a) {
  using Row = PooledRow<T, V, 2>;
  const PoolWalk<V> walk(a);
  if (walk.channel >= a.channels || walk.column >= a.out_width) return;
  Row top, centre, bottom;
  top.read(a, walk, 2 * walk.row - 1);
  float dx_top[2][V] = {};
#pragma unroll 1
  for (int oy = walk.row; oy <= walk.row + a.rows && 2 * oy <= a.in_height; ++oy) {
    centre.read(a, walk, 2 * oy);
    bottom.read(a, walk, 2 * oy + 1);
    float gradient[Row::windows][V];
    load_gradients<T, V, Row::windows>(a, walk, oy, walk.column, gradient);
    float dx_centre[2][V] = {};
    float dx_bottom[2][V] = {};
    give_gradients<T, V, 2>(top, centre, bottom, oy == 0, gradient, dx_top, dx_centre, dx_bottom);
    if (oy > walk.row) store_row<T, V, 2>(a, walk, 2 * oy - 1, dx_top);
    if (oy < walk.row + a.rows) store_row<T, V, 2>(a, walk, 2 * oy, dx_centre);
    top = bottom;
    move(dx_top, dx_bottom);
  }
}

}  // namespace lgcnet
