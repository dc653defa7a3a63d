// The gradient of a map, or of its ReLU, that several operations read:
//
//   dx = sum_k g_k,   or   dx = [x > 0] sum_k g_k
//
// A NaN in x lets the gradient pass, as in PyTorch. Least traffic of K readers in maps: K + 1, and x
// behind a ReLU.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kMostGradients = 16;
constexpr int kGradientThreads = 256;
constexpr int kGradientVectors = 4;  // that a thread writes

struct GradientSumArguments {
  const void* gradients[kMostGradients];  // T (size,): g_1 to g_K
  const void* x;                          // T (size,), read where `relu` is set
  void* dx;                               // T (size,)
  long long size;
  int count;  // K
  int relu;
};

// Grid: blocks of kGradientThreads x kGradientVectors vectors.
template <typename T, int V>
__global__ void __launch_bounds__(kGradientThreads) gradient_sum(const GradientSumArguments a) {
  constexpr int P = kGradientVectors;
  const long long first =
      (static_cast<long long>(blockIdx.x) * P * kGradientThreads + threadIdx.x) * V;
  constexpr int kStep = kGradientThreads * V;
  float sum[P][V] = {};
#pragma unroll 2
  for (int k = 0; k < a.count; ++k) {
    const T* gradient = static_cast<const T*>(a.gradients[k]) + first;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      float value[V];
      load<T, V>(gradient + p * kStep, first + p * kStep < a.size, value);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[p][v] += value[v];
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const long long at = first + p * kStep;
    if (at >= a.size) return;
    float x[V];
    load<T, V>(static_cast<const T*>(a.x) + at, a.relu, x);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[p][v] = a.relu && x[v] <= 0.0f ? 0.0f : sum[p][v];
    store<T, V>(static_cast<T*>(a.dx) + at, sum[p]);
  }
}

}  // namespace lgcnet
