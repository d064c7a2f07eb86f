// As much of CUDA as csrc/kv_copy.cu needs, on the host: each thread of a launch runs to its end
// before the next one starts. Exact for kernels whose threads never talk to one another.

#ifndef EMULATED_CUDA_RUNTIME_H_
#define EMULATED_CUDA_RUNTIME_H_

#include <cstddef>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;

struct alignas(16) int4 {
  int x, y, z, w;
};

struct alignas(8) int2 {
  int x, y;
};

struct dim3 {
  dim3(unsigned width = 1) : x(width) {}
  unsigned x;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
  }
  return cudaSuccess;
}

template <typename Word>
Word __ldcs(const Word* from) {
  return *from;
}

template <typename Word>
void __stcs(Word* to, Word value) {
  *to = value;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

enum cudaMemcpyKind { cudaMemcpyDefault };

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, num_bytes);
  return cudaSuccess;
}

#endif  // EMULATED_CUDA_RUNTIME_H_
