// Block copies between a paged KV cache on the GPU and packed records, which lie in device memory
// (staging) or in pinned host memory that the GPU addresses directly.
//
// One warp copies one piece at a time; all layers and up to kIdsPerLaunch blocks go in one launch.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kv_copy.h"

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;

// Loads that one lane has in flight; 8 x 16 bytes x 32 lanes are 4 KiB per warp.
constexpr int kUnroll = 8;

// The ids travel as kernel parameters: no device buffer that must outlive the launch.
// Parameters may take 4 KiB on every GPU and driver.
constexpr int kIdsPerLaunch = 960;

struct BlockIds {
  int32_t id[kIdsPerLaunch];
};

struct Records {
  uint8_t* start;
  int64_t record_bytes;
};

// Loads first, then stores: each lane keeps kUnroll loads in flight.
template <typename Word>
__device__ void copy_words(Word* __restrict__ to, const Word* __restrict__ from, int64_t count,
                           int lane) {
  for (int64_t base = lane; base < count; base += kUnroll * kWarp) {
    Word held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kWarp;
      if (i < count) held[u] = __ldcs(from + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kWarp;
      if (i < count) __stcs(to + i, held[u]);
    }
  }
}

// Work items are (block, piece) pairs, pieces running fastest, so neighbouring warps write
// neighbouring bytes of a record.
template <typename Word, bool kToRecords>
__global__ void __launch_bounds__(kThreads)
    copy_pieces(const HxPiece* __restrict__ pieces, int64_t num_pieces,
                const __grid_constant__ BlockIds ids, int num_ids, Records records) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t items = num_pieces * num_ids;
  int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  for (; item < items; item += warps) {
    const int record = static_cast<int>(item / num_pieces);
    const HxPiece piece = pieces[item % num_pieces];
    auto* paged = reinterpret_cast<Word*>(piece.address + ids.id[record] * piece.block_stride);
    auto* packed = reinterpret_cast<Word*>(records.start + record * records.record_bytes +
                                           piece.record_offset);
    const int64_t count = piece.num_bytes / static_cast<int64_t>(sizeof(Word));
    if (kToRecords) {
      copy_words(packed, paged, count, lane);
    } else {
      copy_words(paged, packed, count, lane);
    }
  }
}

using Kernel = void (*)(const HxPiece*, int64_t, BlockIds, int, Records);

template <typename Word>
Kernel pick_direction(bool to_records) {
  return to_records ? copy_pieces<Word, true> : copy_pieces<Word, false>;
}

// The widest word that divides every address and size; the caller found it.
Kernel pick_kernel(int word_bytes, bool to_records) {
  switch (word_bytes) {
    case 16: return pick_direction<int4>(to_records);
    case 8: return pick_direction<int2>(to_records);
    case 4: return pick_direction<int>(to_records);
    case 2: return pick_direction<short>(to_records);
    default: return pick_direction<char>(to_records);
  }
}

// This library has its own CUDA runtime, so the device is named in each call and put back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_;
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace

HX_EXPORT const char* hx_cuda_error_text(int32_t status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// Enqueues the copy of num_ids blocks on `stream`: into the records when to_records is not 0,
// else out of them. `pieces` lies on the device, `block_ids` on the host (read before return),
// `records` where the device can reach it. At most max_grid thread blocks run at a time.
HX_EXPORT int32_t hx_cuda_copy_blocks(int32_t device, const HxPiece* pieces, int64_t num_pieces,
                                      const int64_t* block_ids, int64_t num_ids,
                                      uint8_t* records, int64_t record_bytes,
                                      int32_t to_records, int32_t word_bytes, int32_t max_grid,
                                      void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const Kernel kernel = pick_kernel(word_bytes, to_records != 0);
  for (int64_t first = 0; first < num_ids; first += kIdsPerLaunch) {
    BlockIds ids;
    const int count = static_cast<int>(std::min<int64_t>(num_ids - first, kIdsPerLaunch));
    std::copy_n(block_ids + first, count, ids.id);
    const int64_t warps = num_pieces * count;
    const int64_t grid = (warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(std::clamp<int64_t>(grid, 1, max_grid));
    config.blockDim = kThreads;
    config.stream = static_cast<cudaStream_t>(stream);
    const Records part{records + first * record_bytes, record_bytes};
    const cudaError_t status =
        cudaLaunchKernelEx(&config, kernel, pieces, num_pieces, ids, count, part);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// Enqueues `count` plain copies on `stream`, by the copy engines and in one call where the driver
// knows how; the lists lie on the host and are read before this returns.
HX_EXPORT int32_t hx_cuda_copy_batch(int32_t device, void** to, void** from, const int64_t* sizes,
                                     int64_t count, void* stream) {
  static_assert(sizeof(size_t) == sizeof(int64_t));
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto queue = static_cast<cudaStream_t>(stream);
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
  if (queue != nullptr) {  // the default stream takes no batches
    cudaMemcpyAttributes how = {};
    how.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    const cudaError_t status = cudaMemcpyBatchAsync(
        const_cast<const void**>(to), const_cast<const void**>(from),
        reinterpret_cast<const size_t*>(sizes), static_cast<size_t>(count), &how, &first, 1, queue);
    if (status == cudaSuccess) return status;
    cudaGetLastError();  // an older driver: one by one
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    const cudaError_t status =
        cudaMemcpyAsync(to[i], from[i], static_cast<size_t>(sizes[i]), cudaMemcpyDefault, queue);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
