// Dense 3x3 convolutions of NHWC maps, stride 1, padding 1, float32 without tensor cores: several of
// one map, or the sum of one each of several maps, which the gradient of a map is. With u and v in
// {-1, 0, 1}, r = relu or the identity, and zeros outside the maps,
//
//   y_b[q, o] = sum_uvc W_b[u, v, c, o] r(x[q + (u, v), c])                     of each b
//   y[q, o] = [m[q, o] > 0] sum_b sum_uvc W_b[-u, -v, c, o] x_b[q + (u, v), c]   mirrored
//
// A NaN in the mask m lets the sum pass, as in PyTorch.
//
// Positions are numbered as if each row had one column more, of zeros: then tap (u, v) of position p
// is position p + u (width + 1) + v, and blocks take positions one after another, whatever the
// width. Some channels at a time, a block brings to shared memory what its positions read, for each
// u by itself; while it multiplies, the next channels are on their way to registers. A thread has 8
// positions and kOut outputs: of a channel and a u it reads 12 numbers of x and 3 kOut of W, for
// 24 kOut multiply-adds.
//
// Traffic: x three times from the L2 cache for every block of outputs, y once.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kMostConvolutionsOfAMap = 16;
constexpr int kConv3Warps = 4;
constexpr int kConv3Block = 32 * kConv3Warps;

struct Conv3Arguments {
  const float* x[kMostConvolutionsOfAMap];  // (images, height, width, channels)
  float* y[kMostConvolutionsOfAMap];        // (images, height, width, outputs)
  const float* weight;                      // (convolutions, 3, 3, channels, outputs)
  const float* mask;                        // like y, or null
  int summed;  // convolutions in the sum: 1, or all, which have a map x each
  int channels;
  int outputs;
  int images;
  int height;
  int width;
  int relu;
  int mirrored;
  int tiles;  // of outputs, of all maps y
};

// What a block does: kAcross warps have 4 kOut outputs each, and as many times 64 positions as such
// rows of warps fit. With two blocks on a multiprocessor a thread has 255 registers, in which the
// next channels wait: sums of 96 leave room for fewer.
template <int kOut, int kAcross>
struct Conv3Tile {
  static constexpr int kPositions = 64 * kConv3Warps / kAcross;
  static constexpr int kSpan = kPositions + 4;  // a neighbour on either side, and aligned
  static constexpr int kOutputs = 4 * kOut * kAcross;
  static constexpr int kChannels = kOut > 8 ? 4 : 8;
  static constexpr int kParts = kChannels / 4;

  // Where positions and their neighbours lie in the map, for u = -1, 0, 1: in pixels, -1 outside.
  int places[3][kSpan];
  __align__(16) float x[3][kChannels][kSpan];
  __align__(16) float weight[kChannels][9][kOutputs];

  __device__ __forceinline__ void find_places(const Conv3Arguments& a, int first) {
    const int pitch = a.width + 1;
    for (int i = threadIdx.x; i < kSpan; i += kConv3Block) {
      const int at = first - 1 + i;
      const int row = at / pitch, column = at - row * pitch;
      const bool inside = at >= 0 && row < a.images * a.height && column < a.width;
      const int of_image = row % a.height;
#pragma unroll
      for (int u = 0; u < 3; ++u) {
        const bool there = inside && of_image + u >= 1 && of_image + u <= a.height;
        places[u][i] = there ? (row + u - 1) * a.width + column : -1;
      }
    }
  }
};

// The next channels, in registers: fours of x, of which `kParts` neighbours are at one place, and of
// the weights.
template <typename Tile>
struct Conv3Channels {
  static constexpr int kFours = 3 * Tile::kSpan * Tile::kParts;
  static constexpr int kWeightFours = Tile::kChannels * 9 * Tile::kOutputs / 4;
  static constexpr int kOfX = (kFours + kConv3Block - 1) / kConv3Block;
  static constexpr int kOfWeights = (kWeightFours + kConv3Block - 1) / kConv3Block;
  float x[kOfX][4];
  float weight[kOfWeights][4];

  __device__ __forceinline__ void fetch(const Conv3Arguments& a, const Tile& tile, int input,
                                        int convolution, int channel, int output) {
    const float bound = relu_bound(a.relu);
#pragma unroll
    for (int i = 0; i < kOfX; ++i) {
      const int four = threadIdx.x + i * kConv3Block;
      const int at = channel + four % Tile::kParts * 4;
      const int place = four < kFours ? (&tile.places[0][0])[four / Tile::kParts] : -1;
      load_at_least<float, 4>(a.x[input] + (static_cast<long long>(place) * a.channels + at),
                              place >= 0 && at < a.channels, bound, x[i]);
    }
    const float* weights =
        a.weight + static_cast<long long>(convolution) * 9 * a.channels * a.outputs;
#pragma unroll
    for (int i = 0; i < kOfWeights; ++i) {
      const int four = threadIdx.x + i * kConv3Block;
      const int o = output + four % (Tile::kOutputs / 4) * 4;
      const int tap = four / (Tile::kOutputs / 4) % 9;
      const int c = channel + four / (Tile::kOutputs / 4) / 9;
      const int row = (a.mirrored ? 8 - tap : tap) * a.channels + c;
      load<float, 4>(weights + (row * a.outputs + o),
                     four < kWeightFours && c < a.channels && o < a.outputs, weight[i]);
    }
  }

  __device__ __forceinline__ void put(Tile& tile) const {
#pragma unroll
    for (int i = 0; i < kOfX; ++i) {
      const int four = threadIdx.x + i * kConv3Block, at = four / Tile::kParts;
      if (four >= kFours) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        tile.x[at / Tile::kSpan][four % Tile::kParts * 4 + c][at % Tile::kSpan] = x[i][c];
      }
    }
#pragma unroll
    for (int i = 0; i < kOfWeights; ++i) {
      const int four = threadIdx.x + i * kConv3Block;
      if (four < kWeightFours) store<float, 4>(&tile.weight[0][0][0] + four * 4, weight[i]);
    }
  }
};

// A thread's positions within its block are two times four neighbours, from these on; its outputs
// are four of every sixteen.
template <int kAcross>
__device__ __forceinline__ int conv3_position(int quad) {
  return threadIdx.x / 32 / kAcross * 64 + quad * 32 + threadIdx.x % 8 * 4;
}

template <int kOut, int kAcross>
__device__ __forceinline__ int conv3_output(int o) {
  return threadIdx.x / 32 % kAcross * (4 * kOut) + threadIdx.x % 32 / 8 * 4 + o / 4 * 16;
}

template <int kOut, int kAcross>
__device__ __forceinline__ void multiply_conv3(const Conv3Tile<kOut, kAcross>& tile,
                                               float (&sum)[2][4][kOut]) {
#pragma unroll 1
  for (int c = 0; c < tile.kChannels; ++c) {
#pragma unroll
    for (int u = 0; u < 3; ++u) {
      float x[2][6];
#pragma unroll
      for (int quad = 0; quad < 2; ++quad) {
        float four[4], two[2];
        const float* from = &tile.x[u][c][conv3_position<kAcross>(quad)];
        load<float, 4, false>(from, true, four);
        load<float, 2, false>(from + 4, true, two);
#pragma unroll
        for (int i = 0; i < 6; ++i) x[quad][i] = i < 4 ? four[i % 4] : two[i % 2];
      }
#pragma unroll
      for (int v = 0; v < 3; ++v) {
#pragma unroll
        for (int o = 0; o < kOut; o += 4) {
          float weight[4];
          load<float, 4, false>(&tile.weight[c][3 * u + v][conv3_output<kOut, kAcross>(o)], true,
                                weight);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float& total = sum[i / 4][i % 4][o + j];
              total = fmaf(x[i / 4][i % 4 + v], weight[j], total);
            }
          }
        }
      }
    }
  }
}

// Grid: x tiles of the outputs of one map y after the other, then blocks of positions.
template <int kOut, int kAcross>
__global__ void __launch_bounds__(kConv3Block, 2) conv3(const Conv3Arguments a) {
  using Tile = Conv3Tile<kOut, kAcross>;
  __shared__ Tile tile;
  const int tiles = (a.outputs + tile.kOutputs - 1) / tile.kOutputs;  // of a map
  const int number = blockIdx.x % a.tiles;
  const int map = number / tiles, output = number % tiles * tile.kOutputs;
  tile.find_places(a, blockIdx.x / a.tiles * tile.kPositions);
  __syncthreads();

  float sum[2][4][kOut] = {};
  Conv3Channels<Tile> next;
  next.fetch(a, tile, 0, map, 0, output);
  for (int input = 0, channel = 0; input < a.summed;) {
    next.put(tile);
    __syncthreads();
    channel += tile.kChannels;
    if (channel >= a.channels) {
      channel = 0;
      ++input;
    }
    if (input < a.summed) next.fetch(a, tile, input, map + input, channel, output);
    multiply_conv3<kOut, kAcross>(tile, sum);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = tile.places[1][conv3_position<kAcross>(i / 4) + i % 4 + 1];
    if (place < 0) continue;
#pragma unroll
    for (int o = 0; o < kOut; o += 4) {
      const int to = output + conv3_output<kOut, kAcross>(o);
      if (to >= a.outputs) continue;
      const long long at = static_cast<long long>(place) * a.outputs + to;
      float mask[4], found[4];
      load<float, 4>(a.mask + at, a.mask != nullptr, mask);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        found[j] = a.mask != nullptr && mask[j] <= 0.0f ? 0.0f : sum[i / 4][i % 4][o + j];
      }
      store<float, 4>(a.y[map] + at, found);
    }
  }
}

}  // namespace lgcnet
