// Dense NHWC maps as M = N H W positions of C channels, several maps to a kernel.
//
// Blocks are (channel vectors, rows of positions); grids (tiles of positions, channel tiles).
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kMaxMaps = 64;  // branches and plain terms of one node
constexpr int kPositionThreads = 256;
constexpr int kWrittenPositions = 4;  // positions that a thread of the sum and the gradients writes

// Positions that a thread of a reduction holds at once.
template <int V>
constexpr int kReducedPositions = V > 4 ? 4 : 8;

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

}  // namespace lgcnet
