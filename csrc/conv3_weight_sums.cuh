// Weight gradients of dense 3x3 convolutions of maps, padding 1, stride 1, NHWC, float32 without
// tensor cores.
//
// Of convolution b, with r(x) = x or ReLU(x), u and v in {-1, 0, 1}, and zeros outside the maps,
//
//     dw_b[o, u, v, c] = sum_q r(x_b[q + (u, v), c]) dy_b[q, o]
//
// Positions q are numbered as if each row ended in a column of zeros, of x and of dy alike: then v
// is a step of one position and u of a row, and the numbers are cut in parts whatever the width.
// (Where dy has that zero, an infinite or missing x beside it makes the tap NaN.)
//
// A block sums a part of the positions for a tile of c, one of o, one u and all v. A thread goes
// from position to position with 4 channels c: three of x in registers, of which one is new, meet
// dy, so that three reads of shared memory feed 96 multiply-adds (four feed 72 in tiles of 48).
// Chunk by chunk the threads bring x and dy to shared memory: while one half of it is multiplied,
// the next chunk is on its way to the other. In tiles of 32 a warp has all of the tile, and the
// four warps walk through a quarter of the part each; their sums are added up at the end. Shares of
// the blocks are added up by another launch.
//
// Arithmetic: 9 multiply-adds a position, c and o. Traffic: x and dy three times for each tile of
// the other's channels, mostly from the L2 cache.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kMostSummedConvolutions = 12;

struct Conv3SumsArguments {
  const float* x[kMostSummedConvolutions];   // (images, height, width, channels)
  const float* dy[kMostSummedConvolutions];  // (images, height, width, out_channels)
  float* shares;  // (parts, convolutions, out_channels, 3, 3, channels)
  int convolutions;
  int channels;
  int out_channels;
  int height;
  int width;
  int pixels;  // of all images
  int part;    // positions of a part, a multiple of the chunks of all walks
  int relu;
  // How far half a chunk of a walk goes:
  int step_rows;  // modulo height
  int step_columns;
  int step_pixels;
};

template <int Tile>
struct Conv3SumsTile {
  static constexpr int across = Tile == 48 ? 8 : 4;  // threads of a warp that differ in o
  static constexpr int piece = 16 / across;          // neighbouring o of a thread
  static constexpr int pieces = Tile == 48 ? 3 : 2;  // 16 channels apart
  static constexpr int outputs = piece * pieces;
  static constexpr int warp_channels = 4 * (32 / across);
  static constexpr int warps_beside = Tile / warp_channels;
  static constexpr int walks = Tile == 32 ? 4 : 1;
  static constexpr int warps = warps_beside * (Tile / (16 * pieces)) * walks;
  static constexpr int threads = 32 * warps;
  static constexpr int blocks = Tile == 48 ? 4 : 3;  // of a multiprocessor: bounds the registers
  static constexpr int vectors = Tile / 4;
  // A thread brings a vector of each map for half a chunk.
  static constexpr int step = threads / walks / vectors;  // positions
  static constexpr int chunk = 2 * step;
  static_assert(threads % (walks * vectors) == 0, "every thread is busy");
};

// Where in x a thread is, and in dy at the position before.
struct Conv3SumsPosition {
  int row;  // in its image
  int column;
  int pixel;  // its number without the columns of zeros

  __device__ __forceinline__ Conv3SumsPosition(const Conv3SumsArguments& a, int position) {
    const int rows = position / (a.width + 1);
    row = rows % a.height;
    column = position - rows * (a.width + 1);
    pixel = position - rows;
  }
  __device__ __forceinline__ void next_step(const Conv3SumsArguments& a) {
    row += a.step_rows;
    column += a.step_columns;
    pixel += a.step_pixels;
    if (column > a.width) {
      column -= a.width + 1;
      ++row;
      --pixel;
    }
    if (row >= a.height) row -= a.height;
  }
  // x: of the row u further.
  __device__ __forceinline__ void load_x(const Conv3SumsArguments& a, const float* x, int u,
                                         float (&out)[4]) const {
    const bool inside = column < a.width && pixel < a.pixels &&
                        static_cast<unsigned>(row + u) < static_cast<unsigned>(a.height);
    load<float, 4>(x + static_cast<long long>(pixel) * a.channels, inside, out);
  }
  // dy: of the position before.
  __device__ __forceinline__ void load_dy(const Conv3SumsArguments& a, const float* dy,
                                          float (&out)[4]) const {
    const bool inside = column > 0 && pixel <= a.pixels;
    load<float, 4>(dy + static_cast<long long>(pixel) * a.out_channels, inside, out);
  }
};

__device__ __forceinline__ void rectify(float bound, float (&value)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = at_least(value[i], bound);
}

// Adds up half the positions of a chunk; x and dy: of this thread, in shared memory.
template <int Tile>
__device__ __forceinline__ void add_conv3_positions(
    const float* x, const float* dy, float (&before)[4], float (&here)[4],
    float (&sum)[3][Conv3SumsTile<Tile>::outputs][4]) {
  using S = Conv3SumsTile<Tile>;
#pragma unroll
  for (int i = 0; i < S::step; ++i) {
    float behind[4], g[S::outputs];
    load<float, 4, false>(x + i * Tile, true, behind);
#pragma unroll
    for (int k = 0; k < S::pieces; ++k) {
      float piece[S::piece];
      load<float, S::piece, false>(dy + i * Tile + 16 * k, true, piece);
#pragma unroll
      for (int j = 0; j < S::piece; ++j) g[k * S::piece + j] = piece[j];
    }
#pragma unroll
    for (int o = 0; o < S::outputs; ++o) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sum[0][o][c] = fmaf(before[c], g[o], sum[0][o][c]);
        sum[1][o][c] = fmaf(here[c], g[o], sum[1][o][c]);
        sum[2][o][c] = fmaf(behind[c], g[o], sum[2][o][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      before[c] = here[c];
      here[c] = behind[c];
    }
  }
}

// Grid: tiles of channels c, then o, the three u, convolutions, parts, all in x.
template <int Tile>
__global__ void __launch_bounds__(Conv3SumsTile<Tile>::threads, Conv3SumsTile<Tile>::blocks)
    conv3_weight_sums(const Conv3SumsArguments a) {
  using S = Conv3SumsTile<Tile>;
  // Two halves of x, then dy, in rows of positions; how far it is to dy and to the other half:
  constexpr int kToDy = S::walks * S::chunk * Tile, kHalf = 2 * kToDy;
  __shared__ __align__(16) float shared[2 * kHalf];
  int block = blockIdx.x;
  const int first_c = block % (a.channels / Tile) * Tile;
  block /= a.channels / Tile;
  const int first_o = block % (a.out_channels / Tile) * Tile;
  block /= a.out_channels / Tile;
  const int u = block % 3 - 1;
  block /= 3;
  const int convolution = block % a.convolutions, part = block / a.convolutions;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int walk = S::walks > 1 ? warp : 0;
  // Neighbouring threads read the same of the one or of the other map.
  const int of_eight = lane / 2 % 8, of_four = lane % 2 + lane / 16 * 2;
  const int c = (S::across == 8 ? of_four : of_eight) * 4 +
                (S::walks > 1 ? 0 : warp % S::warps_beside * S::warp_channels);
  const int o = (S::across == 8 ? of_eight : of_four) * S::piece +
                (S::walks > 1 ? 0 : warp / S::warps_beside * 16 * S::pieces);

  const float bound = relu_bound(a.relu);
  const int start = part * a.part, walked = a.part / S::walks;  // positions of a walk
  const int left = a.pixels + a.pixels / a.width - start;
  const int chunks = ((left < walked ? left : walked) + S::chunk - 1) / S::chunk;
  const long long map = static_cast<long long>(part) * a.convolutions + convolution;
  // Not wanted before the end, and registers are scarce.
  __shared__ float* shares[S::threads];
  shares[threadIdx.x] = a.shares +
                        ((map * a.out_channels + first_o + o) * 9 + (u + 1) * 3) * a.channels +
                        first_c + c;
  const float* x = a.x[convolution] + static_cast<long long>(u) * a.width * a.channels + first_c;
  const int first = start + walk * walked;
  float before[4] = {}, here[4];
  if (first > 0) Conv3SumsPosition(a, first - 1).load_x(a, x + c, u, before);
  Conv3SumsPosition(a, first).load_x(a, x + c, u, here);
  rectify(bound, before);
  rectify(bound, here);

  // Of the walk of its warp, a thread brings this vector of this position of half a chunk.
  const int bringer = S::walks > 1 ? lane : static_cast<int>(threadIdx.x);
  const int column = bringer % S::vectors * 4, row = bringer / S::vectors;
  x += column;
  const float* dy = a.dy[convolution] - a.out_channels + first_o + column;
  Conv3SumsPosition next(a, first + row + 1);
  float next_x[4], next_dy[4];
  const auto bring = [&] {
    next.load_x(a, x, u, next_x);
    next.load_dy(a, dy, next_dy);
    next.next_step(a);
  };
  float* walk_rows = shared + walk * S::chunk * Tile;
  const float *from_x = walk_rows + c, *from_dy = walk_rows + kToDy + o;
  float* to = walk_rows + row * Tile + column;
  const auto put = [&](int offset) {
    rectify(bound, next_x);
    store<float, 4>(to + offset, next_x);
    store<float, 4>(to + offset + kToDy, next_dy);
  };

  float sum[3][S::outputs][4] = {};
  constexpr int kStep = S::step * Tile;
  bring();
  put(0);
  bring();
  put(kStep);
  __syncthreads();
  int half = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {  // the last brings what nobody reads
#pragma unroll
    for (int step = 0; step < 2 * kStep; step += kStep) {
      bring();
      add_conv3_positions<Tile>(from_x + half + step, from_dy + half + step, before, here, sum);
      put((half ^ kHalf) + step);
    }
    __syncthreads();
    half ^= kHalf;
  }

  if constexpr (S::walks > 1) {  // the last one first
    static_assert(3 * S::outputs * 128 <= 2 * kHalf, "sums of a warp fit");
    float* total = shared + lane * 4;
    for (int adds = S::walks - 1; adds >= 0; --adds) {
      if (walk == adds) {
#pragma unroll
        for (int i = 0; i < 3 * S::outputs; ++i) {
          float(&mine)[4] = sum[i / S::outputs][i % S::outputs];
          float others[4];
          load<float, 4, false>(total + i * 128, adds + 1 < S::walks, others);
#pragma unroll
          for (int j = 0; j < 4; ++j) mine[j] += others[j];
          if (adds > 0) store<float, 4>(total + i * 128, mine);
        }
      }
      __syncthreads();
    }
    if (walk > 0) return;
  }
  float* share = shares[threadIdx.x];
#pragma unroll
  for (int i = 0; i < S::outputs; ++i) {
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      store<float, 4>(share + ((i / S::piece * 16 + i % S::piece) * 9 + v) * a.channels, sum[v][i]);
    }
  }
}

}  // namespace lgcnet
