// Collects kernel instantiations when the library is loaded. The build writes one Registration for
// every entry of lgcnet_fast/native/instances.py into a few .cu files.
#pragma once

#include <stddef.h>

#include <vector>

namespace lgcnet {

struct Kernel {
  const char* name;
  const void* function;
  size_t argument_bytes;
};

inline std::vector<Kernel>& registry() {
  static std::vector<Kernel> kernels;
  return kernels;
}

struct Registration {
  template <typename Arguments>
  Registration(const char* name, void (*kernel)(Arguments)) {
    registry().push_back({name, reinterpret_cast<const void*>(kernel), sizeof(Arguments)});
  }
};

}  // namespace lgcnet
