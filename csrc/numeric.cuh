// Storage types and how their values travel between memory and float registers.
//
// Shared by nvcc, NVRTC and the host emulation of the tests, hence no standard header. A tensor is
// stored as float, Half or BFloat16; every sum is a float.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LGCNET_SM80 1
#else
#define LGCNET_SM80 0
#endif

namespace lgcnet {

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

// One or more images in NHWC order, or a slice of their channels. Strides count elements; the
// channels of one pixel are neighbours.
struct View {
  void* data;
  long long image_stride;
  long long row_stride;
  long long pixel_stride;
};

template <typename T>
__device__ __forceinline__ T* pixel_row(const View& view, int image, int row) {
  return static_cast<T*>(view.data) + image * view.image_stride + row * view.row_stride;
}

#ifdef __CUDACC__  // the host emulation brings its own two
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

union FloatBits {
  float value;
  unsigned bits;
};

__device__ __forceinline__ float bits_to_float(unsigned bits) {
  FloatBits both;
  both.bits = bits;
  return both.value;
}

// Round to nearest even; every NaN becomes the quiet one.
__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
  FloatBits both;
  both.value = value;
  const unsigned rounded = (both.bits + 0x7fffu + ((both.bits >> 16) & 1u)) >> 16;
  return static_cast<unsigned short>(value == value ? rounded : 0x7fc0u);
}

__device__ __forceinline__ float minus_infinity() { return bits_to_float(0xff800000u); }

// The larger of value and bound, which is no NaN; a NaN stays a NaN.
__device__ __forceinline__ float at_least(float value, float bound) {
#if LGCNET_SM80
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(value), "f"(bound));
  return found;
#else
  return value < bound ? bound : value;
#endif
}

// The larger of the two; NaN if either is.
__device__ __forceinline__ float larger(float a, float b) {
#if LGCNET_SM80
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(a), "f"(b));
  return found;
#else
  return b > a || b != b ? b : a;
#endif
}

// Word<T>: the values of T that fill 32 bits.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int values = 1;
  static __device__ __forceinline__ float get(unsigned word, int) { return bits_to_float(word); }
  static __device__ __forceinline__ unsigned pack(const float* value) {
    FloatBits both;
    both.value = value[0];
    return both.bits;
  }
};

template <>
struct Word<BFloat16> {
  static constexpr int values = 2;
  static __device__ __forceinline__ float get(unsigned word, int index) {
    return bits_to_float(index ? word & 0xffff0000u : word << 16);
  }
  static __device__ __forceinline__ unsigned short narrow(float value) {
    return float_to_bfloat16(value);
  }
  static __device__ __forceinline__ unsigned pack(const float* value) {
#if LGCNET_SM80
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(value[1]), "f"(value[0]));
    return word;
#else
    return narrow(value[0]) | static_cast<unsigned>(narrow(value[1])) << 16;
#endif
  }
#if LGCNET_SM80
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    unsigned word;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
#endif
};

template <>
struct Word<Half> {
  static constexpr int values = 2;
  static __device__ __forceinline__ float get(unsigned word, int index) {
    return half_to_float(static_cast<unsigned short>(index ? word >> 16 : word));
  }
  static __device__ __forceinline__ unsigned short narrow(float value) {
    return float_to_half(value);
  }
  static __device__ __forceinline__ unsigned pack(const float* value) {
#if LGCNET_SM80
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(value[1]), "f"(value[0]));
    return word;
#else
    return narrow(value[0]) | static_cast<unsigned>(narrow(value[1])) << 16;
#endif
  }
#if LGCNET_SM80
  static __device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
    unsigned word;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
#endif
};

template <bool Constant, typename Bits>
__device__ __forceinline__ Bits fetch(const Bits* from) {
  if constexpr (Constant) {
    return __ldg(from);
  } else {
    return *from;
  }
}

// Pieces<T, V>: V neighbouring values as 32-bit words (a lone 16-bit value fills half a word), and
// their movement by the widest instruction. Addresses are multiples of the bytes moved, up to 16.
template <typename T, int V>
struct Pieces {
  static constexpr int bytes = V * static_cast<int>(sizeof(T));
  static constexpr int words = (bytes + 3) / 4;
  unsigned word[words];

  // Constant: nothing in the kernel writes there.
  template <bool Constant = true>
  __device__ __forceinline__ void read(const T* from) {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < words; i += 4) {
        const uint4 four = fetch<Constant>(reinterpret_cast<const uint4*>(from) + i / 4);
        word[i] = four.x;
        word[i + 1] = four.y;
        word[i + 2] = four.z;
        word[i + 3] = four.w;
      }
    } else if constexpr (bytes == 8) {
      const uint2 two = fetch<Constant>(reinterpret_cast<const uint2*>(from));
      word[0] = two.x;
      word[1] = two.y;
    } else if constexpr (bytes == 4) {
      word[0] = fetch<Constant>(reinterpret_cast<const unsigned*>(from));
    } else {
      word[0] = fetch<Constant>(reinterpret_cast<const unsigned short*>(from));
    }
  }

  __device__ __forceinline__ void write(T* to) const {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < words; i += 4) {
        uint4 four;
        four.x = word[i];
        four.y = word[i + 1];
        four.z = word[i + 2];
        four.w = word[i + 3];
        reinterpret_cast<uint4*>(to)[i / 4] = four;
      }
    } else if constexpr (bytes == 8) {
      uint2 two;
      two.x = word[0];
      two.y = word[1];
      *reinterpret_cast<uint2*>(to) = two;
    } else if constexpr (bytes == 4) {
      *reinterpret_cast<unsigned*>(to) = word[0];
    } else {
      *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(word[0]);
    }
  }
};

// out = V values at `from`; zeros where `valid` is false, and then nothing is read.
template <typename T, int V, bool Constant = true>
__device__ __forceinline__ void load(const T* from, bool valid, float (&out)[V]) {
  Pieces<T, V> pieces = {};
  if (valid) pieces.template read<Constant>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    out[v] = Word<T>::get(pieces.word[v / Word<T>::values], v % Word<T>::values);
  }
}

// Where ReLU cuts: 0, or -inf to leave every value as it is.
__device__ __forceinline__ float relu_bound(int relu) {
  return relu ? 0.0f : minus_infinity();
}

// As load(), each value raised to `bound` at least.
template <typename T, int V>
__device__ __forceinline__ void load_at_least(const T* from, bool valid, float bound,
                                              float (&out)[V]) {
#if LGCNET_SM80
  if constexpr (sizeof(T) == 2) {  // two values at a time, before they widen
    Pieces<T, V> pieces = {};
    if (valid) pieces.read(from);
    const float pair[2] = {bound, bound};
    const unsigned bounds = Word<T>::pack(pair);
#pragma unroll
    for (int i = 0; i < Pieces<T, V>::words; ++i) {
      pieces.word[i] = Word<T>::larger(pieces.word[i], bounds);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = Word<T>::get(pieces.word[v / 2], v % 2);
    return;
  }
#endif
  load(from, valid, out);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = at_least(out[v], bound);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const float (&value)[V]) {
  Pieces<T, V> pieces;
  if constexpr (V == 1 && sizeof(T) == 2) {
    pieces.word[0] = Word<T>::narrow(value[0]);
  } else {
#pragma unroll
    for (int i = 0; i < Pieces<T, V>::words; ++i) {
      pieces.word[i] = Word<T>::pack(value + i * Word<T>::values);
    }
  }
  pieces.write(to);
}

}  // namespace lgcnet
