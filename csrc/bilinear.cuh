// Bilinear resizing with align_corners=True, along one axis.
//
// With n source and m target positions, target o lies at s = o (n - 1) / (m - 1) and
//
//   y[o] = (1 - f) x[i] + f x[i + 1],   i = floor(s), f = s - i,
//
// which gives x[i] the weight max(0, 1 - |s - i|). All of it is exact integer arithmetic over the
// common denominator m - 1, so that forward and backward agree on every weight and support. Up to
// 32768 positions keep all products below 2^31.
#pragma once

namespace lgcnet {

struct Axis {
  int sources;
  int targets;

  __device__ __forceinline__ int denominator() const { return targets > 1 ? targets - 1 : 1; }
  // The source at or before target o, and the weight of the next one.
  __device__ __forceinline__ int before(int o, float& fraction) const {
    const int scaled = o * (sources - 1);
    const int i = scaled / denominator();
    fraction = static_cast<float>(scaled - i * denominator()) / denominator();
    return i;
  }
  // The targets [first, last] to which source i contributes.
  __device__ __forceinline__ void support(int i, int& first, int& last) const {
    first = 0;
    last = targets - 1;
    if (sources < 2) return;
    if (i > 0) first = (i - 1) * denominator() / (sources - 1) + 1;
    const int end = ((i + 1) * denominator() - 1) / (sources - 1);
    if (end < last) last = end;
  }
  __device__ __forceinline__ float weight(int i, int o) const {
    const int away = o * (sources - 1) - i * denominator();
    return static_cast<float>(denominator() - (away < 0 ? -away : away)) / denominator();
  }
  // The first target at or beyond source i, at most `targets`: those from source i on and before
  // the next one are first_from(i) to first_from(i + 1) - 1.
  __device__ __forceinline__ int first_from(int i) const {
    if (i <= 0) return 0;
    if (sources < 2 || targets < 2) return targets;
    const int o = (i * (targets - 1) + sources - 2) / (sources - 1);
    return o < targets ? o : targets;
  }
};

}  // namespace lgcnet
