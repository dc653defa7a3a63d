// The 1x1 convolution of a concatenation of maps x_i, which never exists in memory, and its
// gradients, NHWC, float32 without tensor cores. With r = relu or the identity and x the x_i side
// by side:
//
//   y[p, n] = sum_c W[n, c] r(x[p, c])                      concat_product
//   dx[p, c] = r'(x[p, c]) sum_n dy[p, n] W[n, c]           concat_product_gradients
//   dW[n, c] = sum_p dy[p, n] r(x[p, c])                    concat_product_weight_gradients
//
// All three are products of matrices in tiles: chunk by chunk the threads bring both factors into
// shared memory, from where every thread multiplies 8 or Width / 8 rows by Width / 8 columns, in
// pieces of kPiece neighbours that a warp reads side by side. While slow threads multiply one half
// of the shared memory, fast ones write the other.
//
// The sum of dW runs over far more positions than dW has entries: the blocks take shares of them,
// and sum_partials adds up what they find.
#pragma once

#include "numeric.cuh"
#include "positions.cuh"

namespace lgcnet {

constexpr int kProductPositions = 128;  // of a block of the first two
constexpr int kProductRows = kProductPositions / 8;
constexpr int kProductColumns = 8;  // threads beside each other in the columns
constexpr int kProductThreads = kProductRows * kProductColumns;
constexpr int kProductChunk = 16;  // channels

constexpr int kSharePositions = 32;  // of a chunk of the third
constexpr int kShareGroups = 4;      // of threads, among which the chunk's positions are divided
constexpr int kGroupThreads = kProductColumns * kProductColumns;
constexpr int kShareThreads = kShareGroups * kGroupThreads;

// Blocks that a multiprocessor holds, which is what bounds their registers.
template <int Width>
constexpr int kProductBlocks = Width == 48 ? 5 : Width == 64 ? 4 : 3;
template <int Width>
constexpr int kShareBlocks = Width == 48 ? 3 : 2;

// Columns of a thread that are neighbours; the pieces of a thread are 8 pieces apart.
template <int Width>
constexpr int kPiece = Width / kProductColumns % 4 == 0 ? 4 : 2;

struct ConcatProductArguments {
  const float* x[kMaxMaps];  // (positions, channels)
  float* dx[kMaxMaps];       // alike
  int channels[kMaxMaps];
  const float* weight;  // (outputs, all channels): W
  const float* dy;      // (positions, outputs)
  float* result;        // y, or dW of every share: (shares, outputs, all channels)
  int positions;
  int share;  // positions of a share
  int maps;
  int all_channels;
  int outputs;
  int relu;
  int tiles;  // of columns, beside each other in the grid
};

// Brings Rows x Columns numbers of a matrix into shared memory by a block of Threads threads, each
// number raised to `bound` at least; zeros from row number `rows` and column number `columns` on.
template <int Rows, int Columns, int V, int Threads, bool Transposed, int Pitch>
__device__ __forceinline__ void bring(const float* matrix, int pitch, int rows, int columns,
                                      float bound, unsigned thread, float (*to)[Pitch]) {
  constexpr unsigned kVectors = Columns / V;
  constexpr int kItems = (Rows * kVectors + Threads - 1) / Threads;
  float value[kItems][V];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int row = (thread + i * Threads) / kVectors;
    const int column = (thread + i * Threads) % kVectors * V;
    const bool inside = row < Rows && row < rows && column < columns;
    load_at_least<float, V>(matrix + (row * pitch + column), inside, bound, value[i]);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int row = (thread + i * Threads) / kVectors;
    const int column = (thread + i * Threads) % kVectors * V;
    if (row >= Rows) continue;
    if constexpr (Transposed) {
#pragma unroll
      for (int v = 0; v < V; ++v) to[column + v][row] = value[i][v];
    } else {
      store<float, V>(&to[row][column], value[i]);
    }
  }
}

// Column of a thread's number n of a tile's Width / 8; `across`: of the threads beside each other.
template <int Width>
__device__ __forceinline__ int piece_column(int across, int n) {
  constexpr int P = kPiece<Width>;
  return P * (across + kProductColumns * (n / P)) + n % P;
}

// A thread's numbers of a row in shared memory.
template <int Width>
__device__ __forceinline__ void take_pieces(const float* row, int across,
                                            float (&out)[Width / kProductColumns]) {
  constexpr int P = kPiece<Width>;
#pragma unroll
  for (int n = 0; n < Width / kProductColumns; n += P) {
    float piece[P];
    load<float, P, false>(row + piece_column<Width>(across, n), true, piece);
#pragma unroll
    for (int i = 0; i < P; ++i) out[n + i] = piece[i];
  }
}

// A thread's numbers of a row in memory, of which `columns` exist: piece by piece, or one by one
// where not even pieces are aligned.
template <int V, int Width>
__device__ __forceinline__ void load_pieces(const float* row, int columns,
                                            float (&out)[Width / kProductColumns]) {
  constexpr int P = V == 1 ? 1 : kPiece<Width>;
#pragma unroll
  for (int n = 0; n < Width / kProductColumns; n += P) {
    const int column = piece_column<Width>(threadIdx.x, n);
    float piece[P];
    load<float, P>(row + column, column < columns, piece);
#pragma unroll
    for (int i = 0; i < P; ++i) out[n + i] = piece[i];
  }
}

template <int V, int Width>
__device__ __forceinline__ void store_pieces(float* row, int columns,
                                             const float (&value)[Width / kProductColumns]) {
  constexpr int P = V == 1 ? 1 : kPiece<Width>;
#pragma unroll
  for (int n = 0; n < Width / kProductColumns; n += P) {
    const int column = piece_column<Width>(threadIdx.x, n);
    float piece[P];
#pragma unroll
    for (int i = 0; i < P; ++i) piece[i] = value[n + i];
    if (column < columns) store<float, P>(row + column, piece);
  }
}

// Where number `column` of a row of a matrix is.
__device__ __forceinline__ long long place(int row, int pitch, int column) {
  return static_cast<long long>(row) * pitch + column;
}

// One of the tiles of Width channels into which the maps are cut, none of two maps.
struct MapTile {
  int map;
  int before;   // channels of the maps before it
  int channel;  // of the map: the tile's first

  __device__ __forceinline__ MapTile(const ConcatProductArguments& a, int number, int width)
      : map(0), before(0), channel(number * width) {
    for (;; ++map) {
      const int padded = (a.channels[map] + width - 1) / width * width;
      if (channel < padded) return;
      channel -= padded;
      before += a.channels[map];
    }
  }
};

// Shared memory of both: while one half is multiplied, the other is written.
template <int Width>
struct ProductHalves {
  __align__(16) float positions[2][kProductChunk][kProductPositions + 4];
  __align__(16) float weight[2][kProductChunk][Width + 4];
};

template <int Width>
__device__ __forceinline__ void multiply_chunk(const ProductHalves<Width>& shared, int half,
                                               float (&sum)[8][Width / kProductColumns]) {
#pragma unroll 2
  for (int k = 0; k < kProductChunk; ++k) {
    float p[2][4], w[Width / kProductColumns];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* from = &shared.positions[half][k][4 * (threadIdx.y + kProductRows * j)];
      load<float, 4, false>(from, true, p[j]);
    }
    take_pieces<Width>(shared.weight[half][k], threadIdx.x, w);
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int n = 0; n < Width / kProductColumns; ++n) {
        sum[m][n] = fmaf(p[m / 4][m % 4], w[n], sum[m][n]);
      }
    }
  }
}

// Position of a thread's row m within its block.
__device__ __forceinline__ int product_position(int m) {
  return 4 * (threadIdx.y + kProductRows * (m / 4)) + m % 4;
}

// Grid of both: tiles of Width columns, then of positions. Block: (kProductColumns, kProductRows).
template <int V, int Width>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<Width>)
    concat_product(const ConcatProductArguments a) {
  constexpr int N = Width / kProductColumns;
  __shared__ ProductHalves<Width> shared;
  const unsigned thread = threadIdx.y * kProductColumns + threadIdx.x;
  const int output = blockIdx.x % a.tiles * Width;
  const int position = blockIdx.x / a.tiles * kProductPositions;
  const float bound = relu_bound(a.relu);
  float sum[8][N] = {};
  int half = 0;
  int before = 0;  // channels of the maps before
  for (int map = 0; map < a.maps; ++map) {
    const int channels = a.channels[map];
    for (int channel = 0; channel < channels; channel += kProductChunk) {
      bring<Width, kProductChunk, V, kProductThreads, true>(
          a.weight + place(output, a.all_channels, before + channel), a.all_channels,
          a.outputs - output, channels - channel, minus_infinity(), thread, shared.weight[half]);
      bring<kProductPositions, kProductChunk, V, kProductThreads, true>(
          a.x[map] + place(position, channels, channel), channels, a.positions - position,
          channels - channel, bound, thread, shared.positions[half]);
      __syncthreads();
      multiply_chunk<Width>(shared, half, sum);
      half ^= 1;
    }
    before += channels;
  }
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const int at = product_position(m);
    if (at >= a.positions - position) continue;
    store_pieces<V, Width>(a.result + place(position + at, a.outputs, output), a.outputs - output,
                           sum[m]);
  }
}

template <int V, int Width>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<Width>)
    concat_product_gradients(const ConcatProductArguments a) {
  constexpr int N = Width / kProductColumns;
  __shared__ ProductHalves<Width> shared;
  const unsigned thread = threadIdx.y * kProductColumns + threadIdx.x;
  const MapTile tile(a, blockIdx.x % a.tiles, Width);
  const int position = blockIdx.x / a.tiles * kProductPositions;
  const int channels = a.channels[tile.map];
  float sum[8][N] = {};
  int half = 0;
  for (int output = 0; output < a.outputs; output += kProductChunk) {
    bring<kProductChunk, Width, V, kProductThreads, false>(
        a.weight + place(output, a.all_channels, tile.before + tile.channel), a.all_channels,
        a.outputs - output, channels - tile.channel, minus_infinity(), thread,
        shared.weight[half]);
    bring<kProductPositions, kProductChunk, V, kProductThreads, true>(
        a.dy + place(position, a.outputs, output), a.outputs, a.positions - position,
        a.outputs - output, minus_infinity(), thread, shared.positions[half]);
    __syncthreads();
    multiply_chunk<Width>(shared, half, sum);
    half ^= 1;
  }
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const int at = product_position(m);
    if (at >= a.positions - position) continue;
    const long long first = place(position + at, channels, tile.channel);
    if (a.relu) {
      float x[N];
      load_pieces<V, Width>(a.x[tile.map] + first, channels - tile.channel, x);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] = x[n] <= 0.0f ? 0.0f : sum[m][n];
    }
    store_pieces<V, Width>(a.dx[tile.map] + first, channels - tile.channel, sum[m]);
  }
}

// Grid: x tiles of Width channels, then of Width outputs, y shares of the positions. Block:
// (kProductColumns, kProductColumns, kShareGroups).
template <int V, int Width>
__global__ void __launch_bounds__(kShareThreads, kShareBlocks<Width>)
    concat_product_weight_gradients(const ConcatProductArguments a) {
  constexpr int N = Width / kProductColumns;
  static_assert(Width <= 2 * kSharePositions, "dy serves for the groups' sums");
  __shared__ __align__(16) float dy[2 * kSharePositions][Width];
  __shared__ __align__(16) float x[2 * kSharePositions][Width];
  const unsigned thread =
      (threadIdx.z * kProductColumns + threadIdx.y) * kProductColumns + threadIdx.x;
  const int output = blockIdx.x / a.tiles * Width;
  const MapTile tile(a, blockIdx.x % a.tiles, Width);
  const int channels = a.channels[tile.map];
  const float bound = relu_bound(a.relu);
  const int first = blockIdx.y * a.share;
  const float* next_dy = a.dy + place(first, a.outputs, output);
  const float* next_x = a.x[tile.map] + place(first, channels, tile.channel);

  float sum[N][N] = {};
  int half = 0;
  int left = a.positions - first < a.share ? a.positions - first : a.share;
  for (; left > 0; left -= kSharePositions) {
    bring<kSharePositions, Width, V, kShareThreads, false>(
        next_dy, a.outputs, left, a.outputs - output, minus_infinity(), thread, dy + half);
    bring<kSharePositions, Width, V, kShareThreads, false>(
        next_x, channels, left, channels - tile.channel, bound, thread, x + half);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kSharePositions / kShareGroups; ++i) {
      const int row = half + threadIdx.z * (kSharePositions / kShareGroups) + i;
      float g[N], r[N];
      take_pieces<Width>(dy[row], threadIdx.y, g);
      take_pieces<Width>(x[row], threadIdx.x, r);
#pragma unroll
      for (int m = 0; m < N; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum[m][n] = fmaf(g[m], r[n], sum[m][n]);
      }
    }
    half ^= kSharePositions;
    next_dy += kSharePositions * a.outputs;
    next_x += kSharePositions * channels;
  }

  // The groups add up, the last one first.
  for (int group = kShareGroups - 1; group >= 0; --group) {
    __syncthreads();
    if (threadIdx.z != group) continue;
#pragma unroll
    for (int m = 0; m < N; ++m) {
      const int row = piece_column<Width>(threadIdx.y, m);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float* total = &dy[row][piece_column<Width>(threadIdx.x, n)];
        if (group + 1 < kShareGroups) sum[m][n] += *total;
        *total = sum[m][n];
      }
    }
  }
  if (threadIdx.z > 0) return;
  float* result = a.result + static_cast<long long>(blockIdx.y) * a.outputs * a.all_channels;
#pragma unroll
  for (int m = 0; m < N; ++m) {
    const int row = output + piece_column<Width>(threadIdx.y, m);
    if (row >= a.outputs) continue;
    store_pieces<V, Width>(result + place(row, a.all_channels, tile.before + tile.channel),
                           channels - tile.channel, sum[m]);
  }
}

}  // namespace lgcnet
