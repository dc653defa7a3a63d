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
// pieces of kPiece neighbours that a warp reads side by side. While slow threads multiply one half of
// the shared memory, fast ones write the other.
//
// The sum of dW runs over far more positions than dW has entries: the blocks take shares of them, and
// sum_partials adds up what they find.
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
constexpr int kProductBlocks = Width == 48 ? 5 : 4;
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
  long long positions;
  long long share;  // positions of a share
  int maps;
  int all_channels;
  int outputs;
  int relu;
  int tiles;  // of columns, beside each other in the grid
};

// Rows x Columns numbers of a matrix, which a block of Threads threads brings into shared memory.
template <int Rows, int Columns, int V, int Threads>
struct Brought {
  static constexpr unsigned kVectors = Columns / V;
  static constexpr int kItems = (Rows * kVectors + Threads - 1) / Threads;
  float value[kItems][V];

  // From the matrix's row 0 and column 0 on, each number raised to `bound` at least; zeros from row
  // number `rows` and column number `columns` on.
  __device__ __forceinline__ void read(const float* matrix, int pitch, int rows, int columns,
                                       float bound, unsigned thread) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = (thread + i * Threads) / kVectors;
      const int column = (thread + i * Threads) % kVectors * V;
      const bool inside = row < Rows && row < rows && column < columns;
      load_at_least<float, V>(matrix + (row * pitch + column), inside, bound, value[i]);
    }
  }

  template <int Pitch>
  __device__ __forceinline__ void write(float (*to)[Pitch], unsigned thread) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned row = (thread + i * Threads) / kVectors;
      if (row < Rows) store<float, V>(&to[row][(thread + i * Threads) % kVectors * V], value[i]);
    }
  }

  template <int Pitch>
  __device__ __forceinline__ void write_transposed(float (*to)[Pitch], unsigned thread) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const unsigned row = (thread + i * Threads) / kVectors;
      const unsigned column = (thread + i * Threads) % kVectors * V;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (row < Rows) to[column + v][row] = value[i][v];
      }
    }
  }
};

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

// How many of `most` positions there are.
__device__ __forceinline__ int counted(long long positions, int most) {
  return positions < most ? static_cast<int>(positions) : most;
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

// The factors of a chunk of y: x as it lies, W transposed.
template <int V, int Width>
struct ForwardChunk {
  Brought<kProductPositions, kProductChunk, V, kProductThreads> x;
  Brought<Width, kProductChunk, V, kProductThreads> w;
  int map = 0;
  int before = 0;  // channels of the maps before
  int channel = 0;

  __device__ __forceinline__ void read(const ConcatProductArguments& a, long long position,
                                       int output, unsigned thread) {
    const int channels = a.channels[map];
    x.read(a.x[map] + position * channels + channel, channels, a.positions - position,
           channels - channel, relu_bound(a.relu), thread);
    w.read(a.weight + static_cast<long long>(output) * a.all_channels + before + channel,
           a.all_channels, a.outputs - output, channels - channel, minus_infinity(), thread);
  }

  // False after the last.
  __device__ __forceinline__ bool advance(const ConcatProductArguments& a) {
    channel += kProductChunk;
    if (channel < a.channels[map]) return true;
    channel = 0;
    before += a.channels[map];
    return ++map < a.maps;
  }
};

// Those of a chunk of dx: dy and W as they lie.
template <int V, int Width>
struct GradientChunk {
  Brought<kProductPositions, kProductChunk, V, kProductThreads> dy;
  Brought<kProductChunk, Width, V, kProductThreads> w;
  int output = 0;

  __device__ __forceinline__ void read(const ConcatProductArguments& a, long long position,
                                       const MapTile& tile, unsigned thread) {
    dy.read(a.dy + position * a.outputs + output, a.outputs,
            counted(a.positions - position, kProductPositions), a.outputs - output, minus_infinity(), thread);
    w.read(a.weight + static_cast<long long>(output) * a.all_channels + tile.before + tile.channel,
           a.all_channels, a.outputs - output, a.channels[tile.map] - tile.channel,
           minus_infinity(), thread);
  }

  __device__ __forceinline__ bool advance(const ConcatProductArguments& a) {
    output += kProductChunk;
    return output < a.outputs;
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
  const long long position = static_cast<long long>(blockIdx.x / a.tiles) * kProductPositions;
  float sum[8][N] = {};
  ForwardChunk<V, Width> chunk;
  for (int half = 0;; half ^= 1) {
    chunk.read(a, position, output, thread);
    chunk.x.write_transposed(shared.positions[half], thread);
    chunk.w.write_transposed(shared.weight[half], thread);
    __syncthreads();
    multiply_chunk<Width>(shared, half, sum);
    if (!chunk.advance(a)) break;
  }
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const long long at = position + product_position(m);
    if (at >= a.positions) continue;
    store_pieces<V, Width>(a.result + at * a.outputs + output, a.outputs - output, sum[m]);
  }
}

template <int V, int Width>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<Width>)
    concat_product_gradients(const ConcatProductArguments a) {
  constexpr int N = Width / kProductColumns;
  __shared__ ProductHalves<Width> shared;
  const unsigned thread = threadIdx.y * kProductColumns + threadIdx.x;
  const MapTile tile(a, blockIdx.x % a.tiles, Width);
  const long long position = static_cast<long long>(blockIdx.x / a.tiles) * kProductPositions;
  float sum[8][N] = {};
  GradientChunk<V, Width> chunk;
  for (int half = 0;; half ^= 1) {
    chunk.read(a, position, tile, thread);
    chunk.dy.write_transposed(shared.positions[half], thread);
    chunk.w.write(shared.weight[half], thread);
    __syncthreads();
    multiply_chunk<Width>(shared, half, sum);
    if (!chunk.advance(a)) break;
  }
  const int channels = a.channels[tile.map];
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    const long long at = position + product_position(m);
    if (at >= a.positions) continue;
    const long long place = at * channels + tile.channel;
    if (a.relu) {
      float x[N];
      load_pieces<V, Width>(a.x[tile.map] + place, channels - tile.channel, x);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[m][n] = x[n] <= 0.0f ? 0.0f : sum[m][n];
    }
    store_pieces<V, Width>(a.dx[tile.map] + place, channels - tile.channel, sum[m]);
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
  const long long first = blockIdx.y * a.share;
  const long long end = first + a.share < a.positions ? first + a.share : a.positions;

  float sum[N][N] = {};
  int half = 0;
  for (long long position = first; position < end; position += kSharePositions) {
    const int rows = counted(end - position, kSharePositions);
    Brought<kSharePositions, Width, V, kShareThreads> values;
    values.read(a.dy + position * a.outputs + output, a.outputs, rows, a.outputs - output,
                minus_infinity(), thread);
    values.write(dy + half, thread);
    values.read(a.x[tile.map] + position * channels + tile.channel, channels, rows,
                channels - tile.channel, bound, thread);
    values.write(x + half, thread);
    __syncthreads();
#pragma unroll 2
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
  float* result =
      a.result + static_cast<long long>(blockIdx.y) * a.outputs * a.all_channels + tile.before;
#pragma unroll
  for (int m = 0; m < N; ++m) {
    const int row = output + piece_column<Width>(threadIdx.y, m);
    if (row >= a.outputs) continue;
    store_pieces<V, Width>(result + static_cast<long long>(row) * a.all_channels + tile.channel,
                           channels - tile.channel, sum[m]);
  }
}

}  // namespace lgcnet
