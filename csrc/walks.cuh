// Walks over the outputs of a dilated 3x3 window that lie a dilation apart and so share inputs.
#pragma once

namespace lgcnet {

// First of `length` positions, `dilation` apart, that walk number `group` visits.
__device__ __forceinline__ int walk_start(int group, int length, int dilation, int extent) {
  const int phases = dilation < extent ? dilation : extent;
  return group % phases + group / phases * length * dilation;
}

}  // namespace lgcnet
