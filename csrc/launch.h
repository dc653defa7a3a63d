// The C interface between the kernels and whatever language calls them: plain numbers, addresses
// as integers, CUDA error codes out. No CUDA header needed.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// The kernels in this library: 0 <= kernel < lgcnet_kernel_count().
int lgcnet_kernel_count(void);
// A kernel's C++ name, as lgcnet_fast/native/instances.py writes it.
const char* lgcnet_kernel_name(int kernel);
// Size of the struct that is the kernel's only argument.
size_t lgcnet_argument_bytes(int kernel);

// Launches on `stream` (a cudaStream_t as an integer) of the current device, with `shared` bytes of
// shared memory a block beside those that the kernel declares. With `early` its blocks may begin
// while the launch before on the stream drains, for which the kernel waits itself (sm_90). Returns 0
// or a CUDA error code; launches are asynchronous, so a fault inside the kernel shows up later.
int lgcnet_launch(int kernel, const unsigned grid[3], const unsigned block[3],
                  const void* arguments, unsigned long long stream, int shared, int early);

const char* lgcnet_error_text(int error);

#ifdef __cplusplus
}
#endif
