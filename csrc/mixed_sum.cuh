// The Gumbel-weighted sum of normalised branches at a mixed node, its batch statistics and its
// gradients. Maps are dense NHWC: M = N H W positions of C channels.
//
//   out = sum_k z_k r_k (y_k - mean_k) + sum_j zp_j x_j,   r_k = 1 / sqrt(var_k + eps)
//
// With g = dout, yhat_k = r_k (y_k - mean_k), S0 = sum g, S1_k = sum g yhat_k:
//
//   dy_k = z_k r_k (g - S0 / M - yhat_k S1_k / M),   dx_j = zp_j g
//
// The statistics are mean and M2 = sum (y - mean)^2 at every level (values that a thread holds, a
// thread, a tile of positions, the map), merged by Chan's rule, so that no sum of squares of a large
// mean is ever formed. No atomics: the partial results of tiles are summed in a fixed order.
//
// Blocks are (channel vectors, rows of positions); grids (tiles of positions, channel tiles), and
// for the statistics a third dimension of maps.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kMaxMaps = 64;  // branches and plain terms of one node
constexpr int kMixedSumThreads = 256;
constexpr int kWrittenPositions = 4;  // positions that a thread of the sum and the gradients writes

// Positions that a thread of a reduction holds at once.
template <int V>
constexpr int kReducedPositions = V > 4 ? 4 : 8;

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

struct MixedSumArguments {
  const void* maps[kMaxMaps];      // T (positions, channels): y_1 to y_K, x_1 to x_J
  const float* z;                  // (K,)
  const float* plain_z;            // (J,)
  const float* mean;               // (K, channels)
  const float* inverse_deviation;  // (K, channels)
  void* out;                       // T (positions, channels)
  long long positions;
  int branches;  // K
  int plain;     // J
  int channels;
};

struct GradientSumsArguments {
  const void* maps[kMaxMaps];  // as MixedSumArguments
  const void* g;               // T (positions, channels)
  const float* mean;
  const float* inverse_deviation;
  float* partial;  // (tiles, 1 + K + J, channels): S0, S1_k, sum g x_j
  long long positions;
  int branches;
  int plain;
  int channels;
};

struct MixedSumGradientsArguments {
  const void* maps[kMaxMaps];  // T (positions, channels): y_1 to y_K
  void* gradients[kMaxMaps];   // T (positions, channels): dy_1 to dy_K, dx_1 to dx_J
  const void* g;
  const float* z;
  const float* plain_z;
  const float* mean;
  const float* inverse_deviation;
  const float* sum;             // (channels,): S0
  const float* normalised_sum;  // (K, channels): S1
  long long positions;
  int branches;
  int plain;
  int channels;
  float share;  // 1 / number of positions that the statistics were taken over
};

// Positions of a block: P a thread, blockDim.y apart, from a tile's first one on.
template <int P>
struct PositionRun {
  long long first;
  long long end;

  __device__ __forceinline__ PositionRun(long long positions, long long start)
      : first(start + threadIdx.y), end(positions) {}
  __device__ __forceinline__ bool inside(int p) const { return at(p) < end; }
  __device__ __forceinline__ long long at(int p) const {
    return first + static_cast<long long>(p) * blockDim.y;
  }
};

// Values (P, V) of a map at the run's positions, zeros past the end.
template <typename T, int V, int P>
__device__ __forceinline__ void load_run(const void* map, const PositionRun<P>& run, int channels,
                                         int channel, bool active, float (&value)[P][V]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const T* from = static_cast<const T*>(map) + run.at(p) * channels + channel;
    load<T, V>(from, active && run.inside(p), value[p]);
  }
}

// First channel of this thread; blockIdx.y numbers the channel tiles.
template <int V>
__device__ __forceinline__ int own_channel() {
  return (blockIdx.y * blockDim.x + threadIdx.x) * V;
}

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
__global__ void __launch_bounds__(kMixedSumThreads, 2)
    tile_statistics(const TileStatisticsArguments a) {
  constexpr int P = kReducedPositions<V>;
  __shared__ float means[V][kMixedSumThreads];
  __shared__ float squares[V][kMixedSumThreads];
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

template <typename T, int V>
__global__ void __launch_bounds__(kMixedSumThreads, 2) mixed_sum(const MixedSumArguments a) {
  constexpr int P = kWrittenPositions;
  const int channel = own_channel<V>();
  const PositionRun<P> run(a.positions, static_cast<long long>(blockIdx.x) * P * blockDim.y);
  if (channel >= a.channels || !run.inside(0)) return;

  float sum[P][V] = {};
#pragma unroll 2
  for (int k = 0; k < a.branches; ++k) {
    float y[P][V], mean[V], scale[V];
    load_run<T, V, P>(a.maps[k], run, a.channels, channel, true, y);
    const long long statistic = static_cast<long long>(k) * a.channels + channel;
    load<float, V>(a.mean + statistic, true, mean);
    load<float, V>(a.inverse_deviation + statistic, true, scale);
    const float z = a.z[k];
#pragma unroll
    for (int v = 0; v < V; ++v) scale[v] *= z;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[p][v] = fmaf(scale[v], y[p][v] - mean[v], sum[p][v]);
    }
  }
#pragma unroll 2
  for (int j = 0; j < a.plain; ++j) {
    float x[P][V];
    load_run<T, V, P>(a.maps[a.branches + j], run, a.channels, channel, true, x);
    const float z = a.plain_z[j];
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[p][v] = fmaf(z, x[p][v], sum[p][v]);
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (!run.inside(p)) return;
    store<T, V>(static_cast<T*>(a.out) + run.at(p) * a.channels + channel, sum[p]);
  }
}

// partial[tile] = S0, S1_1 to S1_K, sums of g x_1 to g x_J over the tile. A thread holds its g while
// the maps pass by; two buffers, so that one map's sums are added up while the next one's arrive.
template <typename T, int V>
__global__ void __launch_bounds__(kMixedSumThreads, 2)
    gradient_sums(const GradientSumsArguments a) {
  constexpr int P = kReducedPositions<V>;
  __shared__ float shared[2][V][kMixedSumThreads];
  const int across = blockDim.x;
  const int threads = across * blockDim.y;
  const int thread = threadIdx.y * across + threadIdx.x;
  const int channel = own_channel<V>();
  const bool active = channel < a.channels;
  const PositionRun<P> run(a.positions, static_cast<long long>(blockIdx.x) * P * blockDim.y);
  const int sums = 1 + a.branches + a.plain;
  float* partial = a.partial + static_cast<long long>(blockIdx.x) * sums * a.channels;

  float g[P][V];
  load_run<T, V, P>(a.g, run, a.channels, channel, active, g);
  for (int s = 0; s < sums; ++s) {
    float total[V] = {};
    if (s == 0) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += g[p][v];
      }
    } else {
      const bool branch = s <= a.branches;
      const long long statistic = static_cast<long long>(s - 1) * a.channels + channel;
      float y[P][V], mean[V], scale[V];
      load_run<T, V, P>(a.maps[s - 1], run, a.channels, channel, active, y);
      load<float, V>(a.mean + statistic, active && branch, mean);
      load<float, V>(a.inverse_deviation + statistic, active && branch, scale);
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] = fmaf(g[p][v], y[p][v] - mean[v], total[v]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] *= branch ? scale[v] : 1.0f;
    }
    float(&buffer)[V][kMixedSumThreads] = shared[s % 2];
#pragma unroll
    for (int v = 0; v < V; ++v) buffer[v][thread] = total[v];
    __syncthreads();
    for (int item = thread; item < V * across; item += threads) {
      const int value = item / across;
      const int vector = item % across;
      const int written = (blockIdx.y * across + vector) * V + value;
      if (written >= a.channels) continue;
      float of_block = 0.0f;
      for (int first = vector; first < threads; first += across) of_block += buffer[value][first];
      partial[static_cast<long long>(s) * a.channels + written] = of_block;
    }
  }
}

// dx_j = zp_j g and dy_k = z_k r_k ((g - S0 / M) - (r_k S1_k / M) (y_k - mean_k)).
template <typename T, int V>
__global__ void __launch_bounds__(kMixedSumThreads, 2)
    mixed_sum_gradients(const MixedSumGradientsArguments a) {
  constexpr int P = kWrittenPositions;
  const int channel = own_channel<V>();
  const PositionRun<P> run(a.positions, static_cast<long long>(blockIdx.x) * P * blockDim.y);
  if (channel >= a.channels || !run.inside(0)) return;

  float g[P][V];
  load_run<T, V, P>(a.g, run, a.channels, channel, true, g);
  for (int j = 0; j < a.plain; ++j) {
    T* dx = static_cast<T*>(a.gradients[a.branches + j]) + channel;
    const float z = a.plain_z[j];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      float out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = z * g[p][v];
      if (run.inside(p)) store<T, V>(dx + run.at(p) * a.channels, out);
    }
  }
  float sum[V];
  load<float, V>(a.sum + channel, true, sum);
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int v = 0; v < V; ++v) g[p][v] = fmaf(-a.share, sum[v], g[p][v]);
  }
#pragma unroll 2
  for (int k = 0; k < a.branches; ++k) {
    float y[P][V], mean[V], scale[V], slope[V];
    load_run<T, V, P>(a.maps[k], run, a.channels, channel, true, y);
    const long long statistic = static_cast<long long>(k) * a.channels + channel;
    load<float, V>(a.mean + statistic, true, mean);
    load<float, V>(a.inverse_deviation + statistic, true, scale);
    load<float, V>(a.normalised_sum + statistic, true, slope);
    const float z = a.z[k];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      slope[v] *= scale[v] * a.share;
      scale[v] *= z;
    }
    T* dy = static_cast<T*>(a.gradients[k]) + channel;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      float out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        out[v] = scale[v] * fmaf(-slope[v], y[p][v] - mean[v], g[p][v]);
      }
      if (run.inside(p)) store<T, V>(dy + run.at(p) * a.channels, out);
    }
  }
}

}  // namespace lgcnet
