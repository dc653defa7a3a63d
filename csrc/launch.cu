#include "launch.h"

#include <cuda_runtime.h>

#include "registry.h"

extern "C" int lgcnet_kernel_count() { return static_cast<int>(lgcnet::registry().size()); }

extern "C" const char* lgcnet_kernel_name(int kernel) {
  return lgcnet::registry().at(kernel).name;
}

extern "C" size_t lgcnet_argument_bytes(int kernel) {
  return lgcnet::registry().at(kernel).argument_bytes;
}

extern "C" int lgcnet_launch(int kernel, const unsigned grid[3], const unsigned block[3],
                             const void* arguments, unsigned long long stream, int shared,
                             int early) {
  const void* function = lgcnet::registry().at(kernel).function;
  void* values[] = {const_cast<void*>(arguments)};
  cudaError_t error = cudaSuccess;
  if (shared > 0) {  // more than 48 KB must be asked for
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid[0], grid[1], grid[2]);
    config.blockDim = dim3(block[0], block[1], block[2]);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    error = cudaLaunchKernelExC(&config, function, values);
  }
  cudaGetLastError();  // reported here, so not once more by whoever asks next
  return error;
}

extern "C" const char* lgcnet_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
