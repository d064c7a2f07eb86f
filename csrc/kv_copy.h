// Copies of KV-cache blocks, shared by the CPU and the CUDA library. C ABI, no torch.
//
// A copy of n blocks is n records of record_bytes bytes. A piece is a stretch of bytes that every
// block has: block b holds it at address + b * block_stride, a record at record_offset.
// The caller checks all arguments; hexgen_vllm/kernels/checks.py does.

#ifndef HEXGEN_KV_COPY_H_
#define HEXGEN_KV_COPY_H_

#include <cstdint>

#define HX_EXPORT extern "C" __attribute__((visibility("default")))

// One row of the table that hexgen_vllm/kernels/tables.py makes. All members are bytes.
struct alignas(16) HxPiece {
  int64_t address;
  int64_t block_stride;
  int64_t num_bytes;
  int64_t record_offset;
};

static_assert(sizeof(HxPiece) == 32, "tables.py writes rows of four int64");

#endif  // HEXGEN_KV_COPY_H_
