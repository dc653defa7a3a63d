// Batch statistics of maps in two stages: those of tiles of positions and their merger.
//
// They are mean and M2 = sum (y - mean)^2 at every level (values that a thread holds, a thread, a
// tile, the map), merged by Chan's rule
//
//   M2 = sum_t M2_t + sum_t n_t (mean_t - mean)^2
//
// so that no sum of squares of a large mean is ever formed.
#pragma once

#include "positions.cuh"

namespace lgcnet {

struct TileStatisticsArguments {
  const void* maps[kMaxMaps];  // T (positions, channels), `count` of them
  float* partial;              // (tiles, 2, count, channels): mean, M2
  long long positions;
  int count;
  int channels;
  int rounds;  // a tile has rounds x kReducedPositions x blockDim.y positions
};

struct MergeStatisticsArguments {
  const float* partial;  // (tiles, 2, width)
  float* mean;           // (width,)
  float* variance;       // biased
  float* inverse_deviation;
  long long positions;
  long long tile_size;
  int tiles;
  int width;
  float eps;
};

// Mean and M2 of some values of each of V channels.
template <int V>
struct Moments {
  float count;
  float mean[V];
  float m2[V];

  __device__ __forceinline__ void merge(float more, const float (&other_mean)[V],
                                        const float (&other_m2)[V]) {
    const float total = count + more;
    const float share = more / total;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float distance = other_mean[v] - mean[v];
      mean[v] = fmaf(distance, share, mean[v]);
      m2[v] += other_m2[v] + distance * distance * count * share;
    }
    count = total;
  }
};

// Mean and M2 of a tile of positions of map number blockIdx.z.
template <typename T, int V>
__global__ void __launch_bounds__(kPositionThreads, 2)
    tile_statistics(const TileStatisticsArguments a) {
  constexpr int P = kReducedPositions<V>;
  __shared__ float means[V][kPositionThreads];
  __shared__ float squares[V][kPositionThreads];
  const int across = blockDim.x;
  const int rows = blockDim.y;
  const int thread = threadIdx.y * across + threadIdx.x;
  const int channel = own_channel<V>();
  const bool active = channel < a.channels;
  const long long tile_size = static_cast<long long>(a.rounds) * P * rows;
  const long long start = blockIdx.x * tile_size;

  Moments<V> own = {};
  for (int round = 0; round < a.rounds; ++round) {
    const PositionRun<P> run(a.positions, start + static_cast<long long>(round) * P * rows);
    if (!run.inside(0)) break;
    float value[P][V];
    load_run<T, V, P>(a.maps[blockIdx.z], run, a.channels, channel, active, value);
    float mean[V] = {};
    float m2[V] = {};
    int held = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      held += run.inside(p);
#pragma unroll
      for (int v = 0; v < V; ++v) mean[v] += value[p][v];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] /= static_cast<float>(held);
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float distance = run.inside(p) ? value[p][v] - mean[v] : 0.0f;
        m2[v] = fmaf(distance, distance, m2[v]);
      }
    }
    own.merge(static_cast<float>(held), mean, m2);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    means[v][thread] = own.mean[v];
    squares[v][thread] = own.m2[v];
  }
  __syncthreads();

  const long long left = a.positions - start;
  const int count = static_cast<int>(left < tile_size ? left : tile_size);
  const long long width = static_cast<long long>(a.count) * a.channels;
  float* partial = a.partial + 2 * blockIdx.x * width +
                   static_cast<long long>(blockIdx.z) * a.channels;
  for (int item = thread; item < V * across; item += across * rows) {
    const int value = item / across;
    const int vector = item % across;
    const int written = (blockIdx.y * across + vector) * V + value;
    if (written >= a.channels) continue;
    float total = 0.0f;
    for (int row = 0; row < rows && row < count; ++row) {
      const int held = (count - row - 1) / rows + 1;
      total += static_cast<float>(held) * means[value][row * across + vector];
    }
    const float mean = total / static_cast<float>(count);
    float m2 = 0.0f;
    for (int row = 0; row < rows && row < count; ++row) {
      const int held = (count - row - 1) / rows + 1;
      const float distance = means[value][row * across + vector] - mean;
      m2 += squares[value][row * across + vector] +
            static_cast<float>(held) * distance * distance;
    }
    partial[written] = mean;
    partial[width + written] = m2;
  }
}

// The sum of `value` over the lanes of a block (32 columns, Lanes), given to all of them.
template <int Lanes>
__device__ __forceinline__ float sum_of_lanes(float value, float (&shared)[Lanes][32]) {
  __syncthreads();  // an earlier sum is read to its end
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  float total = 0.0f;
  for (int lane = 0; lane < Lanes; ++lane) total += shared[lane][threadIdx.x];
  return total;
}

// Mean, variance and r of each column (map, channel) from its tiles. Block: 32 columns x Lanes, each
// lane taking every Lanes-th tile.
template <int Lanes>
__global__ void __launch_bounds__(32 * Lanes)
    merge_statistics(const MergeStatisticsArguments a) {
  __shared__ float shared[Lanes][32];
  const int column = blockIdx.x * 32 + threadIdx.x;
  const bool active = column < a.width;
  const float* partial = a.partial + column;
  const long long step = 2LL * a.width;

  float total = 0.0f;
#pragma unroll 4
  for (int tile = threadIdx.y; tile < (active ? a.tiles : 0); tile += Lanes) {
    const long long left = a.positions - tile * a.tile_size;
    const float count = static_cast<float>(left < a.tile_size ? left : a.tile_size);
    total += count * partial[tile * step];
  }
  const float positions = static_cast<float>(a.positions);
  const float mean = sum_of_lanes<Lanes>(total, shared) / positions;

  total = 0.0f;
#pragma unroll 4
  for (int tile = threadIdx.y; tile < (active ? a.tiles : 0); tile += Lanes) {
    const long long left = a.positions - tile * a.tile_size;
    const float count = static_cast<float>(left < a.tile_size ? left : a.tile_size);
    const float distance = partial[tile * step] - mean;
    total += partial[tile * step + a.width] + count * distance * distance;
  }
  const float variance = sum_of_lanes<Lanes>(total, shared) / positions;
  if (!active || threadIdx.y > 0) return;
  a.mean[column] = mean;
  a.variance[column] = variance;
  a.inverse_deviation[column] = 1.0f / sqrtf(variance + a.eps);
}

}  // namespace lgcnet
