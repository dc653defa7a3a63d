// Weight gradients of dense 3x3 convolutions of maps, padding 1, stride 1, for the matrix units of
// sm_90.
//
// Of convolution b, with r(x) = x or ReLU(x), u and v in {-1, 0, 1}, and zeros outside the maps,
//
//     dw_b[o, u, v, c] = sum_q r(x_b[q, c]) dy_b[q - (u, v), o]
//
// A block has 64 channels c and kOut channels o of a convolution, and goes down columns of maps, two
// rows at a time, which come to shared memory by the tensor memory accelerator; those of dy with a
// column more on either side and a row more above and below. One warp asks for them, as far ahead as
// the ring of shared memory reaches. Three warpgroups multiply, each for the taps of one u:
// wgmma.m64nNk16 over 16 neighbouring positions q. r(x) comes to registers as the products want it
// (ldmatrix, transposed), once for three taps; dy is read where it lies, shifted by the tap. Sums
// stay in registers to the end; shares of the blocks are added up by another launch.
//
// Storage is 16-bit, sums are float. Traffic: x and dy once for each block of channels of the other,
// and the halos of dy from the L2 cache. Arithmetic: 9 multiply-adds a position, c and o.
#pragma once

#include "hopper.cuh"
#include "numeric.cuh"

namespace lgcnet {

constexpr int kConv3Groups = 3;
constexpr int kConv3Threads = kConv3Groups * 128 + 128;  // those that load, too
constexpr int kMostConvolutions = 12;

struct Conv3GradientArguments {
  TensorMap x[kMostConvolutions];   // boxes: 2 rows of `columns` columns, 64 channels
  TensorMap dy[kMostConvolutions];  // of two columns more
  float* shares;                    // (programs, convolutions, out_channels, 3, 3, channels)
  int convolutions;
  int channels;
  int out_channels;
  int step;  // channels of x from one block to the next, at most 64
  int height;
  int width;
  int images;
  int columns;   // of a walk, a multiple of 16
  int rows;      // of a walk, even
  int programs;  // which share the walks
  int ring;      // pairs of rows in shared memory
  int relu;
};

#ifdef LGCNET_SM90A

constexpr int kRing = 1024;  // shared memory before it: two barriers a pair

// Where the walks of a block begin, and what of shared memory they use next.
struct Conv3Walk {
  int walk;
  int image;
  int column;
  int row;
  int pairs;  // of rows of x
  int slot = 0;
  int parity = 0;

  __device__ __forceinline__ explicit Conv3Walk(int first) : walk(first) {}
  __device__ __forceinline__ bool begin(const Conv3GradientArguments& a) {
    const int segments = (a.height + a.rows - 1) / a.rows;
    const int strips = (a.width + a.columns - 1) / a.columns;
    image = walk / (segments * strips);
    column = walk / segments % strips * a.columns;
    row = walk % segments * a.rows;
    pairs = (min(a.rows, a.height - row) + 1) / 2;
    walk += a.programs;
    return image < a.images;
  }
  __device__ __forceinline__ void next(const Conv3GradientArguments& a) {
    if (++slot == a.ring) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A pair of rows in shared memory: of x, then of dy, which is a row ahead.
struct Conv3Ring {
  unsigned shared;
  unsigned x_bytes;
  unsigned bytes;
  unsigned pitch;  // of dy, in bytes

  __device__ __forceinline__ Conv3Ring(const Conv3GradientArguments& a, const char* memory)
      : shared(shared_address(memory)),
        x_bytes(2 * a.columns * 128),
        bytes(x_bytes + (2 * (a.columns + 2) * 128 + 1023) / 1024 * 1024),
        pitch((a.columns + 2) * 128) {}
  __device__ __forceinline__ unsigned full(int slot) const { return shared + 16 * slot; }
  __device__ __forceinline__ unsigned free(int slot) const { return shared + 16 * slot + 8; }
  __device__ __forceinline__ unsigned x(int slot) const { return shared + kRing + slot * bytes; }
  __device__ __forceinline__ unsigned dy(int slot) const { return x(slot) + x_bytes; }
};

__device__ __forceinline__ void load_conv3_walks(const Conv3GradientArguments& a,
                                                 const Conv3Ring& ring, Conv3Walk walk,
                                                 int convolution, int c, int o) {
  bool used = false;  // the slots, before
  while (walk.begin(a)) {
    for (int pair = 0; pair <= walk.pairs; ++pair) {
      const bool last = pair == walk.pairs;
      if (used) wait_for(ring.free(walk.slot), walk.parity ^ 1);
      expect_bytes(ring.full(walk.slot), 2 * ring.pitch + (last ? 0 : ring.x_bytes));
      const int row = walk.row + 2 * pair;
      load_box(ring.dy(walk.slot), a.dy[convolution], ring.full(walk.slot), o, walk.column - 1,
               row - 1, walk.image);
      if (!last) {
        load_box(ring.x(walk.slot), a.x[convolution], ring.full(walk.slot), c, walk.column, row,
                 walk.image);
      }
      walk.next(a);
      used |= walk.slot == 0;
    }
  }
}

// The products of two rows of x with the taps of a u, of a warpgroup; dy[i]: of row i, as u wants
// it; x: of this thread's part of the first row.
template <typename T, int kSums>
__device__ __forceinline__ void add_pair(const Conv3GradientArguments& a, unsigned x,
                                         const unsigned (&dy)[2], float (&sum)[3][kSums]) {
  for (int at = 0; at < a.columns * 128; at += 16 * 128) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned of_x[4];
      load_matrices(of_x, x + i * a.columns * 128 + at);
      if (a.relu) {
#pragma unroll
        for (int j = 0; j < 4; ++j) of_x[j] = rectified<T>(of_x[j]);
      }
      begin_matrix_products();
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        multiply_rows<T>(sum[v], of_x, swizzled_rows(dy[i] + at + (2 - v) * 128));
      }
      commit_matrix_products();
      wait_for_matrix_products<1>();
    }
  }
}

template <typename T, int kSums>
__device__ __forceinline__ void add_conv3_walks(const Conv3GradientArguments& a,
                                                const Conv3Ring& ring, Conv3Walk walk,
                                                float (&sum)[3][kSums]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = __shfl_sync(~0u, warp >> 2, 0);
  const unsigned mine =
      swizzled_wide((lane & 7) + (lane >> 4) * 8, (warp & 3) * 2 + ((lane >> 3) & 1));
  while (walk.begin(a)) {
    wait_for(ring.full(walk.slot), walk.parity);
    for (int pair = 0; pair < walk.pairs; ++pair) {
      const int here = walk.slot;
      walk.next(a);
      wait_for(ring.full(walk.slot), walk.parity);
      // Row i of x meets row i - u of dy, where row -1 is the first: row i + 2 - group of four.
      const unsigned above = ring.dy(here), below = ring.dy(walk.slot);
      const unsigned rows[4] = {above, above + ring.pitch, below, below + ring.pitch};
      const unsigned dy[2] = {group == 0 ? rows[2] : group == 1 ? rows[1] : rows[0],
                              group == 0 ? rows[3] : group == 1 ? rows[2] : rows[1]};
      add_pair<T>(a, ring.x(here) + mine, dy, sum);
      wait_for_matrix_products();
      __syncwarp();
      if (lane == 0) arrive(ring.free(here));
    }
    if (lane == 0) arrive(ring.free(walk.slot));
    walk.next(a);
  }
}

// Grid: blocks of channels c, then o, convolutions, programs, all in x.
template <typename T, int kOut>
__device__ __forceinline__ void conv3_weight_gradient_of(const Conv3GradientArguments& a) {
  extern __shared__ __align__(1024) char memory[];  // swizzles go by addresses
  const Conv3Ring ring(a, memory);
  int block = blockIdx.x;
  const int blocks_c = (a.channels + a.step - 1) / a.step;
  const int blocks_o = (a.out_channels + kOut - 1) / kOut;
  const int c = block % blocks_c * a.step;
  block /= blocks_c;
  const int o = block % blocks_o * kOut;
  block /= blocks_o;
  const int convolution = block % a.convolutions, program = block / a.convolutions;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.ring; ++i) {
      begin_barrier(ring.full(i));
      begin_barrier(ring.free(i), kConv3Groups * 4);
    }
    fence_barriers();
  }
  __syncthreads();
  wait_for_launches();
  if (threadIdx.x >= kConv3Groups * 128) {
    give_registers<40>();
    if (threadIdx.x == kConv3Groups * 128) {
      load_conv3_walks(a, ring, Conv3Walk(program), convolution, c, o);
    }
    return;
  }
  take_registers<152>();
  float sum[3][kOut / 2] = {};
  add_conv3_walks<T>(a, ring, Conv3Walk(program), sum);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, u = warp >> 2;
  const size_t map = static_cast<size_t>(program) * a.convolutions + convolution;
  float* share = a.shares + map * a.out_channels * 9 * a.channels;
#pragma unroll
  for (int v = 0; v < 3; ++v) {
#pragma unroll
    for (int i = 0; i < kOut / 2; ++i) {
      const int channel = (warp & 3) * 16 + (lane >> 2) + (i & 2) * 4;
      const int to = o + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
      if (channel < a.step && c + channel < a.channels && to < a.out_channels) {
        share[(to * 9 + u * 3 + v) * a.channels + c + channel] = sum[v][i];
      }
    }
  }
}

#endif  // LGCNET_SM90A

template <typename T, int kOut>
__global__ void __launch_bounds__(kConv3Threads, 1)
    conv3_weight_gradient(LGCNET_GRID_CONSTANT Conv3GradientArguments a) {
#ifdef LGCNET_SM90A
  conv3_weight_gradient_of<T, kOut>(a);
#endif
}

}  // namespace lgcnet
