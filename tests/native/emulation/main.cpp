// What csrc/launch.h declares, for the emulated kernels. EMULATED_KERNELS is the file that the build
// writes: one KERNEL(name<parameters>) for each instantiation.
#include "device.h"

#include "batch_statistics.cuh"
#include "concat_product.cuh"
#include "conv3.cuh"
#include "conv3_weight_gradient.cuh"
#include "conv3_weight_sums.cuh"
#include "depthwise.cuh"
#include "depthwise_branches.cuh"
#include "gradient_sum.cuh"
#include "max_pool.cuh"
#include "mixed_sum.cuh"
#include "order_statistic.cuh"
#include "separable.cuh"
#include "sums.cuh"
#include "upsample.cuh"
#include "upsample_loss.cuh"

#include <string.h>

namespace {

struct Kernel {
  const char* name;
  size_t argument_bytes;
  std::function<void(const void*)> call;
};

template <typename Arguments>
Kernel wrap(const char* name, void (*kernel)(Arguments)) {
  return {name, sizeof(Arguments), [kernel](const void* packed) {
            Arguments arguments;
            memcpy(&arguments, packed, sizeof arguments);
            kernel(arguments);
          }};
}

#define KERNEL(...) wrap(#__VA_ARGS__, &__VA_ARGS__),
const Kernel kernels[] = {
#include EMULATED_KERNELS
};

}  // namespace

extern "C" int kernel_count() { return sizeof kernels / sizeof *kernels; }
extern "C" const char* kernel_name(int kernel) { return kernels[kernel].name; }
extern "C" size_t argument_bytes(int kernel) { return kernels[kernel].argument_bytes; }

extern "C" void launch(int kernel, const unsigned* grid, const unsigned* block,
                       const void* arguments) {
  emulation::body = [=] { kernels[kernel].call(arguments); };
  emulation::run_grid({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]});
}
