// Both gradients of the depthwise branches of a map in one launch, for the matrix units of sm_90.
//
// Branch k has windows w_k of 3 x 3 with dilation d_k and read r(x), r = ReLU. With o(u, v) =
// (u d_k, v d_k), u and v in {-1, 0, 1}, and zeros outside the maps,
//
//     dx[p, c] = [x[p, c] > 0] sum_k sum_{u, v} w_k[u, v, c] dy_k[p - o(u, v), c]
//     dw_k[u, v, c] = sum_p r(x[p, c]) dy_k[p - o(u, v), c]
//
// both from the same shifted dy_k. A block has 16 channels of a strip of rows of an image. The
// strips of r(x) and of one dy_k after another, these with d_k rows and columns more on every side,
// come to shared memory by the tensor memory accelerator, the next ones while one is worked on; the
// host says where in the ring of shared memory each one goes, and when.
//
// dx: a warpgroup multiplies 8 x 8 positions by 16 channels of dy_k, where they lie, shifted by a
// tap, with the diagonal matrix of the tap's weights (wgmma.m64n16k16). Only its diagonal is
// useful work, which is still faster than as many multiply-adds: none of them needs instructions to
// load and widen what it multiplies. Sums stay in registers for all k.
//
// dw: D[c, c'] = sum_p dy_k[p - o, c] r(x[p, c']) over 16 positions (mma.m16n8k16, 8 channels of two
// taps at a time), of which the diagonals are the answer. A warp goes down rows d_k apart, so that
// the rows above and in the middle are in registers already when the next comes. Two warps share
// positions, one for each half of the channels. Shares of all blocks are added up by another launch.
//
// Storage is 16-bit, sums are float; weights are rounded to the storage type, as PyTorch's autocast
// does. Traffic in maps: K + 1 reads and 1 write, and reads of neighbouring strips from the L2 cache.
#pragma once

#include "hopper.cuh"
#include "numeric.cuh"

namespace lgcnet {

constexpr int kBranchThreads = 512;
constexpr int kMostBranches = 16;

struct BranchStrip {
  TensorMap map;  // of dy_k, its box a strip
  unsigned room;  // where its strip goes in the ring, in bytes
  int branch;     // k: which windows, which share
  int dilation;
  int width;     // columns of the strip in shared memory, a multiple of 8
  int chain;     // rows of dw that a warp takes at a time, d_k apart, at most 4
  int chains;    // of them one after another in a strip
  int loaded;    // strips that are on their way from the time on when this one is worked on
};

struct BranchArguments {
  TensorMap x;
  BranchStrip strips[kMostBranches];
  void* dx;
  const float* weights;  // (branches, 3, 3, channels)
  float* shares;         // (strips of an image x images, branches, 3, 3, channels)
  int branches;
  int channels;
  int height;
  int width;
  int rows;  // of a strip, a multiple of 8
};

#ifdef LGCNET_SM90A

// Shared memory: barriers, two tables of weights, sums of two branches, r(x), the ring.
constexpr int kTableBytes = 9 * 512;
constexpr int kPairs = kBranchThreads / 64;
constexpr int kSums = 9 * 16;
constexpr int kTables = 256;
constexpr int kPartial = kTables + 2 * kTableBytes;
constexpr int kStripOfX = (kPartial + 2 * kPairs * kSums * 4 + 255) / 256 * 256;

struct BranchBlock {
  unsigned shared;  // address of shared memory
  int group;        // of 16 channels
  int image;
  int share;
  int top;
  int live;      // rows of the strip that the map has
  int segments;  // of 16 columns
  unsigned x_bytes;

  __device__ __forceinline__ BranchBlock(const BranchArguments& a, const char* memory)
      : shared(shared_address(memory)), segments((a.width + 15) / 16) {
    const int groups = a.channels / 16, strips = (a.height + a.rows - 1) / a.rows;
    group = blockIdx.x % groups;
    share = blockIdx.x / groups;
    image = share / strips;
    top = share % strips * a.rows;
    live = min(a.rows, a.height - top);
    x_bytes = a.rows * segments * 16 * 32;
  }
  __device__ __forceinline__ unsigned barrier(int strip) const { return shared + 8 * strip; }
  __device__ __forceinline__ unsigned ring() const { return shared + kStripOfX + x_bytes; }
  __device__ __forceinline__ void load(const BranchArguments& a, int strip) const {
    const BranchStrip& s = a.strips[strip];
    expect_bytes(barrier(strip), (a.rows + 2 * s.dilation) * s.width * 32);
    load_box(ring() + s.room, s.map, barrier(strip), group * 16, -s.dilation, top - s.dilation,
             image);
  }
};

// A thread's weight of the diagonal matrices: one of 9 taps of one of 16 channels, of all branches
// one after the other, two of them on their way.
template <typename T>
struct BranchWeights {
  bool mine;
  const float* from;
  size_t pitch;
  unsigned entry;  // in a table
  float next;
  float second;

  __device__ __forceinline__ BranchWeights(const BranchArguments& a, int group)
      : mine(threadIdx.x < kSums), pitch(9 * static_cast<size_t>(a.channels)) {
    const int c = threadIdx.x & 15, tap = threadIdx.x >> 4;
    // dy is shifted by o(tap) for the window's opposite tap.
    from = a.weights + static_cast<size_t>(8 - tap) * a.channels + group * 16 + c;
    // Rows n of a matrix are columns of the product, ordered so that a thread's four of them are
    // neighbouring channels. Eight rows of eight channels are 128 bytes.
    const int n = (c >> 2) * 2 + (c & 1);
    entry = kTables + tap * 512 + ((c & 2) ? 256 : 0) + (c >> 3) * 128 + n * 16 + (c & 7) * 2;
    next = fetch(a, 0);
    second = fetch(a, 1);
  }
  __device__ __forceinline__ float fetch(const BranchArguments& a, int strip) const {
    return mine && strip < a.branches ? __ldg(from + a.strips[strip].branch * pitch) : 0.f;
  }
  // Those of strip `strip`, in order.
  __device__ __forceinline__ void write(const BranchArguments& a, char* memory, int strip) {
    if (!mine || strip >= a.branches) return;
    const unsigned both = pack_two<T>(next, 0.f);
    *reinterpret_cast<unsigned short*>(memory + entry + (strip & 1) * kTableBytes) = both;
    fence_for_matrix_units();
    next = second;
    second = fetch(a, strip + 2);
  }
};

// Rows of dw: 8 channels of 16 positions, two neighbouring columns of taps, and the third.
struct BranchRow {
  unsigned pair[4];
  unsigned third[2];
};

// Where a pair of warps begins, and how far on it goes: 16 columns of a phase, which are the rows of
// one number modulo the dilation.
struct BranchWalk {
  int segment;
  int phase;
  int segments_on;
  int phases_on;

  __device__ __forceinline__ explicit BranchWalk(int segments)
      : segment((threadIdx.x >> 6) % segments),
        phase((threadIdx.x >> 6) / segments),
        segments_on(kPairs % segments),
        phases_on(kPairs / segments) {}
};

// dw of the strip at `strip`, as sums of this warp's positions.
template <typename T>
__device__ __forceinline__ void add_weight_gradients(const BranchArguments& a,
                                                     const BranchStrip& s, const BranchBlock& block,
                                                     const BranchWalk& walk, unsigned strip,
                                                     float (&sum)[5][4]) {
  const int half = (threadIdx.x >> 5) & 1;
  const int row8 = threadIdx.x & 7, low = (threadIdx.x >> 3) & 1, high = (threadIdx.x >> 4) & 1;
  const int d = s.dilation, phases = min(d, a.rows), columns = block.segments * 16;
  const unsigned x = block.shared + kStripOfX + swizzled(low * 8 + row8, half);
  const unsigned first_two = strip + swizzled(high * 8 + row8 + low * d, half);
  const unsigned third = strip + swizzled(low * 8 + row8 + 2 * d, half);
  const unsigned down = d * s.width * 32;
  int segment = walk.segment, phase = walk.phase, chain = 0;
  for (; phase >= phases; phase -= phases) ++chain;
  while (chain < s.chains) {
    const int first = phase + chain * s.chain * d;
    unsigned at = (first * s.width + segment * 16) * 32;
    unsigned x_at = x + (first * columns + segment * 16) * 32;
    BranchRow rows[3];
    auto load_row = [&](BranchRow& row) {
      load_matrices(row.pair, first_two + at);
      load_matrices(row.third, third + at);
      at += down;
    };
    load_row(rows[0]);
    load_row(rows[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= s.chain || first + i * d >= a.rows) break;
      load_row(rows[(i + 2) % 3]);
      unsigned of_x[2];
      load_matrices(of_x, x_at);
      x_at += d * columns * 32;
      const BranchRow &above = rows[i % 3], &here = rows[(i + 1) % 3], &below = rows[(i + 2) % 3];
      multiply<T>(sum[0], above.pair, of_x);
      multiply<T>(sum[1], here.pair, of_x);
      multiply<T>(sum[2], below.pair, of_x);
      const unsigned thirds[4] = {above.third[0], here.third[0], above.third[1], here.third[1]};
      multiply<T>(sum[3], thirds, of_x);
      const unsigned last[4] = {below.third[0], below.third[0], below.third[1], below.third[1]};
      multiply<T>(sum[4], last, of_x);
    }
    segment += walk.segments_on;
    phase += walk.phases_on;
    if (segment >= block.segments) {
      segment -= block.segments;
      ++phase;
    }
    for (; phase >= phases; phase -= phases) ++chain;
  }
}

// The diagonals of a warp's sums, to shared memory: (pairs, halves, taps, 8 channels).
__device__ __forceinline__ void write_diagonals(const float (&sum)[5][4], float* partial) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2;
  if ((lane & 3) != row >> 1) return;
  float* to = partial + (warp >> 1) * kSums + (warp & 1) * (kSums / 2) + row;
  const int odd = row & 1;
  // What is shifted by o(tap) belongs to the opposite tap: 8 - tap.
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    to[(8 - 3 * i) * 8] = odd ? sum[i][1] : sum[i][0];
    to[(7 - 3 * i) * 8] = odd ? sum[i][3] : sum[i][2];
  }
  to[6 * 8] = odd ? sum[3][1] : sum[3][0];
  to[3 * 8] = odd ? sum[3][3] : sum[3][2];
  to[0] = odd ? sum[4][1] : sum[4][0];
}

// This block's share of dw of a strip, from all pairs of warps.
__device__ __forceinline__ void write_share(const BranchArguments& a, const BranchBlock& block,
                                            const float* partial, int branch) {
  if (threadIdx.x >= kSums) return;
  const int c = threadIdx.x & 15, tap = threadIdx.x >> 4;
  const float* from = partial + (c >> 3) * (kSums / 2) + tap * 8 + (c & 7);
  float total = 0.f;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) total += from[pair * kSums];
  const size_t map = static_cast<size_t>(block.share) * a.branches + branch;
  a.shares[(map * 9 + tap) * a.channels + block.group * 16 + c] = total;
}

// Two values of dx where the two of r(x) are not zero; a NaN is not.
__device__ __forceinline__ unsigned where_positive(unsigned dx, unsigned x) {
  return ((x & 0xffffu) ? dx & 0xffffu : 0u) | ((x >> 16) ? dx & 0xffff0000u : 0u);
}

template <typename T, int kTiles>
__device__ __forceinline__ void branches_backward(const BranchArguments& a) {
  extern __shared__ __align__(1024) char memory[];  // swizzles go by addresses
  const BranchBlock block(a, memory);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int group = __shfl_sync(~0u, warp >> 2, 0), columns = block.segments * 16;
  const bool loader = thread == kBranchThreads - 32;
  int loaded = 0;
  if (loader) {
    for (int i = 0; i <= a.branches; ++i) begin_barrier(block.barrier(i));
    fence_barriers();
  }
  for (int i = thread; i < 2 * kTableBytes / 16; i += kBranchThreads) {
    reinterpret_cast<uint4*>(memory + kTables)[i] = make_uint4(0, 0, 0, 0);
  }
  wait_for_launches();
  if (loader) {
    block.load(a, loaded++);  // dx of the first branch needs no x
    expect_bytes(block.barrier(a.branches), block.x_bytes);
    load_box(block.shared + kStripOfX, a.x, block.barrier(a.branches), block.group * 16, 0,
             block.top, block.image);
    while (loaded < a.strips[0].loaded) block.load(a, loaded++);
  }
  BranchWeights<T> weights(a, block.group);
  fence_for_matrix_units();
  __syncthreads();
  weights.write(a, memory, 0);

  // Tiles of 8 x 8 positions of a warpgroup; where there are fewer, one of them once more.
  const int across = (a.width + 7) / 8, tiles = (block.live + 7) / 8 * across;
  int row[kTiles], column[kTiles];
  float dx[kTiles][8];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int tile = min(group + n * (kBranchThreads / 128), tiles - 1);
    row[n] = tile / across * 8;
    column[n] = tile % across * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) dx[n][i] = 0.f;
  }
  const BranchWalk walk(block.segments);

  for (int k = 0; k < a.branches; ++k) {
    const BranchStrip& s = a.strips[k];
    float* partial = reinterpret_cast<float*>(memory + kPartial) + (k & 1) * kPairs * kSums;
    float* before = reinterpret_cast<float*>(memory + kPartial) + (~k & 1) * kPairs * kSums;
    // Everybody is done with the strip before: its room and its table are free, its sums there.
    __syncthreads();
    if (loader) {
      while (loaded < s.loaded) block.load(a, loaded++);
    }
    if (k > 0) write_share(a, block, before, a.strips[k - 1].branch);
    weights.write(a, memory, k + 1);
    wait_for(block.barrier(k));

    const unsigned strip = block.ring() + s.room;
    const unsigned table = block.shared + kTables + (k & 1) * kTableBytes;
    begin_matrix_products();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int at = (row[n] + s.dilation) * s.width + column[n] + s.dilation;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const int shift = ((tap / 3 - 1) * s.width + tap % 3 - 1) * s.dilation;
        multiply_tile<T>(dx[n], swizzled_tile(strip + (at + shift) * 32, s.width * 32),
                         plain_tile(table + tap * 512, 128, 256));
      }
    }
    commit_matrix_products();
    if (k == 0) {
      wait_for(block.barrier(a.branches));
      rectify<T>(memory + kStripOfX, block.x_bytes);
      __syncthreads();
    }
    float sum[5][4] = {};
    add_weight_gradients<T>(a, s, block, walk, strip, sum);
    write_diagonals(sum, partial);
    wait_for_matrix_products();
  }
  __syncthreads();
  const int last = a.branches - 1;
  write_share(a, block, reinterpret_cast<float*>(memory + kPartial) + (last & 1) * kPairs * kSums,
              a.strips[last].branch);

  const int quad = lane & 3;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int j = column[n] + (lane >> 2);
    if (group + n * (kBranchThreads / 128) >= tiles || j >= a.width) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row[n] + (warp & 3) * 2 + h;
      if (i >= block.live) continue;
      const uint2 x = *reinterpret_cast<const uint2*>(
          memory + kStripOfX + swizzled(i * columns + j, quad >> 1) + (quad & 1) * 8);
      uint2 values;
      values.x = where_positive(pack_two<T>(dx[n][2 * h], dx[n][2 * h + 1]), x.x);
      values.y = where_positive(pack_two<T>(dx[n][4 + 2 * h], dx[n][5 + 2 * h]), x.y);
      const size_t pixel =
          (static_cast<size_t>(block.image) * a.height + block.top + i) * a.width + j;
      char* to = static_cast<char*>(a.dx) + (pixel * a.channels + block.group * 16 + quad * 4) * 2;
      *reinterpret_cast<uint2*>(to) = values;
    }
  }
}

#endif  // LGCNET_SM90A

// Grid: 16 channels, strips of an image, images, all in x; kTiles: tiles of 8 x 8 positions of a
// strip that each of four warpgroups has.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kBranchThreads, 1)
    depthwise_branches_backward(LGCNET_GRID_CONSTANT BranchArguments a) {
#ifdef LGCNET_SM90A
  branches_backward<T, kTiles>(a);
#endif
}

}  // namespace lgcnet
