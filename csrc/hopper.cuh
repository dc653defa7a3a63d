// Instructions of sm_90a that no other GPU has, by the names that the kernels call them by.
//
// Shared memory holds maps as the tensor memory accelerator writes 32-byte boxes with its swizzle of
// 32 bytes: position p, half h of its 16 channels at 32 p + 16 (h ^ bit 2 of p), in which eight
// neighbouring positions of one half lie in different banks, wherever they begin.
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

// Offset in bytes of half a position's channels.
__device__ __forceinline__ unsigned swizzled(int position, int half) {
  return (position << 5) ^ (half << 4) ^ ((position << 2) & 16);
}

// -- tensor memory accelerator and the barriers that it arrives at; each is used once -------------

__device__ __forceinline__ void begin_barrier(unsigned barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
}

__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
      "@!done bra again;\n}" ::"r"(barrier)
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

__device__ __forceinline__ void wait_for_matrix_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
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
