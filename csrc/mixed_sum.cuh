// The Gumbel-weighted sum of normalised branches at a mixed node, and its gradients.
//
//   out = sum_k z_k r_k (y_k - mean_k) + sum_j zp_j x_j,   r_k = 1 / sqrt(var_k + eps)
//
// With g = dout, yhat_k = r_k (y_k - mean_k), S0 = sum g, S1_k = sum g yhat_k:
//
//   dy_k = z_k r_k (g - S0 / M - yhat_k S1_k / M),   dx_j = zp_j g
//
// No atomics: the sums of tiles of positions are added up in a fixed order by sum_partials.
#pragma once

#include "positions.cuh"

namespace lgcnet {

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

template <typename T, int V>
__global__ void __launch_bounds__(kPositionThreads, 2) mixed_sum(const MixedSumArguments a) {
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
__global__ void __launch_bounds__(kPositionThreads, 2)
    gradient_sums(const GradientSumsArguments a) {
  constexpr int P = kReducedPositions<V>;
  __shared__ float shared[2][V][kPositionThreads];
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
    float(&buffer)[V][kPositionThreads] = shared[s % 2];
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
__global__ void __launch_bounds__(kPositionThreads, 2)
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
