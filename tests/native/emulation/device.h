// Runs CUDA kernels on the host, one thread after another, so that the very sources of csrc can be
// tested without a GPU. Threads of a block are fibres: each runs until __syncthreads() or its end.
// What this cannot show: races, the GPU's own conversions, anything about speed.
#pragma once

#include <math.h>
#include <stddef.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

struct Dimensions {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // one block at a time
#define __ldg(pointer) (*(pointer))

namespace emulation {

constexpr size_t kStackBytes = 64 * 1024;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished;
};

inline ucontext_t scheduler;
inline Fibre* running;
inline std::vector<Fibre> fibres;
inline unsigned threads;  // of a block
inline std::function<void()> body;

inline void enter() {
  body();
  running->finished = true;
  swapcontext(&running->context, &scheduler);
}

// Runs all threads of the current block to its end, barrier by barrier.
inline void run_block() {
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    fibre.finished = false;
    if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fibre.context, enter, 0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned thread = 0; thread < threads; ++thread) {
      if (fibres[thread].finished) continue;
      threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                   thread / (blockDim.x * blockDim.y)};
      running = &fibres[thread];
      swapcontext(&scheduler, &running->context);
      busy = true;
    }
  }
}

inline void run_grid(const Dimensions& grid, const Dimensions& block) {
  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  if (fibres.size() < threads) fibres.resize(threads);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  const Dimensions own = threadIdx;
  swapcontext(&emulation::running->context, &emulation::scheduler);
  threadIdx = own;
}

// The two conversions that csrc/numeric.cuh takes from the GPU, exact and to nearest even.
namespace lgcnet {

inline float half_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  }
  return bits >> 15 ? -value : value;
}

inline unsigned short float_to_half(float value) {
  const unsigned short sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (isnan(value)) return 0x7fff;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(size, &exponent);  // size = [0.5, 1) * 2^exponent; below 2^-14 the spacing stays 2^-24
  const int spacing = (exponent < -13 ? -13 : exponent) - 11;
  const int steps = static_cast<int>(nearbyintf(ldexpf(size, -spacing)));
  // A carry out of the fraction moves on to the exponent by itself.
  return sign | static_cast<unsigned short>((spacing + 24) * 1024 + steps);
}

}  // namespace lgcnet
