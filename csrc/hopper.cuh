// Instructions of sm_90a that no other GPU has, by the names that the kernels call them by.
//
// Shared memory holds maps as the tensor memory accelerator writes boxes with a swizzle as wide as
// their 16 or 64 channels, 32 or 128 bytes, which goes by addresses: position p, half h of its 16
// channels at 32 p + 16 (h ^ bit 2 of p), or eighth e of its 64 at 128 p + 16 (e ^ p mod 8). Eight
// neighbouring positions of one half, or eighth, lie in different banks, wherever they begin.
#pragma once

#include "numeric.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LGCNET_SM90A
#endif

// Arguments whose address the tensor memory accelerator may take.
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700)
#define LGCNET_GRID_CONSTANT const __grid_constant__
#else
#define LGCNET_GRID_CONSTANT const
#endif

namespace lgcnet {

// CUtensorMap of the driver, which the host fills in.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

#ifdef LGCNET_SM90A

__device__ __forceinline__ unsigned shared_address(const void* memory) {
  return static_cast<unsigned>(__cvta_generic_to_shared(memory));
}

// Until the launch before on the stream has ended and what it wrote is there: all that reads or
// writes maps comes after it.
__device__ __forceinline__ void wait_for_launches() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Offset in bytes of half a position's 16 channels.
__device__ __forceinline__ unsigned swizzled(int position, int half) {
  return (position << 5) ^ (half << 4) ^ ((position << 2) & 16);
}

// Of an eighth of a position's 64 channels.
__device__ __forceinline__ unsigned swizzled_wide(int position, int eighth) {
  return (position << 7) | ((eighth ^ (position & 7)) << 4);
}

// -- tensor memory accelerator and the barriers that it arrives at --------------------------------

__device__ __forceinline__ void begin_barrier(unsigned barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// parity: 0 for what arrives first, 1 for what arrives next, and so on.
__device__ __forceinline__ void wait_for(unsigned barrier, int parity = 0) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of a map (images, height, width, channels) from these coordinates; zeros outside the map.
__device__ __forceinline__ void load_box(unsigned to, const TensorMap& map, unsigned barrier,
                                         int channel, int column, int row, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(channel), "r"(column), "r"(row), "r"(image)
      : "memory");
}

// -- registers of a warpgroup, all of whose threads call this -------------------------------------

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- matrix products of a warpgroup, from shared memory -------------------------------------------

// What this thread wrote to shared memory is there for them once the block has met.
__device__ __forceinline__ void fence_for_matrix_units() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void begin_matrix_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_matrix_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All but those of the last `kPending` commits.
template <int kPending = 0>
__device__ __forceinline__ void wait_for_matrix_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// 16 columns of swizzled rows of 32 bytes; each next eight rows `pitch` bytes on.
__device__ __forceinline__ unsigned long long swizzled_tile(unsigned address, unsigned pitch) {
  const unsigned high = (3u << 30) | (pitch >> 4);
  return (static_cast<unsigned long long>(high) << 32) | (1u << 16) | (address >> 4);
}

// 8 x 8 blocks of 128 bytes; the second half of the columns `across` bytes on, each next eight rows
// `down`.
__device__ __forceinline__ unsigned long long plain_tile(unsigned address, unsigned across,
                                                         unsigned down) {
  return (static_cast<unsigned long long>(down >> 4) << 32) | ((across >> 4) << 16) |
         (address >> 4);
}

// 64 columns of 16 swizzled rows of 128 bytes, which come first as their product's inner positions.
__device__ __forceinline__ unsigned long long swizzled_rows(unsigned address) {
  const unsigned high = (1u << 30) | (1024 >> 4);
  return (static_cast<unsigned long long>(high) << 32) | (1u << 16) | (address >> 4);
}

template <typename T>
__device__ __forceinline__ void multiply_tile(float (&d)[8], unsigned long long a,
                                              unsigned long long b);

#define LGCNET_MULTIPLY_TILE(T, TYPE)                                                            \
  template <>                                                                                    \
  __device__ __forceinline__ void multiply_tile<T>(float(&d)[8], unsigned long long a,           \
                                                   unsigned long long b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                     \
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),       \
                   "+f"(d[6]), "+f"(d[7])                                                        \
                 : "l"(a), "l"(b));                                                              \
  }
LGCNET_MULTIPLY_TILE(Half, "f16")
LGCNET_MULTIPLY_TILE(BFloat16, "bf16")
#undef LGCNET_MULTIPLY_TILE

// d += a b of a warpgroup: a of 64 rows and 16 positions in its registers, as mma.m16n8k16 has them
// of a warp's 16 rows; b of `swizzled_rows`, of which twice as many columns count as d has sums.
template <typename T, int kSums>
__device__ __forceinline__ void multiply_rows(float (&d)[kSums], const unsigned (&a)[4],
                                              unsigned long long b);

#define LGCNET_SUMS(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LGCNET_MULTIPLY_ROWS(T, TYPE, SUMS, SHAPE, NAMES, OPERANDS, ...)                           \
  template <>                                                                                      \
  __device__ __forceinline__ void multiply_rows<T, SUMS>(float(&d)[SUMS], const unsigned(&a)[4],   \
                                                      unsigned long long b) {                      \
    asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES            \
                 "}, " OPERANDS ", 1, 1, 1, 1;"                                                    \
                 : __VA_ARGS__                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
#define LGCNET_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LGCNET_NAMES_24 LGCNET_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LGCNET_NAMES_32 LGCNET_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LGCNET_MULTIPLY_ALL_ROWS(T, TYPE)                                                          \
  LGCNET_MULTIPLY_ROWS(T, TYPE, 16, "m64n32k16", LGCNET_NAMES_16, "{%16, %17, %18, %19}, %20",     \
                       LGCNET_SUMS(d, 0), LGCNET_SUMS(d, 8))                                       \
  LGCNET_MULTIPLY_ROWS(T, TYPE, 24, "m64n48k16", LGCNET_NAMES_24, "{%24, %25, %26, %27}, %28",     \
                       LGCNET_SUMS(d, 0), LGCNET_SUMS(d, 8), LGCNET_SUMS(d, 16))                   \
  LGCNET_MULTIPLY_ROWS(T, TYPE, 32, "m64n64k16", LGCNET_NAMES_32, "{%32, %33, %34, %35}, %36",     \
                       LGCNET_SUMS(d, 0), LGCNET_SUMS(d, 8), LGCNET_SUMS(d, 16),                   \
                       LGCNET_SUMS(d, 24))
LGCNET_MULTIPLY_ALL_ROWS(Half, "f16")
LGCNET_MULTIPLY_ALL_ROWS(BFloat16, "bf16")
#undef LGCNET_MULTIPLY_ALL_ROWS
#undef LGCNET_MULTIPLY_ROWS
#undef LGCNET_NAMES_32
#undef LGCNET_NAMES_24
#undef LGCNET_NAMES_16
#undef LGCNET_SUMS

// -- matrix products of a warp, from registers ----------------------------------------------------

// 8 x 8 matrices, transposed; lanes 0 to 7 hold the addresses of the first one's rows, and so on.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices(unsigned (&to)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address));
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2]);

#define LGCNET_MULTIPLY(T, TYPE)                                                                 \
  template <>                                                                                    \
  __device__ __forceinline__ void multiply<T>(float(&d)[4], const unsigned(&a)[4],               \
                                              const unsigned(&b)[2]) {                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
LGCNET_MULTIPLY(Half, "f16")
LGCNET_MULTIPLY(BFloat16, "bf16")
#undef LGCNET_MULTIPLY

// -- two values of a register ---------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ unsigned pack_two(float low, float high);

template <>
__device__ __forceinline__ unsigned pack_two<Half>(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
__device__ __forceinline__ unsigned pack_two<BFloat16>(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <typename T>
__device__ __forceinline__ unsigned rectified(unsigned both);

template <>
__device__ __forceinline__ unsigned rectified<Half>(unsigned both) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(both) : "r"(0));
  return both;
}

template <>
__device__ __forceinline__ unsigned rectified<BFloat16>(unsigned both) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(both) : "r"(0));
  return both;
}

// By all threads of a block; shared memory of a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void rectify(char* memory, unsigned bytes) {
  for (unsigned at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
    uint4& value = *reinterpret_cast<uint4*>(memory + at);
    value = make_uint4(rectified<T>(value.x), rectified<T>(value.y), rectified<T>(value.z),
                       rectified<T>(value.w));
  }
}

#endif  // LGCNET_SM90A

}  // namespace lgcnet
