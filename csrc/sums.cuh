// The second stage of the reductions: partial sums of blocks become one, without atomics.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

struct SumPartialsArguments {
  const float* partial;  // (groups, count, width)
  float* total;          // (groups, width)
  int count;
  int width;
};

// total[g, i] = sum over n of partial[g, n, i], in an order that depends on `count` alone.
// Block: 32 sums x Lanes, each lane taking every Lanes-th n. Grid: (blocks of sums, groups).
template <int Lanes>
__global__ void __launch_bounds__(32 * Lanes) sum_partials(const SumPartialsArguments a) {
  __shared__ float shared[Lanes][32];
  const int i = blockIdx.x * 32 + threadIdx.x;
  const float* partial = a.partial + static_cast<long long>(blockIdx.y) * a.count * a.width;
  float total = 0.0f;
  if (i < a.width) {
#pragma unroll 4
    for (int n = threadIdx.y; n < a.count; n += Lanes) {
      total += partial[static_cast<long long>(n) * a.width + i];
    }
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || i >= a.width) return;
  for (int lane = 1; lane < Lanes; ++lane) total += shared[lane][threadIdx.x];
  a.total[static_cast<long long>(blockIdx.y) * a.width + i] = total;
}

}  // namespace lgcnet
